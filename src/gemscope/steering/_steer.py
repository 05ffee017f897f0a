"""Steered text beside what the model says by itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.errors import InputError
from gemscope.features import Store
from gemscope.hub import Given
from gemscope.lm import LanguageModel, load_model
from gemscope.sae import Dictionary

from ._change import Change
from ._maxima import load_feature
from ._modes import Mode, Strength
from ._parts import Feature
from ._positions import Positions, Schedule
from ._steering import Steering

Heard = Callable[[str, list[int | None]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """A prompt, what was done, and what the model made of it without and with that."""

    prompt: str
    changes: tuple[Change, ...]
    baseline: list[str]
    """Continuations without any edit, one a sample."""
    steered: list[str]
    """The same with the edits, from the same seed."""
    settings: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """What `gemscope steer --json` says."""
        return {
            "prompt": self.prompt, "edits": [change.json() for change in self.changes],
            "baseline": self.baseline, "steered": self.steered, **self.settings,
        }  # fmt: skip


def steer(
    prompt: str,
    features: str | Change | Sequence[str | Change],
    *,
    mode: str = Mode.ADD,
    strength: str | float | None = None,
    positions: str | Positions = Positions(),
    schedule: Schedule = Schedule(),
    model: LanguageModel | str | None = None,
    store: Store | Path | str | None = None,
    samples: int = 1,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    other_model: bool = False,
    heard: Heard | None = None,
) -> Steered:
    """Generate from `prompt` without and with edits of `features`, from the same seed.

    A feature is `ADDRESS/INDEX`, edited by `mode` and `strength`, or a whole `Change`. The model
    is that of the dictionary unless one is given; `store` is a catalog that knows the features'
    maxima. A temperature of 0 takes the likeliest token, and then one sample says it all. `heard`
    is told `baseline` or `steered` and the next token of every sample. What does not fit is refused
    before anything is generated.
    """
    given = [features] if isinstance(features, str | Change) else list(features)
    opened = Store.open(store) if isinstance(store, str | Path) else store
    known: dict[str, Dictionary] = {}
    changes = tuple(
        one if isinstance(one, Change) else change_of(
            one, mode, strength, positions=positions, schedule=schedule, store=opened, known=known
        )
        for one in given
    )  # fmt: skip
    lm = model if isinstance(model, LanguageModel) else load_model(model or model_of(changes))
    steering = Steering(changes)
    steering.check(lm, other_model=other_model)
    lengths = lm.lengths(lm.prompts(prompt, chat=chat))
    for change in changes:
        change.positions.check(lengths)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "samples": samples, "seed": seed, "chat": chat,
    }  # fmt: skip

    def made(what: str, edits: tuple) -> list[str]:
        told = None if heard is None else lambda tokens: heard(what, tokens)
        return [g.text for g in lm.generate(prompt, edits=edits, heard=told, **settings)]

    baseline, steered = made("baseline", ()), made("steered", (steering,))
    return Steered(
        prompt=prompt, changes=changes, baseline=baseline, steered=steered,
        settings={"model": lm.name, **settings},
    )  # fmt: skip


def change_of(
    feature: str,
    mode: str,
    strength: str | float | None,
    *,
    positions: str | Positions = Positions(),
    schedule: Schedule = Schedule(),
    amount: float = 1.0,
    keep_norm: bool = False,
    store: Store | None = None,
    given: Given = Given(),
    known: dict[str, Dictionary] | None = None,
) -> Change:
    """The edit of the feature `ADDRESS/INDEX` that words describe; dictionaries already loaded may
    be in `known`, where new ones are put.
    """
    how = Mode.parse(mode)
    if isinstance(strength, str):
        much: Strength | None = Strength.parse(strength)
    else:
        much = None if strength is None else Strength(float(strength))
    where = Positions.parse(positions) if isinstance(positions, str) else positions
    what = load_feature(feature, store=store, given=given, known=known)
    return Change(
        what=what, mode=how, strength=much, positions=where, schedule=schedule, amount=amount,
        keep_norm=keep_norm,
    )  # fmt: skip


def model_of(changes: Sequence[Change]) -> str:
    """The one model that all the dictionaries of `changes` are of."""
    found = {
        c.what.sae.origin.model for c in changes if isinstance(c.what, Feature)
    } - {None}  # fmt: skip
    if len(found) == 1:
        return str(next(iter(found)))
    if not found:
        raise InputError("the vectors do not say which model they are for; give --model")
    raise InputError(
        f"the features are of different models, {', '.join(sorted(map(str, found)))}; steer those "
        "of one"
    )
