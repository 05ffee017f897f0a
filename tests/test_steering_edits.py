"""Edits together: many at once, rows, positions, schedules, types, widths, and none at all."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steered import (
    DICTIONARIES,
    NEUTRAL,
    STRENGTHS,
    TEXTS,
    UNIT,
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
from gemscope.lm import load_model
from gemscope.sae import SAE, BatchTopK, JumpReLU, ReLU, TopK
from gemscope.sites import Site
from gemscope.steering import (
    Direction,
    Mode,
    Positions,
    Schedule,
    Steering,
    Unit,
    feature,
    load_feature,
)

RESIDUAL = DICTIONARIES["residual"]


@pytest.fixture(scope="module")
def dictionaries():
    return {name: load_sae(address) for name, address in DICTIONARIES.items()}


@pytest.fixture(scope="module")
def residual_big(dictionaries):
    return dictionaries["residual"]


@pytest.fixture(scope="module")
def active(miniature, residual_big):
    """Features that fire on a good part of the texts."""
    batch = miniature.tokens(TEXTS)
    x = miniature.run(batch, read=[residual_big.reads])[residual_big.reads][batch.counts]
    share = (residual_big.encode(x).dense() > 0).double().mean(0)
    return (share - 0.4).abs().argsort()[:4].tolist()


def test_features_of_one_site_are_read_from_the_unsteered_stream(miniature, residual_big, active):
    features = [feature(residual_big, i) for i in active[:3]]
    three = [
        change(features[0], Mode.SET, 6.0),
        change(features[1], Mode.MULTIPLY, 3.0),
        change(features[2], Mode.ADD, -2.0),
    ]
    site, counted = residual_big.reads, miniature.tokens(TEXTS).counts
    before, after, logits = run(miniature, three, [site])
    x, total, limit = before[site], 0.0, 2 * UNIT * after[site].double().abs()
    for one in three:
        f, f_error, _ = activation(residual_big, one.what.index, x)
        value, row = one.strength.value, one.what.rows[site]
        delta, c, direction = expected(one.mode, value, Unit.ABSOLUTE, None, f, row, x, counted)
        total = total + delta
        limit = limit + bound(one.mode, value, f_error, x, c, direction, after[site].double())
    assert ((after[site].double() - x.double() - total).abs() <= limit).all()
    for order in itertools.permutations(three):
        _, other, others = run(miniature, order, [site])
        assert ((other[site].double() - after[site].double()).abs() <= limit).all()
        torch.testing.assert_close(others, logits, rtol=0, atol=1e-3)
    apart = miniature.run(TEXTS, edits=[Steering([one]) for one in three[:1]], logits=True).logits
    assert (apart - logits).abs().max() > 0.01


def test_layers_and_sites_at_once(miniature, dictionaries):
    """Each is read from the stream that the edits below have made."""
    names = ("heads", "transcoder", "residual", "mlp")
    made = [
        change(feature(dictionaries[n], lively(miniature, dictionaries[n])), mode, STRENGTHS[mode])
        for n, mode in zip(names, (Mode.SET, Mode.ADD, Mode.FLOOR, Mode.MULTIPLY), strict=True)
    ]
    sites = {s for one in made for s in (one.what.reads, *one.what.rows)}
    before, after, _ = run(miniature, made, sites)
    plain, _, _ = run(miniature, [], sites)
    counted = miniature.tokens(TEXTS).counts
    for name, one in zip(names, made, strict=True):
        sae, (site,) = dictionaries[name], one.what.rows
        value, x = one.strength.value, before[site]
        f, f_error, _ = activation(sae, one.what.index, before[one.what.reads])
        delta, c, direction = expected(
            one.mode, value, Unit.ABSOLUTE, None, f, one.what.rows[site], x, counted
        )
        limit = bound(one.mode, value, f_error, x, c, direction, after[site].double())
        assert ((after[site].double() - x.double() - delta).abs() <= limit).all(), name
        assert (delta != 0).any()
        if site.layer > 2:
            assert not torch.equal(before[site], plain[site]), "edits below were felt"


@pytest.mark.parametrize("mode", [m for m in STRENGTHS if STRENGTHS[m] is not None])
def test_strengths_for_each_row_are_row_by_row(mode, miniature, residual_big, active):
    what, site = feature(residual_big, active[0]), residual_big.reads
    values = (STRENGTHS[mode], -0.5)
    together = run(miniature, [change(what, mode, values)], [site])
    for row, (text, value) in enumerate(zip(TEXTS, values, strict=True)):
        alone = run(miniature, [change(what, mode, value)], [site], [text])
        n = alone[2].shape[1]
        # Rows are multiplied in other blocks in a batch: the model itself is that far off.
        spread = run(miniature, [], [site])[2][row, :n] - run(miniature, [], [site], [text])[2][0]
        limit = 16 * spread.abs().max().item() + 1e-5
        torch.testing.assert_close(together[2][row, :n], alone[2][0], rtol=0, atol=limit)
    same = run(miniature, [change(what, mode, (values[0],) * 2)], [site])
    assert torch.equal(bits(same[2]), bits(run(miniature, [change(what, mode, values[0])])[2]))


# Where and when


def moved(model, site, *, prompt=None, texts=TEXTS, **where):
    """By what a direction of ones is added at each token of each row, `[batch, seq]`."""
    one = change(Direction(torch.ones(256), site), Mode.ADD, 64.0, **where)
    before, after, _ = run(model, [one], [site], texts, prompt=prompt)
    return (after[site] - before[site]).mean(-1) / 64


PROMPT = (9, 6)
WHERE = {
    "all": lambda p, n, length: True,
    "prompt": lambda p, n, length: p < n,
    "generated": lambda p, n, length: p >= n,
    "last": lambda p, n, length: p == n - 1,
    "2:5": lambda p, n, length: 2 <= p < 5,
    "3": lambda p, n, length: p == 3,
    "0": lambda p, n, length: p == 0,
    "-2:": lambda p, n, length: n - 2 <= p < n,
    ":-1": lambda p, n, length: p < n - 1,
    "-1": lambda p, n, length: p == n - 1,
    "last+generated": lambda p, n, length: p >= n - 1,
    "0+generated": lambda p, n, length: p == 0 or p >= n,
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", WHERE)
def test_positions(text, special, miniature):
    texts = [TEXTS[0][:60] + "<start_of_turn>" + TEXTS[0][60:], TEXTS[1]]
    batch = miniature.tokens(texts)
    lengths = (batch.ids != 0).sum(1)
    got = moved(miniature, Site.parse("2.resid_post"), prompt=PROMPT, texts=texts,
                positions=Positions.parse(text, special=special))  # fmt: skip
    named = not text.replace("+", "").isalpha() or "last" in text
    for row, (n, length) in enumerate(zip(PROMPT, lengths.tolist(), strict=True)):
        for p in range(batch.ids.shape[1]):
            wanted = p < length and WHERE[text](p, n, length)
            if wanted and not special and not batch.counts[row, p]:
                # Special tokens are spared unless a span or `last` names them.
                wanted = named and any(
                    WHERE[part](p, n, length)
                    for part in text.split("+")
                    if part not in ("all", "prompt", "generated")
                )
            assert got[row, p].item() == pytest.approx(float(wanted), abs=1e-4), (row, p)


@pytest.mark.parametrize("first", [None, 0, 3])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_schedules(first, decay, miniature):
    got = moved(miniature, Site.parse("2.resid_post"), prompt=PROMPT,
                schedule=Schedule(first=first, decay=decay))  # fmt: skip
    counted = miniature.tokens(TEXTS).counts
    for row, n in enumerate(PROMPT):
        for p in counted[row].nonzero().flatten().tolist():
            step = p - n
            wanted = 1.0 if step < 0 else decay**step
            if first is not None and step >= first:
                wanted = 0.0
            assert got[row, p].item() == pytest.approx(wanted, abs=1e-4)


def test_the_norm_is_kept(miniature, residual_big, active):
    site, counted = residual_big.reads, miniature.tokens(TEXTS).counts
    one = change(feature(residual_big, active[0]), Mode.ADD, 40.0, keep_norm=True)
    before, after, _ = run(miniature, [one], [site])
    x, got = before[site].double(), after[site].double()
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    new = x + 40.0 * one.what.rows[site].double()
    new = new * (x.norm(dim=-1) / new.norm(dim=-1))[..., None]
    torch.testing.assert_close(got[counted], new[counted], rtol=1e-5, atol=1e-5)
    assert torch.equal(bits(after[site][~counted]), bits(before[site][~counted]))


# No edit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_edits_of_nothing_are_no_edit_bit_for_bit(name, dtype, dictionaries, miniature):
    model = miniature if dtype == "float32" else load_model("miniature", device="cpu", dtype=dtype)
    sae = dictionaries[name]
    what = feature(sae, lively(miniature, sae), maximum=3.0)
    plain = model.run(TEXTS, logits=True).logits
    everywhere = {"positions": Positions(special=True)}
    nothing = [
        *(change(what, mode, value, amount=0.0, **everywhere) for mode, value in STRENGTHS.items()),
        *(change(what, mode, value, **everywhere) for mode, value in NEUTRAL.items()),
        change(what, Mode.ADD, 0.0, Unit.MAX), change(what, Mode.ADD, 0.0, Unit.NORM),
        change(what, Mode.ADD, 0.0, Unit.CURRENT), change(what, Mode.ADD, (0.0, 0.0)),
        change(what, Mode.ADD, 3.0, positions=Positions.parse("generated")),
        change(what, Mode.SET, 3.0, amount=0.0, keep_norm=True),
    ]  # fmt: skip
    if isinstance(sae, SAE):
        nothing.append(change(what, Mode.REPLACE, None, amount=0.0))
    for one in nothing:
        got = model.run(TEXTS, edits=[Steering([one])], logits=True).logits
        assert torch.equal(bits(got), bits(plain)), (one.mode, one.strength)
    one = change(what, Mode.ADD, 3.0)
    assert not torch.equal(model.run(TEXTS, edits=[Steering([one])], logits=True).logits, plain)


# Types


@pytest.mark.parametrize("mode", STRENGTHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_deltas_are_float32_and_cast_at_the_end(dtype, mode, residual_big, active):
    model = load_model("miniature", device="cpu", dtype=dtype)
    what, site = feature(residual_big, active[0]), residual_big.reads
    before, after, _ = run(model, [change(what, mode, STRENGTHS[mode])], [site])
    x, got, counted = before[site], after[site], model.tokens(TEXTS).counts
    assert got.dtype == getattr(torch, dtype)
    f, f_error, decided = activation(residual_big, active[0], x)
    if dtype == "float64":
        # It is read as float32.
        f_error = f_error + UNIT * (x.abs() @ residual_big.w_enc[:, active[0]].double().abs())
    value, row = STRENGTHS[mode], what.rows[site]
    delta, c, direction = expected(mode, value, Unit.ABSOLUTE, None, f, row, x, counted)
    limit = bound(mode, value, f_error, x, c, direction, torch.zeros(1).double())
    limit = limit + UNIT * delta.abs()
    if dtype == "bfloat16":
        # The sum in float32, then to the 8 bits that are kept.
        limit = limit * 2 + (2.0**-8 + UNIT) * (x.double() + delta).abs()
    else:
        limit = limit + 2.0**-52 * (x + delta).abs()
    off = (got.double() - x.double() - delta).abs()
    assert (off <= limit)[decided | ~counted].all()


# Activation functions and widths


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("mode", [Mode.SET, Mode.ABLATE, Mode.SET_IF_ACTIVE, Mode.ADD])
def test_other_activation_functions(kind, mode, miniature, residual_big, active):
    function = ReLU() if kind == "relu" else TopK(30)
    sae = replace(residual_big, activation=function)
    what, site = feature(sae, active[0]), sae.reads
    assert what.threshold == (0.0 if kind == "relu" else None)
    before, after, _ = run(miniature, [change(what, mode, STRENGTHS[mode])], [site])
    x, counted = before[site], miniature.tokens(TEXTS).counts
    pre = x.double() @ sae.w_enc.double() + sae.b_enc.double()
    own, f_error, _ = activation(sae, active[0], x)
    f = own
    if kind == "topk":
        kept = pre >= pre.topk(30, dim=-1).values[..., -1:]
        f = torch.where(kept[..., active[0]], pre[..., active[0]].clamp_min(0), 0.0)
        assert not torch.equal(f > 0, own > 0)
    assert (f[counted] > 0).any()
    row = what.rows[site]
    delta, c, direction = expected(mode, STRENGTHS[mode], Unit.ABSOLUTE, None, f, row, x, counted)
    limit = bound(mode, STRENGTHS[mode], f_error, x, c, direction, after[site].double())
    assert ((after[site].double() - x.double() - delta).abs() <= limit).all()


def test_batch_topk_is_refused(residual_big):
    with pytest.raises(InputError, match="fires depends on the whole batch; give it the threshold"):
        feature(replace(residual_big, activation=BatchTopK(3)), 0)


def test_a_negative_threshold_lets_nothing_negative_through(miniature, residual_big, active):
    threshold = torch.full_like(residual_big.activation.threshold, -1.0)
    sae = replace(residual_big, activation=JumpReLU(threshold))
    before, after, _ = run(miniature, [change(feature(sae, active[0]), Mode.ABLATE)], [sae.reads])
    x, (site, column, bias, _) = before[sae.reads].double(), encoder_of(sae, active[0])
    f = (x @ column + bias).clamp_min(0)
    f[~miniature.tokens(TEXTS).counts] = 0
    delta = -f[..., None] * sae.w_dec[active[0]].double()
    torch.testing.assert_close(after[site].double() - x, delta, rtol=1e-4, atol=1e-4)


STATUS = Path("/proc/self/status")


def anonymous():
    return next(
        int(line.split()[1]) * 1024
        for line in STATUS.read_text().splitlines()
        if line.startswith("RssAnon")
    )


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="memory is asked of Linux")
def test_a_million_features_cost_what_a_vector_costs(tmp_path, miniature):
    from test_wide import wide

    columns, numbers = wide(tmp_path / "made", 256, 1_048_576, "BF16")
    pick, place = int(columns[100]), 100
    memory = anonymous()
    what = load_feature(f"{tmp_path / 'made'}/{pick}")
    # All of the encoder in float32 would be 1 GB; the thresholds alone are 4 MB.
    assert anonymous() - memory < 20e6
    began = time.perf_counter()
    feature(what.sae, int(columns[200]))
    assert time.perf_counter() - began < 0.5, "a column and a row are read, and nothing else"
    assert torch.equal(what.column.double(), numbers["w_enc"][:, place])
    assert torch.equal(what.rows[what.reads].double(), numbers["w_dec"][place])
    vector = Direction(what.rows[what.reads], what.reads)
    edits = {
        "wide": [Steering([change(what, Mode.SET, 3.0)])],
        "vector": [Steering([change(vector, Mode.ADD, 3.0)])],
    }
    times = {name: [] for name in edits}
    for _ in range(15):
        for name, edit in edits.items():
            began = time.perf_counter()
            miniature.run(TEXTS, edits=edit, logits=True)
            times[name].append(time.perf_counter() - began)
    fastest = {name: min(found) for name, found in times.items()}
    assert fastest["wide"] < 1.3 * fastest["vector"], fastest
    assert anonymous() - memory < 60e6


# In the place of what is there


def reconstruction(sae, x, changed=()):
    """`decode(f')`, with features at other values; float64."""
    pre = x.double() @ sae.w_enc.double() + sae.b_enc.double()
    f = torch.where(pre > sae.activation.threshold.double().clamp_min(0), pre, 0.0)
    for index, value in changed:
        f[..., index] = value
    return f @ sae.w_dec.double() + sae.b_dec.double()


def test_replace_drops_the_error(miniature, residual_big, active):
    site, counted = residual_big.reads, miniature.tokens(TEXTS).counts
    # Two features of one dictionary, loaded one by one, share one reconstruction.
    one, two = (load_feature(f"{RESIDUAL}/{i}") for i in active[:2])
    cases = [
        ([change(one, Mode.REPLACE)], []),
        ([change(one, Mode.REPLACE, 7.0)], [(active[0], 7.0)]),
        (
            [change(one, Mode.REPLACE, 7.0), change(two, Mode.REPLACE, 2.0)],
            [(active[0], 7.0), (active[1], 2.0)],
        ),
    ]
    for changes, values in cases:
        before, after, _ = run(miniature, changes, [site])
        wanted = reconstruction(residual_big, before[site], values)
        got = after[site].double()
        torch.testing.assert_close(got[counted], wanted[counted], rtol=1e-4, atol=1e-3)
        assert torch.equal(bits(after[site][~counted]), bits(before[site][~counted]))


def test_replacements_that_contradict_each_other(miniature, residual_big, active):
    one, two = (load_feature(f"{RESIDUAL}/{i}") for i in active[:2])
    how = [Positions.parse("2:4"), Positions.parse("5:8")]
    parts = [
        change(f, Mode.REPLACE, 7.0, positions=p) for f, p in zip((one, two), how, strict=True)
    ]
    with pytest.raises(InputError, match="replaced at different tokens; give them the same posi"):
        Steering(parts)
    other = load_feature(f"{RESIDUAL.replace('big', 'small')}/3")
    with pytest.raises(InputError, match="of another dictionary both replace what is at 3"):
        Steering([change(one, Mode.REPLACE), change(other, Mode.REPLACE)])


def test_the_largest_of_a_prompt_without_text_is_nothing(miniature, residual_big, active):
    one = change(feature(residual_big, active[0]), Mode.MAX_RELATIVE, 2.0)
    plain = miniature.run(TEXTS, logits=True).logits
    got = miniature.run(TEXTS, edits=[Steering([one])], logits=True, prompt=1).logits
    assert torch.equal(bits(got), bits(plain))
