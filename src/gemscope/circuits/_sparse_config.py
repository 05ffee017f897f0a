"""What a circuit over SAEs is asked for, as typed and validated YAML."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gemscope.errors import InputError, did_you_mean

_MOST_BYTES = 2**24
"""Size of a file of examples, at most."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number; to YAML 1.1 it is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CircuitExample(_Strict):
    """A prompt, what it is compared with, and what is measured at its end."""

    clean: str = Field(min_length=1)
    corrupted: str | None = Field(default=None, min_length=1)
    """The prompt whose activations are patched in, token by token opposite the clean one."""
    metric: str | None = None
    """As `gemscope intervene` writes it, such as `difference:a:b`; the config's if there is none
    here."""
    answer: str | None = Field(default=None, min_length=1)
    """Instead of a metric: the token whose logit is measured."""
    wrong: str | None = Field(default=None, min_length=1)
    """The token whose logit is taken off the answer's."""
    at: int | None = None
    """Position of the metric; the last one if there is none."""

    @model_validator(mode="after")
    def _consistent(self) -> "CircuitExample":
        if self.metric is not None and self.answer is not None:
            raise ValueError("give metric or answer, not both")
        if self.wrong is not None and self.answer is None:
            raise ValueError("wrong is what answer is compared with; give answer too")
        return self


class CircuitConfig(_Strict):
    """A circuit: the dictionaries it is made of, the examples it is found on, and how."""

    task: str | None = None
    """What is asked, in a line for the report."""
    model: str | None = None
    """The dictionaries' own if there is none."""
    dictionaries: tuple[str, ...] = Field(min_length=1)
    """Addresses of SAEs, one a site."""
    examples: tuple[CircuitExample, ...] = Field(min_length=1)
    """Or a JSONL file of them, its path relative to the config."""
    held_out: tuple[CircuitExample, ...] = ()
    """Other examples, which the curves are measured on; without them those of `examples`."""
    metric: str | None = None
    """Of every example that names none."""
    ablation: Literal["corrupted", "mean", "zero"] = "corrupted"
    """What nodes outside a circuit hold: what they hold on the corrupted prompt, their mean over
    the text `mean`, or nothing."""
    mean: str | None = None
    """A file, folder, `miniature`, `python`, ...: with `ablation: mean`."""
    method: Literal["attribution", "integrated"] = "attribution"
    steps: int = Field(default=10, ge=1, le=1000)
    """Of integrated gradients."""
    aggregate: Literal["none", "positions"] = "none"
    """Whether a node is a feature at a position, or at all of them together."""
    node_threshold: float = Field(default=0.1, ge=0)
    """Least size of a node's effect, in the metric's units."""
    edge_threshold: float = Field(default=0.01, ge=0)
    max_nodes: int = Field(default=300, ge=1, le=2000)
    """Most nodes that are kept, whatever the threshold: each costs a backward pass for its edges.
    """
    top_exact: int = Field(default=20, ge=1, le=5000)
    """Nodes whose exact effect is measured beside the estimate."""
    sizes: tuple[int, ...] | None = None
    """Sizes of the circuits in the curves; 1, 2, 5, 10, 20 ... if none are given."""
    random_circuits: int = Field(default=10, ge=2, le=1000)
    """Drawn for each size."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    store: str | None = None
    """Catalog store whose labels name the nodes."""

    @model_validator(mode="after")
    def _consistent(self) -> "CircuitConfig":
        if len(set(self.dictionaries)) < len(self.dictionaries):
            raise ValueError(f"a dictionary is named twice: {', '.join(self.dictionaries)}")
        if (self.mean is None) == (self.ablation == "mean"):
            raise ValueError(
                "ablation mean is over a text: give it as mean: miniature, and only then"
            )
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise ValueError(f"sizes {list(self.sizes)} are no numbers of nodes; give 1 or more")
        for name in ("examples", "held_out"):
            for number, one in enumerate(getattr(self, name), start=1):
                if problem := self._problem(one):
                    raise ValueError(f"{name} {number}: {problem}")
        return self

    def _problem(self, one: CircuitExample) -> str | None:
        if self.ablation == "corrupted" and one.corrupted is None:
            return "no corrupted prompt, which ablation corrupted takes values from: give one"
        if self.metric is None and one.metric is None and one.answer is None:
            return "nothing is measured: give answer (and wrong), or a metric for all examples"
        return None


def read_circuit_config(file: Path) -> CircuitConfig:
    """The config in a YAML file.

    Raises:
        InputError: No such file, no YAML, an unknown key, or values that cannot be.
    """
    if not file.is_file():
        raise InputError(f"no config at {file}; give a YAML file with dictionaries and examples")
    try:
        raw = yaml.load(_text(file), _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds no keys; a config begins with dictionaries: [...]")
    return parse_circuit_config(raw, source=str(file), folder=file.parent)


def parse_circuit_config(
    raw: Mapping[str, Any], *, source: str, folder: Path = Path()
) -> CircuitConfig:
    """`raw` as a config, files it names read from `folder`; mistakes are told in one sentence."""
    plain = dict(raw)
    for name in ("examples", "held_out"):
        if isinstance(plain.get(name), str):
            plain[name] = _examples(folder / plain[name])
    if isinstance(plain.get("examples"), list) and not plain["examples"]:
        raise InputError(f"{source}: examples is empty; give at least one example")
    try:
        return CircuitConfig.model_validate(_tuples(plain))
    except ValidationError as error:
        told = dict.fromkeys(map(_told, error.errors()))
        raise InputError(f"{source}: {'; '.join(told)}") from None


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file} is larger than {_MOST_BYTES:,} bytes; give fewer examples")
        return file.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None


def _examples(file: Path) -> list[Any]:
    """The lines of a JSONL file."""
    if not file.is_file():
        raise InputError(f"no examples at {file}; give a JSONL file, its path from the config's")
    found = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            raise InputError(
                f"{file}, line {number} is not JSON: write one object a line"
            ) from None
    if not found:
        raise InputError(f"{file} holds no examples; give at least one line")
    return found


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that frozen models hold."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _told(error: Any) -> str:
    loc = error["loc"]
    # Numbers of examples are counted from 1, as people do.
    path = " ".join(str(p + 1) if isinstance(p, int) else str(p) for p in loc)
    match error["type"]:
        case "extra_forbidden":
            known = CircuitExample if len(loc) > 1 else CircuitConfig
            where = " ".join(path.split(" ")[:-1])
            return (f"{where}: " if where else "") + (
                f"no key {str(loc[-1])!r}; {did_you_mean(str(loc[-1]), known.model_fields)}"
            )
        case "missing":
            return f"{path} is missing"
        case "value_error":
            return (f"{path}: " if path else "") + str(error["ctx"]["error"])
        case _:
            return f"{path} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"
