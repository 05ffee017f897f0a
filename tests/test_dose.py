"""Dose and response: every figure against plain transformers in float64, the knee by hand."""

import copy
import json
import math

import pytest
import torch

from gemscope import hub, steering
from gemscope.errors import InputError
from gemscope.steering import Mode, Positions, Strength
from gemscope.steering._dose import Measure, Point, _knee

WIDEST = "miniature/resid_post/layer_3_width_2k_l0_medium"
FEATURE = f"{WIDEST}/17"
PROMPTS = ('"""Return the', "<start_of_turn>def main(", "    for item in")
NEW = 14
BITS = 2e-3  # float32 against float64, through the logarithms of a vocabulary


@pytest.fixture(scope="module")
def plain(miniature):
    """The same model in float64, as transformers gives it."""
    return copy.deepcopy(miniature.hf).double()


@pytest.fixture(scope="module")
def feature(residual):
    maximum = steering.maximum_of(WIDEST, 17)
    return steering.feature(residual, 17, maximum=maximum, name=FEATURE)


def strengths(text):
    return [Strength.parse(part) for part in text.split(",")]


def dose(miniature, feature, text, prompts=PROMPTS, **more):
    return steering.dose(miniature, feature, prompts, strengths(text),
                         **{"max_new_tokens": NEW} | more)  # fmt: skip


class Reference:
    """Everything from the logits of calls of the whole text, the edit by a hook of our own."""

    def __init__(self, plain, tokenizer, sae, size):
        self.plain, self.tokenizer, self.size = plain, tokenizer, size
        self.row = sae.w_dec[17].double()
        self.column, self.bias = sae.w_enc[:, 17].double(), float(sae.b_enc[17])
        self.threshold = float(sae.activation.threshold[17])
        self.special = set(tokenizer.all_special_ids)
        promoted = ((1 + plain.model.norm.weight) * self.row) @ plain.lm_head.weight.T
        self.promoted = promoted.topk(10).indices

    def logits(self, ids, size):
        mask = torch.tensor([i not in self.special for i in ids])[:, None]
        seen = []

        def hook(_module, _args, output):
            x = output[0] if isinstance(output, tuple) else output
            new = x + size * mask * self.row
            seen.append(new[0])
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.plain.model.layers[3].register_forward_hook(hook)
        with torch.no_grad():
            out = self.plain(torch.tensor([ids]), use_cache=False).logits[0]
        handle.remove()
        return out.log_softmax(-1), seen[0]

    def rows(self, prompt):
        """`(numerator, denominator)` of each measure."""
        given = [2, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = list(given)
        for _ in range(NEW):
            ids.append(int(self.logits(ids, self.size)[0][-1].argmax()))
        q, x = self.logits(ids, self.size)
        p, _ = self.logits(ids, 0.0)
        kl = (p.exp() * (p - q)).sum(-1)
        asked = [t for t in range(len(given)) if ids[t] not in self.special]
        new = [t for t in range(len(given), len(ids)) if ids[t] not in self.special]
        before = [t - 1 for t in new]
        share = q.exp()[:, self.promoted].sum(-1)
        fired = x @ self.column + self.bias
        fired = torch.where(fired > self.threshold, fired, 0.0)
        n, made = len(new), [ids[t] for t in new]
        pairs = [tuple(made[k : k + 2]) for k in range(n - 1)]
        fours = [tuple(made[k : k + 4]) for k in range(n - 3)]
        return self.tokenizer.decode(ids[len(given) :]), {
            "promoted": (share[before].sum(), n), "promoted_at_end": (share[len(given) - 1], 1),
            "activation": (fired[new].sum(), n), "kl": (kl[asked].sum(), len(asked)),
            "kl_continuation": (kl[new].sum(), n),
            "perplexity": (-p[before, made].sum(), n),
            "distinct": (len(set(pairs)), n - 1), "repetition": (n - 3 - len(set(fours)), n - 3),
        }  # fmt: skip


def test_every_figure_is_that_of_plain_transformers(miniature, plain, residual, feature):
    found = dose(miniature, feature, "0.5xmax,2xmax")
    for point, times in zip((found.baseline, *found.points), (0.0, 0.5, 2.0), strict=True):
        reference = Reference(plain, miniature.tokenizer, residual, times * feature.maximum)
        texts, sums = zip(*map(reference.rows, PROMPTS), strict=True)
        assert point.continuations == texts
        for name, got in point.measures.items():
            over, under = (sum(float(s[name][k]) for s in sums) for k in (0, 1))
            end = math.exp if name == "perplexity" else float
            assert got.value == pytest.approx(end(over / under), rel=BITS, abs=1e-6), name
            each = [end(float(s[name][0]) / s[name][1]) for s in sums]
            # A resample of three prompts is one prompt three times in one case out of nine.
            assert got.low == pytest.approx(min(each), rel=BITS, abs=1e-6), name
            assert got.high == pytest.approx(max(each), rel=BITS, abs=1e-6), name
    assert found.promoted == tuple(miniature.tokenizer.decode([i]) for i in reference.promoted)


def test_a_zero_edit_is_no_edit(miniature, feature):
    found = dose(miniature, feature, "0")
    (point,) = found.points
    assert point.continuations == found.baseline.continuations
    for name in ("kl", "kl_continuation"):
        assert point.measures[name] == Measure(0.0, 0.0, 0.0)
    assert point.change.value == pytest.approx(0, abs=1e-9)
    assert found.knee is None
    assert "no strength at which the text still reads has a clear effect" in found.reason


def test_strengths_that_share_a_batch_are_those_by_themselves(miniature, feature):
    together = dose(miniature, feature, "0.5xmax,2,0.05xnorm,2xmax")
    for point in together.points:
        (alone,) = dose(miniature, feature, str(point.strength)).points
        assert alone.continuations == point.continuations
        for name, measure in point.measures.items():
            assert measure.value == pytest.approx(alone.measures[name].value, rel=1e-4, abs=1e-6)
    assert together.sizes() is None


def test_positions_and_modes(miniature, feature):
    generated = dose(miniature, feature, "2xmax", positions=Positions.parse("generated"))
    (point,) = generated.points
    assert point.measures["kl"].value == 0.0
    assert point.measures["promoted_at_end"] == generated.baseline.measures["promoted_at_end"]
    assert point.measures["kl_continuation"].value > 0.1
    (clamped,) = dose(miniature, feature, "1xmax", mode=Mode.SET).points
    added = dose(miniature, feature, "1xmax").points[0]
    # The feature is silent on these prompts: setting it is adding, until it fires by itself.
    assert clamped.measures["kl"].value == pytest.approx(added.measures["kl"].value, rel=1e-4)


def test_the_response_rises_with_the_dose(miniature, feature):
    prompts = steering.neutral_prompts(miniature)
    found = dose(miniature, feature, "0.25xmax,1xmax,4xmax", prompts, max_new_tokens=30)
    for name in ("promoted", "activation", "kl"):
        values = [p.measures[name].value for p in found.points]
        assert values == sorted(values)
        assert values[-1] > 5 * values[0]
    for point in found.points:
        for measure in filter(None, point.measures.values()):
            assert measure.low <= measure.value <= measure.high
    assert found.knee == Strength.parse("1xmax")
    assert found.points[-1].measures["repetition"].value > 0.9


@pytest.mark.parametrize("name", ["transcoder_all/layer_2_width_192_l0_small_affine",
                                  "clt/width_384_l0_medium_affine",
                                  "crosscoder/layer_1_2_3_4_width_384_l0_medium"])  # fmt: skip
def test_other_kinds_of_dictionaries(miniature, name):
    feature = steering.load_feature(f"miniature/{name}/5")
    found = dose(miniature, feature, "1xmax", max_new_tokens=5)
    assert found.effect == "promoted"
    assert found.points[0].measures["kl"].value > 0


def test_where_direct_logits_are_not_known(miniature, feature, monkeypatch):
    monkeypatch.setattr(type(miniature), "direct_logits", lambda *_: None)
    found = dose(miniature, feature, "1xmax", max_new_tokens=6)
    assert found.effect == "activation"
    assert found.json()["promoted"] is None
    assert found.points[0].measures["promoted"] is None
    assert found.points[0].change.value > 1


def test_what_cannot_be_measured_is_none(miniature, feature):
    one = dose(miniature, feature, "1xmax", PROMPTS[:1], max_new_tokens=1)
    measures = one.points[0].measures
    assert measures["distinct"] is None
    assert measures["repetition"] is None
    assert measures["kl"].low is None, "of one prompt there is no interval"
    assert json.loads(json.dumps(one.json()))["points"][0]["distinct"] is None
    assert "a single prompt does not say" in one.reason or one.knee is None


def test_samples_are_reproducible(miniature, feature):
    again = [
        dose(miniature, feature, "1xmax", PROMPTS[:2], samples=3, temperature=1.0, seed=s).json()
        for s in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]
    assert len(set(again[0]["points"][0]["continuations"])) == 6


def point(strength, perplexity, repetition=0.1, change=0.0):
    values = {"perplexity": perplexity, "repetition": repetition}
    measures = {n: None if v is None else Measure(*[float(v)] * 3) for n, v in values.items()}
    between = Measure(float(change), change - 0.01, change + 0.01)
    return Point(strength=strength, measures=measures, change=between, continuations=())


@pytest.mark.parametrize(
    ("text", "points", "knee", "why"),
    [
        ("1,2,4", [(3, 0.1, 0.1), (5, 0.2, 0.2), (7, 0.1, 0.4)], "2", "before perplexity"),
        # The order they are given in does not matter.
        ("4,1,2", [(7, 0.1, 0.4), (3, 0.1, 0.1), (5, 0.2, 0.2)], "2", "before perplexity"),
        # Text that goes round in circles is not surprising, and no good.
        ("1,2,4", [(3, 0.1, 0.1), (4, 0.9, 0.4), (3, 0.9, 0.9)], "1", "repeats itself"),
        # A strength beyond one that fails is none.
        ("1,2,4", [(3, 0.1, 0.1), (9, 0.1, 0.2), (3, 0.1, 0.4)], "1", "before"),
        # An effect that could be none is passed over.
        ("1,2,4", [(3, 0.1, 0.1), (4, 0.1, 0.005), (9, 0.1, 0.4)], "1", "before"),
        ("1,2", [(3, 0.1, 0.1), (4, 0.1, 0.2)], "2", "may lie beyond"),
        ("1,2", [(9, 0.1, 0.1), (12, 0.1, 0.2)], None, "comes apart at every strength"),
        ("1,2", [(3, 0.1, 0.0), (12, 0.1, 0.2)], None, "has a clear effect"),
        ("1,2", [(None, 0.1, 0.3), (12, 0.1, 0.2)], None, "comes apart"),
        # Both signs: the way on which more happens.
        ("-2,-1,1,2", [(4, 0.1, -0.6), (3, 0.1, -0.3), (3, 0.1, 0.1), (9, 0.1, 0.9)], "-2",
         "beyond"),
        # In the order given where units do not compare.
        ("1xmax,0.1xnorm", [(3, 0.1, 0.2), (9, 0.1, 0.3)], "1xmax", "before"),
        # Absolute strengths and maxima do compare, if the maximum is known: 1xmax is 3.
        ("2,1xmax", [(9, 0.1, 0.2), (3, 0.1, 0.3)], None, "has a clear effect"),
    ],
)  # fmt: skip
def test_the_knee(text, points, knee, why):
    given = strengths(text)
    made = [point(s, *values) for s, values in zip(given, points, strict=True)]
    found, reason = _knee([point(None, 2.5), *made], given, 3.0)
    assert found == (None if knee is None else Strength.parse(knee))
    assert why in reason


def test_no_knee_where_the_unsteered_model_says_nothing():
    (one,) = strengths("1")
    knee, reason = _knee([point(None, None), point(one, 3, 0, 1)], [one], None)
    assert knee is None
    assert "the unsteered model ends its text at once" in reason


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"strengths": []}, "no strengths were given"),
        ({"strengths": strengths("1,2,1")}, "the strength 1 was given twice"),
        ({"strengths": [Strength((1.0, 2.0))]}, "several strengths in one"),
        ({"mode": Mode.ABLATE}, "ablate has no strength to vary"),
        ({"mode": Mode.MULTIPLY, "strengths": strengths("1xmax")}, "multiply does not take"),
        ({"prompts": []}, "no prompts were given"),
        ({"prompts": [""]}, "an empty text was given"),
        ({"samples": 0}, "0 samples are none"),
        ({"positions": Positions.parse("40:50")}, "not in a prompt of"),
        ({"max_new_tokens": 600}, "more than the 512"),
        ({"strengths": strengths("1e37")}, "overflows float32"),
    ],
)
def test_what_is_refused(miniature, feature, more, match):
    given = {"prompts": PROMPTS, "strengths": strengths("1"), "max_new_tokens": 2} | more
    prompts, sweep = given.pop("prompts"), given.pop("strengths")
    with pytest.raises(InputError, match=match):
        steering.dose(miniature, feature, prompts, sweep, **given)


def test_the_command(command, tmp_path, file):
    drawn = tmp_path / "dose.svg"
    small = ("--max-new-tokens", 6, "--strengths", "0,1xmax,4xmax")
    code, out, _ = command("dose", FEATURE, *small, "--figure", drawn)
    assert code == 0
    assert "8 prompts of gemscope/miniature" in out
    assert "unsteered" in out
    assert "1xmax" in out
    first = drawn.read_bytes()
    command("dose", FEATURE, *small, "--figure", drawn)
    assert drawn.read_bytes() == first, "the same figure, the same bytes"
    lines = file("x = 1\n\nreturn self.\n")
    code, out, _ = command("dose", FEATURE, *small, "--prompts", lines, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["prompts"] == ["x = 1", "return self."]
    assert [p["strength"] for p in found["points"]] == ["0", "1xmax", "4xmax"]
    assert found["baseline"]["perplexity"]["low"] <= found["baseline"]["perplexity"]["value"]


def test_the_maximum_comes_from_the_store(command, small_store, indexed):
    given = ("dose", f"{indexed[0]}/3", "--max-new-tokens", 2, "--strengths", "1xmax", "--json")
    found = json.loads(command(*given, "--store", small_store)[1])
    from gemscope.features import Store

    assert found["maximum"] == Store.open(small_store).feature(indexed[0], 3)["max"]


def test_bad_commands(refused, tmp_path, file):
    refused("dose", "17", match="names no feature")
    refused("dose", f"{WIDEST}/5000", match="no feature 5000")
    refused("dose", FEATURE, "--strengths", "lots", match="no strength 'lots'")
    refused("dose", FEATURE, "--mode", "adds", match="no mode named 'adds'")
    refused("dose", FEATURE, "--figure", tmp_path / "a.gif", match="written as .svg, .png or .pdf")
    refused("dose", FEATURE, "--prompts", tmp_path / "none", match="cannot be read")
    refused("dose", FEATURE, "--prompts", file("\n"), match="holds no prompt")
    refused("dose", FEATURE, "--prompts", file("x"), "--prompt", "y", match="give one of them")
    refused("dose", FEATURE, "--samples", 2, "--temperature", 0, match="all 2 samples are the same")


def test_a_feature_that_never_fired_has_no_maximum(miniature, residual):
    assert hub.feature_of(FEATURE) == (WIDEST, 17)
    dead = steering.feature(residual, 17, maximum=0.0)
    with pytest.raises(InputError, match="never fired"):
        dose(miniature, dead, "1xmax")
    assert dose(miniature, dead, "8", max_new_tokens=3).maximum == 0.0
