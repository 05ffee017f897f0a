"""From a YAML file to a config: overrides, the recipe shared by all artefacts, lists expanded."""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gemscope.errors import InputError, did_you_mean

from ._config import Artefact, TrainConfig

_VARIED = (
    "layer", "reads", "writes", "d_sae", "l0", "activation", "affine", "start", "seed",
)  # fmt: skip
"""Keys of an artefact that may be lists: one artefact for each combination of their values."""
_NAME = "{stream}/layer_{layer}_width_{width}_l0_{l0}"
_MOST = 10_000


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as everyone expects; to YAML 1.1 it is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_config(file: Path, overrides: list[str] | None = None) -> TrainConfig:
    """The config in `file`, after `overrides` such as `data.tokens=100000`."""
    if not file.is_file():
        raise InputError(f"no config at {file}; give a YAML file, such as those in presets/")
    try:
        raw = yaml.load(file.read_text("utf-8"), _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds no keys; a config begins with model: ...")
    for override in overrides or []:
        _override(raw, override)
    return parse_config(raw, source=str(file))


def parse_config(raw: Mapping[str, Any], *, source: str) -> TrainConfig:
    """`raw` as a config; what is wrong with it is said in one sentence.

    `recipe` holds keys of an artefact that all of them share; an artefact's own win. Lists in
    `layer`, `reads`, `writes`, `d_sae`, `l0`, `activation`, `affine`, `start` and `seed` stand for
    one artefact each, in all combinations; `{layer}` in `reads` and `writes` is the layer's number.
    """
    plain = {key: value for key, value in raw.items() if key != "recipe"}
    try:
        plain["artefacts"] = list(_artefacts(raw))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    try:
        return TrainConfig.model_validate(_tuples(plain))
    except ValidationError as error:
        # An artefact that is none is missed again as one of the list.
        errors = [e for e in error.errors() if e["type"] != "too_short"]
        told = dict.fromkeys(_told(e, plain["artefacts"]) for e in errors)
        raise InputError(f"{source}: {'; '.join(told)}") from None


def _artefacts(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    recipe, listed = raw.get("recipe", {}), raw.get("artefacts")
    if not isinstance(recipe, dict):
        raise InputError(f"recipe is {recipe!r}, not keys of an artefact")
    if not isinstance(listed, list) or not listed or not all(isinstance(a, dict) for a in listed):
        raise InputError("artefacts is not a list of artefacts: - {reads: 12.resid_post, ...}")
    count = 0
    for given in listed:
        for one in _expanded(_merged(recipe, given)):
            count += 1
            if count > _MOST:
                raise InputError(f"more than {_MOST:,} artefacts; split the run")
            yield one


def _expanded(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lists = {n: given[n] for n in _VARIED if isinstance(given.get(n), list)}
    if empty := next((n for n, values in lists.items() if not values), None):
        raise InputError(f"{empty} is an empty list")
    for values in itertools.product(*lists.values()):
        one = given | dict(zip(lists, values, strict=True))
        layer = one.pop("layer", None)
        if "reads" not in one:
            raise InputError("an artefact does not say what it reads; write reads: 12.resid_post")
        one.setdefault("writes", one["reads"])
        for key in ("reads", "writes"):
            if isinstance(one[key], str) and "{layer}" in one[key]:
                if not isinstance(layer, int):
                    raise InputError(f"{key} is {one[key]}, and layer is {layer!r}, not a number")
                one[key] = one[key].replace("{layer}", str(layer))
        one["name"] = _name(one)
        yield one


def _name(one: Mapping[str, Any]) -> str:
    template = one.get("name", _NAME + ("_seed_{seed}" if one.get("seed") else ""))
    layers, _, stream = str(one["writes"]).partition(".")
    l0 = one.get("l0", "")
    known = {
        "stream": stream,
        "layer": layers,
        "width": width(one.get("d_sae")),
        "l0": f"{l0:g}" if isinstance(l0, int | float) else l0,
        "seed": one.get("seed", 0),
        "activation": one.get("activation", "jumprelu"),
        "affine": "_affine" if one.get("affine") else "",
    }
    try:
        name = str(template).format(**known)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise InputError(
            f"name {template!r} holds other than {', '.join('{' + k + '}' for k in known)}"
        ) from None
    path = PurePosixPath(name)
    legal = re.fullmatch(r"[A-Za-z0-9_.,/-]+", name) and path.parts
    if not legal or path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"name {name!r} is not the name of a folder: letters, digits and _ . - , / are, "
            "and no .."
        )
    return str(path)


def width(d_sae: object) -> str:
    """`16k` of 16,384, `65k` of 65,536, `1m` of 1,048,576, as published names have it."""
    if not isinstance(d_sae, int):
        return str(d_sae)
    if d_sae >= 10**6:
        return f"{d_sae // 10**6}m"
    return f"{d_sae // 1_000}k" if d_sae >= 1_000 else str(d_sae)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)
        out[key] = value
    return out


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that frozen models hold."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"--set {override!r} has no value; write --set data.tokens=100000")
    place: Any = raw
    *sections, key = path.split(".")
    for section in sections:
        if isinstance(place, list) and section.isdecimal() and int(section) < len(place):
            place = place[int(section)]
        elif isinstance(place, dict):
            place = place.setdefault(section, {})
        else:
            place = None
    if not isinstance(place, dict):
        raise InputError(f"--set {override!r}: {'.'.join(sections)} is not a section")
    try:
        place[key] = yaml.load(value, _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"--set {override!r}: {value!r} is not YAML") from None


def _told(error: Any, artefacts: list[dict[str, Any]]) -> str:
    loc = error["loc"]
    of = ""
    if loc[:1] == ("artefacts",) and len(loc) > 1:
        of, loc = f"{artefacts[loc[1]]['name']}: ", loc[2:]
    path = ".".join(str(part) for part in loc)
    match error["type"]:
        case "extra_forbidden":
            return f"{of}no key {path!r}; {did_you_mean(str(loc[-1]), _keys(loc[:-1], bool(of)))}"
        case "missing":
            return f"{of}{path} is missing"
        case "value_error":
            return of + (f"{path}: " if path else "") + str(error["ctx"]["error"])
        case _:
            return f"{of}{path} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys(sections: tuple, of_artefact: bool) -> list[str]:
    found: Any = Artefact if of_artefact else TrainConfig
    for section in sections:
        wanted = found.model_fields[section].annotation
        kinds = [wanted, *get_args(wanted)]
        found = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return [*found.model_fields, *(["recipe"] if found is TrainConfig else [])]
