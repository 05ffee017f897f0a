"""`gemscope cluster`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemscope.errors import InputError

from ._show import console, number, print_json

if TYPE_CHECKING:
    from gemscope.relate import Clustering


def cluster_command(
    store: Annotated[Path, typer.Argument(help="A store of gemscope index --keep-activations.")],
    address: Annotated[str, typer.Argument(help="A dictionary of the store.")],
    on: Annotated[Literal["together", "directions"], typer.Option(help="What makes features alike: firing together (phi), or the directions of their decoder rows (cosine).")] = "together",
    clusters: Annotated[int | None, typer.Option(help="Cut the tree into so many clusters.")] = None,
    distance: Annotated[float | None, typer.Option(help="Cut the tree at this distance, 0 to 1: one less the mean similarity of two groups; default: 0.9.")] = None,
    top: Annotated[int, typer.Option(help="Clusters shown.", min=1)] = 20,
    places: Annotated[bool, typer.Option("--map", help="With --json: places of the features on a map.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the map: .svg, .png or .pdf.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the map.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Group features in a tree, name the groups by their tokens, draw a map of them."""
    from gemscope import relate
    from gemscope.features import Store

    if clusters is not None and distance is not None:
        raise InputError("both --clusters and --distance say where to cut the tree; give one")
    if places and not json:
        raise InputError("--map adds to what --json prints; give --json with it, or --plot FILE")
    if plot is not None:
        relate.check_figure(plot)
    opened = Store.open(store)
    made, like = relate.cluster(opened, address, on, clusters=clusters, distance=distance)
    where = relate.layout(like, seed=seed) if places or plot is not None else None
    if plot is not None and where is not None:
        relate.plot_map(made, where, plot)
    if json:
        drawn = {} if where is None else {"map": relate.map_json(made, where)}
        print_json(made.json() | drawn)
        return
    _print(made, top)
    if plot is not None:
        console().print(f"The map: {plot}")


def _print(made: "Clustering", top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    how = "firing together" if made.on == "together" else "decoder directions"
    alone = sum(len(one.members) == 1 for one in made.clusters)
    out.print(
        f"{made.address}: {len(made.leaves):,} features by {how}, cut at a distance of "
        f"{number(made.distance, 3)}: {len(made.clusters) - alone:,} clusters, and {alone:,} "
        f"features alone. {made.silent:,} never fire and are left out.\n",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("cluster", "size", "cohesion"):
        table.add_column(head, justify="right")
    table.add_column("tokens")
    table.add_column("features, the most typical first", no_wrap=True, overflow="ellipsis")
    for one in made.clusters[:top]:
        members = " ".join(map(str, one.members[:12]))
        table.add_row(str(one.number), f"{len(one.members):,}", f"{one.cohesion:.2f}",
                      Text(" ".join(one.tokens)), members)  # fmt: skip
    out.print(table)
    if len(made.clusters) > top:
        out.print(f"\n{len(made.clusters) - top:,} more: --top, or --json")
