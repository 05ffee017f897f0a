"""`gemscope search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, number, percent, print_json

if TYPE_CHECKING:
    from gemscope.features import Found, Store


def search_command(
    store: Annotated[Path, typer.Argument(help="Folder of the catalog store.")],
    query: Annotated[str | None, typer.Argument(help="Words in explanations, notes, and tokens that features fire on or promote.")] = None,
    text: Annotated[str | None, typer.Option(help="Features that fire on this text; runs the model.")] = None,
    promotes: Annotated[str | None, typer.Option(metavar="TOKEN", help="Features that raise this token's logit most.")] = None,
    like: Annotated[str | None, typer.Option(metavar="ADDRESS/INDEX", help="Features whose decoder direction is nearest to this one's.")] = None,
    where: Annotated[str | None, typer.Option(metavar="CONDITION", help="Only features whose statistics satisfy this, such as 'density < 0.01 AND max > 5'.")] = None,
    dictionary: Annotated[list[str] | None, typer.Option("--in", metavar="ADDRESS", help="Only features of this dictionary. May be repeated.")] = None,
    limit: Annotated[int, typer.Option(help="Features shown.")] = 20,
    max_density: Annotated[float, typer.Option(help="With --text: hide features that fire on more than this share of tokens.")] = 0.01,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list, best first, and nothing else.")] = False,
) -> None:  # fmt: skip
    """Find features: by words, by text, by promoted token, by direction, by statistics."""
    from gemscope import features, hub

    kinds = [n for n, v in (("QUERY", query), ("--text", text), ("--promotes", promotes),
                            ("--like", like)) if v is not None]  # fmt: skip
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(kinds)} were given; give one, with --where and --in")
    if not kinds and where is None:
        raise InputError("nothing to look for: give a QUERY, --text, --promotes, --like or --where")
    opened = features.Store.open(store)
    among = features.Among(addresses=tuple(dictionary or ()), where=where, limit=limit)
    if text is not None:
        found, score = _live(opened, text, among, max_density), "share of max"
    elif promotes is not None:
        found, score = features.search_promotes(opened, promotes, among), "logit, in s.d."
    elif like is not None:
        found, score = features.search_like(opened, *hub.feature_of(like), among), "cosine"
    elif query is not None:
        found, score = features.search(opened, query, among), "match"
    else:
        found, score = features.search_where(opened, among), "density"
    if json:
        print_json([f.json() for f in found])
    elif not found and query is not None and not any(c.isalnum() for c in query):
        console().print(f"No feature matches: signs are no words. Try --promotes {query!r}.")
    else:
        _print(found, score)


def _live(store: "Store", text: str, among: Any, max_density: float) -> "list[Found]":
    from gemscope import features, hub
    from gemscope.lm import load_model

    rows = [
        d for d in store.dictionaries() if not among.addresses or d["address"] in among.addresses
    ]
    for address in among.addresses:
        store.dictionary(address)
    models = sorted({d["loaded_model"] for d in rows})
    if len(models) != 1:
        raise InputError(f"these dictionaries belong to {len(models)} models; choose with --in")
    model = load_model(models[0])
    saes = [(d["address"], hub.load_sae(d["address"]).to(model.device)) for d in rows]
    return features.search_text(store, model, saes, text, among, max_density=max_density)


def _print(found: "list[Found]", score: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from gemscope.features import marked

    if not found:
        console().print("No feature matches.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("feature", overflow="fold")
    for heading in dict.fromkeys((score, "density", "max")):
        table.add_column(heading, justify="right", no_wrap=True)
    extra = next((n for n in ("token", "promotes") if n in found[0].matched), None)
    if extra:
        table.add_column({"token": "at", "promotes": "token"}[extra])
    table.add_column("score and explanation")
    # What a feature is called gets the room that is left: a line for each feature.
    taken = max(len(f"{f.address}/{f.feature}") for f in found) + 10 * len(table.columns) - 10
    room = max(24, console().width - taken)
    for f in found:
        said = Text(
            f"({f.explanation_score:.2f}) " if f.explanation_score is not None else "", "dim"
        )
        said.append(f.explanation or "", style="default")
        said.truncate(room, overflow="ellipsis")
        at = [Text(marked(f.matched[extra]))] if extra else []
        figures = [percent(f.density), number(f.max, 3)]
        if score != "density":
            figures.insert(0, number(f.score, 3))
        table.add_row(f"{f.address}/{f.feature}", *figures, *at, said)
    console().print(table)
