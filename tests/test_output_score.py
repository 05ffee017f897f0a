"""Output scores: the formula in float64, batches, the store, and what stops a run."""

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch

from gemscope import features, hub, steering
from gemscope.errors import InputError
from gemscope.features import Store
from gemscope.steering import _output_score_store
from gemscope.steering._change import Change

WIDEST = "miniature/resid_post/layer_3_width_2k_l0_medium"
SOME = [0, 17, 100, 1500, 2047]


def maxima(address, which):
    return [steering.maximum_of(address, i) for i in which]


def by_formula(logits, tokens):
    """`(1 - rank / vocabulary) * probability` as the paper's code has it: by sorting."""
    p = logits.softmax(-1)
    order = p.argsort(descending=True).tolist()
    rank = min(order.index(t) for t in tokens)
    return (1 - rank / len(p)) * max(float(p[t]) for t in tokens)


def test_the_formula_in_plain_transformers(miniature, residual):
    plain = copy.deepcopy(miniature.hf).double()
    prompts, strength = ("        self.", "# The"), 4.0
    highest = maxima(WIDEST, SOME)
    got = steering.output_scores(
        miniature, residual, SOME, highest, prompts=prompts, strength=strength
    )
    assert got.dtype == np.float64
    for feature, high, score in zip(SOME, highest, got, strict=True):
        row = residual.w_dec[feature].double()
        lens = ((1 + plain.model.norm.weight) * row) @ plain.lm_head.weight.T
        tokens = lens.topk(20).indices.tolist()
        changes = []
        for prompt in prompts:
            ids = [2, *miniature.tokenizer(prompt, add_special_tokens=False)["input_ids"]]

            def hook(_module, _args, output, added=strength * high * row):
                x = (output[0] if isinstance(output, tuple) else output).clone()
                x[0, -1] += added
                return (x, *output[1:]) if isinstance(output, tuple) else x

            before = plain(torch.tensor([ids])).logits[0, -1]
            handle = plain.model.layers[3].register_forward_hook(hook)
            after = plain(torch.tensor([ids])).logits[0, -1]
            handle.remove()
            changes.append(by_formula(after, tokens) - by_formula(before, tokens))
        # A tie in rank moves the score by a share of the vocabulary.
        assert score == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["clt/width_384_l0_medium_affine",
                                  "transcoder_all/layer_2_width_192_l0_small_affine",
                                  "attn_out_all/layer_2_width_128_l0_small"])  # fmt: skip
def test_it_is_what_steering_at_the_last_token_does(miniature, name):
    sae = hub.load_sae(f"miniature/{name}")
    which = [3, sae.d_sae - 1]
    got = steering.output_scores(miniature, sae, which, [2.0, 2.0], prompts=["# The"], strength=5.0)
    tokens = steering.promoted_tokens(miniature, sae, which, 20)
    before = miniature.run("# The", logits=True).logits[0, -1]
    for place, index in enumerate(which):
        change = Change(
            what=steering.feature(sae, index, maximum=2.0), mode=steering.Mode.ADD,
            strength=steering.Strength.parse("5xmax"), positions=steering.Positions.parse("last"),
        )  # fmt: skip
        edits = [steering.Steering([change])]
        after = miniature.run("# The", edits=edits, logits=True).logits[0, -1]
        wanted = [by_formula(x.double(), tokens[place].tolist()) for x in (after, before)]
        assert got[place] == pytest.approx(wanted[0] - wanted[1], abs=1e-5)


def test_batches_do_not_matter_and_nothing_else_is_changed(miniature, residual):
    which, high = list(range(12)), maxima(WIDEST, range(12))
    whole = steering.output_scores(miniature, residual, which, high)
    for batch in (1, 5):
        parts = steering.output_scores(miniature, residual, which, high, batch=batch)
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    none = steering.output_scores(miniature, residual, which, high, strength=0.0)
    np.testing.assert_allclose(none, 0, atol=1e-7)


def test_high_scores_steer_better(miniature, residual):
    which = [i for i in range(0, 2048, 32) if steering.maximum_of(WIDEST, i)]
    scores = steering.output_scores(miniature, residual, which, maxima(WIDEST, which))
    order = [which[k] for k in np.argsort(scores)]
    effects = []
    for some in (order[:4], order[-4:]):
        found = [
            steering.dose(
                miniature, steering.feature(residual, i, maximum=steering.maximum_of(WIDEST, i)),
                ["# The", "        self."], [steering.Strength.parse("2xmax")], max_new_tokens=8,
            ).points[0].change.value
            for i in some
        ]  # fmt: skip
        effects.append(np.mean(found))
    assert effects[1] > 0.5 > 10 * effects[0]


def test_what_has_no_score(miniature, residual, monkeypatch):
    found = steering.output_scores(miniature, residual, [3, 4], [0.0, 1.0])
    assert np.isnan(found).tolist() == [True, False]
    assert len(steering.output_scores(miniature, residual, [], [])) == 0
    for more, match in (
        ({"maxima": [1.0]}, "1 maxima were given for 2 features"),
        ({"prompts": []}, "no neutral prompt"),
        ({"prompts": [""]}, "an empty text"),
        ({"batch": 0}, "a batch of 0"),
        ({"features": [3, 5000]}, "5000"),
    ):
        given = {"features": [3, 4], "maxima": [1.0, 1.0]} | more
        with pytest.raises(InputError, match=match):
            steering.output_scores(miniature, residual, given.pop("features"),
                                   given.pop("maxima"), **given)  # fmt: skip
    monkeypatch.setattr(type(miniature), "direct_logits", lambda *_: None)
    assert np.isnan(steering.output_scores(miniature, residual, [3], [1.0])).all()


def scores_of(folder, address):
    return np.array(Store.open(folder).features(address)["output_score"].to_pylist(), dtype=float)


def test_the_command_search_and_card(own_store, indexed, command, miniature, tmp_path):
    code, out, err = command("output-score", own_store, "--json")
    told = json.loads(out)
    assert (code, [t["address"] for t in told]) == (0, sorted(indexed)), err
    for one in told:
        store, address = Store.open(own_store), one["address"]
        highest = store.features(address, ["max"])["max"].to_numpy()
        found = scores_of(own_store, address)
        assert (np.isnan(found) == (highest == 0)).all()
        assert one["scored"] == (highest > 0).sum() == 384 - one["silent"]
        assert one["median"] == pytest.approx(np.nanmedian(found))
        some = slice(0, 384, 12)
        wanted = steering.output_scores(
            miniature, hub.load_sae(address), range(384)[some], highest[some]
        )
        np.testing.assert_allclose(found[some], wanted, rtol=1e-4, atol=1e-6)
    best = int(np.nanargmax(found))
    code, out, _ = command("search", own_store, "--where", "output_score > 0.1", "--json",
                           "--in", address, "--limit", 384)  # fmt: skip
    assert {f["feature"] for f in json.loads(out)} == set(np.flatnonzero(found > 0.1).tolist())
    page = tmp_path / "page.html"
    code, out, _ = command("feature", own_store, f"{address}/{best}", "--html", page)
    assert f"output score {found[best]:.3f}" in out
    assert f"<dd>{found[best]:.3f}</dd>" in page.read_text()
    record = json.loads(command("feature", own_store, f"{address}/{best}", "--json")[1])
    assert record["output_score"] == found[best]
    how = record["dictionary"]["output_scores"]
    assert (how["tokens"], how["dtype"], len(how["prompts"])) == (20, "float32", 4)
    code, out, _ = command("output-score", own_store)
    assert code == 0
    assert "gemscope search" in out


def test_a_stopped_run_goes_on_to_the_same_scores(own_store, indexed, command, monkeypatch):
    calls = []
    real = _output_score_store.output_scores

    def counted(*given, **more):
        calls.append(len(given[2]))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **more)

    monkeypatch.setattr(_output_score_store, "output_scores", counted)
    code, out, err = command("output-score", own_store, indexed[0], "--json")
    assert (code, out) == (130, "")
    assert "run the command again, and it goes on" in err
    part = scores_of(own_store, indexed[0])
    assert np.isfinite(part).sum() == sum(calls) == 128
    (told,) = json.loads(command("output-score", own_store, indexed[0], "--json")[1])
    assert (told["scored"], told["before"]) == (384 - told["silent"] - 128, 128)
    whole = scores_of(own_store, indexed[0])
    assert whole[np.isfinite(part)].tolist() == part[np.isfinite(part)].tolist()
    asked = len(calls)
    (told,) = json.loads(command("output-score", own_store, indexed[0], "--json")[1])
    assert (told["scored"], len(calls)) == (0, asked)
    assert scores_of(own_store, indexed[0]).tobytes() == whole.tobytes()
    assert np.isnan(scores_of(own_store, indexed[1])).all(), "only what was asked for"


def test_a_crash_keeps_what_was_measured(own_store, indexed, monkeypatch):
    calls = []
    real = _output_score_store.output_scores

    def crash(*given, **more):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return real(*given, **more)

    monkeypatch.setattr(_output_score_store, "output_scores", crash)
    store = Store.open(own_store)
    with pytest.raises(MemoryError):
        steering.score_store(store, [indexed[0]])
    assert np.isfinite(scores_of(own_store, indexed[0])).sum() == 128
    # Indices are up to date for whoever searches.
    (index,) = (i.name for i in store.table("features").list_indices() if i.columns == ["run"])
    assert store.table("features").index_stats(index).num_unindexed_rows == 0


def test_scores_of_other_settings_do_not_mix(own_store, indexed, command, refused):
    given = ("output-score", own_store, indexed[0], "--prompt", "# The")
    assert command(*given)[0] == 0
    before = scores_of(own_store, indexed[0])
    refused(*given, "--strength", 2, match="other strength; take the same, .* --force")
    refused(*given[:3], match="with other prompts")
    assert command(*given, "--strength", 1, "--force")[0] == 0
    after = scores_of(own_store, indexed[0])
    assert np.nanmedian(after) < np.nanmedian(before)


def test_an_index_made_anew_has_no_scores(own_store, indexed, miniature):
    store = Store.open(own_store)
    steering.score_store(store, [indexed[0]], prompts=["# The"])
    entry = hub.locate(indexed[0])
    subject = features.Subject(
        address=indexed[0], sae=hub.build(entry), digest=hub.digest(entry), nominal_l0=entry.l0
    )
    features.index(
        miniature, [subject], features.sources_of(tokens=2_000), store,
        features.Settings(tokens=2_000), model_name="miniature",
    )  # fmt: skip
    assert np.isnan(scores_of(own_store, indexed[0])).all()
    assert "output_scores" not in store.dictionary(indexed[0])


def test_bad_commands(own_store, indexed, refused, tmp_path, monkeypatch):
    refused("output-score", tmp_path / "none", match="no catalog store")
    refused("output-score", own_store, "miniature/x", match="not indexed")
    refused("output-score", own_store, "--strength", 0, match="amplifies nothing")
    refused("output-score", own_store, "--strength", "nan", match="amplifies nothing")
    refused("output-score", own_store, "--device", "moon", match="no device 'moon'")
    refused("output-score", Store.create(tmp_path / "empty").folder, match="no dictionary yet")
    monkeypatch.setattr(hub, "digest", lambda _: "other")
    refused("output-score", own_store, indexed[0], match="others than those that were indexed")


def test_a_dictionary_without_a_direct_path_is_told(own_store, indexed, command, monkeypatch):
    monkeypatch.setattr(_output_score_store, "promoted_tokens", lambda *_: None)
    code, out, _ = command("output-score", own_store, indexed[0])
    assert code == 0
    assert "no direct path leads to the logits" in " ".join(out.split())
    assert np.isnan(scores_of(own_store, indexed[0])).all()
