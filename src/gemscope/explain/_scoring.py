"""Scores of explanations, whoever made them, and an estimate of what a model will be asked."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from gemscope.features import Explanation, Score, Store

from ._asking import Asker
from ._chat import Reply, Request
from ._judges import Judge, ModelJudge
from ._labels import sanitise
from ._model import ModelSettings, Progress, label_request, show
from ._sampling import Sampler
from ._scores import Questions, others, questions, score

_WRITE_EVERY = 64
_SAMPLE = 48
_BYTES_PER_TOKEN = 3.5
_LABEL_TOKENS = 20
_ENTRY_TOKENS = 3


@dataclass(slots=True)
class Scored:
    """Explanations with their scores, and why some have none."""

    explanations: list[Explanation] = field(default_factory=list)
    unscored: dict[tuple[int, str], str] = field(default_factory=dict)
    """By feature and score."""


Each = Callable[[Iterator[Callable[[], Explanation]]], Iterable[Explanation]]


def score_explanations(
    store: Store,
    address: str,
    explanations: Sequence[Explanation],
    judge: Judge,
    settings: ModelSettings,
    *,
    each: Each = lambda jobs: (job() for job in jobs),
    progress: Progress = lambda *_: None,
) -> Scored:
    """Score explanations of one dictionary and put them into the store with their scores.

    `each` runs the jobs: `Asker.each` several at a time. Scores of other names are kept.
    """
    sampler = settings.sampler(store, address)
    # In an order that scores do not change, or a run that goes on would pair them otherwise.
    explanations = sorted(explanations, key=lambda e: (e.feature, e.method, e.author, e.text))
    circle = others(explanations, seed=settings.seed)
    nulls = circle if settings.null else [None] * len(circle)
    out, waiting = Scored(), []

    def jobs() -> Iterator[Callable[[], Explanation]]:
        for one, other in zip(explanations, nulls, strict=True):
            asked, why = questions(sampler, one, settings.scores, settings.judged)
            out.unscored |= {(one.feature, name): reason for name, reason in why.items()}
            yield partial(_scored, one, other, asked, judge, sampler)

    try:
        for done, made in enumerate(each(jobs()), start=1):
            waiting.append(made)
            out.explanations.append(made)
            if len(waiting) >= _WRITE_EVERY:
                store.add_explanations(waiting)
                waiting = []
            progress("scoring", done, len(explanations))
    finally:
        store.add_explanations(waiting)
    out.explanations.sort(key=lambda e: (e.feature, e.method, e.author, e.text))
    return out


def _scored(
    one: Explanation,
    other: Explanation | None,
    asked: Sequence[Questions],
    judge: Judge,
    sampler: Sampler,
) -> Explanation:
    paths = sampler.cutter.text.paths
    made = [score(q, one, other, judge, seed=sampler.seed, paths=paths) for q in asked]
    return replace(one, scores=merged(one.scores, made))


def merged(*scores: Sequence[Score]) -> tuple[Score, ...]:
    """All scores in their first order; of a name, the one that was given last."""
    return tuple({s.name: s for some in scores for s in some}.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will ask, about; what is answered already is not in it."""

    requests: int = 0
    kept: int = 0
    """Requests that are answered already."""
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            self.requests + other.requests,
            self.kept + other.kept,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    def json(self, prices: tuple[float, float] | None = None) -> dict[str, int | float]:
        """As JSON has it, with the price where those of a million tokens are given."""
        return asdict(self) | ({"price": self.price(*prices)} if prices else {})

    def price(self, per_million_in: float, per_million_out: float) -> float:
        """In the currency of the prices."""
        return (self.tokens_in * per_million_in + self.tokens_out * per_million_out) / 1e6


def estimate(
    store: Store,
    address: str,
    work: Sequence[int] | Sequence[Explanation],
    asker: Asker,
    settings: ModelSettings,
) -> Estimate:
    """What labelling features, or scoring explanations, will ask: from the prompts of some of them.

    Tokens are bytes of the prompts by 3.5; answers are taken to be as short as asked for, once.
    """
    sampler = settings.sampler(store, address)
    size = min(len(work), _SAMPLE)
    chosen = [work[i * len(work) // size] for i in range(size)]
    counted = _Counted()
    judge = ModelJudge(asker, per_prompt=settings.per_prompt, max_tokens=settings.max_tokens)
    for one in chosen:
        explanation = one if isinstance(one, Explanation) else _labelled(
            one, sampler, address, asker, settings, counted)  # fmt: skip
        if explanation is None:
            continue
        for asked in questions(sampler, explanation, settings.scores, settings.judged)[0]:
            windows, _ = asked.shuffled([settings.seed, explanation.feature])
            for request in judge.requests(explanation, windows):
                # Another feature's label makes a prompt of the same size.
                for _ in range(1 + settings.null):
                    counted.add(request, asker, _ENTRY_TOKENS * settings.per_prompt)
    return counted.scaled(len(work) / max(1, len(chosen)))


def _labelled(
    feature: int,
    sampler: Sampler,
    address: str,
    asker: Asker,
    settings: ModelSettings,
    counted: "_Counted",
) -> Explanation | None:
    """The feature with its label if it is answered already, else with one of the usual length."""
    shown = show(sampler, address, feature, settings)
    if shown is None:
        return None
    reply = counted.add(label_request(shown, settings), asker, _LABEL_TOKENS)
    text = sanitise(reply.text).text if reply is not None else ""
    return Explanation(
        dictionary=address, feature=feature, text=text or "a word of the usual length of labels",
        method="model", author=asker.chat.model,
    )  # fmt: skip


class _Counted:
    def __init__(self) -> None:
        self.requests = self.kept = self.tokens_out = 0
        self.bytes_in = 0

    def add(self, request: Request, asker: Asker, tokens_out: int) -> Reply | None:
        reply = asker.replies.find(request)
        if reply is not None:
            self.kept += 1
            return reply
        self.requests += 1
        self.bytes_in += sum(len(content.encode()) for _, content in request.messages)
        self.tokens_out += min(tokens_out, request.max_tokens)
        return None

    def scaled(self, by: float) -> Estimate:
        return Estimate(
            round(self.requests * by),
            round(self.kept * by),
            round(self.bytes_in / _BYTES_PER_TOKEN * by),
            round(self.tokens_out * by),
        )
