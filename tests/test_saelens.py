"""Where gemscope and SAELens 6.54.12 agree, where they differ, and what the makers' formulas say.

`golden/saelens.json` holds what SAELens computed from the artefacts made here, as
`peers/saelens_reference.py` found it. What is right is decided by the formula of those who made
the files, in float64, and by neither library. To make the record again, where `make bench` has set
up SAELens: `.venv/bin/python tests/test_saelens.py`.
"""

import json
import math
import socket
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from peers.saelens_artefacts import (
    ADDRESSES,
    CLT,
    CLT_LAYERS,
    CROSSCODER,
    CROSSCODER_LAYERS,
    GEMMA_SCOPE_2,
    HEIGHT,
    HOOKS,
    IDS,
    LENGTHS,
    MODELS,
    NORMS,
    RELEASES,
    TOKENS,
    TRANSCODER,
    WEIGHTS,
    X_CROSSCODER,
    X_LAYERS,
    D,
    F,
    X,
    make,
    snapshot,
    tiny,
)

from gemscope import hub, miniature
from gemscope.corpus import TokenBatch
from gemscope.lm import LanguageModel, splice
from gemscope.sites import Site

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
SCRIPT = HERE / "peers" / "saelens_reference.py"
GOLDEN = HERE / "golden" / "saelens.json"
ROUNDING = 2.0**-24
"""Of one operation in float32, relative."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from huggingface_hub import constants

    root = make(tmp_path_factory.mktemp("saelens"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
        yield root


# What is right


class Wanted:
    """The published rule in float64, and how far float32 may be from it.

    `features = pre * (pre > threshold)` with `pre = x @ w_enc + b_enc`, and `y = features @ w_dec +
    b_dec (+ x @ skip)`. A sum of n products in any order is off by at most n + 1 roundings of the
    sum of their magnitudes; folding a scale into a weight adds at most 4.
    """

    def __init__(self, x, w, scale=1.0):
        self.pre = x @ w["w_enc"] * scale + w["b_enc"]
        magnitudes = abs(x) @ abs(w["w_enc"]) * scale + abs(w["b_enc"])
        self.off = (D + 6) * ROUNDING * magnitudes
        # No rounding decides which features fire, and the threshold does more than a ReLU.
        assert (abs(self.pre - w["threshold"]) > self.off).all()
        self.active = self.pre > w["threshold"]
        assert ((self.pre > 0) & ~self.active).any()
        assert self.active.any()
        self.features = self.pre * self.active
        self.y, self.off_y = self.decoded(w["w_dec"], w["b_dec"])
        if "skip" in w:
            self.skipped = x @ w["skip"]
            self.y = self.y + self.skipped
            self.off_y = self.off_y + (D + F + 6) * ROUNDING * (abs(x) @ abs(w["skip"]))

    def decoded(self, w_dec, b_dec):
        """What these features give with a decoder, without a skip, and how far off it may be."""
        total = self.features @ abs(w_dec) + abs(b_dec)
        off = (F + D + 6) * ROUNDING * total + self.off * self.active @ abs(w_dec)
        return self.features @ w_dec + b_dec, off


def close(found, wanted, off):
    assert (abs(found - wanted) <= off).all(), abs(found - wanted).max()


@cache
def golden():
    return json.loads(GOLDEN.read_text("utf-8"))


def told(record, n_features=F):
    """Features and what was decoded from them, in a record of SAELens."""
    features = np.zeros((TOKENS, n_features))
    for token, feature, value in record["features"]:
        features[token, feature] = value
    return features, np.array(record["decoded"])


def ours(sae, x):
    x = torch.from_numpy(x).float()
    return sae.encode(x).dense().double().numpy(), sae.reconstruct(x).double().numpy()


def check(found, wanted):
    """The same features fire, with the same values, and give the same reconstruction."""
    features, y = found
    assert ((features != 0) == wanted.active).all()
    close(features, wanted.features, wanted.off)
    close(y, wanted.y, wanted.off_y)


# Where both are right


def test_the_record_is_of_this_version():
    versions = golden()["versions"]
    assert versions["sae-lens"] == "6.54.12"
    assert versions["transformer-lens"].startswith("3.9.")
    assert GOLDEN.stat().st_size < 60_000


@pytest.mark.parametrize(
    "name",
    ["gemma-scope residual", "gemma-scope mlp", "gemma-scope-2 residual", "gemma-scope-2 mlp"],
)
def test_autoencoders_agree(made, name):
    record, wanted = golden()[name], Wanted(X, WEIGHTS[name])
    assert record["class"] == "JumpReLUSAE"
    theirs, mine = told(record), ours(hub.load_sae(ADDRESSES[name]), X)
    check(theirs, wanted)
    check(mine, wanted)
    close(mine[0], theirs[0], 2 * wanted.off)
    close(mine[1], theirs[1], 2 * wanted.off_y)


def test_calling_an_affine_transcoder_agrees(made):
    name = "gemma-scope-2 transcoder"
    record, wanted = golden()[name], Wanted(X, WEIGHTS[name])
    assert record["class"] == "JumpReLUSkipTranscoder"
    check((told(record)[0], np.array(record["forward"])), wanted)
    check(ours(hub.load_sae(TRANSCODER), X), wanted)


def in_raw_units(name):
    """A Llama Scope dictionary by its makers' rule, unfolded: `scale` brings activations to the
    norm of training, and a feature with a decoder row of length n fires above `scale / n` times
    the threshold.
    """
    scale, w = math.sqrt(D) / NORMS[name][1], WEIGHTS[name]
    w = w | {"threshold": HEIGHT * scale / LENGTHS[name], "w_dec": w["w_dec"] / scale}
    return scale, w | {"b_dec": w["b_dec"] / scale}


def check_llama(name, sae, wanted, scale):
    """Ours are in raw units with decoder rows of length 1, the formula's at the norm of training.

    Converting between the two rounds four times, and once more in what is added up.
    """
    to_raw = LENGTHS[name] / scale
    features, y = ours(sae, X)
    assert ((features != 0) == wanted.active).all()
    close(features, wanted.features * to_raw, wanted.off * to_raw)
    close(y, wanted.y, wanted.off_y)


def test_llama_scope_agrees_where_decoder_rows_have_length_1(made):
    name = "llama-scope unit rows"
    scale, w = in_raw_units(name)
    wanted = Wanted(X, w, scale)
    check(told(golden()[name]), wanted)
    check_llama(name, hub.load_sae(ADDRESSES[name]), wanted, scale)


# Where they differ


def test_llama_scope_divides_thresholds_by_decoder_lengths(made):
    """SAELens compares every feature of a Llama Scope dictionary with one threshold, where its
    makers fold the length of each decoder row into the encoder before they compare. The makers'
    rule, evaluated here without folding, is right: the stored number belongs to rows of length 1.
    """
    name = "llama-scope"
    scale, w = in_raw_units(name)
    wanted = Wanted(X, w, scale)
    one_for_all = Wanted(X, w | {"threshold": np.full(F, HEIGHT * scale)}, scale)
    check(told(golden()[name]), one_for_all)
    short, long = LENGTHS[name] < 1, LENGTHS[name] > 1
    assert not (wanted.active & ~one_for_all.active)[:, short].any()
    assert (one_for_all.active & ~wanted.active)[:, short].any()
    assert (wanted.active & ~one_for_all.active)[:, long].any()
    check_llama(name, hub.load_sae(ADDRESSES[name]), wanted, scale)


def test_the_bias_of_an_embedding_dictionary_is_scaled_too(made):
    """SAELens scales encoder and decoder of the embedding dictionaries by the root of the width,
    and leaves the decoder's bias as it is. They were trained on embeddings before Gemma scales
    them, so the whole reconstruction, bias included, is to be scaled.
    """
    name, root = "gemma-scope embedding", math.sqrt(D)
    w = WEIGHTS[name]
    unscaled = Wanted(X / root, w)
    features, decoded = told(golden()[name])
    assert ((features != 0) == unscaled.active).all()
    close(features, unscaled.features, unscaled.off)
    close(decoded, unscaled.y * root - (root - 1) * w["b_dec"], unscaled.off_y * root)
    features, y = ours(hub.load_sae(ADDRESSES[name]), X)
    assert ((features != 0) == unscaled.active).all()
    close(features, unscaled.features, unscaled.off)
    close(y, unscaled.y * root, unscaled.off_y * root)


class Stack:
    """Several layers by their makers' formula, `x [n_tokens, n_layers, d_in]`: layer m is written
    `sum over l <= m of f[l] @ w_dec[l][:, m] + b_dec[m] (+ x[m] @ skip[m])`.
    """

    def __init__(self, x, layers):
        self.layers = [
            Wanted(x[:, m], w | {"w_dec": w["w_dec"][:, m]}) for m, w in enumerate(layers)
        ]
        self.features = np.concatenate([each.features for each in self.layers], 1)
        self.off = np.concatenate([each.off for each in self.layers], 1)
        self.y = np.stack([each.y for each in self.layers], 1)
        self.off_y = np.stack([each.off_y for each in self.layers], 1)
        for m, (own, w) in enumerate(zip(self.layers, layers, strict=True)):
            for later in range(m + 1, len(layers)):
                y, off = own.decoded(w["w_dec"][:, later], np.zeros(D))
                self.y[:, later] += y
                self.off_y[:, later] += off

    def check(self, sae, x):
        features, y = ours(sae, x)
        assert ((features != 0) == (self.features != 0)).all()
        close(features, self.features, self.off)
        close(y, self.y, self.off_y)


def test_a_cross_layer_transcoder_writes_each_layer_by_itself(made):
    """SAELens lists no cross-layer transcoders, and its Gemma Scope 2 loader makes the file of one
    layer a transcoder whose decoder is the sum over all layers written: its features are right,
    and what it decodes is what no layer gets. The makers' formula, which gives each layer its own
    sum, decides.
    """
    stack = Stack(X_LAYERS, CLT_LAYERS)
    records = zip(stack.layers, CLT_LAYERS, golden()["cross-layer"], strict=True)
    for place, (wanted, w, record) in enumerate(records):
        features, decoded = told(record, 8)
        assert ((features != 0) == wanted.active).all()
        close(features, wanted.features, wanted.off)
        close(decoded, *wanted.decoded(w["w_dec"].sum(1), w["b_dec"]))
        for found in (decoded, np.array(record["forward"])):
            assert abs(found - stack.y[:, place]).max() > 1
    folder = snapshot(made / "hub", GEMMA_SCOPE_2) / CLT
    stack.check(hub.load_sae(str(folder)), X_LAYERS)


def test_a_crosscoder_is_read(made):
    """SAELens lists no crosscoders, and its Gemma Scope 2 loader raises an error for the folder of
    one. The published files are complete, and by the makers' formula give what gemscope gives.
    """
    kind, message = golden()["refused"]["crosscoder"]
    assert (kind, message) == ("ValueError", "Hook name not found in folder_name.")
    sae = hub.load_sae(f"gemma-scope-2-1b-pt/{CROSSCODER}")
    assert (sae.kind, str(sae.reads)) == ("crosscoder", "7,13,17,22.resid_post")
    Stack(X_CROSSCODER, CROSSCODER_LAYERS).check(sae, X_CROSSCODER)


@pytest.mark.parametrize("suite", ["gemma-scope", "gemma-scope-2"])
def test_a_folder_is_read_as_it_is_published(made, suite):
    """SAELens's readers of local folders want a `cfg.json`, which neither Gemma Scope publishes,
    so its artefacts load from the hub or its cache only. The parameters are whole without it: the
    folder by itself gives what the formula gives.
    """
    said = golden()["refused"]["folders"][suite]
    assert said.keys() == {"sae_lens_disk_loader", "sparsify_disk_loader"}
    assert all(end == ["FileNotFoundError", "cfg.json"] for end in said.values())
    name = f"{suite} residual"
    release, _, path = ADDRESSES[name].partition("/")
    folder = snapshot(made / "hub", RELEASES[release]) / path
    check(ours(hub.load_sae(str(folder)), X), Wanted(X, WEIGHTS[name]))


@pytest.mark.parametrize("suite", ["gemma-scope", "gemma-scope-2"])
def test_what_is_cached_loads_offline(made, suite, monkeypatch):
    """SAELens asks the hub for the header of a Gemma Scope 2 file each time that it loads one, so
    that loading from a full cache fails without a network; Gemma Scope's files load. What it asks
    for is in the cached file, and nothing else is needed.
    """
    name = f"{suite} residual"
    theirs = {
        "gemma-scope": {"end": "loaded", "asked": []},
        "gemma-scope-2": {"end": "ConnectionError", "asked": ["huggingface.co"]},
    }
    assert golden()["from the cache"][name] == theirs[suite]

    def refuse(*_args, **_more):
        raise AssertionError("nothing is to be asked of the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    check(ours(hub.load_sae(ADDRESSES[name]), X), Wanted(X, WEIGHTS[name]))


# Attached to a model


def streams(model):
    """What `transformers` computes around the MLP of layer 1, by plain hooks: the stream before
    the norm, and what the MLP adds. The norm's output is from Gemma's formula in float64.
    """
    block, seen = model.model.layers[1], {}
    before, after = block.pre_feedforward_layernorm, block.post_feedforward_layernorm
    before.register_forward_pre_hook(lambda _m, args: seen.update(resid_mid=args[0]))
    after.register_forward_hook(lambda _m, _i, out: seen.update(mlp_out=out))
    model(input_ids=torch.from_numpy(IDS))
    found = {name: value[0].double().numpy() for name, value in seen.items()}
    x, gain = found["resid_mid"], 1 + before.weight.double().numpy()
    size = np.square(x).mean(-1, keepdims=True) + model.config.rms_norm_eps
    return found | {"mlp_in": x / np.sqrt(size) * gain}


@pytest.mark.parametrize("name", MODELS)
def test_a_transcoder_reads_the_output_of_the_norm(name):
    """SAELens names the input of a Gemma Scope 2 transcoder `blocks.L.hook_mlp_in`, which in
    TransformerLens 3.9 is the residual stream before the MLP's norm and runs on request only;
    without the request an attached transcoder is fed what it is to replace, the MLP's output. The
    config in the file, kept by SAELens as `hf_hook_name`, names the norm's output, and that is
    what gemscope reads.
    """
    record, right = golden()[f"attached to {name}"], streams(tiny(name))
    assert record["hook_name"] == "blocks.1.hook_mlp_in"
    assert record["hf_hook_name"] == HOOKS["transcoder"][0].format(1)
    # Two passes in float32 differ by rounding, and the three tensors by more than a quarter.
    for run, stream in (("by default", "mlp_out"), ("on request", "resid_mid"),
                        ("by hand", "mlp_in")):  # fmt: skip
        reads = np.array(record[run]["reads"])
        for other, value in right.items():
            off = abs(reads - value).max() / abs(value).max()
            assert off < 1e-5 if other == stream else off > 0.25, (run, other, off)
    site = Site.parse("1.mlp_in")
    read = model_of(name).run(batch(), read=[site])[site][0].double().numpy()
    # The mean of D squares, a root, and three products.
    close(read, right["mlp_in"], (D + 6) * ROUNDING * abs(right["mlp_in"]))


@pytest.mark.parametrize("name", MODELS)
def test_an_attached_transcoder_keeps_its_skip(made, name):
    """SAELens adds the affine part of a transcoder where it is called, and leaves it out where it
    is attached to a model: what it writes is off by `x @ A`, whatever tensor `x` it reads. The
    makers' formula has that part in the output, as gemscope's splice has.
    """
    w = WEIGHTS["gemma-scope-2 transcoder"]
    for run in ("by default", "on request", "by hand"):
        record = golden()[f"attached to {name}"][run]
        wanted = Wanted(np.array(record["reads"]), w)
        close(np.array(record["writes"]), wanted.y - wanted.skipped, wanted.off_y)
        assert abs(wanted.skipped).max() > 1
    sites = [Site.parse(f"1.{stream}") for stream in ("mlp_in", "resid_mid", "resid_post")]
    run = model_of(name).run(batch(), read=sites, edits=[splice(hub.load_sae(TRANSCODER))])
    x, before, after = (run[site][0, 1:].double().numpy() for site in sites)
    wanted = Wanted(x, w)
    close(after - before, wanted.y, wanted.off_y + ROUNDING * abs(after))


def model_of(name):
    return LanguageModel(tiny(name), hf.AutoTokenizer.from_pretrained(miniature.MODEL))


def batch():
    """The tokens; the first is no text."""
    ids, one = torch.from_numpy(IDS), torch.zeros(1, dtype=torch.int64)
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 0] = False
    return TokenBatch(ids, counts, one, one)


# SAELens itself


def asked(root, out):
    """Have SAELens make a record of the artefacts at `root`."""
    done = subprocess.run([PEER, SCRIPT, root, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8"))


def same(found, wanted, at):
    """Equal but for rounding: another processor sums in another order, by less than 1e-4 here,
    where another rule would change which features fire, or what is decoded by tenths.
    """
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), at
        for name in wanted:
            same(found[name], wanted[name], f"{at}, {name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), at
        for place, pair in enumerate(zip(found, wanted, strict=True)):
            same(*pair, f"{at}, {place}")
    elif isinstance(wanted, float):
        assert abs(found - wanted) < 1e-4, at
    else:
        assert found == wanted, at


@pytest.mark.slow
@pytest.mark.skipif(not PEER.is_file(), reason="no .venv-peer with SAELens: `make bench` makes it")
def test_saelens_still_says_what_the_record_says(made, tmp_path):
    record, wanted = asked(made, tmp_path / "record.json"), dict(golden())
    assert record.pop("versions")["sae-lens"] == wanted.pop("versions")["sae-lens"]
    same(record, wanted, "record")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        asked(make(Path(place)), GOLDEN)
