"""Output scores of whole dictionaries into a catalog store, a block at a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gemscope import hub
from gemscope.activations import stop_signals
from gemscope.errors import InputError
from gemscope.features import Stopped, Store, begin_output_scores, write_output_scores
from gemscope.lm import LanguageModel, load_model
from gemscope.sae import Dictionary

from ._dose_prompts import neutral_prompts
from ._output_score import PROMPTS, STRENGTH, TOP, output_scores, promoted_tokens

Progress = Callable[[str, int, int], None]

_BATCH = 64
_SECONDS = 10.0
"""Between two writes, at least: each makes a version of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What scoring did with one dictionary."""

    address: str
    features: int
    scored: int
    """Features measured by this call."""
    before: int
    """Features that had a score already."""
    silent: int
    """Features that never fired: they get none."""
    median: float | None
    """Of all scores the dictionary has; None if it has none."""
    reason: str | None = None
    """Why nothing can be measured, if so."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return asdict(self)


def score_store(
    store: Store,
    addresses: Sequence[str] = (),
    *,
    prompts: Sequence[str] | None = None,
    strength: float = STRENGTH,
    again: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = lambda *_: None,
) -> list[Scored]:
    """Measure the output score of every feature that fires and has none, and write it down.

    Of the dictionaries at `addresses`, or all. Written every few seconds: stopped in any way and
    called again with the same arguments, it goes on. `again` measures all of them anew.

    Raises:
        InputError: A dictionary is not in the store, its weights changed since it was indexed, or
            its scores were measured with other prompts, strength or precision.
        Stopped: A signal was received; what was measured is written.
    """
    if not np.isfinite(strength) or strength == 0:
        raise InputError(f"a strength of {strength} amplifies nothing; take a number such as 3")
    wanted = list(dict.fromkeys(addresses)) or [d["address"] for d in store.dictionaries()]
    if not wanted:
        raise InputError(f"{store.folder} holds no dictionary yet; gemscope index adds one")
    known = [store.dictionary(address) for address in wanted]
    total, before, made = sum(d["d_sae"] for d in known), 0, []
    loaded: dict[str, LanguageModel] = {}
    try:
        with stop_signals() as received:
            for facts in known:
                name = facts["loaded_model"]
                if name not in loaded:
                    loaded = {name: load_model(name, device=device, dtype=dtype)}  # one at a time
                one = _One(store, facts, loaded[name], prompts, strength)

                def report(done: int, first: int = before) -> None:
                    progress("scoring features", first + done, total)
                    if received:
                        raise Stopped(
                            "stopped while scoring; run the command again, and it goes on",
                            received[0],
                        )

                made.append(one.score(again, report))
                before += facts["d_sae"]
                progress("scoring features", before, total)
    finally:
        store.refresh()
    return made


class _One:
    """One dictionary of a store that is scored."""

    def __init__(
        self, store: Store, facts: dict[str, Any], model: LanguageModel,
        prompts: Sequence[str] | None, strength: float,
    ):  # fmt: skip
        self.store, self.address, self.run = store, facts["address"], facts["run"]
        self.d_sae, self.model, self.strength = facts["d_sae"], model, strength
        self.prompts = tuple(neutral_prompts(model)[:PROMPTS] if prompts is None else prompts)
        self.sae = self._dictionary(facts["digest"])

    def _dictionary(self, digest: str) -> Dictionary:
        entry = hub.obtain(hub.locate(self.address))
        if hub.digest(entry) != digest:
            raise InputError(
                f"the weights of {self.address} are others than those that were indexed; index it "
                "again"
            )
        return hub.build(entry).to(self.model.device)

    def score(self, again: bool, report: Callable[[int], None]) -> Scored:
        """Measure what is left of it."""
        how = {
            "prompts": list(self.prompts), "strength": self.strength, "tokens": TOP,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }  # fmt: skip
        if promoted_tokens(self.model, self.sae, [0], 1) is None:
            why = f"it writes {self.sae.writes}, from where no direct path leads to the logits"
            return self._said(0, why)
        left = begin_output_scores(self.store, self.address, how, again=again)
        maxima = self.store.features(self.address, ["max"])["max"].to_numpy()
        held: list[tuple[list[int], np.ndarray]] = []
        written = time.monotonic()
        try:
            for first in range(0, len(left), _BATCH):
                report(self.d_sae - len(left) + first)
                some = left[first : first + _BATCH]
                scores = output_scores(
                    self.model, self.sae, some, maxima[some], prompts=self.prompts,
                    strength=self.strength, batch=_BATCH, other_model=True,
                )  # fmt: skip
                held.append((some, scores))
                if time.monotonic() - written > _SECONDS:
                    self._write(held)
                    written = time.monotonic()
        finally:
            self._write(held)
        return self._said(len(left))

    def _write(self, held: list[tuple[list[int], np.ndarray]]) -> None:
        features = [f for some, _ in held for f in some]
        scores = [float(s) for _, found in held for s in found]
        held.clear()
        write_output_scores(self.store, self.address, self.run, features, scores)

    def _said(self, scored: int, reason: str | None = None) -> Scored:
        rows = self.store.features(self.address, ["max", "output_score"])
        scores = rows["output_score"].drop_null().to_numpy()
        return Scored(
            address=self.address, features=self.d_sae, scored=scored,
            before=len(scores) - scored, silent=int((rows["max"].to_numpy() <= 0).sum()),
            median=float(np.median(scores)) if len(scores) else None, reason=reason,
        )  # fmt: skip
