"""Damaged, contradicting and hostile folders in other libraries' layouts: one sentence each."""

import json
import math

import pytest
import torch
from golden_layouts import (
    HOOK,
    LLAMA,
    MLP_OUT,
    R1,
    SAELENS,
    SPARSIFY,
    WRONG,
    D,
    F,
    capital,
    drawn,
    linear,
    llama_scope,
    r1_distill,
    refused,
    saelens,
    sparsify,
    stored,
    told,
)

from gemscope import formats

W, _ = drawn()
NORM = f"dataset_average_activation_norm.{HOOK}"
MORE = {"log_jumprelu_threshold": W["threshold"].log(), NORM: torch.tensor(9.0)}
ROWS = {"encoder.weight": W["w_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["w_dec"],
        "b_dec": W["b_dec"]}  # fmt: skip
LAYOUTS = {
    "llama": (llama_scope, linear(W), LLAMA, "hyperparams.json"),
    "r1": (r1_distill, linear(W) | MORE, R1, "config.json"),
    "saelens": (saelens, capital(W, "threshold"), SAELENS, "cfg.json"),
    "sparsify": (sparsify, ROWS, SPARSIFY, "cfg.json"),
}
EACH = pytest.mark.parametrize("layout", LAYOUTS)


def place(layout, folder, tensors=None, **changes):
    make, sound, *_ = LAYOUTS[layout]
    return make(folder, sound if tensors is None else tensors, **changes)


@EACH
def test_the_sound_ones_are_read(tmp_path, layout):
    assert len(formats.read(place(layout, tmp_path))) == 1


@EACH
def test_a_missing_tensor_is_named(tmp_path, layout):
    _, sound, *_ = LAYOUTS[layout]
    for count, name in enumerate(sound):
        folder = place(layout, tmp_path / str(count), {n: t for n, t in sound.items() if n != name})
        refused(folder, rf"lacks {name}; it has ")


@EACH
def test_an_unknown_tensor_is_named(tmp_path, layout):
    _, sound, *_ = LAYOUTS[layout]
    folder = place(layout, tmp_path, sound | {"b_gate": torch.zeros(F)})
    refused(folder, r"has 'b_gate', which has no place in this layout: .*")


@EACH
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, layout, keep):
    _, sound, *_ = LAYOUTS[layout]
    refused(place(layout, tmp_path, stored(sound)[:keep]), "cut short")


@EACH
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, layout, number):
    _, sound, *_ = LAYOUTS[layout]
    for count, name in enumerate(n for n in sound if n != NORM):
        spoilt = sound[name].clone(memory_format=torch.contiguous_format)
        spoilt.view(-1)[1] = number
        folder = place(layout, tmp_path / str(count), sound | {name: spoilt})
        refused(folder, "holds NaN or infinity")


@EACH
def test_shapes_that_contradict_each_other_are_told(tmp_path, layout):
    _, sound, *_ = LAYOUTS[layout]
    for count, (name, value) in enumerate(sound.items()):
        longer = torch.cat([value.reshape(-1), torch.zeros(1)])
        if value.ndim == 2:
            longer = torch.cat([value, value[:1]])
        folder = place(layout, tmp_path / str(count), sound | {name: longer})
        refused(folder, r"ask for|is \[2\], not one number|says d_(in|sae|model|out)")
        folder = place(layout, tmp_path / f"{count}-flat", sound | {name: value[None, None]})
        if name != NORM:
            refused(folder, r"has shape \[(1, 1, .*|.*, 1, 1)\]")


@EACH
def test_weights_of_another_type_are_refused(tmp_path, layout):
    _, sound, *_ = LAYOUTS[layout]
    raw = stored(sound)
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(n for n in header if n.endswith(("bias", "b_enc")))
    header[name] |= {"dtype": "I32"}
    text = json.dumps(header).encode()
    folder = place(layout, tmp_path, len(text).to_bytes(8, "little") + text + raw[8 + length :])
    refused(folder, f"{name} is I32, not F32, BF16, F16")


@EACH
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, not an object"),
        ('{"k": 1, "k": 2}', "has k twice: keep the one that is meant"),
        ('{"a": {"b": 1, "b": 1}}', "has b twice"),
    ],
)
def test_a_config_that_is_no_object_is_refused(tmp_path, layout, text, match):
    folder = place(layout, tmp_path)
    (folder / LAYOUTS[layout][3]).write_text(text)
    refused(folder, match)


def test_a_missing_config_is_named(tmp_path):
    for layout, (_, _, _, name) in LAYOUTS.items():
        folder = place(layout, tmp_path / layout)
        (folder / name).unlink()
        # The weights file of two layouts has one name; without its config it is taken for SAELens'.
        refused(folder, "cfg.json" if layout == "r1" else name)


@EACH
def test_no_value_of_a_config_does_worse_than_be_refused(tmp_path, layout):
    """Whatever stands in a configuration, it is read or refused in a sentence."""
    _, _, config, file = LAYOUTS[layout]
    folder = place(layout, tmp_path)
    for name in [*config, "k", "signed", "activation_fn_str", "activation_fn_kwargs", "metadata"]:
        for value in WRONG:
            (folder / file).write_text(json.dumps(config | {name: value}))
            assert "\n" not in (told(folder) or "")


@pytest.mark.parametrize(
    ("layout", "changes", "match"),
    [
        ("llama", {"norm_activation": "token-wise"}, "says norm_activation 'token-wise': only"),
        ("llama", {"norm_activation": "inference"}, "says norm_activation 'inference': only"),
        ("llama", {"use_glu_encoder": True}, "a gated encoder cannot be represented"),
        ("llama", {"act_fn": "batchtopk"}, "act_fn 'batchtopk' is not one of jumprelu, topk, relu"),
        ("llama", {"d_model": 8}, "says d_model 8, the weights have 16"),
        ("llama", {"d_sae": 8}, "says d_sae 8, the weights have 48"),
        ("llama", {"act_fn": "topk", "top_k": 0}, "k is 0, not between 1 and the 48 features"),
        ("llama", {"act_fn": "topk", "top_k": 49}, "k is 49, not between 1 and the 48 features"),
        ("llama", {"jump_relu_threshold": -0.1}, "jump_relu_threshold is -0.1, not a positive"),
        ("llama", {"jump_relu_threshold": math.nan}, "jump_relu_threshold is nan, not a positive"),
        (
            "llama",
            {"dataset_average_activation_norm": {"in": 1.0}},
            "hyperparams.json lacks out$",
        ),
        (
            "llama",
            {"dataset_average_activation_norm": {"in": 0, "out": 1}},
            "in is 0.0, not a positive number",
        ),
        (
            "llama",
            {"dataset_average_activation_norm": {"in": 1, "out": 10**400}},
            "out is inf, not a positive number",
        ),
        (
            "llama",
            {"apply_decoder_bias_to_pre_encoder": True, "hook_point_out": MLP_OUT},
            "its meaning for what is read is not known",
        ),
        ("llama", {"use_decoder_bias": False}, "has 'decoder.bias', which has no place"),
        ("r1", {"sae_type": "crosscoder"}, "says sae_type 'crosscoder': only sae"),
        ("r1", {"expansion_factor": 4}, "says expansion_factor 4, the weights have 48 features"),
        ("r1", {"hook_point_out": MLP_OUT}, f"lacks dataset_average_activation_norm.{MLP_OUT}"),
        ("saelens", {"architecture": "gated"}, "says architecture 'gated', which cannot be"),
        ("saelens", {"architecture": "matching_pursuit"}, "'matching_pursuit', which cannot be"),
        ("saelens", {"architecture": "temporal"}, "'temporal', which cannot be represented"),
        ("saelens", {"architecture": "batchtopk"}, "in its training form becomes one of them"),
        (
            "saelens",
            {"normalize_activations": "expected_average_only_in"},
            "'expected_average_only_in': fold it into the weights first",
        ),
        ("saelens", {"normalize_activations": True}, "fold it into the weights first"),
        ("saelens", {"reshape_activations": "other"}, "says reshape_activations 'other', not"),
        (
            "saelens",
            {"metadata": SAELENS["metadata"] | {"hook_head_index": 3}},
            "says hook_head_index 3: a dictionary of one attention head",
        ),
        ("saelens", {"hook_point_head_index": 0}, "says hook_point_head_index 0: a dictionary of"),
        ("saelens", {"architecture": "topk"}, "cfg.json lacks k$"),
        ("saelens", {"architecture": "topk", "k": 49}, "has 'threshold', which has no place"),
        ("saelens", {"activation_fn_str": "tanh-relu"}, "says activation function 'tanh-relu'"),
        (
            "saelens",
            {"architecture": "jumprelu_transcoder", "apply_b_dec_to_input": True},
            "says apply_b_dec_to_input of a transcoder",
        ),
        ("saelens", {"d_in": 17}, "says d_in 17, the weights have 16"),
        ("sparsify", {"signed": True}, "says signed, which cannot be represented: features below"),
        ("sparsify", {"activation": "groupmax"}, "says activation 'groupmax': only topk"),
        ("sparsify", {"embed_skip": True}, "says embed_skip, which cannot be represented"),
        ("sparsify", {"gram_lookup": True}, "says gram_lookup, which cannot be represented"),
        ("sparsify", {"k": 0}, "k is 0, not between 1 and the 48 features there are"),
        ("sparsify", {"num_latents": 7}, "says num_latents 7, the weights have 48"),
        ("sparsify", {"d_in": 17}, "says d_in 17, the weights have 16"),
        ("sparsify", {"skip_connection": True}, "lacks W_skip"),
    ],
)
def test_what_cannot_be_represented_or_contradicts_is_told(tmp_path, layout, changes, match):
    refused(place(layout, tmp_path, **changes), match)


def test_an_autoencoder_writes_what_it_reads(tmp_path):
    w, _ = drawn(out=D - 4)
    refused(saelens(tmp_path / "a", capital(w, "threshold")), "says that it is no transcoder")
    tensors = {"encoder.weight": w["w_enc"].T, "encoder.bias": w["b_enc"]}
    tensors |= {"W_dec": w["w_dec"], "b_dec": w["b_dec"]}
    refused(sparsify(tmp_path / "b", tensors), "does not say transcode")


def test_negative_thresholds_are_refused(tmp_path):
    spoilt = capital(W, "threshold") | {"threshold": -W["threshold"]}
    refused(saelens(tmp_path, spoilt), "threshold has negative entries")


def test_a_scale_that_is_not_one_is_refused(tmp_path):
    spoilt = capital(W, "threshold") | {"scaling_factor": torch.full((F,), 2.0)}
    refused(saelens(tmp_path, spoilt), "scaling_factor is not all ones: fold it")


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf])
def test_a_mean_norm_that_is_no_norm_is_refused(tmp_path, number):
    _, sound, *_ = LAYOUTS["r1"]
    folder = place("r1", tmp_path, sound | {NORM: torch.tensor(number)})
    refused(folder, f"{NORM} is .*, not a positive number")


def test_two_layouts_in_one_folder_are_told_apart(tmp_path):
    """The same name of weights stands for two layouts, and their configs decide."""
    folder = place("r1", tmp_path)
    assert formats.layout_of(folder).name == "llama-scope-r1-distill"
    (folder / "cfg.json").write_text("{}")
    assert formats.layout_of(folder).name == "saelens"
    place("sparsify", folder)
    (folder / "cfg.json").write_text("{}")
    refused(folder, "holds several artefacts: .*; keep one of them in it")
