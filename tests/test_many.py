"""Many artefacts of one pass: each comes out as if trained alone; lists in configs."""

import pytest
import torch
from training import KINDS, SAE, advanced, config, equal, trainer, weights

from gemscope.errors import InputError
from gemscope.train import train


def alone(chosen, place):
    return chosen.model_copy(update={"artefacts": (chosen.artefacts[place],)})


def compare(steps, chosen):
    """Train together and alone; check every artefact."""
    together = trainer(chosen)
    measured = advanced(together, steps)
    shared = [p for places in together._banks if len(places) > 1 for p in places]
    assert len(shared) >= 4
    for place, learner in enumerate(together.learners):
        name = learner.config.name
        one = trainer(alone(chosen, place))
        before = {n: v.clone() for n, v in one.learners[0].weights.named().items()}
        mine = advanced(one, steps)
        ours, theirs = learner.weights.named(), one.learners[0].weights.named()
        if place not in shared:  # the same operations on the same numbers
            assert all(torch.equal(ours[n], theirs[n]) for n in ours), name
            assert [m[place] for m in measured] == [m[0] for m in mine], name
            continue
        # A product with more rows may be summed in another order: d_in = 32 roundings of 2^-24 in
        # each pre-activation, 2e-6. Adam divides by the size of gradients, so where one is near 0
        # the rounding may turn a step around; in ten steps of ten thousands of entries that shows
        # in the loss as little more. It grows with time, as in any training: so in the end weights
        # are compared with how far they came.
        for a, b in list(zip(measured, mine, strict=True))[:10]:
            assert a[place].loss == pytest.approx(b[0].loss, rel=1e-5), name
        assert measured[-1][place].loss == pytest.approx(mine[-1][0].loss, rel=0.02), name
        assert measured[-1][place].l0 == pytest.approx(mine[-1][0].l0, rel=0.02), name
        for n, value in ours.items():
            moved = (theirs[n] - before[n]).norm()
            assert (value - theirs[n]).norm() <= 0.05 * moved, (name, n)


def test_each_comes_out_as_if_trained_alone(tmp_path):
    chosen = [k for k in KINDS if k["name"] not in ("matryoshka", "relu", "clt")]
    compare(20, config(tmp_path / "run", *chosen))


@pytest.mark.slow
def test_each_comes_out_as_if_trained_alone_for_long(tmp_path):
    compare(200, config(tmp_path / "run", *KINDS, data__batch=256, data__tokens=256 * 200))


def test_on_workers_each_comes_out_the_same(monkeypatch, tmp_path):
    """Threads that take whole artefacts compute what one thread does."""
    chosen = config(tmp_path / "run", *KINDS)
    one, two = trainer(chosen), trainer(chosen)
    advanced(one, 3)
    monkeypatch.setattr(two._workers, "_threads", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        advanced(two, 3)
    finally:
        torch.set_num_threads(before)
    assert two._workers._pool is not None
    for a, b in zip(one.learners, two.learners, strict=True):
        for n, value in a.weights.named().items():
            # With one thread to start with it is bit-equal; with more, sums are split otherwise.
            moved = 3 * a.config.optimizer.lr
            close = (value - b.weights.named()[n]).abs() <= 0.01 * moved
            assert close.double().mean() > 0.99, (a.config.name, n)


def test_each_run_serves_the_same_batches_whatever_else_it_trains(miniature, tmp_path):
    """Through the model: other sites in the pass change neither the order nor the numbers."""
    few = {"data__tokens": 8 * 128, "checkpoint_every": 100}
    other = {"name": "other", "reads": "3.resid_post", "d_sae": 96, "l0": 6, "activation": "topk"}
    both = train(config(tmp_path / "both", SAE, other, **few), model=miniature)
    for artefact in (SAE, other):
        one = train(config(tmp_path / artefact["name"], artefact, **few), model=miniature)
        ours, theirs = weights(both / artefact["name"]), weights(one / artefact["name"])
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        # The clock has no place in metrics: they are the same to the last bit, too.
        assert equal(one, both) == []


def test_lists_stand_for_all_combinations(tmp_path):
    chosen = config(
        tmp_path / "run",
        {"layer": [1, 2], "reads": "{layer}.resid_post", "d_sae": [1024, 4096], "l0": [8, 16],
         "seed": [0, 1], "name": "{stream}-{layer}-{width}-{l0}-{seed}"},
        {"reads": "2.mlp_in", "writes": "2.mlp_out", "d_sae": 64, "l0": 4, "affine": [False, True],
         "activation": ["jumprelu", "batch-topk"], "name": "t-{activation}{affine}"},
    )  # fmt: skip
    names = [a.name for a in chosen.artefacts]
    assert len(names) == len(set(names)) == 2**4 + 2**2
    assert names[0] == "resid_post-1-1k-8-0"
    assert "resid_post-2-4k-16-1" in names
    assert names[-4:] == [
        "t-jumprelu", "t-jumprelu_affine", "t-batch-topk", "t-batch-topk_affine",
    ]  # fmt: skip
    by_name = {a.name: a for a in chosen.artefacts}
    found = by_name["resid_post-2-4k-16-1"]
    assert (str(found.reads), found.writes, found.d_sae) == ("2.resid_post", found.reads, 4096)
    assert (found.l0, found.seed) == (16, 1)
    assert chosen.sites == tuple(dict.fromkeys(s for a in chosen.artefacts
                                               for s in (a.reads, a.writes)))  # fmt: skip


def test_names_are_those_of_releases(tmp_path):
    plain = {"reads": "2.resid_post", "d_sae": 2048, "l0": 40}
    seeded = plain | {"seed": [0, 3]}
    wide = plain | {"d_sae": 2**20, "reads": "1-2.resid_post", "l0": 7.5}
    names = [a.name for a in config(tmp_path / "run", seeded, wide).artefacts]
    assert names == [
        "resid_post/layer_2_width_2k_l0_40",
        "resid_post/layer_2_width_2k_l0_40_seed_3",
        "resid_post/layer_1-2_width_1m_l0_7.5",
    ]


@pytest.mark.parametrize(
    ("artefacts", "match"),
    [
        ([SAE, SAE], r"two artefacts are called sae; .*\{layer\}, \{width\}, \{l0\}, \{seed\}"),
        ([SAE | {"d_sae": [64, 128]}], "two artefacts are called sae"),
        ([SAE | {"name": "{site}"}], r"name '\{site\}' holds other than \{stream\}, \{layer\}"),
        ([SAE | {"name": "{l0.real}{"}], "holds other than"),
        ([SAE | {"name": "/tmp/x"}], "name '/tmp/x' is not the name of a folder"),
        ([SAE | {"name": "../x"}], r"name '\.\./x' is not the name of a folder"),
        ([SAE | {"name": "a b"}], "is not the name of a folder"),
        ([SAE | {"name": ""}], "is not the name of a folder"),
        ([SAE | {"name": "."}], r"name '\.' is not the name of a folder"),
        ([SAE | {"name": "checkpoint"}], "checkpoint .*is where a run's own files are"),
        ([SAE | {"name": "metrics/x"}], "metrics/x .*is where a run's own files are"),
        ([SAE, SAE | {"name": "sae/b"}], "sae/b lies in sae, which is an artefact itself"),
        ([SAE | {"layer": "x", "reads": "{layer}.resid_post"}], "layer is 'x', not a number"),
        ([SAE | {"reads": "{layer}.resid_post"}], "layer is None, not a number"),
        ([SAE | {"d_sae": []}], "d_sae is an empty list"),
        ([SAE | {"seed": list(range(101)), "l0": list(range(100)), "name": "{l0}-{seed}"}],
         "more than 10,000 artefacts; split the run"),
        ([5], "artefacts is not a list of artefacts"),
    ],
)  # fmt: skip
def test_what_cannot_be_expanded_is_refused(artefacts, match, tmp_path):
    with pytest.raises(InputError, match=match):
        config(tmp_path / "run", *artefacts)


def test_a_recipe_is_shared_and_an_artefacts_own_keys_win(tmp_path):
    own = SAE | {"name": "own", "optimizer": {"lr": 5e-4}, "sparsity": {"aim": 0.1}}
    first, second = config(tmp_path / "run", SAE, own).artefacts
    assert (first.optimizer.lr, second.optimizer.lr) == (1e-3, 5e-4)
    assert (first.optimizer.warm_up, second.optimizer.warm_up) == (3, 3)
    assert (first.sparsity.aim, second.sparsity.aim) == (0.0, 0.1)
    assert first.sparsity.bandwidth == second.sparsity.bandwidth == 0.05


def test_seeds_are_other_beginnings_of_the_same(tmp_path):
    artefacts = [SAE | {"name": n, "seed": s} for n, s in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = (x.weights.named() for x in trainer(config(tmp_path / "run", *artefacts)).learners)
    for name in ("w_enc.0", "w_dec.0"):
        assert torch.equal(a[name], b[name])
        # Rows of unit length that have nothing to do with each other.
        assert (a[name] * c[name]).sum(1).abs().mean() < 0.3
    assert torch.equal(a["b_dec"], c["b_dec"])
