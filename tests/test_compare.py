"""Two texts against each other: documents are the units, and the figures are what they say."""

import csv
import json
from itertools import pairwise

import numpy as np
import pytest
from planted import dense_code, side, text_of
from scipy import stats

from gemscope.features import Activations, Store, write_activations
from gemscope.relate import (
    benjamini_hochberg,
    compare,
    compare_documents,
    group_counts,
    log_odds,
    write_csv,
)

SMALL = "miniature/attn_out_all/layer_3_width_128_l0_small"
KEYS = ["feature", "density_a", "density_b", "log_odds", "low", "high", "q"]


def clustered(rng, density, tokens, concentration):
    """Firings `[n_features, n_documents]`: each document has a density of its own."""
    a = density * concentration
    p = rng.beta(a[:, None], (concentration - a)[:, None], size=(len(density), len(tokens)))
    return rng.binomial(tokens[None], p)


def null_sides(rng, m_a, m_b, *, n=3_000, concentration=50.0):
    tokens = np.exp(rng.normal(7, 0.7, m_a + m_b)).astype(int) + 50
    k = clustered(rng, 10 ** rng.uniform(-2.3, -0.7, n), tokens, concentration)
    return side(k[:, :m_a], tokens[:m_a]), side(k[:, m_a:], tokens[m_a:])


def answer(done):
    code, out, err = done
    assert code == 0, err
    return json.loads(out)


# --- counts -----------------------------------------------------------------------------------


def test_sums_over_documents_are_those_of_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 9)
    text = text_of(lengths, [0, 0, 0, 0, 1, 1, 1, 1, 1])
    firing = rng.random((lengths.sum(), 7)) * (rng.random((lengths.sum(), 7)) < 0.2)
    made = write_activations(tmp_path, text, {"x": dense_code(text, firing)})
    found = compare(made, "x", "source 0", "source 1")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    k = np.array([(firing[a:b] > 0).sum(0) for a, b in pairwise(ends)]).T
    for got, rows in ((found.a, range(4)), (found.b, range(4, 9))):
        want = side(k[:, list(rows)], lengths[list(rows)])
        assert (got.documents, got.tokens) == (want.documents, want.tokens)
        for name in ("fired", "squares", "products", "documents_fired", "density"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name))


def test_documents_without_tokens_that_count_are_none(tmp_path):
    text = text_of([5, 5, 5, 0, 5])
    made = write_activations(tmp_path, text, {"x": dense_code(text, np.ones((20, 2)))})
    (found,) = group_counts(made, "x", [("a", np.array([0, 3, 4]))])
    assert (found.documents, found.tokens) == (2, 10)
    with pytest.raises(ValueError, match=r"a gave 1 document: .* 2 or more"):
        group_counts(made, "x", [("a", np.array([0, 3]))])
    with pytest.raises(ValueError, match="share documents"):
        compare_documents(made, "x", ("a", np.array([0, 1])), ("b", np.array([1, 2])))


# --- the test ---------------------------------------------------------------------------------


def test_the_statistic_is_welchs_where_documents_are_equally_long():
    rng = np.random.default_rng(1)
    tokens = np.full(24, 400)
    k = clustered(rng, np.full(50, 0.05), tokens, 40.0)
    found = log_odds(side(k[:, :9], tokens[:9]), side(k[:, 9:], tokens[9:]))
    want = stats.ttest_ind(k[:, :9], k[:, 9:], axis=1, equal_var=False)
    often = ((k[:, :9] > 0).sum(1) >= 5) & ((k[:, 9:] > 0).sum(1) >= 5)
    assert often.sum() > 40
    np.testing.assert_allclose(found.t[often], want.statistic[often])
    np.testing.assert_allclose(found.df[often], want.df[often])
    np.testing.assert_allclose(found.p[often], want.pvalue[often])


@pytest.mark.parametrize(("m_a", "m_b"), [(20, 20), (8, 8), (12, 24)])
def test_p_values_are_uniform_where_nothing_differs(m_a, m_b):
    a, b = null_sides(np.random.default_rng(2), m_a, m_b)
    p = log_odds(a, b).p
    # Of 3,000 features a share of 0.05 has a standard error of 0.004; the rest is what is allowed
    # to a t of skewed counts.
    assert stats.kstest(p, "uniform").statistic < 0.05
    assert 0.025 < (p < 0.05).mean() < 0.065
    assert (p < 0.001).mean() < 0.003


def test_counting_tokens_would_find_differences_where_there_are_none():
    a, b = null_sides(np.random.default_rng(2), 20, 20)
    pooled = (a.fired + b.fired) / (a.tokens + b.tokens)
    error = np.sqrt(pooled * (1 - pooled) * (1 / a.tokens + 1 / b.tokens))
    p = 2 * stats.norm.sf(np.abs(a.density - b.density) / error)
    assert (p < 0.05).mean() > 0.5
    assert stats.kstest(p, "uniform").statistic > 0.4


def test_false_discoveries_are_as_few_as_asked_for():
    rng = np.random.default_rng(3)
    shares, power = [], []
    for _ in range(10):
        tokens = np.exp(rng.normal(7, 0.5, 40)).astype(int) + 50
        density = 10 ** rng.uniform(-2, -1, 1_000)
        other = density.copy()
        other[:200] *= 3
        k = clustered(rng, density, tokens[:20], 80.0), clustered(rng, other, tokens[20:], 80.0)
        q = benjamini_hochberg(log_odds(side(k[0], tokens[:20]), side(k[1], tokens[20:])).p)
        found = q <= 0.1
        shares.append(found[200:].sum() / max(found.sum(), 1))
        power.append(found[:200].mean())
    assert np.mean(shares) < 0.12
    assert np.mean(power) > 0.5


def test_halves_of_one_text_do_not_differ(small_store, indexed):
    made = Store.open(small_store).activations(indexed[1])
    rng, found, share, by_tokens = np.random.default_rng(0), 0, [], []
    for _ in range(10):
        order = rng.permutation(len(made.text.paths))
        half = len(order) // 2
        one = compare_documents(made, indexed[1], ("a", order[:half]), ("b", order[half:]))
        found += (one.q <= 0.05).any()
        share.append((one.odds.p < 0.05).mean())
        pooled = (one.a.fired + one.b.fired) / (one.a.tokens + one.b.tokens)
        error = np.sqrt(pooled * (1 - pooled) * (1 / one.a.tokens + 1 / one.b.tokens))
        z = np.abs(one.a.density - one.b.density) / np.where(error > 0, error, np.inf)
        by_tokens.append((z > 1.96).mean())
    # Features of one split are not independent of each other: the mean over splits is told.
    assert found <= 1
    assert np.mean(share) < 0.08
    assert np.mean(by_tokens) > 0.3


def test_q_values_are_those_of_scipy():
    p = np.random.default_rng(4).random(200) ** 2
    p[5] = p[9]
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    assert benjamini_hochberg(np.array([])).shape == (0,)


@pytest.mark.parametrize("m", [2, 5, 20])
def test_intervals_leave_out_zero_exactly_where_p_is_small(m):
    rng = np.random.default_rng(5)
    tokens = rng.integers(200, 2_000, 2 * m)
    k = np.concatenate([
        clustered(rng, np.full(400, 0.02), tokens[:m], 100.0),
        clustered(rng, rng.uniform(0.0001, 0.1, 400), tokens[m:], 100.0),
    ], axis=1)  # fmt: skip
    k[:20, m:] = 0
    found = log_odds(side(k[:, :m], tokens[:m]), side(k[:, m:], tokens[m:]))
    assert (((found.low > 0) | (found.high < 0)) == (found.p < 0.05)).all()
    assert (found.low <= found.value).all()
    assert (found.value <= found.high).all()
    assert (found.high > found.low).all()
    for array in (found.value, found.low, found.high, found.p):
        assert np.isfinite(array).all()


def test_intervals_hold_the_true_log_odds_as_often_as_they_say():
    rng = np.random.default_rng(6)
    tokens = rng.integers(300, 3_000, 40)
    density = 10 ** rng.uniform(-2, -1, 3_000)
    odds = density / (1 - density) * np.e
    other = odds / (1 + odds)
    found = log_odds(
        side(clustered(rng, other, tokens[:20], 100.0), tokens[:20]),
        side(clustered(rng, density, tokens[20:], 100.0), tokens[20:]),
    )
    inside = ((found.low <= 1) & (found.high >= 1)).mean()
    assert 0.92 < inside < 0.97
    assert abs(np.median(found.value) - 1) < 0.05


def test_sides_are_treated_alike():
    a, b = null_sides(np.random.default_rng(7), 6, 9, n=200)
    one, two = log_odds(a, b), log_odds(b, a)
    np.testing.assert_allclose(one.value, -two.value, atol=1e-9)
    np.testing.assert_allclose(one.low, -two.high, atol=1e-6)
    np.testing.assert_allclose(one.p, two.p)


def test_few_documents_promise_little():
    n = np.full(4, 1_000)
    # Ten times as dense, in two documents a side that agree to a firing: t has 2 degrees of
    # freedom or fewer, and equal documents are not taken for certainty.
    k = np.array([[50, 50, 5, 5], [0, 0, 0, 0], [7, 0, 0, 0], [1000, 1000, 1000, 1000]])
    found = log_odds(side(k[:, :2], n[:2]), side(k[:, 2:], n[2:]))
    assert found.high[0] - found.low[0] > 1
    assert found.value[0] == pytest.approx(np.log(10), abs=0.2)
    assert found.p[1] == found.p[3] == 1
    assert found.value[1] == found.value[3] == 0
    assert found.p[2] > 0.2


# --- what is shown ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two folders of a few files each, code and prose, and one file."""
    root = tmp_path_factory.mktemp("texts")
    for i in range(4):
        for name, line in (
            ("code", f"def f{i}(self, x):\n    return self.x[{i}] + len(x)\n\n"),
            ("prose", f"The {i} strings of a path are read and returned as a list of words.\n"),
        ):
            (root / name).mkdir(exist_ok=True)
            (root / name / f"{i}.txt").write_text(line * (10 + 3 * i))
    return root


@pytest.fixture
def sides(library):
    return ["--a", f"code={library / 'code'}", "--b", f"prose={library / 'prose'}"]


def test_compare_prints_rows_of_fixed_keys(command, sides, tmp_path):
    kept = tmp_path / "kept"
    rows = answer(command("compare", SMALL, *sides, "--keep", kept, "--context", 128, "--json"))
    assert all(list(row) == KEYS for row in rows)
    assert sorted(row["feature"] for row in rows) == list(range(128))
    # By hand from the activations that were kept.
    made = Activations.open(kept)
    text = made.text
    counted = text.document_of(np.flatnonzero(text.counts))
    tokens = [int((text.source[counted] == s).sum()) for s in (0, 1)]
    for row in rows:
        places, _ = made.of(SMALL, row["feature"])
        of = text.source[text.document_of(places)]
        assert row["density_a"] == pytest.approx((of == 0).sum() / tokens[0])
        assert row["density_b"] == pytest.approx((of == 1).sum() / tokens[1])
        assert row["low"] <= row["log_odds"] <= row["high"]
        assert 0 <= row["q"] <= 1
    told = [row for row in rows if row["q"] <= 0.05]
    assert told[0]["log_odds"] > 0 > told[-1]["log_odds"]
    # The same again, from what is kept, without the model running.
    assert (
        answer(command("compare", SMALL, *sides, "--keep", kept, "--context", 128, "--json"))
        == rows
    )


def test_compare_tells_tables_contexts_figures_and_csv(command, sides, tmp_path):
    files = tmp_path / "c.svg", tmp_path / "c.csv"
    code, out, err = command(
        "compare", SMALL, *sides, "--plot", files[0], "--csv", files[1], "--context", 128
    )
    assert code == 0, err
    assert "Denser in code" in out
    assert "Denser in prose" in out
    assert "«" in out  # a context, its peak marked
    assert "density in prose" in files[0].read_text()
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == 128
    assert {*KEYS, "p", "cohens_h", "d", "promoted", "context in code"} <= rows[0].keys()


def test_several_are_each_compared_with_the_first(command, sides, library, tmp_path):
    done = command(
        "compare",
        SMALL,
        *sides,
        "--b",
        f"again={library / 'code'}",
        "--context",
        128,
        "--json",
        "--details",
    )
    rows = answer(done)
    assert {row["b"] for row in rows} == {"prose", "again"}
    same = [row for row in rows if row["b"] == "again"]
    assert all(row["q"] == 1 or abs(row["log_odds"]) < 1e-9 for row in same)
    assert any(row.get("contexts", {}).get("prose") for row in rows)


def test_compare_takes_explanations_from_a_store(command, sides, own_store, indexed):
    from gemscope.features import Explanation

    options = [indexed[1], *sides, "--context", 128]
    best = answer(command("compare", *options, "--json"))[0]["feature"]
    said = Explanation(
        dictionary=indexed[1], feature=best, text="a word of ours", method="imported", author="us"
    )
    Store.open(own_store).add_explanations([said])
    code, out, err = command("compare", *options, "--store", own_store)
    assert code == 0, err
    assert "a word of ours" in out


def test_csv_cells_are_no_formulas(tmp_path):
    text = text_of([5, 5, 5, 5], [0, 0, 1, 1])
    firing = np.random.default_rng(0).random((20, 2)) < 0.5
    made = write_activations(tmp_path / "a", text, {"x": dense_code(text, firing)})
    file = tmp_path / "x.csv"
    write_csv([compare(made, "x", "source 0", "source 1")], file, {0: {"promoted": "=1+1"}})
    assert {row["promoted"] for row in csv.DictReader(file.read_text().splitlines())} == {
        "'=1+1",
        "",
    }


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--a", "x={one}", "--b", "y={many}"], "x is 1 document: .* 2 or more; give a folder"),
        (["--a", "x={many}", "--b", "x={many}"], "need names of their own, and these are x, x"),
        (["--a", "x={many}", "--b", "nowhere"], "no text at 'nowhere'"),
        (["--a", "x={many}", "--b", "y={many}", "--plot", "x.bmp"], "as .svg, .png or .pdf"),
        (["--a", "x={many}", "--b", "y={many}", "--csv", "no/x.csv"], "there is no folder"),
        (["--a", "x={many}", "--b", "y={many}", "--details"], "give --json with it"),
        (["--a", "x={many}", "--b", "y={many}", "--store", "no"], "no catalog store at no"),
    ],
)  # fmt: skip
def test_compare_says_what_it_needs(refused, library, extra, match):
    names = {"one": library / "code" / "0.txt", "many": library / "code"}
    refused("compare", SMALL, *(e.format(**names) for e in extra), match=match)
