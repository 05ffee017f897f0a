"""SAELens' layout: `cfg.json` and `sae_weights.safetensors`.

`W_enc [d_in, d_sae]`, `b_enc`, `W_dec [d_sae, d_out]`, `b_dec`, with `threshold [d_sae]` in
JumpReLU dictionaries and `W_skip [d_out, d_in]` in skip transcoders. Since its version 6 the
configuration keeps what the dictionary was trained on under `metadata`; before, beside the rest.
What SAELens does around the encoder (the decoder's bias taken from the input, features of TopK
dictionaries weighted by the length of their decoder rows) is folded into the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.errors import InputError
from gemscope.sites import Site, family_named, site_of_transformer_lens

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
from ._foreign import agreeing, chosen_k, headed, hub_name, less_bias, to_unit_norm
from ._safetensors_read import map_tensors

NAME = "saelens"
CONFIG = "cfg.json"
PARAMETERS = "sae_weights.safetensors"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
THRESHOLD = "threshold"
SKIP = "W_skip"
_SCALE = "scaling_factor"


@dataclass(frozen=True, slots=True)
class _Architecture:
    activation: str
    transcoder: bool = False
    skip: bool = False


_ARCHITECTURES = {
    "standard": _Architecture("relu"),
    "topk": _Architecture("topk"),
    "jumprelu": _Architecture("jumprelu"),
    "transcoder": _Architecture("relu", transcoder=True),
    "skip_transcoder": _Architecture("relu", transcoder=True, skip=True),
    "jumprelu_transcoder": _Architecture("jumprelu", transcoder=True),
    "jumprelu_skip_transcoder": _Architecture("jumprelu", transcoder=True, skip=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """What `cfg.json` says, in either of its forms."""

    architecture: _Architecture
    k: int | None
    less_bias: bool
    by_norm: bool
    reads: Site | None
    writes: Site | None
    model: str | None


def matches(folder: Path) -> bool:
    """Whether `folder` is in this layout; `config.json` instead of `cfg.json` makes it another."""
    return is_there(folder / PARAMETERS) and (
        is_there(folder / CONFIG) or not is_there(folder / "config.json")
    )


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`, its two files checked against each other."""
    file, weights = folder / CONFIG, folder / PARAMETERS
    raw = read_json(file)
    config = _config(file, raw)
    kind = config.architecture
    needed = [*NAMES]
    needed += [THRESHOLD] if kind.activation == "jumprelu" else []
    needed += [SKIP] if kind.skip else []
    infos = headed(weights, needed, (_SCALE,))
    shapes = {n.lower(): infos[n].shape for n in needed if n != SKIP}
    if kind.skip:
        shapes["skip"] = infos[SKIP].shape[::-1]
    d_in, d_sae, d_out = checked_shapes(weights, shapes)
    agreeing(file, raw, d_in=d_in, d_sae=d_sae, d_out=d_out)
    if not kind.transcoder and d_in != d_out:
        raise InputError(
            f"{weights} reads {d_in} and writes {d_out} numbers, and {file} says that it is no "
            "transcoder: one of the two files is of another dictionary"
        )
    if config.k is not None:
        chosen_k(file, config.k, d_sae)
    return Facts(
        layout=NAME,
        kind="transcoder" if kind.transcoder else "sae",
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        affine=kind.skip,
        activation=kind.activation,
        dtype=DTYPES[infos["W_enc"].dtype],
        files=(weights,),
        shapes={n: infos[n].shape for n in needed},
        reads=config.reads,
        writes=config.writes,
        model=config.model,
    )


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors: mapped from the file where nothing has to be folded, float32 elsewhere."""
    file, weights = folder / CONFIG, folder / PARAMETERS
    found, config = inspect(folder), _config(file, read_json(file))
    infos = headed(weights, found.shapes, (_SCALE,))
    tensors = map_tensors(weights, infos)
    if _SCALE in tensors and (tensors[_SCALE] != 1).any():
        raise InputError(
            f"{weights}: scaling_factor is not all ones: fold it into W_dec and leave it out"
        )
    w_enc, b_enc, w_dec = tensors["W_enc"], tensors["b_enc"], tensors["W_dec"]
    if config.less_bias:
        b_enc = less_bias(b_enc, w_enc, tensors["b_dec"])
    if config.by_norm:
        w_enc, b_enc, w_dec = to_unit_norm(w_enc, b_enc, w_dec)
    part = Part(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=tensors["b_dec"],
        threshold=tensors.get(THRESHOLD),
        k=config.k,
        skip=tensors[SKIP].T if SKIP in tensors else None,
    )
    return (checked_values(weights, part),)


def _config(file: Path, raw: Mapping[str, Any]) -> _Config:
    meta = field(file, raw, "metadata", dict, None) or {}
    # Before version 6 these lay beside the rest, and some had other names.
    said = {**raw, **meta}
    architecture = _architecture(file, raw)
    _check_foldable(file, raw, said)
    less = field(file, raw, "apply_b_dec_to_input", bool, not architecture.transcoder)
    if less and architecture.transcoder:
        raise InputError(
            f"{file} says apply_b_dec_to_input of a transcoder, whose b_dec is of what it writes: "
            "set it to false if the transcoder was trained so"
        )
    model = hub_name(field(file, said, "model_name", str, None))
    reads = _site(file, said, model)
    return _Config(
        architecture=architecture,
        k=_k(file, raw) if architecture.activation == "topk" else None,
        less_bias=less,
        by_norm=architecture.activation == "topk"
        and field(file, raw, "rescale_acts_by_decoder_norm", bool, False),
        reads=reads,
        writes=_site(file, said, model, out=True) if architecture.transcoder else reads,
        model=model,
    )


def _architecture(file: Path, raw: Mapping[str, Any]) -> _Architecture:
    name = field(file, raw, "architecture", str, "standard")
    activation = _activation(file, raw)
    if name == "standard" and activation == "topk":
        name = "topk"
    if name not in _ARCHITECTURES:
        raise InputError(
            f"{file} says architecture {shown(name)}, which cannot be represented: readable are "
            f"{', '.join(_ARCHITECTURES)}; a dictionary in its training form becomes one of them "
            "with SAELens' save_inference_model"
        )
    if activation not in (None, "relu", "topk" if name == "topk" else "relu"):
        raise InputError(
            f"{file} says activation function {shown(activation)} of architecture {shown(name)}: "
            "only relu can be represented there"
        )
    return _ARCHITECTURES[name]


def _activation(file: Path, raw: Mapping[str, Any]) -> str | None:
    """The activation function that files before version 6 name."""
    name = "activation_fn_str" if "activation_fn_str" in raw else "activation_fn"
    found = field(file, raw, name, str, None)
    return None if found is None else str(found)


def _k(file: Path, raw: Mapping[str, Any]) -> int:
    arguments = field(file, raw, "activation_fn_kwargs", dict, None) or {}
    if field(file, arguments, "signed", bool, False):
        raise InputError(
            f"{file} says signed: features below zero cannot be represented, only positive ones"
        )
    return int(field(file, raw if "k" in raw else arguments, "k", int))


def _check_foldable(file: Path, raw: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    norm = raw.get("normalize_activations")
    # Versions before 3 wrote a truth value.
    if norm not in (None, False, "none"):
        raise InputError(
            f"{file} says normalize_activations {shown(norm)}: fold it into the weights first, "
            "with fold_activation_norm_scaling_factor of SAELens where it is one factor, and save "
            "the dictionary again"
        )
    shape = field(file, raw, "reshape_activations", str, None)
    if shape not in (None, "none", "hook_z"):
        raise InputError(f"{file} says reshape_activations {shown(shape)}, not none or hook_z")
    for name in ("hook_head_index", "hook_point_head_index"):
        if said.get(name) is not None:
            raise InputError(
                f"{file} says {name} {shown(said[name])}: a dictionary of one attention head "
                "cannot be attached, only one of all heads"
            )


def _site(
    file: Path, said: Mapping[str, Any], model: str | None, *, out: bool = False
) -> Site | None:
    """The site that is read, or with `out` the one that is written, if its name has one meaning."""
    hook = field(file, said, "hf_hook_name_out" if out else "hf_hook_name", str, None)
    if hook is not None:
        # A module alone stands for its output. Another family's module of the same name may hold
        # something else, so only the model's own is asked.
        whole = hook if hook.endswith((".input", ".output")) else f"{hook}.output"
        if site := family_named(model).site_of_hook(whole):
            return site
    for name in ("hook_name_out",) if out else ("hook_name", "hook_point"):
        hook = field(file, said, name, str, None)
        if hook is not None:
            return site_of_transformer_lens(hook)
    return None
