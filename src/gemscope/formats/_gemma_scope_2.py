"""Gemma Scope 2's layouts: `config.json` and parameter files in one folder.

A single-layer artefact has `params.safetensors` with `w_enc [d_in, d_sae]`, `w_dec [d_sae, d_out]`,
`b_enc`, `b_dec`, `threshold [d_sae]` and, for an affine transcoder, `affine_skip_connection
[d_in, d_out]`, used as `x @ A`. A crosscoder or cross-layer transcoder has
`params_layer_{i}.safetensors`, `i` the place in its list of layers, with
`w_dec [n_features, n_layers, d_out]`: axis 1 is the layer written, absolute in that list. The
weights are folded: raw activations go in. Some published folders lack the config.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from gemscope.errors import InputError, did_you_mean
from gemscope.sites import Site, Sites, each, family_named, site_of_hook

from ._facts import (
    DTYPES,
    Facts,
    Part,
    checked_shapes,
    checked_values,
    field,
    is_there,
    listed,
    read_json,
    shown,
)
from ._safetensors import TensorInfo, read_header
from ._safetensors_read import map_tensors
from ._writing import new_folder, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gemma-scope-2"
PARAMETERS = "params.safetensors"
CONFIG = "config.json"
_NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
_KINDS = ("sae", "transcoder", "crosscoder", "clt")
_LAYER = re.compile(r"params_layer_(0|[1-9][0-9]{0,2})\.safetensors")
_MANY = re.compile(r"\{([0-9,\s]*|all)\}")
"""Several layers in the name of a hook: `model.layers.{5,9,12,15}.output`, or `{all}` of them."""
_SAMPLED = 256
"""Features of each layer whose decoder is looked at for what it writes to earlier layers."""
_ANTI_CAUSAL = 1e-6
"""Share of the squares of a decoder that may be there: noise, and not features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`config.json`, field by field under its own names."""

    hf_hook_point_in: str
    hf_hook_point_out: str
    width: int
    model_name: str
    architecture: str
    l0: float
    affine_connection: bool
    type: str


def matches(folder: Path) -> bool:
    """Whether `folder` is in one of these layouts."""
    return is_there(folder / PARAMETERS) or bool(_layer_files(folder))


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`, config and headers checked against each other."""
    config = read_config(folder) if is_there(folder / CONFIG) else None
    files, n_layers = _files(folder)
    infos = [_infos(file) for file in files]
    shapes = [
        checked_shapes(file, {_ours(n): i.shape for n, i in info.items()}, n_layers=n_layers)
        for file, info in zip(files, infos, strict=True)
    ]
    if len({(d_in, d_out) for d_in, _, d_out in shapes}) > 1:
        raise InputError(f"the layers of {folder} are of different widths: get the folder again")
    affine = {_SKIP in info for info in infos}
    if len(affine) > 1:
        raise InputError(f"some layers of {folder} have {_SKIP} and some have not")
    d_sae = sum(s[1] for s in shapes)
    reads, writes = _sites(folder, config, n_layers) if config else (None, None)
    if config:
        _check_config(folder, config, d_sae, _SKIP in infos[0], same_sites=reads == writes)
    return Facts(
        layout=NAME,
        kind=config.type if config else None,
        d_in=shapes[0][0],
        d_sae=d_sae,
        d_out=shapes[0][2],
        affine=_SKIP in infos[0],
        activation="jumprelu",
        dtype=DTYPES[infos[0]["w_enc"].dtype],
        files=tuple(files),
        shapes={n: i.shape for n, i in infos[0].items()},
        reads=reads,
        writes=writes,
        model=config.model_name if config else None,
        l0=config.l0 if config else None,
    )


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors, mapped from the files: one part, or one for each layer."""
    facts, parts = inspect(folder), []
    for place, file in enumerate(facts.files):
        part = _part(map_tensors(file, _infos(file)))
        if part.w_dec.ndim == 3:
            _check_causal(file, part, place)
        parts.append(checked_values(file, part))
    return tuple(parts)


def read_config(folder: Path) -> Config:
    """The config of an artefact."""
    file = folder / CONFIG
    raw = read_json(file)
    fields = get_type_hints(Config)
    if missing := sorted(fields.keys() - raw.keys()):
        raise InputError(f"{file} lacks {', '.join(missing)}")
    values = {name: field(file, raw, name, wanted) for name, wanted in fields.items()}
    config = Config(**values | {"model_name": _model(raw)})
    if not 0 < config.l0 <= config.width:
        raise InputError(
            f"{file}: l0 is {shown(raw['l0'])}, not between 0 and width {config.width}"
        )
    if config.type not in _KINDS:
        raise InputError(f"{file}: type {config.type!r} is not one of {', '.join(_KINDS)}")
    if config.architecture != "jump_relu":
        raise InputError(f"{file}: architecture {config.architecture!r} is not jump_relu")
    return config


def write(folder: Path, config: Config, parts: Sequence[Part]) -> None:
    """Write an artefact's folder; it appears whole or not at all. Several parts are layers."""
    names = [PARAMETERS] if parts[0].w_dec.ndim == 2 else [
        f"params_layer_{i}.safetensors" for i in range(len(parts))
    ]  # fmt: skip
    with new_folder(folder, read) as made:
        for name, part in zip(names, parts, strict=True):
            write_tensors(made / name, _tensors(part))
        (made / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", "utf-8")


def _part(tensors: "Mapping[str, Tensor]") -> Part:
    return Part(
        w_enc=tensors["w_enc"],
        b_enc=tensors["b_enc"],
        w_dec=tensors["w_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
        skip=tensors.get(_SKIP),
    )


def _tensors(part: Part) -> dict[str, "Tensor"]:
    if part.threshold is None:
        raise InputError(f"the {NAME} layout holds JumpReLU dictionaries only")
    named = {name: getattr(part, name) for name in _NAMES}
    return named if part.skip is None else named | {_SKIP: part.skip}


def _infos(file: Path) -> dict[str, TensorInfo]:
    infos = read_header(file)
    if missing := [n for n in _NAMES if n not in infos]:
        raise InputError(f"{file} lacks {', '.join(missing)}; it has {listed(infos)}")
    # An unknown tensor may change the function; ignoring it could load something else.
    if unknown := sorted(infos.keys() - {*_NAMES, _SKIP}):
        raise InputError(
            f"{file} has an unknown tensor {unknown[0]!r}; {did_you_mean(unknown[0], _NAMES)}"
        )
    if wrong := [n for n in infos if infos[n].dtype not in ("F32", "BF16", "F16")]:
        raise InputError(f"{file}: {wrong[0]} is {infos[wrong[0]].dtype}, not F32, BF16 or F16")
    return infos


def _ours(name: str) -> str:
    return "skip" if name == _SKIP else name


def _layer_files(folder: Path) -> list[tuple[int, Path]]:
    try:
        found = [(int(m[1]), f) for f in folder.iterdir() if (m := _LAYER.fullmatch(f.name))]
    except OSError:
        return []
    return sorted(found)


def _files(folder: Path) -> tuple[list[Path], int | None]:
    """The parameter files, and the number of layers if they are those of a multi-layer model.

    Its layers are 0 to the number that their decoders write.
    """
    found = _layer_files(folder)
    if is_there(folder / PARAMETERS):
        if found:
            raise InputError(
                f"{folder} holds two artefacts: {PARAMETERS} and {found[0][1].name}; keep one of "
                "them in it"
            )
        return [folder / PARAMETERS], None
    if not found:
        raise InputError(f"{folder} has neither {PARAMETERS} nor params_layer_0.safetensors")
    first = found[0][1]
    shape = _infos(first)["w_dec"].shape
    if len(shape) != 3 or 0 in shape:
        raise InputError(f"{first}: w_dec has shape {list(shape)}, not [features, layers, d_out]")
    # A header may claim any number of layers: nothing that long is made of it.
    places, n_layers = [place for place, _ in found], shape[1]
    if places != list(range(len(places))) or len(places) != n_layers:
        missing = next((n for n in range(n_layers) if n not in places), None)
        raise InputError(
            f"{folder} has {len(places)} files of layers, and their decoders write {n_layers}"
            + ("" if missing is None else f": params_layer_{missing}.safetensors is missing")
        )
    return [file for _, file in found], n_layers


def _check_config(
    folder: Path, config: Config, d_sae: int, affine: bool, *, same_sites: bool
) -> None:
    if config.width != d_sae:
        raise InputError(
            f"{folder}: {CONFIG} says width {config.width}, the weights are {d_sae} wide"
        )
    if same_sites != (config.type in ("sae", "crosscoder")):
        raise InputError(
            f"{folder}: {CONFIG} says type {config.type}, and reads {config.hf_hook_point_in}, "
            f"writes {config.hf_hook_point_out}: an sae or crosscoder writes where it reads, "
            "a transcoder or clt not"
        )
    if config.affine_connection != affine:
        has = "has" if affine else "has no"
        raise InputError(
            f"{folder}: {CONFIG} says affine_connection {config.affine_connection}, "
            f"the parameters {has} {_SKIP}"
        )


def _sites(folder: Path, config: Config, n_layers: int | None) -> tuple[Site | Sites, Site | Sites]:
    if (config.type in ("crosscoder", "clt")) != (n_layers is not None):
        raise InputError(f"{folder}: {CONFIG} says type {config.type}, and there are "
                         f"{n_layers or 'no'} files of layers")  # fmt: skip
    try:
        reads = _site(config.hf_hook_point_in, config.model_name, n_layers)
        writes = _site(config.hf_hook_point_out, config.model_name, n_layers)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    # A single-layer transcoder may write anywhere; of several layers each is read and written.
    if isinstance(reads, Sites) and [s.layer for s in reads] != [s.layer for s in each(writes)]:
        raise InputError(
            f"{folder / CONFIG} reads {reads} and writes {writes}: they must be of the same layers"
        )
    return reads, writes


def _site(hook: str, model: str, n_layers: int | None) -> Site | Sites:
    many = _MANY.search(hook)
    if (many is not None) != (n_layers is not None):
        raise InputError(f"{hook} is of {'one layer' if many is None else 'several layers'}, and "
                         f"there are {n_layers or 'no'} files of layers")  # fmt: skip
    if many is None or n_layers is None:
        return site_of_hook(hook, model=model)
    layers = [*map(str, range(n_layers))] if many[1] == "all" else many[1].split(",")
    if len(layers) != n_layers:
        raise InputError(
            f"{hook} names {len(layers)} layers, and there are {n_layers} files of layers"
        )
    return Sites(
        site_of_hook(hook.replace(many[0], layer.strip()), model=model) for layer in layers
    )


def hook_of(sites: Site | Sites, model: str | None) -> str:
    """`sites` as `config.json` writes them."""
    first, *rest = each(sites)
    hook = family_named(model).hook(first)
    if isinstance(sites, Site):
        return hook
    layers = ",".join(str(s.layer) for s in (first, *rest))
    return hook.replace(f".{first.layer}.", ".{" + layers + "}.", 1)


def _check_causal(file: Path, part: Part, place: int) -> None:
    """Refuse a decoder that writes to layers before the one it reads."""
    step = max(1, len(part.w_dec) // _SAMPLED)
    # Squares of large numbers need float64; a layer at a time, for its memory.
    some = part.w_dec[::step]
    energy = [float(of.double().square().sum()) for of in some.unbind(1)]
    before, whole = sum(energy[:place]), sum(energy)
    if before > _ANTI_CAUSAL * whole:
        raise InputError(
            f"{file}: {100 * before / whole:.3g}% of the decoder writes to layers before its own; "
            "axis 1 of w_dec must be the layer written, counted over all layers"
        )


def _model(raw: dict[str, Any]) -> str:
    # Some published configs write `gemma-v3-1b-pt`; the model is `google/gemma-3-1b-pt`. The
    # smallest pretrained one has no suffix.
    name = str(raw["model_name"]).replace("gemma-v3-", "gemma-3-")
    name = re.sub(r"^gemma-", "google/gemma-", name)
    return "google/gemma-3-270m" if name == "google/gemma-3-270m-pt" else name
