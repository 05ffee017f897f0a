"""What a training run is, as typed and validated YAML: one model pass, any number of artefacts."""

from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from gemscope.sites import Site, Sites, each, parse_sites


def _sites(value: object) -> Site | Sites:
    if isinstance(value, str):
        return parse_sites(value)
    if not isinstance(value, Site | Sites):
        raise ValueError(f"{value!r} is no site; write LAYER.STREAM, such as 12.resid_post")
    return value


SitesField = Annotated[
    Site | Sites,
    BeforeValidator(_sites),
    PlainSerializer(str, return_type=str),
]


class _Strict(BaseModel):
    # Strict: YAML has types, and "4000" where a number belongs is a mistake worth a sentence.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class Data(_Strict):
    """Which activations every artefact of the run is trained on, in the same order."""

    text: str | None = None
    """A file, folder, glob pattern, `miniature` or `python` (the standard library)."""
    dataset: str | None = None
    """Or a data set of the hub, `OWNER/NAME[:SPLIT[:COLUMN]]`."""
    store: str | None = None
    """Or a store that `gemscope harvest` wrote, a folder or URL."""
    tokens: int = Field(gt=0)
    """Activations to train on, in all."""
    epochs: int = Field(default=1, gt=0)
    """How often the data may be gone through to get there."""
    context: int = Field(default=1_024, ge=2)
    batch: int = Field(default=4_096, gt=0)
    """Activations of a step."""
    buffer: int = Field(default=1_000_000, gt=0)
    """Tokens in memory to draw batches from."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations in that memory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the order of the data."""
    skip_corrupt: bool = False
    """Whether damaged shards of a store are left out instead of ending the run."""

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if [self.text, self.dataset, self.store].count(None) != 2:
            raise ValueError("give one of text, dataset and store")
        if self.tokens < self.batch:
            raise ValueError(f"tokens {self.tokens} is less than one batch of {self.batch}")
        if self.store is None and self.buffer < 2 * self.batch:
            raise ValueError(
                f"a buffer of {self.buffer} tokens mixes nothing into batches of {self.batch}; "
                f"take {2 * self.batch} or more"
            )
        return self


class Optimizer(_Strict):
    """Adam; the defaults are Gemma Scope's."""

    lr: float = Field(default=7e-5, gt=0)
    beta1: float = Field(default=0.0, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    warm_up: int = Field(default=1_000, ge=0)
    """Steps of the cosine warm-up from a tenth of `lr`."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, at the end, in which the rate falls linearly to zero."""
    threshold_lr: float = Field(default=1.0, gt=0)
    """Rate of the thresholds, as a multiple of `lr`."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; null: as they are."""


class Sparsity(_Strict):
    """What makes features rare. `topk` and `batch-topk` need none of it."""

    penalty: Literal["quadratic", "linear", "l1", "none"] = "quadratic"
    """Per token: `(2 / l0) (L0 - l0)^2` (Gemma Scope 2), `L0` (Gemma Scope), or the sum of the
    features (`relu`); times `coefficient`, mean over the batch."""
    coefficient: float = Field(default=1e-3, ge=0)
    warm_up: int = Field(default=50_000, ge=0)
    """Steps over which the coefficient rises linearly from zero."""
    aim: float = Field(default=0.0, ge=0, lt=1)
    """How fast the target of the penalty is moved to bring the L0 itself to `l0`: share of the
    difference per step. 0: not at all, as published."""
    frequency: float = Field(default=0.0, ge=0)
    """Coefficient of the penalty on features that fire often, after the same warm-up."""
    frequency_scale: float = Field(default=0.1, gt=0, le=1)
    """Share of tokens from which a feature is often."""
    bandwidth: float = Field(default=1e-3, gt=0)
    """Width of the straight-through window, at inputs of unit mean squared norm."""
    threshold: float | None = Field(default=1e-3, ge=0)
    """Initial threshold of every feature, at the same scale; null: measured, see `start_l0`."""
    start_l0: float | None = Field(default=None, gt=0)
    """Without a `threshold`: each feature's initial threshold is the quantile of its own
    pre-activations that makes all features fire equally often and this many on a token."""

    @model_validator(mode="after")
    def _one_start(self) -> "Sparsity":
        if (self.threshold is None) == (self.start_l0 is None):
            raise ValueError("give either threshold or start_l0, and null for the other")
        return self


class AuxK(_Strict):
    """The loss that brings dead features back (2406.04093): they reconstruct what is left over."""

    features: int = Field(gt=0)
    """Dead features of a token that take part, at most."""
    coefficient: float = Field(default=1 / 32, gt=0)
    dead_after: int = Field(default=10_000_000, gt=0)
    """Tokens without firing after which a feature is dead."""


class EndToEnd(_Strict):
    """A KL term through the rest of the model (2503.17272), for finetuning.

    The loss is `(MSE + a b KL) / (1 + b)`, `a = MSE / (KL + 1e-8)` as a constant.
    """

    weight: float = Field(default=1.0, gt=0)
    """`b`."""


class Artefact(_Strict):
    """One dictionary: an SAE where `reads` is `writes`, else a transcoder; of several layers, a
    crosscoder or cross-layer transcoder.
    """

    name: str
    """Folder under `out`."""
    reads: SitesField
    writes: SitesField
    d_sae: int = Field(gt=0)
    """Features, of all layers together."""
    l0: float = Field(gt=0)
    """Features per token to reach; for `topk` and `batch-topk` their k."""
    activation: Literal["jumprelu", "topk", "batch-topk", "relu"] = "jumprelu"
    affine: bool = False
    """Whether a transcoder has a skip connection."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: numbers of first features that reconstruct on their own, ascending."""
    prefix_weights: tuple[float, ...] | None = None
    """Weights of their losses and, last, of the whole; equal ones when not given. Sum 1."""
    start: str | None = None
    """Address of an artefact to go on training from; null: from nothing."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the initial weights."""
    optimizer: Optimizer = Optimizer()
    sparsity: Sparsity = Sparsity()
    auxk: AuxK | None = None
    end_to_end: EndToEnd | None = None

    @property
    def kind(self) -> str:
        """`sae`, `transcoder`, `crosscoder` or `clt`."""
        if isinstance(self.reads, Sites):
            return "crosscoder" if self.reads == self.writes else "clt"
        return "sae" if self.reads == self.writes else "transcoder"

    @property
    def levels(self) -> tuple[tuple[int, float], ...]:
        """Number of features and weight of every reconstruction that is trained, the whole last."""
        sizes = (*self.prefixes, self.d_sae)
        weights = self.prefix_weights or (1 / len(sizes),) * len(sizes)
        return tuple(zip(sizes, weights, strict=True))

    @model_validator(mode="after")
    def _consistent(self) -> "Artefact":
        for problem in _problems(self):
            raise ValueError(problem)
        return self


def _problems(a: Artefact):
    """What about `a` cannot be, in sentences."""
    reads, writes = each(a.reads), each(a.writes)
    if a.l0 >= a.d_sae:
        yield f"l0 {a.l0:g} is not below d_sae {a.d_sae}"
    if "topk" in a.activation and a.l0 != int(a.l0):
        yield f"l0 {a.l0} is the k of {a.activation}, a whole number"
    if a.activation == "relu" and a.sparsity.penalty not in ("l1", "none"):
        yield f"relu has no threshold for the {a.sparsity.penalty} penalty to move; take l1"
    if a.activation == "jumprelu" and a.sparsity.penalty == "l1":
        yield "the l1 penalty is for relu; take quadratic or linear"
    if [s.layer for s in reads] != [s.layer for s in writes] and len(reads) > 1:
        yield f"reads {a.reads} and writes {a.writes}: they must be of the same layers"
    if len(reads) != len(writes):
        yield f"reads {a.reads} is {len(reads)} sites, and writes {a.writes} is {len(writes)}"
    if any(r.layer > w.layer for r, w in zip(reads, writes, strict=False)):
        yield f"reads {a.reads} comes after writes {a.writes}"
    if a.affine and a.reads == a.writes:
        yield "affine belongs to transcoders; reads and writes are the same site"
    if a.d_sae % len(reads):
        yield f"d_sae {a.d_sae} is not a multiple of the {len(reads)} layers"
    if len(reads) > 1 and (a.activation != "jumprelu" or a.prefixes or a.auxk or a.end_to_end):
        yield (
            f"a {a.kind} is trained with jumprelu, without prefixes, auxk and end_to_end; "
            "leave them out"
        )
    sizes = (*a.prefixes, a.d_sae)
    if any(x >= y or x <= 0 for x, y in pairwise(sizes)):
        yield f"prefixes {list(a.prefixes)} do not ascend to d_sae {a.d_sae}"
    if a.prefix_weights is not None and len(a.prefix_weights) != len(sizes):
        yield (
            f"prefix_weights has {len(a.prefix_weights)} values for {len(a.prefixes)} prefixes "
            "and the whole"
        )
    if a.prefix_weights is not None and abs(sum(a.prefix_weights) - 1) > 1e-6:
        yield f"prefix_weights sum to {sum(a.prefix_weights):g}, not 1"
    if a.end_to_end and (a.prefixes or a.reads != a.writes):
        yield "end_to_end is for SAEs without prefixes"


class Evaluation(_Strict):
    """How an unfinished artefact is looked at: spliced into the model, on held-out text."""

    every: int = Field(gt=0)
    """Steps between looks; there is one at the end in any case."""
    tokens: int = Field(default=20_000, gt=0)
    text: str = "miniature"


_OF_THE_RUN = (
    "checkpoint", "metrics", "figures", "config.yaml", "evaluations.jsonl", "run.json",
    "report.md", "report.json", "report.html",
)  # fmt: skip
"""What a run writes into `out` beside its artefacts."""


class TrainConfig(_Strict):
    """A run."""

    model: str
    model_dtype: str = "float32"
    out: str
    """Folder of the run."""
    checkpoint_every: int = Field(default=200, gt=0)
    """Steps between checkpoints."""
    data: Data
    evaluate: Evaluation | None = None
    log: tuple[Literal["trackio", "wandb"], ...] = ()
    """Where metrics go beside the run's own folder."""
    artefacts: tuple[Artefact, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        names = [a.name for a in self.artefacts]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(
                f"two artefacts are called {twice}; put what they differ in into name, such as "
                "{layer}, {width}, {l0}, {seed}"
            )
        if of_run := next((n for n in names if n.partition("/")[0] in _OF_THE_RUN), None):
            raise ValueError(f"name {of_run} is where a run's own files are; choose another")
        for inner, outer in ((n, str(p)) for n in names for p in PurePosixPath(n).parents):
            if outer in names:
                raise ValueError(f"{inner} lies in {outer}, which is an artefact itself")
        if any(a.end_to_end for a in self.artefacts):
            if len({str(a.reads) for a in self.artefacts}) > 1 or self.data.store:
                raise ValueError("end_to_end needs text, and artefacts of one site")
            if not all(a.end_to_end for a in self.artefacts):
                raise ValueError("end_to_end is for all artefacts of a run or for none")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.data.tokens // self.data.batch

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site read or written, each once."""
        found = [s for a in self.artefacts for sites in (a.reads, a.writes) for s in each(sites)]
        return tuple(dict.fromkeys(found))
