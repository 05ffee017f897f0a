"""A whole run over a store: which features, by whom, and what came of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemscope.errors import InputError
from gemscope.features import Explanation, Store

from ._asking import Asker
from ._conditions import Conditions
from ._judges import ModelJudge, RuleJudge
from ._learn import RuleSettings
from ._model import Labelled, ModelSettings, Progress, label_features
from ._rules_explain import RuleText, explain_by_rules
from ._rules_report import rule_summary
from ._scoring import Estimate, Scored, estimate, merged, score_explanations

_WRITE_EVERY = 256


@dataclass(frozen=True, slots=True)
class Work:
    """What to do for one dictionary."""

    address: str
    features: list[int]
    """To be explained."""
    noted: list[int] = field(default_factory=list)
    """Left out, as a person has said what they are."""
    explanations: list[Explanation] | None = None
    """To be scored and nothing else."""


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    work: Work
    labelled: Labelled
    scored: Scored

    @property
    def explanations(self) -> list[Explanation]:
        """Those that were made or scored."""
        return self.scored.explanations or self.labelled.explanations

    def scores(self) -> dict[str, dict[str, Any]]:
        """Of each score the mean over features, of its null too, and what could not be read."""
        found: dict[str, dict[str, Any]] = {}
        names = dict.fromkeys(s.name for e in self.explanations for s in e.scores)
        for name in names:
            some = [s for e in self.explanations for s in e.scores if s.name == name]
            nulls = [s.null for s in some if s.null is not None]
            found[name] = {
                "mean": float(np.mean([s.value for s in some])),
                "null": float(np.mean(nulls)) if nulls else None,
                "explanations": len(some),
                "judged": sum(s.n for s in some),
                "failures": sum(s.failures for s in some),
            }
        return found

    def rules(self) -> dict[str, Any] | None:
        """How good the rules are, if rules were learned."""
        if not any(e.method == "rule" for e in self.labelled.explanations):
            return None
        return rule_summary(self.labelled.explanations, features=len(self.work.features))

    def lines(self) -> list[str]:
        """What there is to say in words."""
        made, out = len(self.explanations), []
        what = "scored" if self.work.explanations is not None else "explained"
        out.append(f"{made:,} {'explanation' if what == 'scored' else 'feature'}(s) {what}")
        if (rules := self.rules()) is not None and rules["scored"]:
            above, null = rules["above"], rules["above_null"]
            by_chance = (
                ""
                if null["0.8"] is None
                else (f" (of another feature's rules {null['0.8']:.0%} and {null['0.9']:.0%})")
            )
            out.append(f"on documents they were not learned on {above['0.8']:.0%} have a balanced "
                       f"accuracy above 0.8, {above['0.9']:.0%} above 0.9{by_chance}")  # fmt: skip
        if self.work.noted:
            out.append(f"{len(self.work.noted):,} left out, as a person has a note on them (--all)")
        if self.labelled.silent:
            out.append(f"{len(self.labelled.silent):,} never fire on this text, or have no rule")
        if self.labelled.unusable:
            last = list(self.labelled.unusable.values())[-1]
            count = len(self.labelled.unusable)
            out.append(f"{count:,} without a usable answer (the last: {last})")
        for name in dict.fromkeys(name for _, name in self.scored.unscored):
            why = [w for (_, n), w in self.scored.unscored.items() if n == name]
            out.append(f"{len(why):,} without {name}: {', or '.join(dict.fromkeys(why))}")
        return out

    def json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "address": self.work.address,
            "explanations": [e.json() for e in self.explanations],
            "scores": self.scores(),
            "rules": self.rules(),
            "noted": self.work.noted,
            "silent": self.labelled.silent,
            "unusable": {str(f): problem for f, problem in self.labelled.unusable.items()},
            "unscored": [
                {"feature": feature, "score": name, "why": why}
                for (feature, name), why in self.scored.unscored.items()
            ],
        }


def choose(
    store: Store,
    addresses: Sequence[str] | None,
    features: Sequence[int] | None,
    *,
    limit: int | None = None,
    noted: bool = False,
    scoring: bool = False,
    of: str | None = None,
) -> list[Work]:
    """The work of each dictionary: all of the store and all features unless some are named.

    Features with a note of a person are left out unless `noted`. With `scoring`, it is the
    explanations that are there, of the method or author `of` alone if one is given.
    """
    wanted = list(dict.fromkeys(addresses or [d["address"] for d in store.dictionaries()]))
    if not wanted:
        raise InputError(f"{store.folder} holds no dictionary; gemscope index ADDRESS adds one")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; take 1 or more")
    out = []
    for address in wanted:
        d_sae = int(store.dictionary(address)["d_sae"])
        if features is not None and (far := max(features, default=0)) >= d_sae:
            raise InputError(f"no feature {far}: {address} has 0 to {d_sae - 1}")
        chosen = list(range(d_sae)) if features is None else sorted(set(features))
        if scoring:
            out.append(_to_score(store, address, chosen, limit, of))
            continue
        said = {n.feature for n in store.notes(address)} if not noted else set()
        free = [f for f in chosen if f not in said]
        out.append(Work(address, free[:limit], [f for f in chosen if f in said]))
    if scoring and not any(work.explanations for work in out):
        whose = f" by {of}" if of is not None else ""
        raise InputError(
            f"there are no explanations{whose} of these features to score; gemscope explain "
            "makes some, gemscope import brings others'"
        )
    return out


def _to_score(
    store: Store, address: str, features: list[int], limit: int | None, of: str | None
) -> Work:
    allowed = set(features)
    found = [
        e
        for e in store.explanations(address)
        if e.feature in allowed and of in (None, e.method, e.author)
    ]
    kept = set(sorted({e.feature for e in found})[:limit])
    return Work(address, [], explanations=[e for e in found if e.feature in kept])


def estimate_work(
    store: Store, works: Sequence[Work], asker: Asker, settings: ModelSettings
) -> Estimate:
    """What all of it will ask, about."""
    total = Estimate()
    for work in works:
        todo = work.features if work.explanations is None else work.explanations
        total += estimate(store, work.address, todo, asker, settings)
    return total


def run_model(
    store: Store,
    works: Sequence[Work],
    asker: Asker,
    settings: ModelSettings,
    *,
    progress: Progress = lambda *_: None,
) -> list[Outcome]:
    """Label with a language model and have it judge, or have it judge what is there."""
    judge = ModelJudge(asker, per_prompt=settings.per_prompt, max_tokens=settings.max_tokens)
    out = []
    for work in works:
        if work.explanations is None:
            labelled = label_features(
                store, work.address, work.features, asker, settings, progress=progress
            )
            explanations = labelled.explanations
        else:
            labelled, explanations = Labelled(), work.explanations
        scored = Scored()
        if settings.scores and explanations:
            scored = score_explanations(
                store, work.address, explanations, judge, settings,
                each=asker.each, progress=progress,
            )  # fmt: skip
        out.append(Outcome(work, labelled, scored))
    _check_use(out, asker)
    return out


def _check_use(outcomes: Sequence[Outcome], asker: Asker) -> None:
    """Refuse to call it a success where nothing that the model said could be used."""
    unusable = [problem for o in outcomes for problem in o.labelled.unusable.values()]
    if unusable and not any(o.labelled.explanations for o in outcomes):
        raise InputError(
            f"{asker.chat.model} gave no usable label for any of {len(unusable)} feature(s) (the "
            f"last answer: {unusable[-1]}); take another model or more --max-tokens; its answers "
            f"are in {asker.replies.file}"
        )
    made = [s for o in outcomes for e in o.scored.explanations for s in e.scores]
    judged = [s for s in made if s.detail.get("judge") == asker.chat.model]
    if judged and all(s.failures == s.n for s in judged):
        raise InputError(
            f"{asker.chat.model} answered none of {len(judged)} score(s) with a list that can be "
            "read, so they count as wrong; take another model or more --max-tokens; its answers "
            f"are in {asker.replies.file}"
        )


def run_rules(
    store: Store,
    works: Sequence[Work],
    settings: ModelSettings,
    *,
    check: Callable[[], None] = lambda: None,
    progress: Progress = lambda *_: None,
) -> list[Outcome]:
    """Learn rules, or take those that are there, and score them by applying them to windows.

    `check` is called again and again, and raises when the run is to end; what is learned is kept.
    """
    out = []
    ready: dict[str, RuleText] = {}
    for work in works:
        if work.explanations is None:
            labelled = _learned(store, work, settings, ready, check, progress)
            rules = labelled.explanations
        else:
            rules = [e for e in work.explanations if e.method == "rule"]
            labelled, work = Labelled(), replace(work, explanations=rules)
        scored = Scored()
        if settings.scores and rules:
            scored = _scored_by_rule(store, work.address, rules, settings, check, progress)
        out.append(Outcome(work, labelled, scored))
    if all(o.work.explanations == [] for o in out):
        raise InputError(
            "there are no rules of these features to score; gemscope explain makes them, and a "
            "model judges other explanations (--by URL --model NAME)"
        )
    return out


def _scored_by_rule(
    store: Store,
    address: str,
    rules: Sequence[Explanation],
    settings: ModelSettings,
    check: Callable[[], None],
    progress: Progress,
) -> Scored:
    judge = RuleJudge(Conditions.of(store.text(address), store.tokenizer(address)))

    def each(jobs: Iterator[Callable[[], Explanation]]) -> Iterator[Explanation]:
        for job in jobs:
            check()
            yield job()

    return score_explanations(store, address, rules, judge, settings, each=each, progress=progress)


def _learned(
    store: Store,
    work: Work,
    settings: ModelSettings,
    ready: dict[str, RuleText],
    check: Callable[[], None],
    progress: Progress,
) -> Labelled:
    activations = store.activations(work.address)
    if activations is None:
        raise InputError(
            f"{work.address} was indexed without keeping its activations, from which rules are "
            "learned: run the gemscope index command that made it again, with --keep-activations, "
            "and then this"
        )
    text, tokenizer = activations.text, store.tokenizer(work.address)
    # Reading a text takes a while: once for all dictionaries that were indexed on it.
    if text.key not in ready:
        sought = RuleSettings(seed=settings.seed)
        ready[text.key] = RuleText.of(text, tokenizer, sought, progress=progress)
    waiting, out = [], Labelled()
    before = {e.key: e.scores for e in store.explanations(work.address)}
    try:
        for made in explain_by_rules(
            text, activations, work.address, tokenizer=tokenizer, features=work.features,
            prepared=ready[text.key], progress=progress,
        ):  # fmt: skip
            check()
            made = replace(made, scores=merged(made.scores, before.get(made.key, ()), made.scores))
            waiting.append(made)
            out.explanations.append(made)
            if len(waiting) >= _WRITE_EVERY:
                store.add_explanations(waiting)
                waiting = []
    finally:
        store.add_explanations(waiting)
    out.silent = sorted(set(work.features) - {e.feature for e in out.explanations})
    return out
