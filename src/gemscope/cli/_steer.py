"""`gemscope steer`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, print_json
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.lm import LanguageModel
    from gemscope.steering import Change, Steered


def steer_command(
    prompt: Annotated[str, typer.Argument(help="The text that the model goes on from.")],
    feature: Annotated[list[str] | None, typer.Option(metavar="ADDRESS/INDEX", help="A feature to edit. May be repeated.")] = None,
    vector: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A steering vector to edit with. May be repeated, after the features.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="add, set, set-if-active, floor, cap, multiply, ablate, offset-if-active, max-relative, ablate-direction, scale-direction, set-projection, norm-relative or replace; once, or once for each feature.")] = None,
    strength: Annotated[list[str] | None, typer.Option(help="A number, or a multiple: 0.5xmax, 0.1xnorm, 2xcurrent; once, or once for each feature.")] = None,
    positions: Annotated[str, typer.Option(help="all, prompt, generated, last or a span of the prompt such as 3:7; several joined by +.")] = "all",
    special: Annotated[bool, typer.Option("--special", help="Also at BOS and other special tokens.")] = False,
    first: Annotated[int | None, typer.Option(metavar="N", help="Of the generated tokens, only at the first N.")] = None,
    decay: Annotated[float, typer.Option(help="Share of the edit left from each generated token to the next.")] = 1.0,
    amount: Annotated[float, typer.Option(help="Share of the change that is made.")] = 1.0,
    keep_norm: Annotated[bool, typer.Option("--keep-norm", help="Rescale to the length that was there.")] = False,
    samples: Annotated[int, typer.Option(help="Continuations of each; with a temperature.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token; default: 0 for one sample, 1 for several.")] = None,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of both, without and with the edits.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn.")] = False,
    store: Annotated[Path | None, typer.Option(metavar="STORE", help="Catalog store that knows the features' maxima.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionary's own.")] = None,
    other_model: Annotated[bool, typer.Option("--other-model", help="Attach to a model it was not made for.")] = False,
    reads: Reads = None,
    writes: Writes = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Generate with edits of features, beside what the model says without."""
    from gemscope import steering
    from gemscope.features import Store
    from gemscope.lm import load_model

    if samples > 1 and temperature == 0:
        raise InputError(f"at a temperature of 0 all {samples} samples are the same; leave it out")
    where = steering.Positions.parse(positions, special=special)
    changes = changes_of(
        feature or [], vector or [], mode or ["add"], strength or [],
        store=None if store is None else Store.open(store), given=given(reads, writes, model),
        positions=where, schedule=steering.Schedule(first=first, decay=decay), amount=amount,
        keep_norm=keep_norm,
    )  # fmt: skip
    lm = load_model(model or steering.model_of(changes))
    stream = not json and samples == 1
    done = steering.steer(
        prompt, changes, model=lm, samples=samples, max_new_tokens=max_new_tokens,
        temperature=(0.0 if samples == 1 else 1.0) if temperature is None else temperature,
        top_p=top_p, seed=seed, chat=chat, other_model=other_model,
        heard=_streamed(lm) if stream else None,
    )  # fmt: skip
    if json:
        print_json(done.json())
    elif stream:
        print()
    else:
        _print(done)


def changes_of(
    features: Sequence[str],
    vectors: Sequence[Path],
    modes: Sequence[str],
    strengths: Sequence[str],
    **options: Any,
) -> "list[Change]":
    """The edits that a command was given: modes and strengths once, or once for each."""
    from gemscope import steering

    what: list[Any] = [*features, *(d for file in vectors for d in steering.load_vector(file))]
    if not what:
        raise InputError("nothing to steer with; give --feature ADDRESS/INDEX or --vector FILE")
    for name, many in (("--mode", modes), ("--strength", strengths)):
        if len(many) not in (0, 1, len(what)):
            raise InputError(
                f"{len(many)} times {name} for {len(what)} features and vectors; give it once, or "
                "once for each"
            )
    hows = [steering.Mode.parse(m) for m in (list(modes) * len(what) if len(modes) == 1 else modes)]
    # One strength is for the modes that take one; if none does, they say so themselves.
    takes = [bool(steering.UNITS[how]) for how in hows]
    once = [strengths[0] if t or not any(takes) else None for t in takes] if strengths else []
    spread = list(strengths) if len(strengths) > 1 else once or [None] * len(what)
    store, entry = options.pop("store"), options.pop("given")
    known: dict[str, Any] = {}
    out = []
    for one, how, much in zip(what, hows, spread, strict=True):
        if isinstance(one, str):
            out.append(
                steering.change_of(one, how, much, store=store, given=entry, known=known, **options)
            )
        else:
            force = None if much is None else steering.Strength.parse(much)
            out.append(steering.Change(what=one, mode=how, strength=force, **options))
    return out


def _streamed(lm: "LanguageModel") -> "Callable[[str, list[int | None]], None]":
    """Prints each token of the one sample as it comes, under a heading."""
    so_far: dict[str, list[int]] = {}
    told: dict[str, str] = {}

    def heard(what: str, tokens: list[int | None]) -> None:
        if what not in so_far:
            print(f"{'' if not so_far else chr(10) * 2}{_HEADINGS[what]}")
            so_far[what], told[what] = [], ""
        if tokens[0] is None:
            return
        so_far[what].append(tokens[0])
        text = lm.tokenizer.decode(so_far[what], skip_special_tokens=True)
        # A token may hold part of a character; it is shown when the rest has come.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text.removeprefix(told[what]), end="", flush=True)
            told[what] = text

    return heard


_HEADINGS = {"baseline": "--- without edits", "steered": "--- steered"}


def _print(done: "Steered") -> None:
    to = console()
    for number, pair in enumerate(zip(done.baseline, done.steered, strict=True), 1):
        to.print(f"[bold]Sample {number}[/bold]")
        for what, text in zip(_HEADINGS.values(), pair, strict=True):
            to.print(what, style="dim")
            to.print(text, markup=False, highlight=False)
        to.print()
