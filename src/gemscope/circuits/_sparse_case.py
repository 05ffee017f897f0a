"""One example made ready: what every dictionary holds in its clean run, and what it is ablated to.

At each dictionary's site `x = sum f d + b + error`. Ablated, the features `f` become `f'` and the
error `error'`: those of the corrupted run, their means over a text, or 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemscope.corpus import contexts, pack, read_text
from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, BatchTopK, SparseFeatures
from gemscope.sites import Site
from gemscope.steering import Measuring, Metric, Prompt
from gemscope.steering import metric as read_metric

from ._sparse_config import CircuitConfig, CircuitExample

Load = Callable[[str], object]
Progress = Callable[[str, int, int], None]
"""Told `(what, done, total)`."""
MEAN_TOKENS = 10_000
"""Tokens that a mean is taken over, at most."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Features that change when all is ablated, entry by entry."""

    positions: Int[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    moved: Float[Tensor, " nnz"]
    """`f' - f`, float64."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Swap:
    """What a dictionary makes of its site in the clean run, and what that is ablated to."""

    sae: SAE
    code: SparseFeatures
    error: Float[Tensor, "seq d"]
    """Float64, as is the next."""
    other_code: SparseFeatures
    other_error: Float[Tensor, "seq d"]
    ordinary: Bool[Tensor, " seq"]
    """Where anything is ablated: no dictionary was made for the other tokens."""

    @property
    def error_moved(self) -> Float[Tensor, "seq d"]:
        """What becomes of the error, less what it is."""
        return (self.other_error - self.error) * self.ordinary[:, None]

    @property
    def moved(self) -> Float[Tensor, "seq d"]:
        """What becomes of the whole site, less what it is."""
        made = self.sae.decode(self.other_code).double() - self.sae.decode(self.code).double()
        return made * self.ordinary[:, None] + self.error_moved

    def entries(self) -> Entries:
        """The features that change."""
        width, codes = self.sae.d_sae, (self.code, self.other_code)
        keys = torch.cat([code.rows * width + code.indices.long() for code in codes])
        signed = torch.cat((-self.code.values.double(), self.other_code.values.double()))
        key, inverse = keys.unique(return_inverse=True)
        moved = signed.new_zeros(len(key)).index_add_(0, inverse, signed)
        kept = self.ordinary[key // width] & (moved != 0)
        return Entries(key[kept] // width, key[kept] % width, moved[kept])


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """An example, its metric, and the swap at each dictionary's site."""

    example: CircuitExample
    measuring: Measuring
    prompt: Prompt
    swaps: tuple[Swap, ...]
    clean: float
    """The metric on the clean prompt."""
    corrupted: float | None
    """The same on the corrupted prompt; None for another ablation."""


Means = tuple[tuple[Float[Tensor, " _"], Float[Tensor, " _"]], ...]
"""Of each dictionary, the mean feature activations and the mean error."""


def check_dictionaries(model: LanguageModel, saes: Sequence[object]) -> tuple[SAE, ...]:
    """Refuse what is no SAE of `model`, or two of one site."""
    found: dict[Site, SAE] = {}
    for sae in saes:
        if not isinstance(sae, SAE) or sae.is_transcoder or sae.skip is not None:
            kind = getattr(sae, "kind", "dictionary")
            if kind == "sae":
                kind = "SAE with a skip connection"
            name = sae.origin.address if hasattr(sae, "origin") else None
            raise InputError(
                f"{name or 'a dictionary'} is a {kind}: a circuit here is made of plain "
                "SAEs, which write the site that they read; gemscope trace is for transcoders"
            )
        if isinstance(sae.activation, BatchTopK):
            raise InputError(
                f"{sae.origin.address or 'a dictionary'} chooses features among all tokens of a "
                "batch, so what fires would depend on what else is run: take one with thresholds"
            )
        model.check(sae)
        if sae.writes in found:
            raise InputError(
                f"{found[sae.writes].origin.address} and {sae.origin.address} are two accounts of "
                f"{sae.writes}: name one dictionary a site"
            )
        found[sae.writes] = sae
    return tuple(found.values())


def metric_of(
    example: CircuitExample, config: CircuitConfig, model: LanguageModel, load: Load,
    sites: Sequence[Site],
) -> Metric:  # fmt: skip
    """What an example measures.

    Raises:
        InputError: A token that is none, or a metric without a slope.
    """
    named = example.metric or config.metric
    if example.answer is not None:
        kind = "logit" if example.wrong is None else "difference"
        named = ":".join(
            (kind, example.answer, *([] if example.wrong is None else [example.wrong]))
        )
    assert named is not None  # the config has been checked
    found = read_metric(named, model, load, at=example.at, after=sites)  # type: ignore[arg-type]
    if found.kind == "kl":
        raise InputError(
            "kl is smallest at the clean run, where its slope is 0: take another metric, such as "
            "difference:TOKEN:TOKEN"
        )
    return found


def case_of(
    example: CircuitExample, what: Metric, model: LanguageModel, saes: tuple[SAE, ...],
    ablation: str, means: Means | None,
) -> Case:  # fmt: skip
    """Run an example, and its corrupted prompt if that is what nodes are ablated to."""
    prompt = Prompt.of(model, example.clean)
    measuring = Measuring(model, what, prompt)
    sites = tuple(sae.reads for sae in saes)
    with torch.no_grad():
        run, clean = measuring.begin(sites)
        here = [_split(sae, run.values[sae.reads][0]) for sae in saes]
        corrupted = None
        if ablation == "corrupted":
            assert example.corrupted is not None
            other = Prompt.of(model, example.corrupted)
            if len(other) != len(prompt):
                raise InputError(
                    f"the prompts have {len(prompt)} and {len(other)} tokens, and patching takes "
                    f"values position by position: {prompt.listed} and {other.listed}; make them "
                    "equally long, or take ablation: mean or zero"
                )
            there_run, corrupted = measuring.beside(other, sites)
            there = [_split(sae, there_run.values[sae.reads][0]) for sae in saes]
            # A token that no dictionary was made for may stand opposite an ordinary one.
            ordinary = prompt.ordinary & other.ordinary
        else:
            there = [_constant(sae, len(prompt), None if means is None else means[number])
                     for number, sae in enumerate(saes)]  # fmt: skip
            ordinary = prompt.ordinary
        swaps = tuple(
            Swap(sae=sae, code=code, error=error, other_code=other_code, other_error=other_error,
                 ordinary=ordinary.to(model.device))
            for sae, (code, error), (other_code, other_error) in zip(saes, here, there, strict=True)
        )  # fmt: skip
    return Case(example=example, measuring=measuring, prompt=prompt, swaps=swaps, clean=clean,
                corrupted=corrupted)  # fmt: skip


def _split(
    sae: SAE, x: Float[Tensor, "n d"]
) -> tuple[SparseFeatures, Float[Tensor, "n d"]]:  # fmt: skip
    """Features, and the error as float64."""
    x = x.detach()
    code = sae.encode(x.float())
    return code, x.double() - sae.decode(code).double()


def _constant(
    sae: SAE, length: int, mean: tuple[Tensor, Tensor] | None
) -> tuple[SparseFeatures, Tensor]:
    """The same at every position: a mean, or nothing."""
    device = sae.w_enc.device
    if mean is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        code = SparseFeatures.from_entries(
            nothing, nothing, torch.zeros(0, device=device), length, sae.d_sae
        )
        return code, torch.zeros(length, sae.d_out, dtype=torch.float64, device=device)
    values, error = mean
    some = values.nonzero()[:, 0]
    rows = torch.arange(length, device=device).repeat_interleave(len(some))
    code = SparseFeatures.from_entries(
        rows, some.repeat(length), values[some].float().repeat(length), length, sae.d_sae
    )
    return code, error.expand(length, -1)


@torch.no_grad()
def means_over(
    model: LanguageModel, saes: tuple[SAE, ...], source: str, progress: Progress | None = None
) -> Means:
    """Mean features and errors over the first `MEAN_TOKENS` ordinary tokens of a text."""
    length = min(128, model.max_context)
    rows = contexts(read_text(source), model.tokenizer, length=length)
    zeros = partial(torch.zeros, dtype=torch.float64, device=model.device)
    sums = [(zeros(sae.d_sae), zeros(sae.d_out)) for sae in saes]
    seen = 0
    for batch in pack(rows, model.tokenizer, batch=8, tokens=MEAN_TOKENS, prefix=model.prefix):
        run = model.run(batch, read=[sae.reads for sae in saes])
        counts = batch.counts.to(model.device)
        for sae, (features, errors) in zip(saes, sums, strict=True):
            code, error = _split(sae, run.values[sae.reads][counts])
            features.index_add_(0, code.indices.long(), code.values.double())
            errors += error.sum(0)
        seen += batch.n_counted
        if progress is not None:
            progress("means", min(seen, MEAN_TOKENS), MEAN_TOKENS)
    if not seen:
        raise InputError(f"{source} has no ordinary token to take a mean over; name another text")
    return tuple((features / seen, errors / seen) for features, errors in sums)
