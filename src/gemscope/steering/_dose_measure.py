"""What a dose is measured by: sums over tokens, kept prompt by prompt.

Every figure is a ratio of sums, so that intervals come from resampling prompts. `t` runs over
ordinary tokens; BOS, turns of a chat and other special tokens count nowhere. A continuation is
scored teacher-forced, in one pass of the steered and one of the unsteered model over it.

    promoted         mean steered probability of the feature's promoted tokens together, where the
                     tokens of the continuation are predicted
    promoted_at_end  the same at the prompt's last token alone
    activation       mean of the feature's activation on the continuation, encoded again from what
                     its site holds after the edit
    kl               mean over the prompt's tokens of KL(unsteered || steered) of the next token
    kl_continuation  the same over the continuation
    perplexity       exp of the mean of -log p(t) of the continuation under the unsteered model
    distinct         distinct pairs of adjacent tokens / pairs, in the continuation
    repetition       runs of four tokens that stood in the continuation before / runs of four
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.lm import Edit, Edits, Generated, LanguageModel, Tokens

from ._parts import Feature

MEASURES = ("promoted", "promoted_at_end", "activation", "kl", "kl_continuation", "perplexity",
            "distinct", "repetition")  # fmt: skip
_ENTRIES = 2**22
"""Probabilities that are held at once in float64."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Numerators and denominators of each measure, one of each prompt, float64 `[n_prompts]`."""

    n_prompts: int
    over: dict[str, np.ndarray] = field(default_factory=dict)
    under: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, name: str, prompt: int, over: float | int, under: float | int) -> None:
        """Add tokens of a continuation of one prompt."""
        for held, value in ((self.over, over), (self.under, under)):
            held.setdefault(name, np.zeros(self.n_prompts))[prompt] += value

    def ratio(self, name: str, chosen: np.ndarray | None = None) -> np.ndarray | float:
        """The measure over all prompts, or over those `chosen` `[..., n]`; NaN of no tokens."""
        where = np.arange(self.n_prompts) if chosen is None else chosen
        if name not in self.over:
            return np.full(where.shape[:-1], np.nan)
        over, under = (held[name][where].sum(-1) for held in (self.over, self.under))
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            value = np.where(under > 0, over / np.where(under > 0, under, 1.0), np.nan)
            return np.exp(value) if name == "perplexity" else value


@dataclass(frozen=True, slots=True)
class Row:
    """A continuation of one prompt, with the sums it counts in."""

    made: Generated
    prompt: int
    sums: Sums


@torch.no_grad()
def measure(
    model: LanguageModel,
    feature: Feature,
    promoted: Int[Tensor, " n_promoted"] | None,
    given: TokenBatch,
    rows: Sequence[Row],
    edits: Sequence[Edits],
) -> None:
    """Add what a batch of continuations of the prompts `given` says to their sums; `edits` are
    those that they came from.
    """
    batch = _together(model, given, rows)
    lengths = [len(row.made.prompt_ids) for row in rows]
    watch = _Watch(feature)
    steered = model.run(batch, edits=[*edits, watch.edit()], logits=True, prompt=lengths).logits
    plain = model.run(batch, logits=True).logits if edits else steered
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids, counts = batch.ids[place], batch.counts[place]
        own = counts.nonzero().flatten()
        asked, new = own[own < length], own[own >= length]
        add, q, p = row.sums.add, steered[place], plain[place]
        for name, at in (("kl", asked), ("kl_continuation", new)):
            add(name, row.prompt, sum(_divergence(p, q, at)), len(at))
        logs = sum(_log_probability(p, new - 1, ids[new]))
        add("perplexity", row.prompt, -logs, len(new))
        if promoted is not None:
            for name, at in (("promoted", new - 1),
                             ("promoted_at_end", torch.tensor([length - 1]))):  # fmt: skip
                add(name, row.prompt, sum(_share(q, at, promoted)), len(at))
        fired = watch.values[(watch.rows == place) & torch.isin(watch.positions, new)]
        add("activation", row.prompt, float(fired.double().sum()), len(new))
        for name, size in (("distinct", 2), ("repetition", 4)):
            runs = list(zip(*(ids[new].tolist()[k:] for k in range(size)), strict=False))
            many = len(set(runs))
            add(name, row.prompt, many if name == "distinct" else len(runs) - many, len(runs))


class _Watch:
    """How strongly a feature fires on what its site holds after the edits of a pass."""

    def __init__(self, feature: Feature):
        self.feature = feature

    def edit(self) -> Edit:
        """An edit that changes nothing and comes after others of its site."""
        return Edit(self.feature.reads, self.feature.reads, self._see, placed=True)

    def _see(self, tokens: Tokens, x: Float[Tensor, "n_tokens d"]) -> Float[Tensor, "n_tokens d"]:
        self.values = self.feature.to(x.device).values(x).cpu()
        self.rows, self.positions = tokens.rows.cpu(), tokens.positions.cpu()
        return x


def _together(model: LanguageModel, given: TokenBatch, rows: Sequence[Row]) -> TokenBatch:
    """Prompts with their continuations as one batch, padded on the right."""
    made = [row.made for row in rows]
    longest = max(len(one.prompt_ids) + len(one.ids) for one in made)
    pad = model.tokenizer.pad_token_id or 0
    ids = torch.full((len(made), longest), pad)
    counts = torch.zeros(ids.shape, dtype=torch.bool)
    for place, one in enumerate(made):
        length = len(one.prompt_ids)
        whole = torch.tensor([*one.prompt_ids, *one.ids])
        ids[place, : len(whole)] = whole
        counts[place, : len(whole)] = ~torch.isin(whole, model.specials)
        counts[place, :length] = given.counts[rows[place].prompt, :length]
    places = torch.arange(len(made))
    return TokenBatch(ids, counts, places, torch.zeros_like(places))


def _parts(logits: Tensor, at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some positions at a time: where they stand in `at`, and which they are."""
    size = max(1, _ENTRIES // logits.shape[-1])
    yield from zip(torch.arange(len(at)).split(size), at.split(size), strict=True)


def _divergence(p: Tensor, q: Tensor, at: Int[Tensor, " n"]) -> Iterator[float]:
    """Sums of KL(p || q) in nats, from logits `[seq, vocab]`."""
    for _, some in _parts(p, at):
        here = p[some.to(p.device)].double().log_softmax(-1)
        there = q[some.to(q.device)].double().log_softmax(-1)
        yield float((here.exp() * (here - there)).sum())


def _log_probability(p: Tensor, at: Int[Tensor, " n"], ids: Int[Tensor, " n"]) -> Iterator[float]:
    for places, some in _parts(p, at):
        logs = p[some.to(p.device)].double().log_softmax(-1)
        yield float(logs.gather(1, ids[places].to(p.device)[:, None]).sum())


def _share(q: Tensor, at: Int[Tensor, " n"], tokens: Int[Tensor, " m"]) -> Iterator[float]:
    for _, some in _parts(q, at):
        yield float(q[some.to(q.device)].double().softmax(-1)[:, tokens.to(q.device)].sum())
