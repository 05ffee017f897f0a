"""What a training run is, as typed and validated YAML."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from gemscope.errors import InputError, did_you_mean
from gemscope.sites import Site

SiteField = Annotated[
    Site,
    BeforeValidator(lambda value: Site.parse(value) if isinstance(value, str) else value),
    PlainSerializer(str, return_type=str),
]


class _Strict(BaseModel):
    # Strict: YAML has types, and "4000" where a number belongs is a mistake worth a sentence.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Strict):
    """Which activations the dictionary is trained on."""

    text: str | None = None
    """A file, folder, glob pattern, `miniature` or `python` (the standard library)."""
    dataset: str | None = None
    """Or a data set of the hub, `OWNER/NAME[:SPLIT[:COLUMN]]`."""
    tokens: int = Field(gt=0)
    """Activations to train on, in all; the text is repeated as often as that takes."""
    context: int = Field(default=1_024, ge=2)
    batch: int = Field(default=4_096, gt=0)
    """Activations of a step."""
    bucket: int = Field(default=1_000_000, gt=0)
    """Tokens that are shuffled together."""

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if (self.text is None) == (self.dataset is None):
            raise ValueError("give either text or dataset")
        if self.tokens < self.batch:
            raise ValueError(f"tokens {self.tokens} is less than one batch of {self.batch}")
        return self


class Optimizer(_Strict):
    """Adam with betas (0, 0.999); the defaults are Gemma Scope's."""

    lr: float = Field(default=7e-5, gt=0)
    warm_up: int = Field(default=1_000, ge=0)
    """Steps of the cosine warm-up from a tenth of `lr`."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, at the end, in which the rate falls linearly to zero."""
    threshold_lr: float = Field(default=1.0, gt=0)
    """Rate of the thresholds, as a multiple of `lr`."""


class Sparsity(_Strict):
    """The L0 penalty `coefficient * (2 / l0) * (L0 - l0)^2` per token, and what trains it."""

    l0: float = Field(gt=0)
    """Features per token to reach."""
    coefficient: float = Field(default=1e-3, ge=0)
    warm_up: int = Field(default=50_000, ge=0)
    """Steps over which the coefficient rises linearly from zero."""
    frequency: float = Field(default=0.0, ge=0)
    """Coefficient of the penalty on features that fire often, after the same warm-up."""
    frequency_scale: float = Field(default=0.1, gt=0, le=1)
    """Share of tokens from which a feature is often."""
    bandwidth: float = Field(default=1e-3, gt=0)
    """Width of the straight-through window, at inputs of unit mean squared norm."""
    threshold: float | None = Field(default=1e-3, gt=0)
    """Initial threshold of every feature, at the same scale; None: measured, see `start_l0`."""
    start_l0: float | None = Field(default=None, gt=0)
    """Without a `threshold`: each feature's initial threshold is the quantile of its own
    pre-activations that makes all features fire equally often and this many on a token."""

    @model_validator(mode="after")
    def _one_start(self) -> "Sparsity":
        if (self.threshold is None) == (self.start_l0 is None):
            raise ValueError("give either threshold or start_l0, and null for the other")
        return self


class TrainConfig(_Strict):
    """One dictionary to train: an SAE where `reads` is `writes`, else a transcoder."""

    model: str
    model_dtype: str = "float32"
    reads: SiteField
    writes: SiteField
    d_sae: int = Field(gt=0)
    affine: bool = False
    """Whether a transcoder has a skip connection."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint_every: int = Field(default=200, gt=0)
    """Steps between checkpoints."""
    out: str
    """Folder of the run."""
    data: Data
    optimizer: Optimizer = Optimizer()
    sparsity: Sparsity

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.sparsity.l0 >= self.d_sae:
            raise ValueError(f"sparsity.l0 {self.sparsity.l0} is not below d_sae {self.d_sae}")
        if self.reads.layer > self.writes.layer:
            raise ValueError(f"reads {self.reads} comes after writes {self.writes}")
        if self.affine and self.reads == self.writes:
            raise ValueError("affine belongs to transcoders; reads and writes are the same site")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.data.tokens // self.data.batch


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
        raise InputError(f"no config at {file}; give a YAML file, such as those in configs/")
    try:
        raw = yaml.load(file.read_text("utf-8"), _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds no keys; a config begins with model: ...")
    for override in overrides or []:
        _override(raw, override)
    return parse_config(raw, source=str(file))


def parse_config(raw: dict[str, Any], *, source: str) -> TrainConfig:
    """`raw` as a config; what is wrong with it is said in one sentence."""
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{source}: {'; '.join(_told(e) for e in error.errors())}") from None


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"--set {override!r} has no value; write --set data.tokens=100000")
    *sections, key = path.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise InputError(f"--set {override!r}: {section} is not a section")
    try:
        raw[key] = yaml.load(value, _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"--set {override!r}: {value!r} is not YAML") from None


def _told(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return (
                f"no key {path!r}; {did_you_mean(str(error['loc'][-1]), _keys(error['loc'][:-1]))}"
            )
        case "missing":
            return f"{path} is missing"
        case "value_error":
            where = f"{path}: " if path else ""
            return where + str(error["ctx"]["error"])
        case _:
            return f"{path} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys(sections: tuple) -> list[str]:
    found: Any = TrainConfig
    for section in sections:
        found = found.model_fields[section].annotation
    return list(found.model_fields)
