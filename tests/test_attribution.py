"""Attribution patching: slopes against finite differences, estimates against real changes."""

import json

import pytest
import torch
from intervened import CLEAN, CLT, KINDS, METRIC, OTHER, SAE, TRANSCODER

from gemscope import hub
from gemscope.lm import Edit
from gemscope.sae import SparseFeatures
from gemscope.sites import each
from gemscope.steering import attribute, intervene


def metric_with(model, changes):
    """The metric when `changes`, a vector for each site and position, are added."""

    def plus(site, moved):
        def function(tokens, x):
            return x + moved[tokens.positions]

        return Edit(site, site, function, placed=True)

    edits = [plus(site, moved) for site, moved in changes.items()]
    logits = model.run(CLEAN, edits=edits, logits=True).logits[0, -1]
    a, b = model.tokenizer.convert_tokens_to_ids(["item", "name"])
    return float(logits[a] - logits[b])


def slope(model, changes):
    """The metric's slope along `changes`, by four points.

    The library computes norms and attention weights in float32 whatever the model's type: logits
    of 10 are known to a few times 2^-24, 3e-6, which the step of 0.05 makes 6e-5 at most; what the
    four points leave is of the order of the step's fourth power.
    """
    h = 0.05
    at = {k: metric_with(model, {s: k * h * v for s, v in changes.items()}) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)


def codes(model, sae, text):
    run = model.run(text, read=[sae.reads])
    return sae.encode(run[sae.reads][0].float()).dense().double()


@pytest.mark.parametrize("address", KINDS)
def test_estimates_are_slopes(exact, address):
    """A small step along an estimate's change moves the metric by the step's share of it."""
    sae = hub.load_sae(address)
    found = attribute(exact, CLEAN, [sae], metric=METRIC, corrupted=OTHER, top=6)
    moved = codes(exact, sae, OTHER) - codes(exact, sae, CLEAN)
    for node in (n for n in found.top if n.index is not None):
        rows = sae.rows([node.index])[0].double()
        along = moved[:, node.index, None] * at_all(node)
        expected = slope(
            exact, {site: along * rows[m] for m, site in enumerate(each(sae.writes))}
        )  # fmt: skip
        assert node.attribution == pytest.approx(expected, rel=1e-4, abs=1e-4)


def at_all(node):
    mask = torch.zeros(9, 1, dtype=torch.float64)
    mask[node.positions] = 1
    return mask


@pytest.mark.parametrize("address", [SAE, TRANSCODER, CLT])
def test_estimates_of_errors_are_slopes(exact, address):
    sae = hub.load_sae(address)
    found = attribute(exact, CLEAN, [sae], metric=METRIC, corrupted=OTHER)
    sites = (sae.reads, sae.writes)
    error = {}
    for text in (CLEAN, OTHER):
        run = exact.run(text, read=sites)
        x, y = (run[s][0] for s in sites)
        error[text] = y - sae.reconstruct(x.float()).double()
    moved = error[OTHER] - error[CLEAN]
    moved[0] = 0
    for m, site in enumerate(each(sae.writes)):
        own = moved if len(each(sae.writes)) == 1 else moved[:, m]
        expected = slope(exact, {site: own})
        assert float(found.active[0].errors[site].sum()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("corrupted", [OTHER, None])
@pytest.mark.parametrize("address", KINDS)
def test_exact_effects_are_interventions(exact, address, corrupted):
    found = attribute(exact, CLEAN, [address], metric=METRIC, corrupted=corrupted, top=8)
    assert len(found.top) == 8
    for node in found.top:
        done = intervene(
            exact, CLEAN, [node.name], do="patch" if corrupted else "ablate",
            corrupted=corrupted, metric=METRIC,
        )  # fmt: skip
        # Activations of float32: 2^-24 of 20, times slopes below 1, at eight positions.
        assert node.exact == pytest.approx(done.outcome.effect, abs=2e-5), node.name


def test_every_active_entry_is_estimated_and_no_other(exact, monkeypatch):
    sae = hub.load_sae(SAE)
    clean, other = (codes(exact, sae, text) for text in (CLEAN, OTHER))
    moved = other - clean
    moved[0] = 0  # BOS
    monkeypatch.setattr(SparseFeatures, "dense", None)
    found = attribute(exact, CLEAN, [sae], metric=METRIC, corrupted=OTHER)
    (active,) = found.active
    assert set(zip(active.positions.tolist(), active.features.tolist(), strict=True)) == set(
        map(tuple, moved.nonzero().tolist())
    )
    torch.testing.assert_close(
        active.other - active.clean, moved[active.positions, active.features], rtol=0, atol=1e-6
    )
    which, sums = active.sums()
    for feature, total in zip(which.tolist(), sums.tolist(), strict=True):
        assert total == pytest.approx(float(active.effects[active.features == feature].sum()))
    names = [(abs(n.attribution), n.name) for n in found.top]
    assert names == sorted(names, key=lambda pair: -pair[0])
    largest = max(sums.abs().max().item(), abs(float(sum(active.errors.values()).sum())))
    assert names[0][0] == pytest.approx(largest)


def test_rows_of_a_batch_are_rows_alone(exact, monkeypatch):
    from gemscope.steering import _attribute_exact

    options = {"metric": METRIC, "corrupted": OTHER, "top": 9}
    together = attribute(exact, CLEAN, [SAE, CLT], **options)
    for some in (1, 4):
        monkeypatch.setattr(_attribute_exact, "rows_that_fit", lambda *_, n=some: n)
        apart = attribute(exact, CLEAN, [SAE, CLT], **options)
        for a, b in zip(together.top, apart.top, strict=True):
            assert (a.name, a.exact) == (b.name, pytest.approx(b.exact, abs=1e-10))


def test_the_site_of_a_dictionary_adds_up(exact):
    """To first order, features, errors and bias together are the patch of the whole site."""
    found = attribute(exact, CLEAN, [SAE], metric=METRIC, corrupted=OTHER)
    sae = hub.load_sae(SAE)
    (site,) = each(sae.writes)
    here, there = (exact.run(text, read=[site])[site][0] for text in (CLEAN, OTHER))
    moved = there - here
    moved[0] = 0
    total = float(found.active[0].effects.sum() + found.active[0].errors[site].sum())
    assert total == pytest.approx(slope(exact, {site: moved}), rel=1e-3)


@pytest.mark.parametrize("metric", ["loss", "probability:item", "feature"])
def test_other_metrics_have_slopes_too(exact, metric):
    if metric == "feature":
        later = hub.load_sae("miniature/resid_post_all/layer_4_width_384_l0_small")
        feature = int(codes(exact, later, CLEAN)[-1].argmax())
        metric = f"feature:{later.origin.address}/{feature}"
    found = attribute(exact, CLEAN, [SAE], metric=metric, corrupted=OTHER, top=10)
    assert found.agreement.pearson > 0.8
    assert found.agreement.same_sign >= 0.8


def test_agreement_by_hand():
    from gemscope.steering import agreement

    pairs = [(1.0, 2.0), (2.0, 3.0), (3.0, 10.0), (-1.0, 0.5)]
    found = agreement(pairs)
    a, b = torch.tensor(pairs).T
    assert found.pearson == pytest.approx(float(torch.corrcoef(torch.stack((a, b)))[0, 1]))
    assert found.spearman == pytest.approx(1.0)
    assert found.same_sign == 0.75
    assert agreement([(1.0, 1.0), (2.0, 2.0)]).pearson is None
    assert agreement([(1.0, 0.0)] * 3).same_sign is None
    assert agreement([]).nodes == 0


def test_the_command_prints_one_value(command):
    options = (
        "intervene", CLEAN, "--corrupted", OTHER, "--attribute", SAE, "--attribute", CLT,
        "--metric", METRIC, "--top", "5",
    )  # fmt: skip
    code, out, err = command(*options, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert [d["address"] for d in made["dictionaries"]] == [SAE, CLT]
    assert len(made["dictionaries"][1]["sum_errors"]) == 6
    assert made["agreement"]["nodes"] == len(made["top"]) == 5
    for node in made["top"]:
        assert node["attribution"] == pytest.approx(
            sum(p["attribution"] for p in node["positions"])
        )
        assert all(made["clean"]["tokens"][p["position"]] == p["token"] for p in node["positions"])
    code, out, _ = command(*options)
    assert code == 0
    assert all(node["name"] in out for node in made["top"])
    assert "Pearson" in out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--metric", "kl"), "slope is 0"),
        (("--metric", METRIC, "--corrupted", f"{OTHER}(x"), "compares them position by position"),
        (("--metric", METRIC, "--attribute", SAE), "named twice"),
        (("--metric", f"feature:{SAE}/1"), "does not reach"),
        (("--metric", METRIC, "--value", "2"), "--value is for --on"),
        (("--metric", "feature:miniature/resid_post_all/layer_5_width_384_l0_small/SILENT"),
         "is silent at position"),
    ],
)  # fmt: skip
def test_what_cannot_be_attributed_is_refused(refused, miniature, options, match):
    late = hub.load_sae("miniature/resid_post_all/layer_5_width_384_l0_small")
    silent = int(codes(miniature, late, CLEAN)[-1].argmin())
    options = [o.replace("SILENT", str(silent)) for o in options]
    refused("intervene", CLEAN, "--attribute", SAE, *options, match=match)
