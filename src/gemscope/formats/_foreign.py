"""What the readers of other libraries' layouts share: checks of their configurations and headers,
and the arithmetic that folds what those libraries do around an encoder into its weights.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError

from ._facts import field, listed, shown
from ._safetensors import TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("F32", "BF16", "F16")
_LEAST = 2.0**-126
"""The smallest number that float32 holds to its full precision; one over it, it holds as well."""
_TILE = 4096
"""Features at a time where a sum is taken in float64."""
_GPT2 = {"gpt2": "gpt2", "gpt2-small": "gpt2", "gpt2-medium": "gpt2-medium",
         "gpt2-large": "gpt2-large", "gpt2-xl": "gpt2-xl"}  # fmt: skip


def positive(file: Path, raw: Mapping[str, Any], name: str, *, zero: bool = False) -> float:
    """`raw[name]`, a positive number that float32 can hold, or 0 with `zero`."""
    number = float(field(file, raw, name, float))
    if not _LEAST <= number <= 1 / _LEAST and not (zero and number == 0):
        raise InputError(
            f"{file}: {name} is {number}, not a positive number that float32 "
            "holds: get the file again"
        )
    return number


def chosen_k(file: Path, k: int, d_sae: int) -> int:
    """`k` of a TopK dictionary, at least 1 and at most its features."""
    if not 1 <= k <= d_sae:
        raise InputError(f"{file}: k is {k}, not between 1 and the {d_sae} features there are")
    return k


def agreeing(file: Path, raw: Mapping[str, Any], **found: int) -> None:
    """Refuse a configuration that gives other sizes than the weights have."""
    for name, size in found.items():
        said = field(file, raw, name, int, None)
        if said is not None and said != size:
            raise InputError(
                f"{file} says {name} {said}, the weights have {size}: one of the two files is of "
                "another dictionary"
            )


def headed(
    file: Path, needed: Collection[str], optional: Collection[str] = ()
) -> dict[str, TensorInfo]:
    """The header of `file`, with all of `needed` and nothing beside `optional` in it."""
    infos = read_header(file)
    if missing := [name for name in needed if name not in infos]:
        raise InputError(f"{file} lacks {', '.join(missing)}; it has {listed(infos)}")
    # An unknown tensor may change the function; ignoring it could load something else.
    if unknown := sorted(infos.keys() - {*needed, *optional}):
        raise InputError(
            f"{file} has {shown(unknown[0])}, which has no place in this layout: a dictionary of "
            f"this kind has {', '.join([*needed, *optional])}"
        )
    if wrong := [name for name in infos if infos[name].dtype not in _FLOATS]:
        raise InputError(f"{file}: {wrong[0]} is {infos[wrong[0]].dtype}, not {', '.join(_FLOATS)}")
    return infos


def hub_name(model: str | None) -> str | None:
    """A model's name on the hub, for the short names that have one meaning; others as they are."""
    if model is None or "/" in model:
        return model
    if model in _GPT2:
        return f"openai-community/{_GPT2[model]}"
    if re.fullmatch(r"gemma-(2-)?\d+b(-it)?|gemma-3-\d+[bm](-it|-pt)?", model):
        return f"google/{model}"
    if re.fullmatch(r"pythia-[\d.]+[mb](-deduped)?", model):
        return f"EleutherAI/{model}"
    return model


def less_bias(b_enc: "Tensor", w_enc: "Tensor", bias: "Tensor") -> "Tensor":
    """`b_enc - bias @ w_enc`, in float32: `b_enc` of an encoder `w_enc [d_in, d_sae]` that took
    `bias [d_in]` from its input, and no longer does.
    """
    import torch

    # The sum over the input's width is the one place where float32 would lose digits.
    tiles = [bias.double() @ some.double() for some in w_enc.split(_TILE, dim=1)]
    return (b_enc.double() - torch.cat(tiles)).float()


def to_unit_norm(
    w_enc: "Tensor", b_enc: "Tensor", w_dec: "Tensor", scale: float = 1.0
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Encoder, bias and decoder in float32, the decoder's rows times `scale` brought to length 1.

    A feature whose decoder row is zero writes nothing: its encoder becomes zero too.
    """
    w_dec = w_dec.float()
    norm = w_dec.norm(dim=1)
    safe = norm.where(norm > 0, 1.0)
    weight = norm * scale
    return w_enc.float() * weight, b_enc.float() * weight, w_dec / safe[:, None]
