"""Labels by a language model: what it is shown, what it says, and what becomes of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from gemscope.errors import InputError
from gemscope.features import Explanation, Store

from ._asking import Asker
from ._chat import Reply, Request
from ._firings import Firings, Sides
from ._labels import Label, sanitise
from ._prompts import VERSION, explain_prompt, reminded
from ._sampling import Sampler
from ._scores import check_scores
from ._windows import Cutter, Window

Progress = Callable[[str, int, int], None]
"""Called with what is being done, features done and features in all."""

_WRITE_EVERY = 64
_RAW = 4_000


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How features are explained and scored by a language model."""

    examples: int = 20
    """Windows shown to explain a feature, at most."""
    window: int = 32
    """Tokens of a window."""
    judged: int = 20
    """Windows of either right answer that a score asks about, at most."""
    per_prompt: int = 10
    """Windows in one request to judge."""
    tries: int = 3
    """Answers taken from the model until one is a label."""
    max_tokens: int = 400
    """Of an answer; a model that thinks aloud needs more."""
    scores: tuple[str, ...] = ("detection", "fuzzing")
    null: bool = True
    """Whether each score is also taken with another feature's explanation."""
    seed: int = 0

    def __post_init__(self):
        check_scores(self.scores)
        for name, least, most in (
            ("examples", 2, 200), ("window", 4, 512), ("judged", 4, 1_000), ("per_prompt", 1, 50),
            ("tries", 1, 10), ("max_tokens", 8, 100_000), ("seed", 0, 2**31),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                option = name.replace("_", "-")
                raise InputError(f"{option} is {getattr(self, name)}; take {least:,} to {most:,}")

    def sampler(self, store: Store, address: str) -> Sampler:
        """What draws the windows of a dictionary's features."""
        firings = Firings(store, address)
        cutter = Cutter(firings.text, store.tokenizer(address), self.window)
        return Sampler(firings, Sides(firings.text, self.seed), cutter, self.seed)


@dataclass(slots=True)
class Labelled:
    """What became of the features of one dictionary."""

    explanations: list[Explanation] = field(default_factory=list)
    unusable: dict[int, str] = field(default_factory=dict)
    """Features for which no answer was a label, with what the last one was instead."""
    silent: list[int] = field(default_factory=list)
    """Features without an activation to show."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A feature and what the model gets to see of it."""

    address: str
    feature: int
    windows: list[Window]
    promoted: list[str]
    documents: list[str]


def label_features(
    store: Store,
    address: str,
    features: Sequence[int],
    asker: Asker,
    settings: ModelSettings,
    *,
    progress: Progress = lambda *_: None,
) -> Labelled:
    """Label features and put the labels into the store as they come, in their order in the end."""
    sampler = settings.sampler(store, address)
    scores = {e.key: e.scores for e in store.explanations(address)}
    out, waiting = Labelled(), []

    def jobs() -> Iterator[Callable[[], tuple[_Shown, Label, list[Reply]]]]:
        for feature in features:
            shown = show(sampler, address, feature, settings)
            if shown is None:
                out.silent.append(feature)
            else:
                yield partial(_label, shown, asker, settings)

    done = 0
    try:
        for shown, label, replies in asker.each(jobs()):
            done += 1
            if label.problem:
                out.unusable[shown.feature] = label.problem
            else:
                made = _explanation(shown, label, replies, asker, settings)
                # The same label as before keeps what it has been scored.
                made = replace(made, scores=scores.get(made.key, ()))
                waiting.append(made)
                out.explanations.append(made)
            if len(waiting) >= _WRITE_EVERY:
                store.add_explanations(waiting)
                waiting = []
            progress("explaining", done + len(out.silent), len(features))
    finally:
        store.add_explanations(waiting)
    progress("explaining", len(features), len(features))
    out.explanations.sort(key=lambda e: e.feature)
    return out


def show(sampler: Sampler, address: str, feature: int, settings: ModelSettings) -> _Shown | None:
    """What the model gets to see of a feature; None where it fires nowhere."""
    windows = sampler.explaining(feature, settings.examples)
    if not windows:
        return None
    paths = sampler.cutter.text.paths
    promoted = sampler.firings.row(feature)["promoted"] or []
    return _Shown(
        address,
        feature,
        windows,
        [str(token["token"]) for token in promoted[:8]],
        sorted({paths[window.document] for window in windows}),
    )


def label_request(shown: _Shown, settings: ModelSettings) -> Request:
    """What is asked first."""
    messages = explain_prompt(shown.windows, shown.promoted)
    purpose = f"explain {shown.address}#{shown.feature}"
    return Request(messages, settings.max_tokens, purpose=purpose)


def _label(
    shown: _Shown, asker: Asker, settings: ModelSettings
) -> tuple[_Shown, Label, list[Reply]]:
    request, replies = label_request(shown, settings), []
    while True:
        replies.append(asker.ask(request))
        answer = replies[-1].text
        label = sanitise(answer)
        if label.problem and not answer.strip() and replies[-1].finish == "length":
            label = Label("", "it is empty: the model thought until --max-tokens")
        if not label.problem or len(replies) >= settings.tries:
            return shown, label, replies
        # From the first request each time, so that prompts do not grow.
        messages = reminded(label_request(shown, settings).messages, answer, label.problem)
        if messages == request.messages:  # it repeats itself, and would do so again
            return shown, label, replies
        request = Request(messages, settings.max_tokens, purpose=request.purpose)


def _explanation(
    shown: _Shown, label: Label, replies: list[Reply], asker: Asker, settings: ModelSettings
) -> Explanation:
    return Explanation(
        dictionary=shown.address,
        feature=shown.feature,
        text=label.text,
        method="model",
        author=asker.chat.model,
        detail={
            "raw": [reply.text[:_RAW] for reply in replies],
            "at": asker.chat.at,
            "prompt": VERSION,
            "seed": settings.seed,
            "examples": [window.first for window in shown.windows],
            "window": settings.window,
            "documents": {"explaining": shown.documents},
        },
        # Of the reply, not of now: an explanation made again from kept replies is the same.
        created=replies[-1].created,
    )
