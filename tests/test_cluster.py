"""Groups of features: trees, names, and the map."""

import json

import numpy as np
import pytest
from planted import planted
from scipy.cluster.hierarchy import cophenet, is_valid_linkage

from gemscope.features import Store
from gemscope.relate import cluster, layout, similarity
from gemscope.relate._cluster import characteristic, visible
from gemscope.relate._tree import cut, full_tree, sparse_tree


def answer(done):
    code, out, err = done
    assert code == 0, err
    return json.loads(out)


def random_similarity(n, seed=0, share=1.0):
    rng = np.random.default_rng(seed)
    s = rng.uniform(0, 1, (n, n)) * (rng.random((n, n)) < share)
    s = np.triu(s, 1)
    return (s + s.T + np.eye(n)).astype(np.float64)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.05])
def test_the_sparse_tree_is_scipys(share):
    s = random_similarity(40, share=share)
    rows, columns = np.nonzero(np.triu(s, 1))
    found = sparse_tree(40, rows, columns, s[rows, columns])
    assert is_valid_linkage(found)
    # Cophenetic distances name a tree whatever the order of ties.
    np.testing.assert_allclose(cophenet(found), cophenet(full_tree(s)), atol=1e-9)


def test_entries_given_twice_count_once():
    s = random_similarity(20, share=0.4)
    rows, columns = np.nonzero(s - np.eye(20))
    once = np.nonzero(np.triu(s, 1))
    np.testing.assert_allclose(
        cophenet(sparse_tree(20, rows, columns, s[rows, columns])),
        cophenet(sparse_tree(20, *once, s[once])),
    )


def test_cuts_give_as_many_clusters_as_asked_for():
    tree = full_tree(random_similarity(30))
    for count in (1, 7, 29, 30):
        labels, _ = cut(tree, clusters=count)
        assert len(np.unique(labels)) == count
    alone, _ = cut(tree, distance=0.0)
    assert len(np.unique(alone)) == 30
    assert cut(tree)[1] == 0.9
    # All distances equal: ties are cut in the order they were made.
    flat = full_tree(np.eye(6))
    assert len(np.unique(cut(flat, clusters=4)[0])) == 4


def blocks(tmp_path, on):
    """Three groups of four features each that fire together or point one way, and a dead one."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 4)
    firing = np.zeros((3_000, 13))
    for f, g in enumerate(group):
        firing[g * 300 + rng.permutation(300)[:250], f] = 1
    if on == "directions":
        firing[:, :12] = rng.random((3_000, 12)) < 0.05
    v = rng.normal(size=(13, 200))
    v[:12] = rng.normal(size=(3, 200))[group] + 0.3 * v[:12]
    return planted(tmp_path, {"x": firing}, {"x": v})[0], group


@pytest.mark.parametrize("on", ["together", "directions"])
def test_planted_groups_are_recovered_in_full_and_from_nearest_alone(tmp_path, on):
    one, group = blocks(tmp_path, on)
    for options in ({}, {"full": 4, "nearest": 3}):
        like = similarity(one, on, **options)
        assert like.leaves.tolist() == list(range(12))
        assert like.whole == (not options)
        entries = None if like.whole else like.matrix.tocoo()
        tree = (
            full_tree(like.matrix)
            if entries is None
            else sparse_tree(12, entries.row, entries.col, entries.data)
        )
        labels, _ = cut(tree, distance=0.8)
        assert len(np.unique(labels)) == 3
        assert len({(a, b) for a, b in zip(labels, group, strict=True)}) == 3
        places = layout(like, seed=1)
        assert places.shape == (12, 2)
        np.testing.assert_array_equal(places, layout(like, seed=1))


def test_nearest_entries_are_those_of_the_full_matrix(tmp_path):
    one, _ = blocks(tmp_path, "together")
    whole = similarity(one, "together").matrix
    part = similarity(one, "together", full=4, nearest=3).matrix.toarray()
    assert (part == part.T).all()
    kept = part > 0
    np.testing.assert_allclose(part[kept], whole[kept])
    off = whole - np.diag(np.diag(whole))
    for i in range(12):
        want = [j for j in np.argsort(-off[i])[:3] if off[i, j] > 0]
        assert kept[i][want].all()


def test_groups_are_named_by_what_is_theirs_alone():
    rows = [
        [{"token": " def", "share": 0.5}, {"token": ",", "share": 0.3}],
        [{"token": "Def", "share": 0.4}, {"token": ",", "share": 0.3}],
        [{"token": "\n\n", "share": 0.6}, {"token": ",", "share": 0.3}],
        [],
    ]
    names = characteristic([np.array([0, 1]), np.array([2]), np.array([3])], rows)
    assert names[0][0] == "def"
    assert names[1][0] == "⏎⏎"
    assert names[2] == []
    assert [visible(t) for t in (" ", "\t", "\n\n\n\n", " A")] == ["␣", "⇥", "⏎⏎⏎", "a"]


# --- the command ------------------------------------------------------------------------------


def test_the_command_gives_clusters_and_the_tree(command, small_store, indexed):
    found = answer(command("cluster", small_store, indexed[0], "--clusters", 12, "--json"))
    assert found.keys() == {
        "dictionary", "on", "features", "silent", "distance", "pairs", "clusters", "leaves", "tree",
    }  # fmt: skip
    assert len(found["clusters"]) == 12
    assert sorted(f for c in found["clusters"] for f in c["members"]) == found["leaves"]
    assert found["features"] + found["silent"] == 384
    n = found["features"]
    assert len(found["tree"]) == n - 1
    assert found["tree"][-1]["size"] == n
    assert sorted(m[side] for m in found["tree"] for side in ("left", "right")) == list(
        range(2 * n - 2)
    )
    for one in found["clusters"]:
        assert one.keys() == {"id", "name", "tokens", "size", "cohesion", "members"}
        assert one["size"] == len(one["members"])


def test_cohesion_is_the_mean_over_pairs(small_store, indexed):
    made, like = cluster(Store.open(small_store), indexed[1], "directions")
    place = {f: i for i, f in enumerate(like.leaves.tolist())}
    one = made.clusters[0]
    at = [place[f] for f in one.members]
    within = like.matrix[np.ix_(at, at)]
    assert one.cohesion == pytest.approx(within[~np.eye(len(at), dtype=bool)].mean(), rel=1e-5)
    # At a cut of 0.9 no two clusters are more than 0.1 alike on average.
    two = [place[f] for f in made.clusters[1].members]
    assert np.maximum(like.matrix[np.ix_(at, two)], 0).mean() <= 0.1 + 1e-6


@pytest.mark.slow
def test_the_map_is_drawn_and_the_same_each_time(command, small_store, indexed, tmp_path):
    drawn = []
    for name in ("a.svg", "b.svg"):
        code, out, err = command("cluster", small_store, indexed[0], "--on", "directions",
                                 "--plot", tmp_path / name, "--seed", 3)  # fmt: skip
        assert code == 0, err
        assert "the most typical first" in out
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    found = answer(command("cluster", small_store, indexed[0], "--map", "--json"))
    assert [m["feature"] for m in found["map"]] == found["leaves"]
    assert found["map"][0].keys() == {"feature", "x", "y", "cluster"}


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--clusters", "0"], "0 clusters of 38[0-4] features that fire"),
        (["--clusters", "9999"], "9999 clusters of 38[0-4] features that fire: give 1 to 38"),
        (["--distance", "1.5"], "a distance is 0 to 1"),
        (["--distance", "0.5", "--clusters", "3"], "give one"),
        (["--map"], "give --json with it, or --plot"),
        (["--plot", "x.txt"], "written as .svg, .png or .pdf"),
    ],
)
def test_cluster_says_what_it_needs(refused, small_store, indexed, extra, match):
    refused("cluster", small_store, indexed[0], *extra, match=match)


def test_cluster_says_what_is_not_there(refused, small_store, own_store, indexed):
    import shutil

    refused("cluster", small_store, "nothing", match="nothing is not indexed in")
    shutil.rmtree(own_store / "activations")
    refused("cluster", own_store, indexed[0], match="were not kept")
