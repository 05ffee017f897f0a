"""Circuits over SAEs: what is ablated, faithfulness and completeness, work that goes on."""

import json

import pytest
import torch
from intervened import CLEAN, METRIC, OTHER

from gemscope import hub
from gemscope.circuits import CircuitConfig, CircuitExample, sparse_circuit
from gemscope.circuits import _sparse_circuit as making
from gemscope.circuits._sparse_curves import circuits_of, curves_of, sizes_of
from gemscope.lm import Tokens
from gemscope.sae import SAE, Origin, ReLU
from gemscope.sites import Site

HEADS = "miniature/attn_out_all/layer_4_width_128_l0_small"
MLP = "miniature/mlp_out_all/layer_4_width_128_l0_small"
RESIDUAL = "miniature/resid_post_all/layer_4_width_384_l0_small"
LAST = Site.parse("5.resid_post")


def config_of(*addresses, **changes):
    options = {"examples": (CircuitExample(clean=CLEAN, corrupted=OTHER),), "metric": METRIC,
               "random_circuits": 3, "top_exact": 2}  # fmt: skip
    return CircuitConfig(dictionaries=addresses, **(options | changes))


@pytest.mark.parametrize("aggregate", ["none", "positions"])
@pytest.mark.parametrize("ablation", ["corrupted", "mean", "zero"])
def test_everything_is_the_model_and_nothing_is_nothing(miniature, file, ablation, aggregate):
    mean = {"mean": str(file("import os\nfor name in names:\n    print(name)\n" * 4))}
    found = sparse_circuit(
        config_of(HEADS, MLP, RESIDUAL, ablation=ablation, aggregate=aggregate, sizes=(3,),
                  max_nodes=5, metric="logit:item", **(mean if ablation == "mean" else {})),
        model=miniature,
    )  # fmt: skip
    curves, (one,) = found.curves, found.examples
    assert [p.size for p in curves.points] == [0, 3, 5, found.count]
    # Float32 logits of 10 are known to some 2^-20; the whole differs from nothing by several.
    assert abs(curves.whole - curves.empty) > 1
    assert curves.whole == pytest.approx(one.clean, abs=1e-4)
    for size, faithful in ((0, 0.0), (found.count, 1.0)):
        point = curves.at(size)
        for spread in (point.faithfulness, point.random_faithfulness):
            assert spread.value == pytest.approx(faithful, abs=1e-4)
        for spread in (point.completeness, point.random_completeness):
            assert spread.value == pytest.approx(1 - faithful, abs=1e-4)
    if ablation == "corrupted":  # a residual stream lets nothing past
        assert curves.empty == pytest.approx(one.corrupted, abs=1e-4)


@pytest.mark.parametrize("others", [False, True])
def test_what_is_outside_of_a_circuit_is_ablated(miniature, others):
    """Against the definition, position by position and feature by feature."""
    from gemscope.circuits._sparse_case import case_of, metric_of
    from gemscope.circuits._sparse_run import Ablating
    from gemscope.circuits._sparse_space import Space

    sae, config = hub.load_sae(RESIDUAL), config_of(RESIDUAL)
    what = metric_of(config.examples[0], config, miniature, hub.load_sae, [sae.reads])
    case = case_of(config.examples[0], what, miniature, (sae,), "corrupted", None)
    space, site = Space((RESIDUAL,), (sae.reads,), (sae.d_sae,), 9), sae.reads
    generator = torch.Generator().manual_seed(1)
    keys = torch.randperm(space.firsts[-1], generator=generator)[:1500]
    # In a run that is another than the clean one.
    changed = miniature.run("for word in words:\n    print(", read=[site])[site][0][:9]
    (edit,) = Ablating(case, space, [(keys, others)]).steps()
    at = Tokens(
        rows=torch.zeros(9, dtype=torch.int64), positions=torch.arange(9),
        ordinary=torch.arange(9) > 0, prompt_lengths=torch.tensor([9]),
    )  # fmt: skip
    got = edit.function(at, changed)
    there = miniature.run(OTHER, read=[site])[site][0]
    f, g = (sae.encode(x).dense().double() for x in (changed, there))
    left, right = (
        x.double() - sae.reconstruct(x).double() for x in (changed, there)
    )  # fmt: skip
    inside = torch.isin(torch.arange(space.firsts[-1]), keys).view(9, -1) ^ others
    inside[0] = True  # BOS
    mixed = torch.where(inside[:, :-1], f, g)
    expected = mixed @ sae.w_dec.double() + sae.b_dec + torch.where(inside[:, -1:], left, right)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
    assert float((got - changed)[1:].abs().max()) > 1
    assert torch.equal(got[0], changed[0])


def planted(model, count=3, others=40):
    """A dictionary of the last residual stream in which `count` features carry all that tells the
    prompts apart at the last position, and others what tells them apart elsewhere.
    """
    here, there = (model.run(t, read=[LAST])[LAST][0] for t in (CLEAN, OTHER))
    apart = (here - there)[-1].double()
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(count - 1, len(apart), generator=generator, dtype=torch.float64)
    basis = torch.cat((apart[None] / apart.norm(), parts))
    rest = torch.randn(others, len(apart), generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.cat((basis, rest)).T)
    turn = torch.eye(count) - 2 / count
    # A reflection: each row has an equal share of the first direction, or nearly so.
    turn = turn.double()
    rows = torch.cat((turn @ q[:, :count].T, q[:, count:].T)).float()
    order = torch.randperm(len(rows), generator=generator)
    bias = 1000.0  # every feature fires, and is linear
    sae = SAE(
        w_enc=rows[order].T.contiguous(), b_enc=torch.full((len(rows),), bias),
        w_dec=rows[order].contiguous(), b_dec=-bias * rows.sum(0), activation=ReLU(), reads=LAST,
        writes=LAST, origin=Origin(address="planted", model=model.name),
    )  # fmt: skip
    return sae, {int((order == i).nonzero()) for i in range(count)}


@pytest.mark.parametrize("method", ["attribution", "integrated"])
def test_a_planted_circuit_is_found(miniature, method):
    sae, wanted = planted(miniature)
    config = config_of("planted", method=method, sizes=(1, 2, 3), random_circuits=20,
                       node_threshold=0.02, top_exact=10)  # fmt: skip
    found = sparse_circuit(config, model=miniature, load=lambda _: sae)
    assert {one.node.feature for one in found.nodes[:3]} == wanted
    assert {one.node.position for one in found.nodes} == {8}
    assert len(found.nodes) == 3
    point = found.curves.at(3)
    # Activations of a thousand are known to 2^-14; the logits tell the prompts apart by 6.
    assert point.faithfulness.value == pytest.approx(1, abs=2e-3)
    assert point.completeness.value == pytest.approx(0, abs=2e-3)
    assert abs(point.random_faithfulness.value) < 0.1
    assert found.curves.at(1).faithfulness.value < 0.9
    assert found.agreement["same_sign"] > 0.5
    # All that goes to the metric goes there straight.
    assert {edge.target for edge in found.edges} == {"metric"}


def test_curves_by_hand():
    ends = torch.tensor([[4.0, 0.0], [8.0, 2.0]], dtype=torch.float64)
    rows = torch.tensor([[1.0, 3.0, 0.5, 4.0, 1.5, 2.0], [5.0, 5.0, 2.0, 8.0, 3.0, 7.0]],
                        dtype=torch.float64)  # fmt: skip
    curves = curves_of(rows, ends, [1], 2, seed=0, held_out=True)
    (point,) = curves.points
    # Means 3 and 4 of the circuit and its complement, between 1 and 6.
    assert point.faithfulness.value == pytest.approx(0.4)
    assert point.completeness.value == pytest.approx(0.6)
    assert point.faithfulness.low == pytest.approx(0.25)  # the first prompt twice
    assert point.faithfulness.high == pytest.approx(0.5)
    # Random circuits: 1.25 and 2.25, complements 6 and 4.5.
    assert point.random_faithfulness.value == pytest.approx((0.05 + 0.25) / 2)
    assert point.random_completeness.value == pytest.approx((1.0 + 0.7) / 2)
    assert (curves.whole, curves.empty, curves.prompts) == (6.0, 1.0, 2)
    assert sizes_of(25, None, 7) == (0, 1, 2, 5, 7, 10, 20, 25)
    assert sizes_of(25, (3, 30), 0) == (0, 3, 25)
    order = torch.arange(50)
    drawn = circuits_of(order, [0, 4], 2, seed=3)
    assert [len(k) for k, _ in drawn] == [0, 50] * 3 + [4, 46] * 3
    assert not any(others for _, others in drawn)
    for (one, _), (rest, _) in zip(drawn[::2], drawn[1::2], strict=True):
        assert sorted([*one.tolist(), *rest.tolist()]) == list(range(50))
    assert drawn[6][0].tolist() == [0, 1, 2, 3]
    assert all(len(k.unique()) == len(k) for k, _ in drawn)
    again = circuits_of(order, [0, 4], 2, seed=3)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(drawn, again, strict=True))


PAIRS = tuple(
    CircuitExample(clean=f"x = [{names}", corrupted=f"x = ({names}", answer="]", wrong=")")
    for names in ("first, second, third", "alpha, beta, gamma", "value, key, name")
)


def test_what_was_interrupted_goes_on(miniature, tmp_path, monkeypatch):
    config = config_of(RESIDUAL, examples=PAIRS, metric=None, aggregate="positions", sizes=(2, 9))
    whole = sparse_circuit(config, model=miniature).json()
    assert whole["curves"]["prompts"] == 3
    cases = []
    true = making.case_of

    def counted(*arguments):
        cases.append(arguments[0].clean)
        return true(*arguments)

    monkeypatch.setattr(making, "case_of", counted)

    def stop(what, done, total):
        if what == "edges" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparse_circuit(config, model=miniature, parts=tmp_path, progress=stop)
    assert len(cases) == 3 + 3 + 2
    cases.clear()
    assert sparse_circuit(config, model=miniature, parts=tmp_path).json() == whole
    assert cases == [PAIRS[2].clean] + [one.clean for one in PAIRS]  # edges, then curves
    cases.clear()
    assert sparse_circuit(config, model=miniature, parts=tmp_path).json() == whole
    assert not cases
    # Three parts damaged, each in another way, are made anew.
    cut, changed, empty, *_ = sorted(tmp_path.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-3])
    raw = changed.read_bytes()
    changed.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    empty.write_bytes(b"")
    assert sparse_circuit(config, model=miniature, parts=tmp_path).json() == whole
    assert len(cases) == 3
    # Another question is asked anew.
    other = config.model_copy(update={"ablation": "zero"})
    assert sparse_circuit(other, model=miniature, parts=tmp_path).json() != whole
    assert len(cases) == 3 + 12


def test_held_out_prompts_are_what_curves_are_measured_on(miniature):
    options = {"metric": None, "aggregate": "positions", "sizes": (5,), "max_nodes": 4}
    found = sparse_circuit(
        config_of(RESIDUAL, examples=PAIRS[:2], held_out=PAIRS[2:], **options), model=miniature
    )
    alone = sparse_circuit(config_of(RESIDUAL, examples=PAIRS[2:], **options), model=miniature)
    assert found.curves.held_out
    assert not alone.curves.held_out
    assert found.curves.whole == alone.curves.whole
    assert json.loads(json.dumps(found.json()))["curves"]["measured_on"] == "held_out"
    assert len(found.examples) == 2
    assert found.held_out[0].clean == alone.examples[0].clean
    # Effects are means over the examples, with an interval over them.
    one = found.nodes[0]
    apart = [
        sparse_circuit(config_of(RESIDUAL, examples=(p,), **options), model=miniature)
        for p in PAIRS[:2]
    ]
    each = [c.node(one.node.id).effect.value for c in apart]
    assert one.effect.value == pytest.approx(sum(each) / 2)
    assert (one.effect.low, one.effect.high) == pytest.approx((min(each), max(each)))
    sums = found.json()["sums"][RESIDUAL]
    assert sums["features"] == pytest.approx(
        sum(c.json()["sums"][RESIDUAL]["features"] for c in apart) / 2
    )
