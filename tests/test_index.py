"""Every statistic of the index against the same counted one by one, from dense activations."""

from collections import Counter

import numpy as np
import pytest
import torch

from gemscope import features, hub
from gemscope.errors import InputError
from gemscope.features import Entries, Keep, Store
from gemscope.features._statistics import Measurer

N = 384


@pytest.fixture(scope="module")
def store(small_store):
    return Store.open(small_store)


@pytest.fixture(scope="module")
def brute(store, indexed, miniature):
    """Dense activations `[n_places, d_sae]` of the first dictionary, a context at a time."""
    sae, text = hub.load_sae(indexed[0]), store.text(indexed[0])
    out = np.zeros((len(text.ids), N), dtype=np.float32)
    pre = np.full((len(text.ids), N), -np.inf, dtype=np.float32)
    for c in range(text.n_contexts):
        first, stop = text.offsets[c], text.offsets[c + 1]
        batch = text.batch(c, c + 1, 0)
        with torch.no_grad():
            x = miniature.run(batch, read=[sae.reads])[sae.reads][0].float()
        z = (x.double() @ sae.w_enc.double() + sae.b_enc.double()).float()
        fires = z > sae.activation.threshold
        keep = batch.counts[0][:, None]
        out[first:stop] = torch.where(fires & keep, z, 0.0).numpy()
        pre[first:stop] = torch.where(keep, z, -torch.inf).numpy()
    return out, pre


@pytest.fixture(scope="module")
def rows(store, indexed):
    return store.features(indexed[0]).to_pylist()


@pytest.fixture(scope="module")
def exact(brute, store, indexed):
    """Activations as kept, after checking that they are those of the brute computation."""
    dense, _ = brute
    kept = np.zeros_like(dense)
    for f in range(N):
        places, values = store.activations(indexed[0]).of(indexed[0], f)
        kept[places, f] = values
    # A sum in another order may fall on the other side of a threshold once in a million.
    assert ((kept > 0) != (dense > 0)).sum() <= 2
    same = (kept > 0) & (dense > 0)
    np.testing.assert_allclose(kept[same], dense[same], rtol=2e-5, atol=2e-5)
    return kept


def test_bos_is_in_the_input_and_in_no_statistic(store, indexed, exact, miniature):
    text = store.text(indexed[0])
    bos = text.ids == miniature.tokenizer.bos_token_id
    assert bos[text.offsets[:-1]].all()
    assert not text.counts[bos].any()
    assert not exact[~text.counts].any()
    assert text.n_tokens == 20_000


def test_counts_means_and_maxima(rows, exact):
    for f, row in enumerate(rows):
        column = exact[:, f].astype(np.float64)
        assert row["count"] == (column > 0).sum()
        assert row["density"] == row["count"] / 20_000
        assert row["mean"] == pytest.approx(column.sum() / 20_000)
        assert row["mean_active"] == pytest.approx(column[column > 0].mean())
        assert row["max"] == np.float32(column.max())


def test_quantiles_are_those_of_numpy(rows, exact):
    shares = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
    for f, row in enumerate(rows):
        fires = exact[:, f][exact[:, f] > 0].astype(np.float64)
        np.testing.assert_allclose(row["quantiles"], np.quantile(fires, shares), rtol=1e-12)


def test_histogram_bins_are_quarter_octaves(rows, exact):
    for f, row in enumerate(rows):
        first, counts = row["histogram"]["first"], row["histogram"]["counts"]
        edges = 2.0 ** (np.arange(first, first + len(counts) + 1) / 4)
        found = Counter(np.searchsorted(edges, exact[:, f][exact[:, f] > 0], side="right") - 1)
        assert [found[b] for b in range(len(counts))] == counts


def test_where_it_fires(rows, exact, store, indexed):
    text = store.text(indexed[0])
    position = np.concatenate([np.arange(n) for n in np.diff(text.offsets)])
    document = np.repeat(text.document, np.diff(text.offsets))
    firsts = {int(o) + int(np.argmax(text.counts[o:e])) for o, e in
              zip(text.offsets[:-1], text.offsets[1:], strict=True)}  # fmt: skip
    for f, row in enumerate(rows):
        places = np.flatnonzero(exact[:, f])
        bins = Counter(int(p).bit_length() - 1 for p in position[places])
        assert {b: c for b, c in enumerate(row["positions"]) if c} == dict(bins)
        assert row["documents"] == len(set(document[places]))
        assert row["first_share"] == pytest.approx(len(firsts & set(places)) / len(places))
        assert row["source_densities"] == [row["density"]]


@pytest.mark.parametrize(("name", "shift"), [("tokens", 0), ("before", -1), ("after", 1)])
def test_tokens_and_their_neighbours(rows, exact, store, indexed, miniature, name, shift):
    text = store.text(indexed[0])
    context = np.repeat(np.arange(text.n_contexts), np.diff(text.offsets))
    for f in range(0, N, 7):
        places = np.flatnonzero(exact[:, f])
        beside = [p + shift for p in places if 0 <= p + shift < len(text.ids)]
        found = Counter(
            int(text.ids[b]) for b in beside if context[b] == context[b - shift]
        )  # fmt: skip
        ranked = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        assert [(t["id"], t["count"]) for t in rows[f][name]] == ranked
        for t in rows[f][name]:
            assert t["share"] == t["count"] / len(places)
            assert t["token"] == miniature.tokenizer.decode([t["id"]])


def test_pairs_are_counted_over_the_whole_text(rows, exact):
    fires = (exact > 0).astype(np.float64)
    both, n = fires.T @ fires, fires.sum(0)
    tokens = 20_000
    for f in range(0, N, 11):
        found = rows[f]["together"]
        assert len(found) == 16
        for other in found:
            o = other["feature"]
            assert other["count"] == both[f, o]
            assert other["jaccard"] == pytest.approx(both[f, o] / (n[f] + n[o] - both[f, o]))
            assert other["lift"] == pytest.approx(both[f, o] * tokens / (n[f] * n[o]))
            a, b = fires[:, f], fires[:, o]
            spread = np.sqrt(n[f] * (tokens - n[f]) * n[o] * (tokens - n[o]))
            assert other["phi"] == pytest.approx((a @ b * tokens - n[f] * n[o]) / spread)
        assert [x["phi"] for x in found] == sorted((x["phi"] for x in found), reverse=True)
        spread = np.sqrt(n[f] * (tokens - n[f]) * n * (tokens - n))
        every = np.delete((both[f] * tokens - n[f] * n) / spread, f)
        assert found[15]["phi"] == pytest.approx(np.sort(every)[-16])


def test_top_contexts_are_the_strongest_of_each_document(store, indexed, exact):
    text = store.text(indexed[0])
    document = np.repeat(text.document, np.diff(text.offsets))
    for f in range(0, N, 13):
        top = [c for c in store.contexts(indexed[0], f) if c["group"] == "top"]
        peaks = {d: exact[document == d, f].max() for d in set(document[exact[:, f] > 0])}
        assert [c["rank"] for c in top] == list(range(len(top)))
        values = [np.float32(c["value"]) for c in top]
        # Repeated stretches of text may leave a document out; none is there twice.
        assert len(peaks) - 2 <= len(top) <= len(peaks)
        assert values == sorted(values, reverse=True)
        assert len({document[c["place"]] for c in top}) == len(top)
        assert set(values) <= set(peaks.values())
        assert values[0] == max(peaks.values())


def test_contexts_list_every_activation_in_them(store, indexed, exact):
    text = store.text(indexed[0])
    for c in store.contexts(indexed[0])[::17]:
        first = text.offsets[c["context"]]
        column = exact[first : text.offsets[c["context"] + 1], c["feature"]]
        assert c["positions"] == np.flatnonzero(column).tolist()
        np.testing.assert_array_equal(np.float32(c["values"]), column[column > 0])
        assert c["place"] == first + c["position"]
        if c["group"] != "near":
            assert np.float32(c["value"]) == column[c["position"]]


def test_intervals_hold_the_shares_they_say(rows, store, indexed, exact):
    for f in range(0, N, 5):
        fires = np.sort(exact[:, f][exact[:, f] > 0].astype(np.float64))
        edges = np.quantile(fires, [0, 0.2, 0.4, 0.6, 0.8, 1])
        intervals = rows[f]["intervals"]
        assert sum(i["share"] for i in intervals) == pytest.approx(1)
        assert sum(i["mass"] for i in intervals) == pytest.approx(1)
        for place, interval in enumerate(intervals):
            low, high = interval["low"], interval["high"]
            np.testing.assert_allclose([low, high], edges[place : place + 2], rtol=1e-6)
            inside = (fires > edges[place] if place else fires > 0) & (fires <= edges[place + 1])
            assert interval["share"] == pytest.approx(inside.mean(), abs=1e-9)
            assert interval["mass"] == pytest.approx(fires[inside].sum() / fires.sum())
        for c in store.contexts(indexed[0], f):
            if c["group"].startswith("interval"):
                here = intervals[int(c["group"][-1]) - 1]
                assert here["low"] * (1 - 1e-6) <= c["value"] <= here["high"] * (1 + 1e-6)
                assert c["share"] == here["share"]


def test_near_misses_are_silent_contexts_that_came_closest(store, indexed, exact, brute):
    _, pre = brute
    text = store.text(indexed[0])
    thresholds = hub.load_sae(indexed[0]).activation.threshold.numpy()
    seen = 0
    for f in range(0, N, 9):
        near = [c for c in store.contexts(indexed[0], f) if c["group"] == "near"]
        best: dict[int, float] = {}
        for c in range(text.n_contexts):
            here = slice(text.offsets[c], text.offsets[c + 1])
            if not exact[here, f].any() and pre[here, f].max() > 0.75 * thresholds[f]:
                d = int(text.document[c])
                best[d] = max(best.get(d, 0), float(pre[here, f].max()))
        wanted = sorted(best.values(), reverse=True)[: len(near)]
        np.testing.assert_allclose([c["value"] for c in near], wanted, rtol=1e-4)
        assert all(c["positions"] == [] for c in near)
        seen += len(near)
    assert seen > 20


def test_weights_and_directions(rows, store, indexed):
    sae = hub.load_sae(indexed[0])
    decoder, encoder = sae.w_dec.double(), sae.w_enc.double().T
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(-1)
    np.testing.assert_array_equal(store.vectors(indexed[0]), sae.w_dec.float().numpy())
    both = torch.cosine_similarity(encoder, decoder, dim=1)
    for f, row in enumerate(rows):
        assert row["layer"] == 2
        assert row["threshold"] == float(sae.activation.threshold[f])
        assert row["decoder_norm"] == pytest.approx(float(decoder[f].norm()), rel=1e-6)
        assert row["encoder_norm"] == pytest.approx(float(encoder[f].norm()), rel=1e-6)
        assert row["encoder_decoder_cosine"] == pytest.approx(float(both[f]), abs=1e-6)
        best = cosine[f].topk(10)
        assert [n["cosine"] for n in row["neighbours"]] == pytest.approx(
            best.values.tolist(), abs=1e-6
        )


def test_promoted_tokens_have_the_norms_gain_folded_in(rows, indexed, miniature):
    sae = hub.load_sae(indexed[0])
    gain = 1 + miniature.hf.model.norm.weight.double()
    unembedding = miniature.hf.get_output_embeddings().weight.double()
    logits = (sae.w_dec.double() * gain) @ unembedding.T
    for f in range(0, N, 19):
        best = logits[f].topk(10)
        assert [t["logit"] for t in rows[f]["promoted"]] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )
        assert rows[f]["suppressed"][0]["logit"] == pytest.approx(float(logits[f].min()), rel=1e-4)
        assert rows[f]["logit_mean"] == pytest.approx(float(logits[f].mean()), abs=1e-5)
        assert rows[f]["logit_std"] == pytest.approx(float(logits[f].std(correction=0)), rel=1e-4)
        around = (logits[f] - logits[f].mean()) / logits[f].std(correction=0)
        assert rows[f]["logit_skew"] == pytest.approx(float(around.pow(3).mean()), abs=1e-3)
        assert rows[f]["logit_kurtosis"] == pytest.approx(float(around.pow(4).mean()), rel=1e-3)
        assert sum(rows[f]["logit_histogram"]["counts"]) == len(logits[f])


def test_activations_by_feature_are_those_by_token(store, indexed, exact):
    kept = store.activations(indexed[0])
    for first, stop, code in kept.codes(indexed[0]):
        np.testing.assert_array_equal(code.toarray(), exact[first:stop])
    entries = kept.entries(indexed[0], 10, 20)
    assert len(entries.offsets) == 11
    with pytest.raises(InputError, match="0 to 383"):
        kept.entries(indexed[0], 380, 385)


def test_silent_features_are_filed_and_measured(tmp_path, store, indexed):
    from scipy.sparse import csc_array

    text, size = store.text(indexed[0]), len(store.text(indexed[0]).ids)
    places = np.flatnonzero(text.counts)[[5, 6, 900]]
    code = csc_array((np.array([1.0, 2.0, 3.0]), (places, [1, 1, 1])), shape=(size, 4))
    silent = csc_array((size, 3))
    made = features.write_activations(tmp_path / "a", text, {"some": code, "none": silent})
    assert made.of("some", 1)[0].tolist() == places.tolist()
    for feature in (0, 2, 3):
        assert made.of("some", feature)[0].size == 0
    entries = made.entries("none", 0, 3)
    measurer = Measurer(text, ["?"] * 5_000, keep=Keep())
    for found, n in ((made.entries("some", 0, 4), 4), (entries, 3), (made.near("some", 2, 4), 2)):
        none = Entries(np.zeros(n + 1, dtype=np.int64), np.zeros(0, np.int64), np.zeros(0, "f4"))
        block = measurer.block(found, none)
        assert [len(column) for column in block.columns.values()] == [n] * len(block.columns)
        assert block.columns["quantiles"][0] == []
        assert block.columns["max"][0] == 0
