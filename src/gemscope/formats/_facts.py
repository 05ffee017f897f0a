"""What every reader gives: the facts of an artefact, and its tensors under one set of names."""

import json
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError
from gemscope.sites import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_LARGEST_JSON = 2**20
_DEEPEST_JSON = 100
_LONGEST_TEXT = 1_000
_LARGEST_INT = 2**63
_MOST_NAMES = 20
_CHECKED_WHOLE = 2 * 2**30
"""Bytes up to which every weight is looked at for NaN; of a wider artefact the vectors are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the files of an artefact say of it, without its weights; None is what they do not say.

    `shapes` names the tensors as the files do. `d_sae` counts the features of all layers.
    """

    layout: str
    kind: str | None
    """`sae`, `transcoder`, `crosscoder` or `clt`."""
    d_in: int
    d_sae: int
    d_out: int
    affine: bool
    activation: str
    """`jumprelu`, `relu` or `topk`."""
    dtype: str
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    reads: Site | Sites | None = None
    writes: Site | Sites | None = None
    model: str | None = None
    l0: float | None = None
    input_norm: float | None = None
    """Mean norm of the activations it was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The tensors of a dictionary, or of one layer of a multi-layer one, folded: raw activations
    in, raw activations out. `w_dec` of a multi-layer one is `[n_features, n_layers, d_out]`.
    """

    w_enc: "Tensor"
    b_enc: "Tensor"
    w_dec: "Tensor"
    b_dec: "Tensor"
    threshold: "Tensor | None" = None
    k: int | None = None
    skip: "Tensor | None" = None


def size_of(file: Path) -> int:
    """Bytes in `file`, which must be a file or a link to one: opening a pipe might never return."""
    try:
        found = file.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            raise InputError(f"{file} links to a file that is not there: get it again") from None
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or a pipe"
        raise InputError(f"{file} is {what}, not a file: get the file again")
    return found.st_size


def is_there(file: Path) -> bool:
    """Whether there is anything called `file`, be it a link to nothing: `size_of` says what."""
    return os.path.lexists(file)


def shown(value: object) -> str:
    """`value` as Python writes it, in a line of bounded length whatever a file says."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def listed(names: Iterable[str]) -> str:
    """`names` for a sentence, however many there are."""
    known = sorted(names)
    plain = [n if n.isprintable() and len(n) <= 80 else shown(n) for n in known[:_MOST_NAMES]]
    rest = len(known) - len(plain)
    return ", ".join(plain) + (f" and {rest} more" if rest else "") or "nothing"


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; one that has a key twice is refused, since either could be meant."""
    if size_of(file) > _LARGEST_JSON:
        raise InputError(f"{file} is too large for a configuration: get the file again")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                plain = name if name.isidentifier() and len(name) < 80 else shown(name)
                raise InputError(f"{file} has {plain} twice: keep the one that is meant")
            made[name] = value
        return made

    try:
        raw = json.loads(file.read_text("utf-8"), object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds {type(raw).__name__}, not an object")
    # Whoever walks it after this is safe from running out of stack.
    level: list[Any] = [raw]
    for _ in range(_DEEPEST_JSON):
        deeper = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in deeper for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise InputError(f"{file} is nested too deeply for a configuration: get the file again")
    return raw


def field(file: Path, raw: Mapping[str, Any], name: str, wanted: type, default: Any = ...) -> Any:
    """`raw[name]` if it is a `wanted`; an absent one is `default`, or a mistake without one."""
    if name not in raw:
        if default is ...:
            raise InputError(f"{file} lacks {name}")
        return default
    value = raw[name]
    if value is None and default is None:
        return None
    accepted = (int, float) if wanted is float else (wanted,)
    # bool is an int to Python, and neither a width nor an L0 to us.
    if not isinstance(value, accepted) or isinstance(value, bool) != (wanted is bool):
        raise InputError(f"{file}: {name} is {shown(value)}, not {wanted.__name__}")
    # JSON's whole numbers have no end.
    huge = isinstance(raw[name], int) and not -_LARGEST_INT < raw[name] < _LARGEST_INT
    if wanted is float:
        return math.copysign(math.inf, raw[name] > 0 or -1) if huge else float(raw[name])
    if huge:
        raise InputError(f"{file}: {name} is {shown(value)}, larger than anything there is")
    if wanted is str and (len(raw[name]) > _LONGEST_TEXT or not raw[name].isprintable()):
        raise InputError(f"{file}: {name} is {shown(value)}, not a line of text")
    return value


def checked_shapes(
    file: Path, shapes: Mapping[str, tuple[int, ...]], *, n_layers: int | None = None
) -> tuple[int, int, int]:
    """`(d_in, d_sae, d_out)`, after checking tensors, named as in `Part`, against each other.

    Of one layer of a multi-layer model, `n_layers` is the number of layers written.
    """
    rank = {"w_enc": 2, "w_dec": 2 if n_layers is None else 3, "skip": 2}
    for name, shape in shapes.items():
        if len(shape) != rank.get(name, 1) or 0 in shape:
            raise InputError(f"{file}: {name} has shape {list(shape)}")
    (d_in, d_sae), d_out = shapes["w_enc"], shapes["w_dec"][-1]
    wanted = {
        "b_enc": (d_sae,),
        "w_dec": (d_sae, d_out) if n_layers is None else (d_sae, n_layers, d_out),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
        "skip": (d_in, d_out),
    }
    for name, shape in wanted.items():
        if name in shapes and shapes[name] != shape:
            raise InputError(
                f"{file}: {name} is {list(shapes[name])} where w_enc {[d_in, d_sae]} "
                f"and w_dec ask for {list(shape)}"
            )
    return d_in, d_sae, d_out


def checked_values(file: Path, part: Part) -> Part:
    """`part`, after looking for NaN, infinities and negative thresholds."""
    tensors = {
        "w_enc": part.w_enc, "w_dec": part.w_dec, "b_enc": part.b_enc, "b_dec": part.b_dec,
        "threshold": part.threshold, "affine_skip_connection": part.skip,
    }  # fmt: skip
    whole = sum(t.nbytes for t in tensors.values() if t is not None) <= _CHECKED_WHOLE
    for name, tensor in tensors.items():
        if tensor is not None and (whole or tensor.ndim == 1) and not _finite(tensor):
            raise InputError(f"{file}: {name} holds NaN or infinity; get the file again")
    if part.threshold is not None and (part.threshold < 0).any():
        raise InputError(f"{file}: threshold has negative entries")
    return part


def _finite(tensor: "Tensor") -> bool:
    # The largest magnitude is NaN or infinite if any is, and takes no memory of its own.
    import torch

    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() and high.isfinite())
