"""Gemma Scope 2's single-layer layout: `config.json` and `params.safetensors` in one folder.

`params.safetensors` holds `w_enc [d_in, d_sae]`, `w_dec [d_sae, d_out]`, `b_enc [d_sae]`,
`b_dec [d_out]`, `threshold [d_sae]` and, for an affine transcoder, `affine_skip_connection
[d_in, d_out]`, used as `x @ A`. The weights are folded: raw activations go in.
"""

import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from gemscope.errors import InputError, did_you_mean

from ._safetensors import TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS = "params.safetensors"
CONFIG = "config.json"
_NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
_KINDS = ("sae", "transcoder")
_CHECKED_WHOLE = 2 * 2**30
"""Bytes up to which every weight is looked at for NaN; of a wider file the vectors are."""


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


def read_config(folder: Path) -> Config:
    """The facts of an artefact, without its weights."""
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(
            f"{folder} has no {CONFIG}; an artefact's folder has it beside {PARAMETERS}"
        )
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds {type(raw).__name__}, not an object")
    fields = get_type_hints(Config)
    if missing := sorted(fields.keys() - raw.keys()):
        raise InputError(f"{file} lacks {', '.join(missing)}")
    for name, wanted in fields.items():
        accepted = (int, float) if wanted is float else (wanted,)
        # bool is an int to Python, and neither a width nor an L0 to us.
        if not isinstance(raw[name], accepted) or isinstance(raw[name], bool) != (wanted is bool):
            raise InputError(f"{file}: {name} is {raw[name]!r}, not {wanted.__name__}")
    if not 0 < raw["l0"] <= raw["width"]:
        raise InputError(f"{file}: l0 is {raw['l0']}, not between 0 and width {raw['width']}")
    known = {"l0": float(raw["l0"]), "model_name": _model(raw)}
    config = Config(**{name: raw[name] for name in fields} | known)
    if config.type not in _KINDS:
        raise InputError(f"{file}: type {config.type!r} is not one of {', '.join(_KINDS)}")
    if config.architecture != "jump_relu":
        raise InputError(f"{file}: architecture {config.architecture!r} is not jump_relu")
    return config


def read_shapes(folder: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of the parameters, checked against each other."""
    file = folder / PARAMETERS
    if not file.is_file():
        raise InputError(f"no weights in {folder}: {PARAMETERS} is missing")
    infos = read_header(file)
    if missing := [n for n in _NAMES if n not in infos]:
        raise InputError(f"{file} lacks {', '.join(missing)}; it has {', '.join(sorted(infos))}")
    # An unknown tensor may change the function; ignoring it could load something else.
    if unknown := sorted(infos.keys() - {*_NAMES, _SKIP}):
        raise InputError(
            f"{file} has an unknown tensor {unknown[0]!r}; {did_you_mean(unknown[0], _NAMES)}"
        )
    wrong_rank = [
        n for n in infos if len(infos[n].shape) != (2 if n in ("w_enc", "w_dec", _SKIP) else 1)
    ]
    if wrong_rank:
        raise InputError(f"{file}: {wrong_rank[0]} has shape {list(infos[wrong_rank[0]].shape)}")
    (d_in, d_sae), d_out = infos["w_enc"].shape, infos["w_dec"].shape[1]
    wanted = {
        "b_enc": (d_sae,),
        "w_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
        _SKIP: (d_in, d_out),
    }
    for name, shape in wanted.items():
        if name in infos and infos[name].shape != shape:
            raise InputError(
                f"{file}: {name} is {list(infos[name].shape)} where w_enc {[d_in, d_sae]} "
                f"and w_dec ask for {list(shape)}"
            )
    if wrong := [n for n in infos if infos[n].dtype not in ("F32", "BF16", "F16")]:
        raise InputError(f"{file}: {wrong[0]} is {infos[wrong[0]].dtype}, not F32, BF16 or F16")
    return infos


def check(folder: Path) -> tuple[Config, dict[str, TensorInfo]]:
    """Config and shapes, checked against each other as well."""
    config, infos = read_config(folder), read_shapes(folder)
    d_sae = infos["w_enc"].shape[1]
    if config.width != d_sae:
        raise InputError(
            f"{folder}: {CONFIG} says width {config.width}, the weights are {d_sae} wide"
        )
    if (config.hf_hook_point_in != config.hf_hook_point_out) != (config.type == "transcoder"):
        raise InputError(
            f"{folder}: {CONFIG} says type {config.type}, and reads {config.hf_hook_point_in}, "
            f"writes {config.hf_hook_point_out}: an sae writes where it reads, a transcoder not"
        )
    if config.affine_connection != (_SKIP in infos):
        has = "has" if _SKIP in infos else "has no"
        raise InputError(
            f"{folder}: {CONFIG} says affine_connection {config.affine_connection}, "
            f"{PARAMETERS} {has} {_SKIP}"
        )
    return config, infos


def read(folder: Path) -> tuple[Config, dict[str, "Tensor"]]:
    """Config and parameters, memory-mapped in their storage type, `affine_skip_connection` too."""
    from safetensors import SafetensorError, safe_open

    config, infos = check(folder)
    file = folder / PARAMETERS
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in infos}
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read: {error}; get it again") from None
    whole = file.stat().st_size <= _CHECKED_WHOLE
    for name, tensor in tensors.items():
        if (whole or tensor.ndim == 1) and not tensor.isfinite().all():
            raise InputError(f"{file}: {name} holds NaN or infinity; get the file again")
    if (tensors["threshold"] < 0).any():
        raise InputError(f"{file}: threshold has negative entries")
    return config, tensors


def write(folder: Path, config: Config, tensors: dict[str, "Tensor"]) -> None:
    """Write an artefact's folder; it appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if folder.exists():
        raise InputError(f"{folder} exists; choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as held:
            part = Path(held) / folder.name
            part.mkdir()
            save_file({n: t.contiguous() for n, t in tensors.items()}, part / PARAMETERS)
            (part / PARAMETERS).chmod(0o644)  # the library makes it its owner's alone
            (part / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", "utf-8")
            read(part)
            os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {error}") from None


def _model(raw: dict[str, Any]) -> str:
    # Some published configs write `gemma-v3-1b-pt`; the model is `google/gemma-3-1b-pt`. The
    # smallest pretrained one has no suffix.
    name = str(raw["model_name"]).replace("gemma-v3-", "gemma-3-")
    name = re.sub(r"^gemma-", "google/gemma-", name)
    return "google/gemma-3-270m" if name == "google/gemma-3-270m-pt" else name
