"""`gemscope explain`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, number, print_json, token_progress

if TYPE_CHECKING:
    from gemscope.explain import Asker, Chat, Estimate, ModelSettings, Outcome, Work
    from gemscope.features import Store

Progress = Callable[[str, int, int], None]

_SHOWN = 10
"""Explanations printed of each dictionary."""


def explain_command(
    store: Annotated[str, typer.Argument(help="Folder of a catalog store, which gemscope index made.")],
    addresses: Annotated[list[str] | None, typer.Argument(help="Dictionaries; default: all of the store.")] = None,
    by: Annotated[str, typer.Option("--by", metavar="rules|URL|transformers", help="Who explains: short rules, without a model; the base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; or a model of transformers in this process. Texts leave this machine only if a URL is given, and go there alone.")] = "rules",
    model: Annotated[str | None, typer.Option(help="The server's name of the model; of transformers: a name on the hub, or a local folder.")] = None,
    features: Annotated[str | None, typer.Option(help="Features, such as 0-99,200; default: all.")] = None,
    limit: Annotated[int | None, typer.Option(help="Features of each dictionary, at most.")] = None,
    noted: Annotated[bool, typer.Option("--all", help="Explain features too that a person has a note on; notes are never changed.")] = False,
    score: Annotated[str | None, typer.Option(metavar="NAMES", help="Scores: detection, fuzzing, contrast, or none; default: detection,fuzzing with a model; none with rules, which bring a score of their own.")] = None,
    score_only: Annotated[bool, typer.Option("--score-only", help="Make no explanations: score those that are there, imported ones too.")] = False,
    of: Annotated[str | None, typer.Option(help="With --score-only: those of this author or method (rule, model, imported).")] = None,
    null: Annotated[bool, typer.Option(help="Score another feature's explanation too, for comparison; twice the requests.")] = True,
    examples: Annotated[int, typer.Option(help="Windows shown to explain a feature.")] = 20,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 32,
    judged: Annotated[int, typer.Option(help="Windows of either answer that a score asks about.")] = 20,
    per_prompt: Annotated[int, typer.Option("--per-prompt", help="Windows in one request to judge.")] = 10,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of an answer; a model that thinks aloud needs thousands.")] = 400,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 120.0,
    key_env: Annotated[str | None, typer.Option("--key-env", metavar="NAME", help="Environment variable that holds the API key; default: OPENAI_API_KEY. The key is sent to the URL, and neither stored nor shown.")] = None,
    price_in: Annotated[float | None, typer.Option("--price-in", help="Price of a million input tokens, for the estimate.")] = None,
    price_out: Annotated[float | None, typer.Option("--price-out", help="Price of a million output tokens.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate, and ask nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the first request.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of documents, windows and nulls.")] = 0,
    device: Annotated[str | None, typer.Option(help="Of transformers: cpu or cuda; default: a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Say what features fire on, by rules or by a language model, and score what is said.

    Answers are kept in the store as they come: stopped in any way, the same command goes on.
    """
    from gemscope.explain import ModelSettings, choose
    from gemscope.features import Store

    settings = ModelSettings(
        examples=examples, window=window, judged=judged, per_prompt=per_prompt, seed=seed,
        max_tokens=max_tokens, scores=_scores(score, by, score_only), null=null,
    )  # fmt: skip
    opened = Store.open(store)
    works = choose(opened, addresses, parse_features(features), limit=limit, noted=noted,
                   scoring=score_only, of=of)  # fmt: skip
    if by == "rules":
        if model is not None or dry_run:
            raise InputError("--model and --dry-run are for a language model: name it with --by")
        _by_rules(opened, works, settings, json=json)
        return
    chat = _chat(by, model, key_env, concurrency, timeout, device)
    prices = None if price_in is price_out is None else (price_in or 0.0, price_out or 0.0)
    _by_model(opened, works, settings, chat, prices, yes=yes, dry_run=dry_run, json=json)


def _scores(text: str | None, by: str, score_only: bool) -> tuple[str, ...]:
    from gemscope.explain import check_scores

    if text is None and not score_only:
        return () if by == "rules" else ("detection", "fuzzing")
    names = [name.strip() for name in (text or "").split(",")]
    found = () if names == ["none"] else check_scores(n for n in names if n)
    if score_only and not found:
        raise InputError("--score-only needs --score, such as detection,contrast")
    return found


def parse_features(text: str | None) -> list[int] | None:
    """The features of `0-99,200`; None for all."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(e.isascii() and e.isdecimal() and len(e) < 9 for e in ends):
            raise InputError(f"no features {text!r}: give numbers and ranges, such as 0-99,200")
        first, last = int(ends[0]), int(ends[-1])
        if last < first:
            raise InputError(f"no features {part!r}: a range begins with the smaller number")
        found += range(first, last + 1)
    return found


def _chat(
    by: str,
    model: str | None,
    key_env: str | None,
    concurrency: int,
    timeout: float,
    device: str | None,
) -> "Chat":
    from gemscope.explain import InProcess, Served, key_from

    if not by.startswith(("http://", "https://", "transformers")):
        raise InputError(
            f"--by {by!r} is nobody who explains: give rules, transformers, or the base URL of a "
            "server, such as http://localhost:8000/v1"
        )
    if model is None:
        raise InputError(f"--by {by} needs --model NAME")
    if by == "transformers":
        return InProcess(model, device=device)
    if not 1 <= concurrency <= 256:
        raise InputError(f"concurrency is {concurrency}; take 1 to 256")
    if not 0.1 <= timeout <= 86_400:
        raise InputError(f"timeout is {timeout:g}; take 0.1 to 86400 seconds")
    key = key_from(by, key_env)
    return Served(by, model, key=key, concurrency=concurrency, timeout=timeout)


def _by_model(
    store: "Store",
    works: "list[Work]",
    settings: "ModelSettings",
    chat: "Chat",
    prices: tuple[float, float] | None,
    *,
    yes: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """Estimate, ask whether to go on, run, and tell what came of it."""
    from gemscope.explain import Asker, Replies, estimate_work, run_model

    asker = Asker(chat, Replies(store.folder / "replies", chat.at, chat.model))
    needs = estimate_work(store, works, asker, settings)
    if dry_run and json:
        print_json(needs.json(prices))
        return
    _print_estimate(needs, chat, prices, out=dry_run)
    if dry_run or not _agreed(yes or not needs.requests):
        return
    with _stoppable() as (stopped, progress):
        asker.stopping = stopped
        with progress() as report:
            outcomes = run_model(store, works, asker, settings, progress=report)
    asker.close()
    _print(outcomes, json=json, asker=asker, prices=prices)


def _agreed(yes: bool) -> bool:
    """Whether to begin; where nobody can be asked, the command line has said so."""
    if yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    # Not by typer's prompt, which writes to standard output too.
    print("Begin? [Y/n] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().lower() in ("\n", "y\n", "yes\n")


def _print_estimate(
    needs: "Estimate", chat: "Chat", prices: tuple[float, float] | None, *, out: bool
) -> None:
    to = console(stderr=not out)
    costs = f", {needs.price(*prices):,.2f} at these prices" if prices else ""
    kept = f"; {needs.kept:,} more are answered already" if needs.kept else ""
    to.print(
        f"About {needs.requests:,} requests to {chat.model} ({chat.at}): {needs.tokens_in:,} tokens "
        f"in, {needs.tokens_out:,} out if it answers briefly{costs}{kept}.",
        markup=False,
        soft_wrap=True,
    )


def _by_rules(
    store: "Store", works: "list[Work]", settings: "ModelSettings", *, json: bool
) -> None:
    from gemscope.explain import Stopped, run_rules

    with _stoppable() as (stopped, progress):

        def check() -> None:
            if stopped():
                raise Stopped

        with progress() as report:
            outcomes = run_rules(store, works, settings, check=check, progress=report)
    _print(outcomes, json=json)


@contextmanager
def _stoppable() -> Iterator[tuple[Callable[[], bool], Any]]:
    """Whether a signal came; when it ends a run, it is told how to go on."""
    from gemscope.activations import stop_signals
    from gemscope.explain import Stopped

    with stop_signals() as received:
        try:
            yield (lambda: bool(received)), lambda: token_progress(unit="")
        except Stopped:
            print(
                "gemscope: stopped; what was answered is kept: run the same command to go on",
                file=sys.stderr,
            )
            raise typer.Exit(128 + received[0]) from None


def _print(
    outcomes: "list[Outcome]",
    *,
    json: bool,
    asker: "Asker | None" = None,
    prices: tuple[float, float] | None = None,
) -> None:
    asked = {} if asker is None else asker.json(prices)
    if json:
        print_json({"dictionaries": [o.json() for o in outcomes], **asked})
        return
    to = console()
    for outcome in outcomes:
        to.print(f"\n{outcome.work.address}", style="bold", markup=False)
        for line in outcome.lines():
            to.print(f"  {line}", markup=False, soft_wrap=True)
        _print_scores(outcome)
        for one in sorted(outcome.explanations, key=lambda e: -(e.score or 0.0))[:_SHOWN]:
            to.print(f"  {one.feature:>6}  {number(one.score, 3):>5}  {_visible(one.text)}", markup=False,
                     soft_wrap=True)  # fmt: skip
    if asked:
        costs = f", {asked['price']:,.2f} at these prices" if prices else ""
        to.print(
            f"\n{asked['requests']:,} requests ({asked['kept']:,} more were answered already), "
            f"{asked['tokens_in']:,} tokens in, {asked['tokens_out']:,} out{costs}."
        )


def _visible(text: str) -> str:
    """A line of what others may have written, without codes that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]


def _print_scores(outcome: "Outcome") -> None:
    from rich.table import Table

    found = outcome.scores()
    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 2))
    for heading in ("score", "mean", "of another feature", "explanations", "unreadable answers"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name, row in found.items():
        table.add_row(
            name,
            number(row["mean"], 3),
            number(row["null"], 3),
            f"{row['explanations']:,}",
            f"{row['failures']:,}",
        )
    console().print(table)
