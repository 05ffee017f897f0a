"""Llama Scope's layout: `hyperparams.json` and `checkpoints/final.safetensors`.

`encoder.weight [d_sae, d_model]`, `encoder.bias`, `decoder.weight [d_model, d_sae]`,
`decoder.bias`, trained on activations scaled to a mean norm of `sqrt(d_model)`. What is read here
takes and gives raw activations, by the rule of its authors: the scales of input and output are
folded in, then decoder rows are brought to length 1, and a feature fires where its pre-activation
is then above `jump_relu_threshold`. A transcoder has one scale for what it reads and another for
what it writes. `top_k` is left over from training, unless `act_fn` is topk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError
from gemscope.sites import site_of_transformer_lens

from ._facts import (
    DTYPES,
    Facts,
    Part,
    checked_shapes,
    checked_values,
    field,
    is_there,
    read_json,
    shown,
)
from ._foreign import agreeing, chosen_k, headed, less_bias, positive, to_unit_norm
from ._safetensors import TensorInfo
from ._safetensors_read import map_tensors

if TYPE_CHECKING:
    from torch import Tensor

NAME = "llama-scope"
CONFIG = "hyperparams.json"
PARAMETERS = "checkpoints/final.safetensors"
WEIGHTS = ("encoder.weight", "encoder.bias", "decoder.weight")
BIAS = "decoder.bias"
_ACTIVATIONS = ("jumprelu", "topk", "relu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a configuration says of how encoder and decoder were trained to be used."""

    act_fn: str
    k: int | None
    by_norm: bool
    """Whether features compete by activation times the length of their decoder row."""
    less_bias: bool
    """Whether the decoder's bias is taken from the input."""
    bias: bool
    """Whether there is a decoder's bias."""
    d_model: int
    hook_in: str
    hook_out: str
    model: str | None


def matches(folder: Path) -> bool:
    """Whether `folder` is in this layout."""
    return is_there(folder / PARAMETERS)


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`, its two files checked against each other."""
    file = folder / CONFIG
    raw = read_json(file)
    recipe = read_recipe(file, raw)
    _norms(file, raw)
    _threshold(file, raw, recipe)
    weights = folder / PARAMETERS
    return facts(NAME, file, raw, recipe, weights, headed(weights, names(recipe)))


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors, folded, in float32: raw activations in, raw activations out."""
    import torch

    found = inspect(folder)
    file = folder / CONFIG
    raw = read_json(file)
    recipe = read_recipe(file, raw)
    scales = [math.sqrt(recipe.d_model) / norm for norm in _norms(file, raw)]
    tensors = map_tensors(folder / PARAMETERS, found.shapes)
    w_enc, b_enc, w_dec, b_dec = folded(tensors, recipe, scales[0], scales[1])
    height = _threshold(file, raw, recipe)
    part = Part(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        threshold=None if height is None else torch.full_like(b_enc, height),
        k=recipe.k,
    )
    return (checked_values(folder / PARAMETERS, part),)


def read_recipe(file: Path, raw: Mapping[str, Any]) -> Recipe:
    """What the configuration `raw`, read from `file`, says; what cannot be folded is refused."""
    norm = field(file, raw, "norm_activation", str)
    if norm != "dataset-wise":
        raise InputError(
            f"{file} says norm_activation {shown(norm)}: only dataset-wise, one scale for all "
            "tokens, can be folded into weights; fold it with the library it comes from"
        )
    if field(file, raw, "use_glu_encoder", bool, False):
        raise InputError(f"{file} says use_glu_encoder: a gated encoder cannot be represented")
    act_fn = field(file, raw, "act_fn", str).lower()
    if act_fn not in _ACTIVATIONS:
        raise InputError(f"{file}: act_fn {shown(act_fn)} is not one of {', '.join(_ACTIVATIONS)}")
    hook_in = field(file, raw, "hook_point_in", str)
    hook_out = field(file, raw, "hook_point_out", str, hook_in)
    bias = field(file, raw, "use_decoder_bias", bool, True)
    less = field(file, raw, "apply_decoder_bias_to_pre_encoder", bool, False) and bias
    if less and hook_in != hook_out:
        raise InputError(
            f"{file} says apply_decoder_bias_to_pre_encoder, and reads {hook_in} but writes "
            f"{hook_out}: the bias is of what is written, and its meaning for what is read is not "
            "known"
        )
    return Recipe(
        act_fn=act_fn,
        k=field(file, raw, "top_k", int) if act_fn == "topk" else None,
        by_norm=field(file, raw, "sparsity_include_decoder_norm", bool),
        less_bias=less,
        bias=bias,
        d_model=field(file, raw, "d_model", int),
        hook_in=hook_in,
        hook_out=hook_out,
        model=field(file, raw, "model_name", str, None),
    )


def names(recipe: Recipe) -> tuple[str, ...]:
    """The tensors that a dictionary of `recipe` has."""
    return (*WEIGHTS, BIAS) if recipe.bias else WEIGHTS


def facts(
    layout: str,
    file: Path,
    raw: Mapping[str, Any],
    recipe: Recipe,
    weights: Path,
    infos: Mapping[str, TensorInfo],
    threshold: str | None = None,
) -> Facts:
    """What the configuration `raw` of `file` and the header `infos` of `weights` say together.

    `threshold` is the tensor with thresholds, if there is one.
    """
    shapes = {
        "w_enc": infos["encoder.weight"].shape[::-1],
        "b_enc": infos["encoder.bias"].shape,
        "w_dec": infos["decoder.weight"].shape[::-1],
    }
    shapes |= {"b_dec": infos[BIAS].shape} if recipe.bias else {}
    shapes |= {"threshold": infos[threshold].shape} if threshold else {}
    d_in, d_sae, d_out = checked_shapes(weights, shapes)
    agreeing(file, raw, d_model=d_in, d_sae=d_sae)
    agreeing(file, raw, d_model=d_out)
    if recipe.k is not None:
        chosen_k(file, recipe.k, d_sae)
    return Facts(
        layout=layout,
        kind="sae" if recipe.hook_in == recipe.hook_out else "transcoder",
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        affine=False,
        activation=recipe.act_fn,
        dtype=DTYPES[infos["encoder.weight"].dtype],
        files=(weights,),
        shapes={name: info.shape for name, info in infos.items()},
        reads=site_of_transformer_lens(recipe.hook_in),
        writes=site_of_transformer_lens(recipe.hook_out),
        model=recipe.model,
    )


def folded(
    tensors: "Mapping[str, Tensor]", recipe: Recipe, scale_in: float, scale_out: float
) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """`w_enc`, `b_enc`, `w_dec`, `b_dec` in float32, for raw activations.

    `scale_in` and `scale_out` brought what is read and written to the scale of training.
    """
    w_enc = tensors["encoder.weight"].float().T
    w_dec = tensors["decoder.weight"].float().T
    b_enc = tensors["encoder.bias"].float()
    b_dec = tensors[BIAS].float() if recipe.bias else w_dec.new_zeros(w_dec.shape[1])
    if recipe.less_bias:
        b_enc = less_bias(b_enc, w_enc, b_dec)  # at the scale of training, as both are
    b_enc, b_dec, ratio = b_enc / scale_in, b_dec / scale_out, scale_in / scale_out
    if recipe.by_norm:
        w_enc, b_enc, w_dec = to_unit_norm(w_enc, b_enc, w_dec, ratio)
    else:
        w_dec = w_dec * ratio
    return w_enc, b_enc, w_dec, b_dec


def _norms(file: Path, raw: Mapping[str, Any]) -> tuple[float, float]:
    """Mean norm of the activations that are read, and of those that are written."""
    norms = field(file, raw, "dataset_average_activation_norm", dict)
    return positive(file, norms, "in"), positive(file, norms, "out")


def _threshold(file: Path, raw: Mapping[str, Any], recipe: Recipe) -> float | None:
    if recipe.act_fn != "jumprelu":
        return None
    return positive(file, raw, "jump_relu_threshold", zero=True)
