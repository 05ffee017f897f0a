"""The layout of Llama Scope R1 Distill: `config.json` and `sae_weights.safetensors`.

Tensors are those of Llama Scope, `log_jumprelu_threshold [d_sae]`, one for each feature, and
`dataset_average_activation_norm.<hook>`, the mean norm of activations where it reads and where it
writes. Thresholds were trained with the weights, on scaled activations: there, a feature fires
where its pre-activation, times the length of its decoder row if `sparsity_include_decoder_norm`
says so, is above `exp(log_jumprelu_threshold)`. That is what is read here, for raw activations.
"""

import math
from pathlib import Path
from typing import Any

from gemscope.errors import InputError

from ._facts import Facts, Part, checked_values, field, is_there, read_json, shown
from ._foreign import headed, positive
from ._llama_scope import Recipe, facts, folded, names, read_recipe
from ._safetensors_read import map_tensors

NAME = "llama-scope-r1-distill"
CONFIG = "config.json"
PARAMETERS = "sae_weights.safetensors"
_THRESHOLD = "log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."


def matches(folder: Path) -> bool:
    """Whether `folder` is in this layout: SAELens' has the same weights file beside `cfg.json`."""
    return (
        is_there(folder / PARAMETERS)
        and is_there(folder / CONFIG)
        and not is_there(folder / "cfg.json")
    )


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`, its two files checked against each other."""
    file, weights = folder / CONFIG, folder / PARAMETERS
    raw = read_json(file)
    recipe = _recipe(file, raw)
    threshold = _THRESHOLD if recipe.act_fn == "jumprelu" else None
    norms = sorted({_NORM + recipe.hook_in, _NORM + recipe.hook_out})
    infos = headed(weights, [*names(recipe), *([threshold] if threshold else []), *norms])
    if odd := [name for name in norms if math.prod(infos[name].shape) != 1]:
        raise InputError(f"{weights}: {odd[0]} is {list(infos[odd[0]].shape)}, not one number")
    found = facts(NAME, file, raw, recipe, weights, infos, threshold)
    factor = positive(file, raw, "expansion_factor")
    if abs(factor * found.d_in - found.d_sae) > 0.5:
        raise InputError(
            f"{file} says expansion_factor {factor:g}, the weights have {found.d_sae} features at "
            f"d_model {found.d_in}: one of the two files is of another dictionary"
        )
    return found


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors, folded, in float32: raw activations in, raw activations out."""
    weights = folder / PARAMETERS
    tensors = map_tensors(weights, inspect(folder).shapes)
    recipe = _recipe(folder / CONFIG, read_json(folder / CONFIG))
    root = math.sqrt(recipe.d_model)
    values = {name: value.item() for name, value in tensors.items() if name.startswith(_NORM)}
    scale_in = root / positive(weights, values, _NORM + recipe.hook_in)
    scale_out = root / positive(weights, values, _NORM + recipe.hook_out)
    w_enc, b_enc, w_dec, b_dec = folded(tensors, recipe, scale_in, scale_out)
    threshold = None
    if recipe.act_fn == "jumprelu":
        # A folded pre-activation is the trained one over the scale of what it is measured in:
        # of what is written once the decoder's length is in it, of what is read otherwise.
        scale = scale_out if recipe.by_norm else scale_in
        threshold = tensors[_THRESHOLD].float().exp() / scale
    part = Part(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, threshold=threshold, k=recipe.k)
    return (checked_values(weights, part),)


def _recipe(file: Path, raw: dict[str, Any]) -> Recipe:
    kind = field(file, raw, "sae_type", str, "sae")
    if kind != "sae":
        raise InputError(f"{file} says sae_type {shown(kind)}: only sae, of one layer, can be read")
    return read_recipe(file, raw)
