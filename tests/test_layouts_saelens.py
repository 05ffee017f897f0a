"""SAELens' folders: read as it computes with them, and written exactly."""

import json

import pytest
import torch
from golden_layouts import (
    OUT,
    RESID,
    SAELENS,
    D,
    F,
    agrees,
    capital,
    drawn,
    only,
    plain_unfolded,
    saelens,
    tensor,
)

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sites import Site, Stream


def test_saelens_by_hand(tmp_path):
    tensors = {
        "W_enc": tensor([1.0, 2, 3], [4, 5, 6]),
        "b_enc": tensor(0.5, 0, -1),
        "W_dec": tensor([3.0, 4], [0, 2], [0, 0]),
        "b_dec": tensor(1.0, -2),
    }
    sizes = {"d_in": 2, "d_sae": 3, "architecture": "topk", "k": 2}
    plain = only(saelens(tmp_path / "plain", tensors, **sizes))
    assert torch.equal(plain.w_enc, tensors["W_enc"])
    assert torch.equal(plain.b_enc, tensors["b_enc"])
    assert (plain.k, plain.threshold, plain.skip) == (2, None, None)
    asked = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True}
    part = only(saelens(tmp_path / "asked", tensors, **sizes, **asked))
    # b_dec @ W_enc is (-7, -8, -9); decoder rows are 5, 2 and 0 long.
    assert torch.equal(part.b_enc, tensor(7.5 * 5, 8 * 2, 0.0))
    assert torch.equal(part.w_enc, tensor([5.0, 4, 0], [20, 10, 0]))
    assert torch.equal(part.w_dec, tensor([0.6, 0.8], [0, 1], [0, 0]))
    assert torch.equal(part.b_dec, tensors["b_dec"])


@pytest.mark.parametrize("less_bias", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "topk by norm"])
def test_saelens_folded_is_unfolded(tmp_path, less_bias, kind):
    w, x = drawn(4)
    by_norm, threshold = kind == "topk by norm", w["threshold"] if kind == "jumprelu" else None
    changes = {"architecture": kind.split(" ", 1)[0], "apply_b_dec_to_input": less_bias}
    changes |= {"k": 7, "rescale_acts_by_decoder_norm": by_norm} if "topk" in kind else {}
    folder = saelens(
        tmp_path, capital(w, *(["threshold"] if kind == "jumprelu" else [])), **changes
    )
    wanted = plain_unfolded(
        x, w, less_bias=less_bias, by_norm=by_norm, threshold=threshold,
        k=7 if "topk" in kind else None,
    )  # fmt: skip
    agrees(only(folder), x, wanted)
    facts = formats.inspect(folder)
    assert (facts.kind, facts.reads, facts.writes, facts.model, facts.affine) == (
        "sae", RESID, RESID, "google/gemma-2-2b", False,
    )  # fmt: skip
    assert facts.activation == {"standard": "relu"}.get(kind, kind.split(" ", 1)[0])


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_saelens_transcoders(tmp_path, jump, skip):
    w, x = drawn(5, out=OUT)
    tensors = capital(w, *(["threshold"] if jump else []))
    tensors |= {"W_skip": w["skip"].T} if skip else {}
    name = f"{'jumprelu_' if jump else ''}{'skip_' if skip else ''}transcoder"
    meta = SAELENS["metadata"] | {
        "hook_name": "blocks.5.mlp.hook_in",
        "hook_name_out": "blocks.5.hook_mlp_out",
    }
    folder = saelens(tmp_path, tensors, architecture=name, d_out=OUT, metadata=meta)
    wanted = plain_unfolded(x, w, threshold=w["threshold"] if jump else None, skip=skip)
    agrees(only(folder), x, wanted)
    facts = formats.inspect(folder)
    assert (facts.kind, facts.affine, facts.d_out) == ("transcoder", skip, OUT)
    assert (facts.reads, facts.writes) == (Site(5, Stream.MLP_IN), Site(5, Stream.MLP_OUT))


OLD = {
    "d_in": D, "d_sae": F, "dtype": "torch.float32", "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre", "hook_point_head_index": None,
    "normalize_activations": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "k", "site"),
    [
        (OLD, None, Site(8, Stream.RESID_PRE)),
        (OLD | {"activation_fn_str": "relu"}, None, Site(8, Stream.RESID_PRE)),
        (
            OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}},
            7,
            Site(8, Stream.RESID_PRE),
        ),
        (
            OLD | {"hook_name": "blocks.3.attn.hook_z", "architecture": "topk", "k": 7},
            7,
            Site(3, Stream.ATTN_HEADS),
        ),
    ],
)
def test_saelens_before_version_6(tmp_path, config, k, site):
    """The bias is taken from the input unless it says otherwise, and ones scale nothing."""
    w, x = drawn(6)
    folder = saelens(tmp_path, capital(w) | {"scaling_factor": torch.ones(F)}, config)
    agrees(only(folder), x, plain_unfolded(x, w, less_bias=True, k=k))
    facts = formats.inspect(folder)
    assert (facts.reads, facts.writes, facts.model) == (site, site, "openai-community/gpt2")


@pytest.mark.parametrize(
    ("meta", "reads"),
    [
        ({"hook_name": "blocks.5.hook_mlp_in"}, None),
        ({"hook_name": "blocks.5.ln1.hook_normalized"}, None),
        ({"hook_name": None}, None),
        ({"hf_hook_name": "model.layers.7"}, Site(7, Stream.RESID_POST)),
        ({"hf_hook_name": "model.layers.7.output"}, Site(7, Stream.RESID_POST)),
        (
            {
                "hook_name": "blocks.5.hook_mlp_in",
                "hf_hook_name": "model.layers.5.pre_feedforward_layernorm.output",
            },
            Site(5, Stream.MLP_IN),
        ),
        ({"hf_hook_name": "somewhere.else"}, RESID),
        # In the model's family a norm follows that module.
        ({"hook_name": "blocks.5.hook_mlp_in", "hf_hook_name": "model.layers.5.mlp"}, None),
    ],
)
def test_saelens_sites(tmp_path, meta, reads):
    """A name with two meanings is left to the user, and an exact one believed first."""
    w, _ = drawn()
    metadata = SAELENS["metadata"] | meta
    folder = saelens(tmp_path, capital(w, "threshold"), metadata=metadata)
    assert formats.inspect(folder).reads == reads


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("gemma-2-9b-it", "google/gemma-2-9b-it"),
        ("gemma-2b", "google/gemma-2b"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
        ("gelu-2l", "gelu-2l"),
        (None, None),
    ],
)
def test_models_are_called_by_their_names_on_the_hub(tmp_path, said, meant):
    w, _ = drawn()
    metadata = SAELENS["metadata"] | {"model_name": said}
    folder = saelens(tmp_path, capital(w, "threshold"), metadata=metadata)
    assert formats.inspect(folder).model == meant


WRITTEN = {
    "jumprelu": ({"threshold"}, RESID, RESID),
    "standard": (set(), RESID, RESID),
    "topk": ({"k"}, RESID, RESID),
    "transcoder": (set(), Site(2, Stream.MLP_IN_UNSCALED), Site(2, Stream.MLP_OUT)),
    "skip_transcoder": ({"skip"}, Site(2, Stream.MLP_IN), Site(2, Stream.MLP_OUT)),
    "jumprelu_transcoder": ({"threshold"}, RESID, Site(6, Stream.RESID_POST)),
    "jumprelu_skip_transcoder": (
        {"threshold", "skip"},
        Site(2, Stream.MLP_IN),
        Site(2, Stream.MLP_OUT),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", WRITTEN)
def test_saelens_written_is_read_back_exactly(tmp_path, architecture, dtype):
    has, reads, writes = WRITTEN[architecture]
    w, _ = drawn(7, out=D if reads == writes else OUT)
    matrices = {n: w[n].to(dtype) for n in ("w_enc", "b_enc", "w_dec", "b_dec")}
    part = formats.Part(
        **matrices,
        threshold=w["threshold"] if "threshold" in has else None,
        k=7 if "k" in has else None,
        skip=w["skip"].to(dtype) if "skip" in has else None,
    )
    folder = tmp_path / "new" / "one"
    formats.write_saelens(folder, part, reads=reads, writes=writes, model="google/gemma-2-2b")
    found, facts = only(folder), formats.inspect(folder)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold", "skip"):
        was, now = getattr(part, name), getattr(found, name)
        assert (was is None) == (now is None), name
        assert was is None or (was.dtype == now.dtype and torch.equal(was, now)), name
    assert found.k == part.k
    assert (facts.reads, facts.writes, facts.model) == (reads, writes, "google/gemma-2-2b")
    assert facts.kind == ("sae" if reads == writes else "transcoder")
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == architecture
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["one"]
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in folder.iterdir())


def test_saelens_joins_the_heads_of_attention(tmp_path):
    """Its own models keep heads on an axis of their own."""
    w, _ = drawn()
    part = formats.Part(**{n: w[n] for n in ("w_enc", "b_enc", "w_dec", "b_dec")})
    heads = Site(1, Stream.ATTN_HEADS)
    formats.write_saelens(tmp_path / "a", part, reads=heads, writes=heads, model=None)
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    assert config["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    assert formats.inspect(tmp_path / "a").reads == heads


def test_what_saelens_cannot_hold_is_refused(tmp_path):
    w, _ = drawn()
    bare = {n: w[n] for n in ("w_enc", "b_enc", "w_dec", "b_dec")}
    other = Site(6, Stream.RESID_POST)
    for part, writes, match in (
        (formats.Part(**bare, k=3), other, "no TopK transcoders"),
        (formats.Part(**bare, skip=w["skip"]), RESID, "no autoencoders with a skip connection"),
        (
            formats.Part(**bare | {"w_dec": w["w_dec"][:, None]}),
            RESID,
            "no dictionaries of several layers",
        ),
        (formats.Part(**bare, threshold=-w["threshold"]), RESID, "negative"),
    ):
        with pytest.raises(InputError, match=match):
            formats.write_saelens(tmp_path / "a", part, reads=RESID, writes=writes, model=None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place, match in (("file", "exists; choose another"), ("file/a", "a cannot be written")):
        with pytest.raises(InputError, match=match):
            formats.write_saelens(
                tmp_path / place, formats.Part(**bare), reads=RESID, writes=RESID, model=None
            )


def test_weights_that_need_no_folding_keep_their_storage_type(tmp_path):
    w, _ = drawn()
    half = {n: t.bfloat16() for n, t in capital(w, "threshold").items()}
    part = only(saelens(tmp_path, half))
    assert part.w_enc.dtype == part.w_dec.dtype == torch.bfloat16
    assert torch.equal(part.w_enc, half["W_enc"])
    assert formats.inspect(tmp_path).dtype == "bfloat16"
