"""Circuits over SAEs: effects and edges, against interventions and finite differences."""

import pytest
import torch
from intervened import CLEAN, METRIC, OTHER

from gemscope import hub
from gemscope.circuits import CircuitConfig, CircuitExample, sparse_circuit
from gemscope.circuits._sparse_case import case_of, metric_of
from gemscope.circuits._sparse_edges import edges_of
from gemscope.circuits._sparse_effects import effects_of, gradients
from gemscope.circuits._sparse_space import Space
from gemscope.lm import Edit
from gemscope.steering import attribute, intervene, order

HEADS = "miniature/attn_out_all/layer_3_width_128_l0_small"
MLP = "miniature/mlp_out_all/layer_3_width_128_l0_small"
RESIDUAL = "miniature/resid_post_all/layer_3_width_384_l0_small"
LATER = "miniature/resid_post_all/layer_4_width_384_l0_small"


def config_of(*addresses, **changes):
    options = {"examples": (CircuitExample(clean=CLEAN, corrupted=OTHER),), "metric": METRIC}
    return CircuitConfig(dictionaries=addresses, **(options | changes))


def made(model, *addresses, **changes):
    """A case, and the space of its nodes."""
    config = config_of(*addresses, **changes)
    saes = tuple(sorted(map(hub.load_sae, addresses), key=lambda s: order(s.reads)))
    sites = tuple(s.reads for s in saes)
    what = metric_of(config.examples[0], config, model, hub.load_sae, sites)
    case = case_of(config.examples[0], what, model, saes, config.ablation, None)
    length = len(case.prompt) if config.aggregate == "none" else None
    names = tuple(s.origin.address for s in saes)
    return case, Space(names, sites, tuple(s.d_sae for s in saes), length)


def test_estimates_are_exact_where_the_way_is_linear(exact):
    """What an MLP adds reaches a feature of the residual stream after it through a sum alone."""
    late = hub.load_sae(RESIDUAL)
    run = exact.run(CLEAN, read=[late.reads])
    feature = int(late.encode(run[late.reads][0].float()).dense()[-1].argmax())
    found = sparse_circuit(
        config_of(MLP, ablation="zero", metric=f"feature:{RESIDUAL}/{feature}", node_threshold=0.0,
                  top_exact=30), model=exact,
    )  # fmt: skip
    moved = [one for one in found.nodes if one.exact is not None and abs(one.effect.value) > 1e-3]
    assert len(moved) >= 5
    assert {one.node.position for one in moved} == {8}  # attention lies after it
    for one in moved:
        # Activations are float32: 2^-24 of 20, times 256 summands at most.
        assert one.exact == pytest.approx(one.effect.value, abs=2e-4)
    assert found.agreement["pearson"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("aggregate", ["none", "positions"])
def test_estimates_and_exact_effects_are_those_of_attribution(exact, aggregate):
    found = sparse_circuit(
        config_of(HEADS, RESIDUAL, aggregate=aggregate, node_threshold=0.2, top_exact=6),
        model=exact,
    )
    known = attribute(exact, CLEAN, [HEADS, RESIDUAL], metric=METRIC, corrupted=OTHER, top=40)
    theirs = {node.name: node for node in known.top}
    for one in found.nodes:
        node, place = theirs[one.node.name], one.node.position
        mine = [p for at, p in zip(node.positions, node.parts, strict=True)
                if place is None or at == place]  # fmt: skip
        assert one.effect.value == pytest.approx(sum(mine), abs=1e-5)
        if one.exact is not None:
            done = intervene(
                exact, CLEAN, [one.node.name], do="patch", corrupted=OTHER, metric=METRIC,
                positions="all" if place is None else str(place),
            )  # fmt: skip
            assert one.exact == pytest.approx(done.outcome.effect, abs=1e-4)
    assert sum(one.exact is not None for one in found.nodes) == 6


@pytest.mark.parametrize("address", [HEADS, MLP, RESIDUAL])
def test_integrated_gradients_sum_to_what_the_whole_site_does(exact, address):
    """Completeness of integrated gradients, over features and errors of one site."""
    case, space = made(exact, address)
    whole = intervene(
        exact, CLEAN, [str(space.sites[0])], do="patch", corrupted=OTHER, metric=METRIC,
        positions=",".join(map(str, range(1, 9))),
    ).outcome.effect  # fmt: skip
    off = [
        abs(float(effects_of(case, space, gradients(case, space, "integrated", n)).values.sum())
            - whole)
        for n in (1, 4, 64)
    ]  # fmt: skip
    assert off[2] < 2e-3 * abs(whole)
    assert off[2] <= off[1] <= off[0]
    estimate = effects_of(case, space, gradients(case, space, "attribution", 1)).values.sum()
    assert abs(float(estimate) - whole) > 3 * off[2]


def all_keys(case, space):
    """Every node that changes or fires."""
    found = [effects_of(case, space, gradients(case, space, "attribution", 1)).keys]
    for number, swap in enumerate(case.swaps):
        rows, indices = swap.code.rows, swap.code.indices.long()
        kept = swap.ordinary[rows]
        found.append(space.keys(number, rows[kept], indices[kept]))
    return torch.cat(found).unique()


@pytest.mark.parametrize("aggregate", ["none", "positions"])
def test_edges_of_a_node_sum_to_its_effect(exact, aggregate):
    case, space = made(exact, HEADS, MLP, LATER, aggregate=aggregate)
    slopes = gradients(case, space, "attribution", 1)
    keys = all_keys(case, space)
    weights = edges_of(case, space, slopes, keys)
    effects = effects_of(case, space, slopes)
    sums = weights.sum(1)[torch.searchsorted(keys, effects.keys)]
    assert float(effects.values.abs().max()) > 0.5
    # Slopes of float32 norms, sums of float32 products of size 30.
    torch.testing.assert_close(sums, effects.values, rtol=1e-4, atol=1e-4)
    # Nothing flows backward, and nothing among nodes of one site.
    site = torch.tensor([space.site(k) for k in keys.tolist()])
    assert not weights[:, :-1][site[:, None] >= site[None, :]].any()


def test_edges_are_finite_differences(exact):
    """A site between two nodes is held where it is; the step and its noise as in attribution."""
    case, space = made(exact, HEADS, MLP, LATER)
    slopes = gradients(case, space, "attribution", 1)
    effects = effects_of(case, space, slopes)
    top = {s: [k for k in effects.keys[effects.values.abs().argsort(descending=True)].tolist()
               if space.site(k) == s][:3] for s in (0, 1, 2)}  # fmt: skip
    error = space.keys(2, torch.tensor([8]), torch.tensor([case.swaps[2].sae.d_sae]))
    keys = torch.tensor([*top[0], *top[1], *top[2], int(error)]).unique()
    weights = edges_of(case, space, slopes, keys)
    place = {k: i for i, k in enumerate(keys.tolist())}
    clean = exact.run(CLEAN, read=space.sites)
    checked = 0
    for u in (*top[0][:2], *top[1][:2]):
        for d in (k for k in keys.tolist() if space.site(k) > space.site(u)):
            expected = difference(exact, case, space, clean, slopes, u, d)
            got = float(weights[place[u], place[d]])
            assert got == pytest.approx(expected, rel=1e-3, abs=2e-4), (space.node(u), d)
            checked += abs(expected) > 1e-3
    assert checked >= 5


def difference(model, case, space, clean, slopes, u, d):
    """The edge from `u` to `d`, by four points."""
    from_, to = space.site(u), space.site(d)
    one, swap, end = space.node(u), case.swaps[space.site(u)], case.swaps[to]
    moved = torch.zeros_like(swap.error)
    if one.feature is None:
        moved[one.position] = swap.error_moved[one.position]
    else:
        f, g = (c.dense()[one.position, one.feature] for c in (swap.code, swap.other_code))
        moved[one.position] = (g - f).double() * swap.sae.w_dec[one.feature].double()
    held = [Edit(space.sites[s], space.sites[s],
                 lambda _, x, s=s: clean[space.sites[s]][0], placed=True)
            for s in range(from_ + 1, to)]  # fmt: skip
    h, values = 0.05, {}
    for k in (-2, -1, 1, 2):
        plus = Edit(space.sites[from_], space.sites[from_],
                    lambda _, x, k=k: x + k * h * moved, placed=True)  # fmt: skip
        run = model.run(CLEAN, edits=[plus, *held], read=space.sites)
        values[k] = run[space.sites[to]][0]
    slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
    there = space.node(d)
    dx, g = slope[there.position], slopes[to][there.position]
    fires = end.code.dense()[there.position].double() > 0
    df = (dx @ end.sae.w_enc.double()) * fires
    if there.feature is None:
        return float(g @ (dx - df @ end.sae.w_dec.double()))
    return float((g @ end.sae.w_dec[there.feature].double()) * df[there.feature])


def test_a_node_knows_its_key():
    from gemscope.sites import Site

    sites = (Site.parse("0.mlp_out"), Site.parse("1.mlp_out"))
    for length in (None, 3):
        space = Space(("a", "b"), sites, (4, 2), length)
        ids = set()
        for key in range(space.firsts[-1]):
            node = space.node(key)
            site = ("a", "b").index(node.dictionary)
            feature = space.widths[site] if node.feature is None else node.feature
            place = torch.tensor([node.position or 0])
            assert space.keys(site, place, torch.tensor([feature])).tolist() == [key]
            assert node.json()["kind"] == ("error" if node.feature is None else "feature")
            ids.add(node.id)
        assert len(ids) == (8 if length is None else 24)
