"""What an intervention is measured by: a number for each row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.errors import InputError, did_you_mean
from gemscope.features import marked
from gemscope.lm import Edits, LanguageModel, Run
from gemscope.sites import Site

from ._intervene_places import Prompt, same_length
from ._parts import Feature
from ._target import FeatureTarget, Load, order, target

_BYTE_LEVEL = str.maketrans({" ": "Ġ", "\n": "Ċ", "\t": "ĉ"})
"""How tokenizers over bytes write white space."""


class Measure(StrEnum):
    """Kinds of metric."""

    LOGIT = "logit"
    DIFFERENCE = "difference"
    PROBABILITY = "probability"
    LOSS = "loss"
    KL = "kl"
    FEATURE = "feature"


_ARGUMENTS = {
    Measure.LOGIT: "TOKEN", Measure.DIFFERENCE: "TOKEN:TOKEN", Measure.PROBABILITY: "TOKEN",
    Measure.LOSS: "", Measure.KL: "", Measure.FEATURE: "ADDRESS/INDEX",
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Metric:
    """One metric; logits and features are those at the position `at`, by default the last."""

    kind: Measure
    text: str
    """As it was given."""
    tokens: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    """The tokens as text, spaces marked."""
    feature: Feature | None = None
    at: int | None = None
    """Counted from BOS, which is 0; a negative one from the end."""

    def __str__(self) -> str:
        match self.kind:
            case Measure.LOGIT | Measure.PROBABILITY:
                return f"{self.kind} of {self.names[0]}"
            case Measure.DIFFERENCE:
                return f"logit of {self.names[0]} minus logit of {self.names[1]}"
            case Measure.LOSS:
                return "next-token loss in nats"
            case Measure.KL:
                return "divergence from the clean run in nats"
            case Measure.FEATURE:
                assert self.feature is not None
                return f"activation of {self.feature.name}"

    @property
    def reads(self) -> tuple[Site, ...]:
        """The site it reads, if it is a feature's activation."""
        return () if self.feature is None else (self.feature.reads,)

    def place(self, prompt: Prompt) -> int:
        """The position it is taken at, counted from the start of `prompt`."""
        return prompt.check(-1 if self.at is None else self.at, "--at")

    def check(self, targets: Sequence[Site]) -> None:
        """Refuse a feature that is computed before what is changed, or is the changed site's."""
        if self.feature is None:
            return
        for site in targets:
            if order(site) >= order(self.feature.reads):
                raise InputError(
                    f"{self.feature.name} is read at {self.feature.reads}, which a change at "
                    f"{site} does not reach: take a feature of a later site"
                )


def metric(
    text: str | Metric, model: LanguageModel, load: Load, *, at: int | None = None,
    after: Sequence[Site] = (),
) -> Metric:  # fmt: skip
    """The metric that `text` names: `logit:TOKEN`, `difference:TOKEN:TOKEN`, `probability:TOKEN`,
    `loss`, `kl` or `feature:ADDRESS/INDEX`; one that changes at the sites `after` reach.

    Raises:
        InputError: No such metric, text that is not one token, or no such feature.
    """
    found = text if isinstance(text, Metric) else _parsed(text, model, load, at)
    found.check(after)
    return found


def _parsed(text: str, model: LanguageModel, load: Load, at: int | None) -> Metric:
    name, colon, rest = text.partition(":")
    if name not in list(Measure):
        kinds = ", ".join(f"{k}:{a}" if a else k for k, a in _ARGUMENTS.items())
        raise InputError(
            f"no metric {name!r} ({did_you_mean(name, Measure)}); the metrics are {kinds}"
        )
    kind = Measure(name)
    wanted = _ARGUMENTS[kind]
    if bool(rest) != bool(wanted) or (colon and not wanted):
        raise InputError(
            f"{text!r} is not how this metric is written: {f'{kind}:{wanted}' if wanted else kind}"
        )
    if at is not None and kind is Measure.LOSS:
        raise InputError("loss is the mean over the whole text: --at does not apply to it")
    if kind is Measure.FEATURE:
        found = target(rest, model, load)
        if not isinstance(found, FeatureTarget):
            raise InputError(f"{rest!r} names no feature: write feature:ADDRESS/INDEX")
        return Metric(kind=kind, text=text, feature=found.feature, at=at)
    ids: tuple[int, ...] = ()
    if kind is Measure.DIFFERENCE:
        ids = two_tokens(rest, model.tokenizer)
    elif wanted:
        ids = (single_token(rest, model.tokenizer),)
    names = tuple(marked(model.tokenizer.decode([i])) for i in ids)
    return Metric(kind=kind, text=text, tokens=ids, names=names, at=at)


def two_tokens(text: str, tokenizer: Any) -> tuple[int, int]:
    """The tokens of `A:B`, either of which may hold colons."""
    cuts = [i for i, c in enumerate(text) if c == ":" and 0 < i < len(text) - 1]
    if not cuts:
        raise InputError(f"'difference:{text}' names one token: write difference:TOKEN:TOKEN")
    found = [
        (a, b)
        for i in cuts
        if (a := _token(text[:i], tokenizer)) is not None
        and (b := _token(text[i + 1 :], tokenizer)) is not None
    ]
    if not found:
        halves = text[: cuts[0]], text[cuts[0] + 1 :]
        return single_token(halves[0], tokenizer), single_token(halves[1], tokenizer)
    if any(one != two for one, two in pairwise(found)):
        raise InputError(f"'difference:{text}' can be cut at its colons in several ways")
    return found[0]


def _token(text: str, tokenizer: Any) -> int | None:
    """The id of the one token whose text is `text`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text:
        return ids[0]
    # A tokenizer may put a space before every text, and would miss a token without one.
    for form in (text, text.replace(" ", "▁"), text.translate(_BYTE_LEVEL)):
        found = tokenizer.convert_tokens_to_ids(form)
        if (
            found not in (None, tokenizer.unk_token_id)
            and tokenizer.decode([found], clean_up_tokenization_spaces=False) == text
        ):
            return found
    return None


def single_token(text: str, tokenizer: Any) -> int:
    """The id of the token `text`; a space before a word is part of its token."""
    if (found := _token(text, tokenizer)) is not None:
        return found
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = "|".join(marked(tokenizer.decode([i])) for i in ids)
    other = text[1:] if text.startswith(" ") else f" {text}"
    said = "without" if text.startswith(" ") else "with"
    hint = (
        f"; {said} the space before it, {other!r} is one"
        if other and _token(other, tokenizer) is not None
        else ""
    )
    raise InputError(
        f"{text!r} is not one token but {len(ids)}: {pieces}{hint}; name a single token, such as "
        f"the first of these"
    )


class Measuring:
    """A metric of a model, beside a clean prompt: what is lost and diverged from is the clean's."""

    def __init__(self, model: LanguageModel, what: Metric, clean: Prompt):
        self.model, self.metric, self.clean = model, what, clean
        self.place = what.place(clean)
        self.at = None if what.kind is Measure.LOSS else self.place
        self._base: Tensor | None = None
        if what.kind is Measure.LOSS and not bool(clean.ordinary[1:].any()):
            raise InputError("the text has no token that is predicted; give one more")

    def opposite(self, corrupted: Prompt) -> int:
        """The metric's position in the corrupted prompt."""
        if self.metric.kind is Measure.LOSS:
            same_length(
                self.clean, corrupted, "loss is that of the clean prompt's tokens in both",
                "make them equally long, or take another metric",
            )  # fmt: skip
        return self.metric.place(corrupted)

    def run(
        self, batch: TokenBatch, *, edits: tuple[Edits, ...] = (), read: tuple[Site, ...] = (),
        place: int | None = None,
    ) -> tuple[Run, Float[Tensor, " rows"]]:  # fmt: skip
        """One pass and the metric of each row, float64; at `place`, by default the clean's."""
        logits = self.metric.kind is not Measure.FEATURE
        sites = (*read, *self.metric.reads)
        run = self.model.run(batch, read=sites, edits=edits, logits=logits)
        return run, self._of(run, self.place if place is None else place)

    def begin(self, read: tuple[Site, ...] = ()) -> tuple[Run, float]:
        """The clean run and its metric."""
        run, value = self.run(self.clean.batch, read=read)
        return run, float(value[0])

    def beside(self, corrupted: Prompt, read: tuple[Site, ...]) -> tuple[Run, float]:
        """The run on another prompt and its metric."""
        run, value = self.run(corrupted.batch, read=read, place=self.opposite(corrupted))
        return run, float(value[0])

    def effects(self, count: int, edits: Edits, before: float) -> list[float]:
        """What `edits` do to the metric in each of `count` rows of the clean prompt.

        One row is compared with `before`, the clean run's; several with one more that is left
        alone, because a batch rounds otherwise than a row by itself.
        """
        if count == 1:
            return [float(self.run(self.clean.batch, edits=(edits,))[1][0]) - before]
        _, values = self.run(self.clean.rows(count + 1), edits=(edits,))
        return (values[:-1] - values[-1]).tolist()

    def _of(self, run: Run, place: int) -> Tensor:
        match self.metric.kind:
            case Measure.FEATURE:
                assert self.metric.feature is not None
                return _activation(self.metric.feature, run[self.metric.feature.reads][:, place])
            case Measure.LOSS:
                return self._loss(run.logits)
        logits = run.logits[:, place].double()
        ids = self.metric.tokens
        match self.metric.kind:
            case Measure.LOGIT:
                return logits[:, ids[0]]
            case Measure.DIFFERENCE:
                return logits[:, ids[0]] - logits[:, ids[1]]
            case Measure.PROBABILITY:
                return logits.log_softmax(-1)[:, ids[0]].exp()
        log = logits.log_softmax(-1)
        if self._base is None:  # the clean run comes first
            self._base = log[:1].detach()
        return (self._base.exp() * (self._base - log)).sum(-1).clamp_min(0)

    def _loss(self, logits: Tensor) -> Tensor:
        """Mean over the clean prompt's ordinary tokens, each predicted from those before it."""
        counted = self.clean.ordinary[1:].nonzero()[:, 0].to(logits.device)
        wanted = self.clean.batch.ids[0, 1:].to(logits.device)[counted]
        losses = [
            F.cross_entropy(row[some].double(), labels, reduction="sum")
            for row in logits
            for some, labels in ((counted, wanted),)
        ]
        return torch.stack(losses) / len(counted)


def _activation(feature: Feature, x: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """A feature's activation; its slope is that of the pre-activation where it fires."""
    fires = feature.values(x.detach().float()) > 0
    pre = x.double() @ feature.column.to(x.device).double() + float(feature.bias)
    return torch.where(fires, pre, 0.0)


def rows_that_fit(model: LanguageModel, length: int) -> int:
    """Rows of `length` tokens in one batch: their logits are to fit into a gigabyte."""
    return max(1, min(64, 2**28 // (length * model.config.vocab_size)))
