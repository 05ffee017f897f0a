"""Interventions: laws that tie targets together, and the same by hand-written hooks."""

import json

import pytest
import torch
from intervened import ATTENTION, CLEAN, CLT, CROSSCODER, KINDS, METRIC, OTHER, SAE, TRANSCODER

from gemscope import hub
from gemscope.lm import replace
from gemscope.sites import Site, each
from gemscope.steering import intervene


def difference(model, run):
    a, b = model.tokenizer.convert_tokens_to_ids(["item", "name"])
    return float(run.logits[0, -1, a].double() - run.logits[0, -1, b].double())


def everything(address):
    return [f"{address}/{part}" for part in ("all", "error", "bias")]


@pytest.mark.parametrize("address", KINDS)
def test_features_error_and_bias_make_up_the_site(miniature, address):
    done = intervene(miniature, CLEAN, everything(address), do="ablate", metric=METRIC)
    sites = each(hub.load_sae(address).writes)
    zeros = [replace(s, torch.zeros(miniature.width(s))) for s in sites]
    run = miniature.run(CLEAN, edits=zeros, logits=True)
    # Parts are summed in float64: what is left of numbers up to 100 is below 1e-13, which no
    # float32 stream can hold beside its own.
    assert done.outcome.after == pytest.approx(difference(miniature, run), abs=1e-6)


@pytest.mark.parametrize("address", KINDS)
def test_all_parts_patched_are_the_site_patched(exact, address):
    sites = [str(s) for s in each(hub.load_sae(address).writes)]
    options = {"do": "patch", "corrupted": OTHER, "metric": METRIC}
    whole = intervene(exact, CLEAN, sites, **options).outcome
    parts = intervene(exact, CLEAN, everything(address), **options).outcome
    assert parts.after == pytest.approx(whole.after, abs=1e-9)
    assert abs(whole.effect) > 0.1


@pytest.mark.parametrize("metric", [METRIC, "logit:item", "probability:name", "loss", "kl"])
def test_the_last_stream_patched_is_the_corrupted_run(miniature, metric):
    done = intervene(
        miniature, CLEAN, ["5.resid_post"], do="patch", corrupted=OTHER, metric=metric
    )  # fmt: skip
    assert done.outcome.after == done.corrupted
    assert done.outcome.share == 1


@pytest.mark.parametrize(
    "targets",
    [["2.mlp_out"], ["3.attn_heads/1"], [f"{SAE}/all"], [f"{SAE}/error"], [f"{SAE}/8"],
     everything(TRANSCODER), [f"{CROSSCODER}/all", f"{CROSSCODER}/error"], [f"{CLT}/all"],
     [f"{CLT}/error@3.mlp_out"], [f"{ATTENTION}/bias"]],
)  # fmt: skip
def test_patching_from_the_same_text_changes_nothing(miniature, targets):
    done = intervene(
        miniature, CLEAN, targets, do="patch", corrupted=CLEAN, metric="loss", each=True
    )  # fmt: skip
    assert done.outcome.effect == 0
    assert done.outcome.share is None
    # Rows of a batch round otherwise than a row by itself: logits of 10 by 2^-24, a few times.
    assert all(abs(one.effect) < 1e-5 for one in done.each)


def test_all_heads_are_the_site(miniature):
    options = {"do": "patch", "corrupted": OTHER, "metric": METRIC}
    heads = miniature.config.num_attention_heads
    apart = [f"3.attn_heads/{i}" for i in range(heads)]
    together = intervene(miniature, CLEAN, ["3.attn_heads"], **options)
    assert intervene(miniature, CLEAN, apart, **options).outcome == together.outcome
    assert together.outcome.effect != 0


def hooked(model, change, module, *, before=False):
    """The metric with a plain hook of torch's."""
    place = model.hf.get_submodule(module)

    def after(_module, _args, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = (
        place.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))
        if before
        else place.register_forward_hook(after)
    )
    try:
        ids = model.tokens(CLEAN).ids
        with torch.no_grad():
            logits = model.hf(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    a, b = model.tokenizer.convert_tokens_to_ids(["item", "name"])
    return float(logits[0, -1, a] - logits[0, -1, b])


def strongest(model, address, text=CLEAN):
    """The feature that fires most on a text, and all activations."""
    sae = hub.load_sae(address)
    run = model.run(text, read=[sae.reads])
    dense = sae.encode(run[sae.reads][0].float()).dense()
    dense[0] = 0
    return int(dense.sum(0).argmax()), dense, sae


@pytest.mark.parametrize(("do", "value"), [("ablate", 0.0), ("set", 4.0)])
def test_a_feature_is_changed_as_by_hand(exact, do, value):
    index, dense, sae = strongest(exact, SAE)
    row = sae.rows([index])[0, 0].double()

    def change(x):
        moved = (value - dense[:, index].double())[:, None] * row
        moved[0] = 0
        return x + moved

    got = intervene(
        exact, CLEAN, [f"{SAE}/{index}"], do=do, metric=METRIC, value=value if do == "set" else None
    )
    # Activations are float32: 2^-24 of 20, times a slope of a few.
    assert got.outcome.after == pytest.approx(hooked(exact, change, "model.layers.3"), abs=1e-5)
    assert abs(got.outcome.effect) > 0.01


def test_a_transcoder_feature_is_read_and_written_elsewhere(exact):
    index, dense, sae = strongest(exact, TRANSCODER)
    row = sae.rows([index])[0, 0].double()
    assert sae.reads != sae.writes

    def change(y):
        moved = dense[:, index].double()[:, None] * row
        moved[0] = 0
        return y - moved

    got = intervene(exact, CLEAN, [f"{TRANSCODER}/{index}"], do="ablate", metric=METRIC)
    module = "model.layers.2.post_feedforward_layernorm"
    assert got.outcome.after == pytest.approx(hooked(exact, change, module), abs=1e-5)
    assert abs(got.outcome.effect) > 0.01


def test_a_head_is_its_slice(exact):
    width = exact.width(Site.parse("3.attn_heads")) // exact.config.num_attention_heads

    def change(x):
        out = x.clone()
        out[:, 4:6, width : 2 * width] = 0
        return out

    got = intervene(
        exact, CLEAN, ["3.attn_heads/1"], do="ablate", metric=METRIC, positions="4:6"
    )  # fmt: skip
    by_hand = hooked(exact, change, "model.layers.3.self_attn.o_proj", before=True)
    assert got.outcome.after == pytest.approx(by_hand, abs=1e-9)
    assert got.outcome.effect != 0


def test_a_crosscoder_feature_is_changed_at_every_site(exact):
    index, _, sae = strongest(exact, CROSSCODER)
    place = sae.layer_of(index)
    from gemscope.lm import Edit

    run = exact.run(CLEAN, read=[sae.reads])
    value = sae.encode(run[sae.reads][0].float()).dense()[1:, index].double()
    rows = sae.rows([index])[0].double()
    edits = [
        Edit(site, site, lambda x, m=m: x - value[:, None] * rows[m])
        for m, site in enumerate(sae.writes)
        if m >= place
    ]
    expected = difference(exact, exact.run(CLEAN, edits=edits, logits=True))
    got = intervene(exact, CLEAN, [f"{CROSSCODER}/{index}"], do="ablate", metric=METRIC)
    assert got.outcome.after == pytest.approx(expected, abs=1e-5)
    assert abs(got.outcome.effect) > 0.01


@pytest.mark.parametrize("target", ["3.mlp_out", f"{SAE}/all", f"{CLT}/error"])
def test_each_position_is_that_position_alone(exact, target):
    options = {"do": "patch", "corrupted": OTHER, "metric": METRIC}
    all_ = intervene(exact, CLEAN, [target], each=True, **options)
    for place, one in zip(all_.positions, all_.each, strict=True):
        alone = intervene(exact, CLEAN, [target], positions=str(place), **options)
        # Encoding is float32, and a batch's products are rounded otherwise.
        assert one.effect == pytest.approx(alone.outcome.effect, abs=1e-4)
    assert all_.positions == list(range(1, 9))


def test_a_mean_is_over_the_text(exact, file):
    text = file("x = 1\n" * 20)
    site = Site.parse("3.mlp_out")
    mean = exact.run("x = 1\n" * 20, read=[site])[site][0, 1:].mean(0)
    run = exact.run(CLEAN, edits=[replace(site, mean)], logits=True)
    got = intervene(exact, CLEAN, [str(site)], do="ablate", mean=str(text), metric=METRIC)
    assert got.outcome.after == pytest.approx(difference(exact, run), abs=1e-9)
    for target in (f"{SAE}/38", f"{CLT}/all"):
        other = intervene(exact, CLEAN, [target], do="ablate", mean=str(text), metric=METRIC)
        assert other.outcome.after != other.clean


def test_metrics_are_what_they_say(exact):
    run = exact.run(CLEAN, logits=True)
    logits = run.logits[0]
    ids = run.tokens.ids[0]
    item = exact.tokenizer.convert_tokens_to_ids("item")
    colon = exact.tokenizer.convert_tokens_to_ids(":")
    sae = hub.load_sae("miniature/resid_post_all/layer_4_width_384_l0_small")
    site = sae.reads
    code = sae.encode(exact.run(CLEAN, read=[site])[site][0].float()).dense()
    late = int(code[4].argmax())
    expected = {
        ("logit:item", None): logits[-1, item],
        ("logit:item", 3): logits[3, item],
        ("probability:item", -2): logits[-2].softmax(-1)[item],
        ("difference:item::", None): logits[-1, item] - logits[-1, colon],
        ("loss", None): torch.nn.functional.cross_entropy(logits[:-1], ids[1:]),
        ("kl", None): torch.tensor(0.0),
        (f"feature:{sae.origin.address}/{late}", 4): code[4, late],
    }
    for (metric, at), value in expected.items():
        got = intervene(exact, CLEAN, ["2.mlp_out"], do="ablate", metric=metric, at=at)
        assert got.clean == pytest.approx(float(value), rel=1e-5, abs=1e-12), metric
        assert got.outcome.effect != 0
    kl = intervene(exact, CLEAN, ["5.resid_post"], do="patch", corrupted=OTHER, metric="kl")
    other = exact.run(OTHER, logits=True).logits[0, -1]
    clean = logits[-1].log_softmax(-1)
    by_hand = (clean.exp() * (clean - other.log_softmax(-1))).sum()
    assert kl.corrupted == pytest.approx(float(by_hand), rel=1e-9)


def test_prompts_of_other_lengths_meet_where_both_have_positions(miniature):
    longer = "for name in my_names:\n    print("
    options = {"do": "patch", "corrupted": longer, "metric": METRIC}
    last = intervene(miniature, CLEAN, ["5.resid_post"], positions="last", **options)
    assert last.outcome.after == pytest.approx(last.corrupted, abs=1e-5)
    assert last.opposite[0] > last.positions[0]
    first = intervene(miniature, CLEAN, ["5.resid_post"], positions="0,1", **options)
    assert first.opposite == first.positions == [0, 1]
    with pytest.raises(ValueError, match=r"the prompts have 9 and 1[0-9] tokens, and patching"):
        intervene(miniature, CLEAN, ["5.resid_post"], **options)
    with pytest.raises(ValueError, match="loss is that of the clean prompt's tokens"):
        intervene(
            miniature, CLEAN, ["5.resid_post"], do="ablate", corrupted=longer, metric="loss"
        )  # fmt: skip


def test_the_command_prints_one_value(command):
    code, out, err = command(
        "intervene", CLEAN, "--corrupted", OTHER, "--on", f"{SAE}/all", "--do", "patch",
        "--metric", METRIC, "--each", "--json",
    )  # fmt: skip
    assert code == 0, err
    made = json.loads(out)
    assert made["targets"] == [f"{SAE}/all"]
    assert [row["position"] for row in made["positions"]] == list(range(1, 9))
    assert made["positions"][1] | {"after": 0, "effect": 0, "share": 0} == {
        "position": 2, "token": " item", "corrupted_position": 2, "corrupted_token": " name",
        "after": 0, "effect": 0, "share": 0,
    }  # fmt: skip
    assert made["effect"] == pytest.approx(made["after"] - made["clean"]["metric"])
    assert "".join(made["clean"]["tokens"][1:]) == CLEAN
    code, out, _ = command(
        "intervene", CLEAN, "--corrupted", OTHER, "--on", f"{SAE}/all", "--do", "patch",
        "--metric", METRIC, "--each",
    )  # fmt: skip
    assert code == 0
    assert "2 ·item ← ·name" in out
    assert "share" in out


def test_activations_are_told(command, miniature):
    index, dense, _ = strongest(miniature, SAE)
    silent = int(dense.sum(0).argmin())
    options = ("intervene", CLEAN, "--do", "ablate", "--metric", METRIC)
    code, out, _ = command(*options, "--on", f"{SAE}/{index}", "--json")
    rows = json.loads(out)["positions"]
    got = [row["activations"][0]["clean"] for row in rows]
    assert code == 0
    assert got == pytest.approx(dense[1:, index].tolist(), rel=1e-5)
    code, out, _ = command(*options, "--on", f"{SAE}/{silent}")
    assert code == 0
    assert f"{SAE}/{silent} is silent at these positions" in out


BAD = [
    (("--on", "3.nothing", "--do", "ablate"), "no stream named 'nothing'"),
    (("--on", "9.mlp_out", "--do", "ablate"), "9.mlp_out is not in .*layers are 0 to 5"),
    (("--on", "3.attn_heads/99", "--do", "ablate"), "has the heads 0 to"),
    (("--on", "3.mlp_out/1", "--do", "ablate"), "not parted into heads"),
    (("--on", SAE, "--do", "ablate"), "names nothing to change"),
    (("--on", f"{SAE}/400", "--do", "ablate"), "has no feature 400: it has 0 to 383"),
    (("--on", f"{SAE}/error@2.mlp_out", "--do", "ablate"), "has no error at 2.mlp_out"),
    (("--on", f"{SAE}/1", "--do", "set"), "give --value"),
    (("--on", "3.mlp_out", "--do", "set", "--value", "2"), "is none: name features"),
    (("--on", "3.mlp_out", "--do", "patch"), "give its prompt with --corrupted"),
    (("--on", "3.mlp_out", "--do", "ablate", "--value", "2"), "a value is for set"),
    (("--on", "3.mlp_out", "--do", "patch", "--corrupted", OTHER, "--mean", "code"), "mean is for"),
    (("--on", "3.mlp_out", "--do", "blate"), "nearest: ablate"),
    (("--on", "3.mlp_out"), "give --do patch, ablate or set"),
    ((), "nothing to change"),
    (("--on", "3.mlp_out", "--do", "ablate", "--positions", "99"), "outside the prompt, whose 9"),
    (("--on", "3.mlp_out", "--do", "ablate", "--positions", "x"), "names no positions"),
    (("--on", f"{SAE}/1", "--do", "ablate", "--positions", "0"), "holds the special token"),
    (("--on", f"{SAE}/1", "--on", f"{SAE}/1", "--do", "ablate"), "name it once"),
    (("--on", f"{SAE}/1", "--on", f"{SAE}/all", "--do", "ablate"), "do one of them"),
    (("--on", "3.resid_post", "--on", f"{SAE}/1", "--do", "ablate"), "change the same numbers"),
    (("--on", "3.mlp_out", "--do", "ablate", "--at", "50"), "--at 50 is outside"),
    (("--on", "3.mlp_out", "--do", "ablate", "--top", "5"), "does not apply to --on"),
    (("--attribute", SAE, "--each"), "--each is for --on"),
    (("--attribute", SAE, "--on", "3.mlp_out"), "give one"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_what_cannot_be_done_is_refused(refused, options, match):
    refused(
        "intervene", CLEAN, "--model", "miniature", "--metric", METRIC, *options, match=match
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        ("logit:selfx", r"'selfx' is not one token but 2: self\|x"),
        ("logit: __init__zz", "is not one token but"),
        ("logit:newline", "with the space before it, ' newline' is one"),
        ("difference:item", "names one token"),
        ("difference:item:self x", "'self x' is not one token but 2"),
        ("logit", "logit:TOKEN"),
        ("kl:3", "is not how this metric is written: kl"),
        ("entropy", "no metric 'entropy'"),
        ("feature:3.mlp_out", "names no feature"),
        (f"feature:{SAE}/3", "which a change at 3.resid_post does not reach"),
    ],
)
def test_metrics_that_are_none_are_refused(refused, metric, match):
    refused(
        "intervene", CLEAN, "--model", "miniature", "--on", "3.resid_post", "--do", "ablate",
        "--metric", metric, match=match,
    )  # fmt: skip


def test_another_models_dictionary_is_refused(refused, miniature):
    refused(
        "intervene", CLEAN, "--on", "3.mlp_out", "--do", "ablate", "--metric", METRIC,
        match="name a model with --model",
    )  # fmt: skip
    from dataclasses import replace as changed

    sae = hub.load_sae(SAE)
    other = changed(sae, origin=changed(sae.origin, model="google/gemma-2-2b"))
    with pytest.raises(ValueError, match="belongs to google/gemma-2-2b"):
        intervene(
            miniature, CLEAN, [f"{SAE}/1"], do="ablate", metric="kl", load=lambda _: other
        )  # fmt: skip
