"""`gemscope relations`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, percent, print_json

if TYPE_CHECKING:
    from gemscope.relate import LadderStep, Relation


def relations_command(
    store: Annotated[Path, typer.Argument(help="A store of gemscope index --keep-activations.")],
    addresses: Annotated[list[str], typer.Argument(help="A dictionary of the store; or several of one site and growing width: what splits and what is absorbed.")],
    feature: Annotated[int | None, typer.Option(help="Of this feature alone.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of this type alone: parent, child, sibling, duplicate, opposite.")] = None,
    top: Annotated[int, typer.Option(help="Relations shown.", min=1)] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Relations of features, with their evidence: parents, duplicates, splitting, absorption."""
    from gemscope import relate
    from gemscope.features import Store

    opened = Store.open(store)
    for address in addresses:
        opened.dictionary(address)
    if feature is not None:
        opened.check_feature(addresses[0], feature)
    if len(addresses) > 1 and kind is not None:
        raise InputError("--kind is of the relations within one dictionary; give one address")
    if kind is not None and kind not in (known := [k for k in relate.KINDS if k != "splits into"]):
        raise InputError(f"no kind {kind!r}: the kinds are {', '.join(known)}")
    if len(addresses) > 1:
        _ladder(opened, addresses, feature, json)
        return
    one = relate.from_store(opened, addresses[0])
    found = relate.relations(one, feature=feature)
    if kind is not None:
        found = [r for r in found if r.kind == kind]
    if json:
        print_json([r.json() for r in found])
        return
    _print(opened, found, top)


def _ladder(store: Any, addresses: list[str], feature: int | None, json: bool) -> None:
    from itertools import pairwise

    from gemscope import relate

    rungs = [relate.from_store(store, address) for address in dict.fromkeys(addresses)]
    steps = relate.ladder(rungs)
    rungs.sort(key=lambda one: one.d_sae)
    split = [r for a, b in pairwise(rungs) for r in relate.splits(a, b)]
    if feature is not None:
        split = [r for r in split if r.dictionary == addresses[0] and r.feature == feature]
    if json:
        print_json({"steps": [s.json() for s in steps], "splits": [r.json() for r in split]})
        return
    _print_ladder(steps)


def _print(store: Any, found: "list[Relation]", top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    if not found:
        out.print("no relation of these kinds was found")
        return
    kinds = [r.kind for r in found]
    counts = ", ".join(f"{kinds.count(k):,} {k}" for k in dict.fromkeys(kinds))
    out.print(f"{found[0].dictionary}: {counts}\n", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    fires_on = words(store, found[0].dictionary)
    table.add_column("feature", justify="right")
    table.add_column("is")
    for head in ("of", "together", "P(of | it)", "P(it | of)", "cosine"):
        table.add_column(head, justify="right")
    table.add_column("it fires on", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("the other fires on", no_wrap=True, overflow="ellipsis", max_width=24)
    for r in found[:top]:
        e = r.evidence
        table.add_row(
            str(r.feature), r.kind, str(r.other), f"{e['together']:,}",
            percent(e["other_given_feature"]["value"]), percent(e["feature_given_other"]["value"]),
            f"{e['cosine']:+.2f}", Text(fires_on[r.feature]), Text(fires_on[r.other]),
        )  # fmt: skip
    out.print(table)
    if len(found) > top:
        out.print(f"\n{len(found) - top:,} more: --top, --feature, --kind, or --json")


def _print_ladder(steps: "list[LadderStep]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("to")
    for head in ("features", "kept", "split", "lost", "absorbed in part", "tokens absorbed"):
        table.add_column(head, justify="right")
    out = console()
    out.print(f"from {steps[0].narrow}", markup=False)
    for s in steps:
        table.add_row(
            s.wide, f"{s.features:,}", percent(s.kept / max(s.features, 1)),
            percent(s.split / max(s.features, 1)), percent(s.lost / max(s.features, 1)),
            f"{len(s.absorbed):,}", percent(s.rate),
        )  # fmt: skip
    out.print(table)
    for s in steps:
        if s.absorbed:
            out.print(f"\nAbsorbed most in {s.wide}:", markup=False)
        for one in s.absorbed[:3]:
            children = ", ".join(str(c["feature"]) for c in one.children[:4])
            out.print(
                f"  {one.feature}: its counterpart {one.counterpart} is silent on "
                f"{percent(one.rate)} of its tokens, where {children} fire"
            )


def words(store: Any, address: str) -> list[str]:
    """A few tokens of each feature, those it fires on more than other features do."""
    from gemscope import relate

    rows = store.features(address, ["tokens"])["tokens"].to_pylist()
    return [" ".join(found[:4]) for found in relate.characteristic_tokens(rows)]
