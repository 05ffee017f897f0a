"""Edits as plain vectors in a file, and back.

What adds the same vector at every token is a vector: `save_vector` writes one for each site, as
safetensors or as a control vector in GGUF. What depends on the token is refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import gemscope
from gemscope.activations import write_whole
from gemscope.errors import InputError
from gemscope.sites import Site, Stream, family_named

from ._change import Change
from ._modes import Mode, Unit
from ._parts import Direction, Feature
from ._positions import Schedule
from ._vector_gguf import LARGEST, gguf_bytes, read_gguf

FORMATS = (".safetensors", ".gguf")
"""Ends of the names of files that hold vectors."""
_FORM = "gemscope-vectors-1"


@dataclass(frozen=True, eq=False)
class Vectors:
    """What some changes add at every token: a vector for each site they write."""

    sites: dict[Site, Float[Tensor, " d"]]
    edits: list[dict[str, Any]]
    """Of each change what it was: feature, strength and what was folded into the vector."""
    model: str | None
    special: bool
    """Whether BOS and other special tokens are meant as well."""


def vectors_of(changes: Sequence[Change], *, model: str | None = None) -> Vectors:
    """The vectors that `changes` add; those of one site are summed.

    Float32, with strength and amount multiplied in. Their model is `model`, or the one that the
    dictionaries say.

    Raises:
        InputError: A change is no constant addition, or they belong to several models.
    """
    if not changes:
        raise InputError("there is no edit to make a vector of; give at least one")
    sums: dict[Site, Tensor] = {}
    edits, models = [], {model} - {None}
    specials = {change.positions.special for change in changes}
    for change in changes:
        what, factor = change.what, _factor(change)
        for site, row in what.rows.items():
            # Rounded as the edit itself rounds, so that the vector is the same to the last bit.
            part = (factor * change.amount) * row.detach().cpu().float()
            sums[site] = part if site not in sums else sums[site] + part
        edits.append(_edit(change, factor))
        if isinstance(what, Feature) and model is None:
            models.add(what.sae.origin.model)
    models -= {None}
    if len(models) > 1:
        raise InputError(
            f"these edits belong to {' and '.join(sorted(map(str, models)))}: export those of one "
            "model at a time"
        )
    if len(specials) > 1:
        raise InputError(
            "some of these edits are to change special tokens and some are not: export them apart"
        )
    for site, vector in sums.items():
        if not bool(vector.isfinite().all()):
            raise InputError(f"the vector at {site} is too large for float32; take less strength")
    return Vectors(sums, edits, next(iter(models), None), specials.pop())


def _factor(change: Change) -> float:
    """The activation that `change` adds, if that is one number."""
    strength, parts = change.strength, set(change.positions.parts)
    everywhere = "all" in parts and parts <= {"all", "prompt", "generated"}
    if change.mode is not Mode.ADD:
        why = f"{change.mode} depends on what each token holds"
    elif strength is None or strength.unit in (Unit.NORM, Unit.CURRENT):
        why = f"{strength} depends on what each token holds"
    elif isinstance(strength.value, tuple):
        why = "it has a strength for each row of a batch, and a file has one: export each"
    elif not everywhere and parts != {"prompt", "generated"}:
        why = f"it is for some positions only ({change.positions})"
    elif change.schedule != Schedule():
        why = "its schedule changes from token to token"
    elif change.keep_norm:
        why = "keeping the norm depends on what each token holds"
    else:
        if strength.unit is not Unit.MAX:
            return strength.value
        assert isinstance(change.what, Feature)
        assert change.what.maximum is not None
        return strength.value * change.what.maximum
    raise InputError(
        f"{change.what.name} is no constant vector: {why}; what can be exported is mode add with a "
        "strength such as 4 or 0.5xmax, at all positions"
    )


def _edit(change: Change, factor: float) -> dict[str, Any]:
    what = change.what
    known: dict[str, Any] = {"name": what.name}
    if isinstance(what, Feature):
        known |= {"address": what.sae.origin.address, "feature": what.index}
        known |= {"maximum": what.maximum}
    return known | {
        "sites": [str(site) for site in what.rows], "strength": str(change.strength),
        "activation": factor, "amount": change.amount,
    }  # fmt: skip


def save_vector(
    changes: Sequence[Change], file: str | Path, *, model: str | None = None, force: bool = False
) -> Path:
    """Write what `changes` add as `.safetensors` or `.gguf`; the file is there whole or not at all.

    Safetensors: a float32 tensor for each site, called as the site is, such as `3.resid_post`, and
    what it was made from in the metadata. GGUF: a control vector of llama.cpp and repeng, which
    is added to the residual stream after layers 1 and up, at every token, BOS included.

    Raises:
        InputError: A change is no constant addition or the format cannot hold it; the file exists
            and `force` is not given, or cannot be written.
    """
    file = Path(file).expanduser()
    check_target(file, force=force)
    vectors = vectors_of(changes, model=model)
    raw = _safetensors(vectors) if file.suffix == ".safetensors" else _gguf(vectors)
    try:
        write_whole(file, raw)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from None
    return file


def check_target(file: Path, *, force: bool) -> None:
    """Refuse a file that vectors cannot be written to."""
    if file.suffix not in FORMATS:
        raise InputError(f"{file} names no format: end it in {' or '.join(FORMATS)}")
    if file.is_dir() or (file.exists() and not force):
        raise InputError(f"{file} exists; choose another name, or write over it with --force")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file} cannot be written: there is no folder {file.absolute().parent}")


def _notes(vectors: Vectors) -> dict[str, Any]:
    return {
        "version": gemscope.__version__, "model": vectors.model, "special": vectors.special,
        "edits": vectors.edits,
    }  # fmt: skip


def _safetensors(vectors: Vectors) -> bytes:
    from safetensors.torch import save

    tensors = {str(site): vector.contiguous() for site, vector in vectors.sites.items()}
    notes = {name: json.dumps(value) for name, value in _notes(vectors).items()}
    return save(tensors, {"format": _FORM, **notes})


def _gguf(vectors: Vectors) -> bytes:
    layers: dict[int, Tensor] = {}
    if not vectors.special:
        raise InputError(
            "a GGUF control vector is added at BOS and special tokens too, which these edits leave "
            "out: give them positions with special=True, or write .safetensors"
        )
    if vectors.model is None:
        raise InputError(
            "a GGUF control vector says what model it is for, and nobody has: give the model's "
            "name, or write .safetensors"
        )
    for site, vector in vectors.sites.items():
        layer = control_layer(site)
        layers[layer] = vector if layer not in layers else layers[layer] + vector
    hint = family_named(vectors.model).name.replace("-", "")
    return gguf_bytes(layers, hint=hint, notes=_notes(vectors))


def control_layer(site: Site) -> int:
    """The layer after which a control vector adds what is added at `site`."""
    able = "GGUF has what is added to the residual stream after layers 1 and up"
    layer = site.layer
    match site.stream:
        # What the MLP gives out is added to the stream and to nothing else before the layer ends.
        case Stream.RESID_POST | Stream.MLP_OUT:
            pass
        case Stream.RESID_PRE:
            layer -= 1
        case _:
            raise InputError(
                f"a GGUF control vector cannot hold what is added at {site}: {able}; write "
                ".safetensors"
            )
    if layer < 1:
        raise InputError(
            f"a GGUF control vector cannot hold what is added at {site}: {able}, and llama.cpp "
            "refuses layer 0; write .safetensors"
        )
    return layer


def load_vector(file: str | Path) -> list[Direction]:
    """The vectors of a file that `save_vector` or repeng wrote, one for each site, float32.

    Add them with a strength of 1 for the effect they were made with. A control vector is read as
    what it adds to `resid_post`. The file is not trusted: sizes are checked before anything is
    made, and nothing in it is run.

    Raises:
        InputError: The file is none of these, is damaged, or holds numbers that are not finite.
    """
    file = Path(file).expanduser()
    if file.suffix not in FORMATS:
        raise InputError(f"{file} names no format: vectors end in {' or '.join(FORMATS)}")
    try:
        size = file.stat().st_size
        if not file.is_file() or size > LARGEST:
            raise InputError(
                f"{file} is no file of at most {LARGEST >> 20} MiB, which a few vectors fit into"
            )
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    if file.suffix == ".gguf":
        layers = read_gguf(file, raw)
        found = {Site(layer, Stream.RESID_POST): vector for layer, vector in layers.items()}
    else:
        found = _read_safetensors(file, raw)
    if not found:
        raise InputError(f"{file} holds no vector: get it again")
    for site, vector in found.items():
        if not bool(vector.isfinite().all()):
            raise InputError(f"the vector at {site} of {file} is not of finite numbers")
    return [Direction(v, site, name=f"{file.name}:{site}") for site, v in sorted(found.items())]


def _read_safetensors(file: Path, raw: bytes) -> dict[Site, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from gemscope.formats import read_header

    for name, info in read_header(file).items():
        if len(info.shape) != 1 or not info.shape[0] or info.dtype not in ("F32", "BF16", "F16"):
            raise InputError(
                f"{name} of {file} is {info.dtype} of shape {list(info.shape)}, not one vector of "
                "F32, BF16 or F16"
            )
        try:
            Site.parse(name)
        except InputError:
            raise InputError(
                f"{file} has a tensor {name!r}, which is no site: those of a steering vector are "
                "called as the site they are added at, such as 3.resid_post"
            ) from None
    try:
        loaded = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from None
    return {Site.parse(name): vector.to(torch.float32) for name, vector in loaded.items()}
