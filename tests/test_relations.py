"""Pairs of features: counts, likeness, types of relation, splitting and absorption."""

import json

import numpy as np
import pytest
from planted import brute_counts, dense_code, planted, text_of

from gemscope.errors import InputError
from gemscope.features import write_activations
from gemscope.relate import (
    KINDS,
    Rules,
    decoder_nearest,
    firing_nearest,
    indexed,
    ladder,
    pairs,
    relations,
    splits,
    virtual_weights,
    wilson,
)

N = 4_000


def answer(done):
    code, out, err = done
    assert code == 0, err
    return json.loads(out)


def random_pair(tmp_path, seed=0):
    rng = np.random.default_rng(seed)
    firing = {
        name: rng.random((300, d)) * (rng.random((300, d)) < rng.uniform(0, 0.4, d))
        for name, d in (("a", 9), ("b", 13))
    }
    firing["a"][:, 4] = 0  # dead
    firing["b"][:, 5] = 1  # never silent
    vectors = {"a": rng.normal(size=(9, 5)), "b": rng.normal(size=(13, 5))}
    made = planted(tmp_path, firing, vectors, lengths=[100, 150, 50])
    return *made, firing


# --- pairs ------------------------------------------------------------------------------------


def test_counts_phi_and_shares_are_those_of_brute_force(tmp_path):
    one, other, firing = random_pair(tmp_path)
    for left, right in ((one, other), (one, one)):
        blocks = list(pairs(left, right))
        both = np.concatenate([b.both for b in blocks])
        np.testing.assert_array_equal(both, brute_counts(left, right))
        f, g = (firing[x.address] > 0 for x in (left, right))
        want = np.array([[_corrcoef(x, y) for y in g.T] for x in f.T])
        np.testing.assert_allclose(np.concatenate([b.phi for b in blocks]), want, atol=1e-12)
        given = [[(x & y).sum() / max(x.sum(), 1) for y in g.T] for x in f.T]
        np.testing.assert_allclose(np.concatenate([b.b_given_a for b in blocks]), given)
        jaccard = [[(x & y).sum() / max((x | y).sum(), 1) for y in g.T] for x in f.T]
        np.testing.assert_allclose(np.concatenate([b.jaccard for b in blocks]), jaccard)


def _corrcoef(x, y):
    return 0.0 if x.std() == 0 or y.std() == 0 else np.corrcoef(x, y)[0, 1]


def test_dictionaries_collected_apart_are_counted_like_those_collected_together(tmp_path):
    one, other, firing = random_pair(tmp_path / "both")
    text = text_of([100, 150, 50])
    made = write_activations(tmp_path / "b", text, {"b": dense_code(text, firing["b"])})
    apart = indexed(made, "b", other.vectors, "3.resid_post")
    for left, right in zip(pairs(one, other), pairs(one, apart), strict=True):
        np.testing.assert_array_equal(left.both, right.both)
    text = text_of([150, 100, 50])
    made = write_activations(tmp_path / "c", text, {"b": dense_code(text, firing["b"])})
    with pytest.raises(InputError, match="indexed on different texts"):
        next(pairs(one, indexed(made, "b", other.vectors, "3.resid_post")))


def test_wilson_is_the_score_interval():
    # Newcombe 1998, table I: 81 of 263; and the ends.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1
    assert wilson(0, 0) == (0, 1)


# --- likeness ---------------------------------------------------------------------------------


def test_nearest_directions_virtual_weights_and_firing(tmp_path):
    one, other, _ = random_pair(tmp_path)
    a, b = one.vectors, other.vectors
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    found = decoder_nearest(a, b, k=3)
    np.testing.assert_array_equal(found.index, np.argsort(-cosine, axis=1)[:, :3])
    np.testing.assert_allclose(found.value, -np.sort(-cosine, axis=1)[:, :3])
    own = decoder_nearest(a, k=20)
    assert own.index.shape == (9, 8)
    assert (own.index != np.arange(9)[:, None]).all()
    weights = a @ b.T
    found = virtual_weights(a, b, k=2)
    assert found.index[:, 0].tolist() == np.abs(weights).argmax(1).tolist()
    np.testing.assert_allclose(found.value, np.take_along_axis(weights, found.index, 1))
    phi = np.concatenate([p.phi for p in pairs(one, other)])
    np.testing.assert_allclose(firing_nearest(one, other, k=1).value[:, 0], phi.max(1))
    assert (firing_nearest(one, k=4).index != np.arange(9)[:, None]).all()


# --- types ------------------------------------------------------------------------------------


def family(tmp_path):
    """0 a parent; 1, 2 its children; 3 a duplicate of 1; 4 an opposite of 0; 5 chance."""
    rng = np.random.default_rng(0)
    f = np.zeros((N, 6))
    f[:1_000, 0] = 1
    f[:200, 1] = f[200:400, 2] = 1
    f[:190, 3] = 1
    f[2_000:2_500, 4] = 1
    f[rng.permutation(N)[:800], 5] = 1
    v = rng.normal(size=(6, 64))
    v[3], v[4] = v[1] + 0.1 * v[3], -v[0] + 0.1 * v[4]
    return planted(tmp_path, {"x": f}, {"x": v})[0]


def test_planted_relations_are_found_with_their_evidence(tmp_path):
    one = family(tmp_path)
    found = relations(one)
    told = {(r.feature, r.kind, r.other) for r in found}
    want = {(c, "child", 0) for c in (1, 2, 3)} | {(0, "parent", c) for c in (1, 2, 3)}
    want |= {(a, "sibling", b) for a, b in ((1, 2), (2, 1), (2, 3), (3, 2))}
    want |= {(1, "duplicate", 3), (3, "duplicate", 1), (0, "opposite", 4), (4, "opposite", 0)}
    assert told == want
    (child,) = (r for r in found if (r.feature, r.kind, r.other) == (1, "child", 0))
    e = child.json()["evidence"]
    assert (e["together"], e["feature_tokens"], e["other_tokens"]) == (200, 200, 1_000)
    assert e["other_given_feature"]["value"] == 1
    assert e["feature_given_other"]["value"] == 0.2
    low, high = wilson(200, 1_000)
    assert (e["feature_given_other"]["low"], e["feature_given_other"]["high"]) == (low, high)
    (parent,) = (r for r in found if (r.feature, r.kind, r.other) == (0, "parent", 1))
    assert parent.evidence["other_given_feature"]["value"] == 0.2
    assert parent.evidence["phi"] == pytest.approx(e["phi"])
    (sibling,) = (r for r in found if (r.feature, r.other) == (1, 2))
    assert sibling.evidence["parents"] == [0]
    assert {r.feature for r in relations(one, feature=2)} == {2}


def test_rules_are_settings(tmp_path):
    one = family(tmp_path)
    assert not [r for r in relations(one, Rules(least=2_000)) if r.kind != "opposite"]
    assert not [r for r in relations(one, Rules(opposed=-0.999)) if r.kind == "opposite"]
    assert not [r for r in relations(one, Rules(alike=0.9999)) if r.kind == "duplicate"]


def test_what_always_fires_is_nobodys_parent(tmp_path):
    f = np.zeros((N, 2))
    f[:3_900, 0] = f[:300, 1] = 1
    (one,) = planted(tmp_path, {"x": f}, {"x": np.eye(2, 4)})
    assert relations(one) == []


def ladder_of(tmp_path):
    """Narrow 0 splits in three; narrow 1 is kept and absorbed in part; narrow 2 has no answer."""
    rng = np.random.default_rng(1)
    narrow, wide = np.zeros((N, 3)), np.zeros((N, 8))
    narrow[:600, 0] = narrow[1_000:1_500, 1] = narrow[2_000:2_300, 2] = 1
    wide[:250, 0] = wide[250:420, 1] = wide[420:590, 2] = 1
    wide[1_100:1_500, 3] = 1  # the counterpart of 1, silent on its first 100 tokens
    wide[1_000:1_100, 4] = 1  # where this child speaks
    wide[1_400:1_480, 5] = 1  # another child, on whose tokens the counterpart speaks
    wide[rng.permutation(N)[:400], 6] = 1
    v, w = np.eye(3, 32), rng.normal(size=(8, 32)) * 0.01
    w[:3, 0] += 1
    w[3, 1] = w[4, 1] = w[5, 1] = 1
    w[4, 10] = w[5, 11] = 2
    return planted(tmp_path, {"narrow": narrow, "wide": wide}, {"narrow": v, "wide": w})


def test_a_planted_split_is_found(tmp_path):
    found = splits(*ladder_of(tmp_path))
    assert [(r.feature, r.other) for r in found] == [(0, 0), (0, 1), (0, 2)]
    assert {r.kind for r in found} == {"splits into"}
    assert found[0].evidence["parts"] == [0, 1, 2]
    assert found[0].evidence["covered"]["value"] == pytest.approx(590 / 600)


def test_planted_absorption_is_found_at_its_rate(tmp_path):
    (step,) = ladder(ladder_of(tmp_path)[::-1])  # in any order
    assert (step.narrow, step.wide) == ("narrow", "wide")
    assert (step.features, step.kept, step.split, step.lost) == (3, 1, 1, 1)
    (one,) = step.absorbed
    assert (one.feature, one.counterpart, one.tokens, one.absorbed) == (1, 3, 500, 100)
    assert [(c["feature"], c["silent"]) for c in one.children] == [(4, 100)]
    assert one.rate == step.rate == 0.2


def test_directions_of_different_spaces_are_not_compared(tmp_path):
    rng = np.random.default_rng(0)
    f, v = (rng.random((50, 4)) < 0.5).astype(float), rng.normal(size=(4, 6))
    where = {"a": "2.attn_heads", "b": "3.attn_heads", "c": "3.resid_post", "d": "2.mlp_out"}
    a, b, c, d = planted(tmp_path, dict.fromkeys(where, f), dict.fromkeys(where, v), writes=where)
    for pair in ((a, b), (a, c)):
        with pytest.raises(InputError, match="directions are not of one space"):
            splits(*pair)
    assert splits(a, a) == splits(c, d) == []
    with pytest.raises(InputError, match="two widths or more"):
        ladder([a])


# --- the command ------------------------------------------------------------------------------


def test_the_command_tells_relations_of_a_store(command, small_store, indexed):
    rows = answer(command("relations", small_store, indexed[1], "--json"))
    assert rows
    for row in rows:
        assert list(row) == [
            "dictionary",
            "feature",
            "other_dictionary",
            "other",
            "kind",
            "evidence",
        ]
        assert row["kind"] in KINDS
    kind = rows[0]["kind"]
    of = answer(command("relations", small_store, indexed[1], "--kind", kind, "--json"))
    assert of == [row for row in rows if row["kind"] == kind]
    code, out, _ = command("relations", small_store, indexed[1], "--top", 3)
    assert code == 0
    assert "it fires on" in out


def test_the_command_says_what_it_needs(refused, small_store, indexed, tmp_path):
    refused("relations", tmp_path, indexed[0], match="no catalog store at")
    refused("relations", small_store, "nothing", match="nothing is not indexed in")
    refused("relations", small_store, indexed[0], "--feature", 384, match="no feature 384")
    refused("relations", small_store, indexed[0], "--kind", "aunt", match="kinds are parent, child")
    refused("relations", small_store, *indexed, match="not of one site")


def test_without_kept_activations_the_command_says_how_to_keep_them(refused, own_store, indexed):
    import shutil

    shutil.rmtree(own_store / "activations")
    refused("relations", own_store, indexed[0], match="were not kept.*keep-activations keeps")
