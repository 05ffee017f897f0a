"""Every mode of steering against its formula, written in float64 (`steered.py`)."""

import re
from dataclasses import replace

import pytest
import torch
from steered import (
    DICTIONARIES,
    ON_DIRECTIONS,
    STRENGTHS,
    TEXTS,
    activation,
    bits,
    bound,
    change,
    encoder_of,
    expected,
    lively,
    run,
)

from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.sites import Site, each
from gemscope.steering import (
    Direction,
    Mode,
    Positions,
    Schedule,
    Steering,
    Strength,
    Unit,
    feature,
)


@pytest.fixture(scope="module")
def dictionaries():
    return {name: load_sae(address) for name, address in DICTIONARIES.items()}


def check(model, sae, index, mode, value, unit=Unit.ABSOLUTE, maximum=None, amount=1.0):
    """One edit, at every site it writes, against the formula."""
    what = feature(sae, index, maximum=maximum)
    one = change(what, mode, value, unit, amount=amount)
    site = encoder_of(sae, index)[0]
    assert what.reads == site
    before, after, _ = run(model, [one], dict.fromkeys([site, *what.rows]))
    counted = model.tokens(TEXTS).counts
    f, f_error, decided = activation(sae, index, before[site])
    assert (f[counted] > 0).any()
    assert decided[counted].all()
    moved = 0.0
    for written, row in what.rows.items():
        x, got = before[written], after[written]
        delta, c, direction = expected(mode, value, unit, maximum, f, row, x, counted)
        delta, c = amount * delta, amount * c
        limit = bound(mode, value, f_error, x, c, direction, got.double())
        assert ((got.double() - x.double() - delta).abs() <= limit).all(), written
        assert torch.equal(bits(got[~counted]), bits(x[~counted])), "special tokens are spared"
        moved = max(moved, delta.abs().max().item())
    assert moved > 1e-3, "the edit does something"


def test_rows_are_what_the_dictionary_writes(dictionaries):
    for sae in dictionaries.values():
        what = feature(sae, 5)
        rows = dict(zip(each(sae.writes), sae.rows([5])[0], strict=True))
        assert {s: r.any().item() for s, r in rows.items() if r.any()}.keys() == what.rows.keys()
        assert all(torch.equal(what.rows[s], rows[s]) for s in what.rows)
        _, column, bias, theta = encoder_of(sae, 5)
        assert torch.equal(what.column.double(), column)
        assert what.bias == pytest.approx(float(bias), rel=1e-7)
        assert what.threshold == pytest.approx(float(theta), rel=1e-7)


@pytest.mark.parametrize("mode", STRENGTHS)
@pytest.mark.parametrize("name", DICTIONARIES)
def test_the_stream_changes_by_the_formula(name, mode, miniature, dictionaries):
    sae = dictionaries[name]
    check(miniature, sae, lively(miniature, sae), mode, STRENGTHS[mode])


UNITS = [
    *((mode, unit) for mode in (Mode.ADD, Mode.OFFSET_IF_ACTIVE) for unit in Unit if unit),
    *((mode, Unit.MAX) for mode in (Mode.SET, Mode.SET_IF_ACTIVE, Mode.FLOOR, Mode.CAP)),
    (Mode.SET_PROJECTION, Unit.NORM),
]


@pytest.mark.parametrize(("mode", "unit"), UNITS)
@pytest.mark.parametrize("name", ["residual", "cross-layer"])
def test_units(name, mode, unit, miniature, dictionaries):
    sae = dictionaries[name]
    # A cap must be below what is there, and all else is felt anywhere.
    check(miniature, sae, lively(miniature, sae), mode, 0.25, unit, maximum=0.5)


@pytest.mark.parametrize("mode", [Mode.ADD, Mode.SET, Mode.SCALE_DIRECTION])
def test_an_amount_is_a_share_of_the_edit(mode, miniature, dictionaries):
    sae = dictionaries["residual"]
    check(miniature, sae, lively(miniature, sae), mode, STRENGTHS[mode], amount=0.3)


@pytest.mark.parametrize("mode", sorted(ON_DIRECTIONS))
def test_directions_of_any_origin(mode, miniature, generator):
    site = Site.parse("2.resid_pre")
    row = torch.randn(256, generator=generator)
    before, after, _ = run(miniature, [change(Direction(row, site), mode, STRENGTHS[mode])], [site])
    counted, x = miniature.tokens(TEXTS).counts, before[site]
    none = torch.zeros(x.shape[:2]).double()
    delta, c, unit = expected(mode, STRENGTHS[mode], Unit.ABSOLUTE, None, none, row, x, counted)
    limit = bound(mode, STRENGTHS[mode], none, x, c, unit, after[site].double())
    assert ((after[site].double() - x.double() - delta).abs() <= limit).all()
    assert delta.abs().max() > 1e-3


def test_the_logits_are_those_of_a_hand_written_hook(miniature, dictionaries):
    sae, counted = dictionaries["residual"], miniature.tokens(TEXTS).counts
    index = lively(miniature, sae)
    _, _, logits = run(miniature, [change(feature(sae, index), Mode.SET, 5.0)])

    def hook(_module, _args, out):
        x = out[0] if isinstance(out, tuple) else out
        f, _, _ = activation(sae, index, x)
        delta = torch.where(counted, 5.0 - f, 0.0)[..., None] * sae.w_dec[index].double()
        new = (x.double() + delta).float()
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = miniature.stack.layers[3].register_forward_hook(hook)
    by_hand = miniature.hf(miniature.tokens(TEXTS).ids).logits
    handle.remove()
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-3)
    plain = miniature.run(TEXTS, logits=True).logits
    assert torch.equal(bits(logits[:, 0]), bits(plain[:, 0]))
    assert (logits - plain)[counted].abs().max() > 0.1


# What cannot be done

VECTOR = Direction(torch.ones(256), Site.parse("2.resid_post"), name="mine")
MISTAKES = {
    "add needs a strength, such as 0.5xmax": lambda f: change(f, Mode.ADD),
    "multiply needs a strength, such as 0.5": lambda f: change(f, Mode.MULTIPLY),
    "ablate takes no strength, and 3 was given": lambda f: change(f, Mode.ABLATE, 3.0),
    "multiply does not take a strength of 3xmax": lambda f: change(f, Mode.MULTIPLY, 3.0, Unit.MAX),
    "set does not take a strength of 0.1xnorm": lambda f: change(f, Mode.SET, 0.1, Unit.NORM),
    "a strength of nan is no number": lambda f: change(f, Mode.ADD, float("nan")),
    "a strength of inf": lambda f: change(f, Mode.ADD, float("inf")),
    "a strength of  is no number": lambda f: change(f, Mode.ADD, ()),
    "an amount of nan is no share": lambda f: change(f, Mode.ADD, 1.0, amount=float("nan")),
    "nobody has measured how strongly": lambda f: change(f, Mode.ADD, 1.0, Unit.MAX),
    "mine is a vector of no dictionary and fires": lambda f: change(VECTOR, Mode.SET, 1.0),
    "mine is a vector of no dictionary and has": lambda f: change(VECTOR, Mode.ADD, 1.0, Unit.MAX),
    "vector holds numbers that are not finite": lambda f: Direction(
        torch.tensor([torch.nan]), f.reads
    ),
    "no strength 'much'": lambda f: Strength.parse("much"),
    "no strength '3xhuge'": lambda f: Strength.parse("3xhuge"),
    "no strength '3x'": lambda f: Strength.parse("3x"),
    "no mode named 'addd'": lambda f: Mode.parse("addd"),
    "no positions 'first'": lambda f: Positions.parse("first"),
    "no positions '1:2:3'": lambda f: Positions.parse("1:2:3"),
    "no positions ''": lambda f: Positions.parse(""),
    "the first -1 tokens": lambda f: Schedule(first=-1),
    "a decay of 1.5": lambda f: Schedule(decay=1.5),
    "a decay of nan": lambda f: Schedule(decay=float("nan")),
    "some keep the length": lambda f: Steering(
        [change(f, Mode.ADD, 1.0), change(f, Mode.ADD, 2.0, keep_norm=True)]
    ),
    "rows cannot be of one batch": lambda f: Steering(
        [change(f, Mode.ADD, (1.0, 2.0)), change(f, Mode.ADD, (1.0, 2.0, 3.0))]
    ),
}


@pytest.mark.parametrize("why", MISTAKES)
def test_mistakes_are_told(why, dictionaries):
    with pytest.raises(InputError, match=re.escape(why)) as told:
        MISTAKES[why](feature(dictionaries["residual"], 5))
    assert "\n" not in str(told.value)


def test_mistakes_that_a_run_tells(miniature, dictionaries):
    what = feature(dictionaries["residual"], 5)
    cases = {
        "strengths for 3 rows in a batch of 2": change(what, Mode.ADD, (1.0, 2.0, 3.0)),
        "positions 3:900 are not in a prompt of": change(
            what, Mode.ADD, 1.0, positions=Positions.parse("3:900")
        ),
        "positions 5:5 are not": change(what, Mode.ADD, 1.0, positions=Positions.parse("5:5")),
    }
    for why, one in cases.items():
        with pytest.raises(InputError, match=why):
            miniature.run(TEXTS, edits=[Steering([one])], logits=True)
    with pytest.raises(InputError, match="has features 0 to 383"):
        feature(dictionaries["residual"], 384)


def test_what_does_not_fit_the_model_is_told_beforehand(miniature, dictionaries):
    sae = dictionaries["residual"]
    foreign = replace(sae, origin=replace(sae.origin, model="google/gemma-3-1b-pt"))
    cases = {
        "belongs to google/gemma-3-1b-pt, not to": change(feature(foreign, 5), Mode.ADD, 1.0),
        r"mine has 3 numbers at 2\.resid_post, where .* has 256": change(
            Direction(torch.ones(3), VECTOR.site, name="mine"), Mode.ADD, 1.0
        ),
        r"9\.resid_post is not in": change(
            Direction(torch.ones(256), Site.parse("9.resid_post")), Mode.ADD, 1.0
        ),
        r"a strength of 1e\+30 on .*/5 overflows float32": change(feature(sae, 5), Mode.ADD, 1e30),
    }
    for why, one in cases.items():
        with pytest.raises(InputError, match=why):
            Steering([one]).check(miniature)
    Steering([change(feature(sae, 5), Mode.ADD, 1.0)]).check(miniature)
