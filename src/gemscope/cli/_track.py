"""`gemscope track`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._relations import words
from ._show import console, percent, print_json

if TYPE_CHECKING:
    from gemscope.relate import Ablation, Chain, Step


def track_command(
    store: Annotated[Path, typer.Argument(help="A store of gemscope index --keep-activations.")],
    feature: Annotated[str | None, typer.Argument(metavar="[ADDRESS/FEATURE]", help="The feature to follow; without it, all of --stream.")] = None,
    stream: Annotated[str | None, typer.Option(help="Follow every feature of this stream, such as resid_post.")] = None,
    like: Annotated[str | None, typer.Option(metavar="ADDRESS", help="With --stream: the dictionaries like this one, where a layer has several.")] = None,
    cosine: Annotated[float, typer.Option(help="What is passed on keeps its direction to this cosine,", min=-1.0, max=1.0)] = 0.7,
    phi: Annotated[float, typer.Option(help="and its firing to this correlation.", min=-1.0, max=1.0)] = 0.5,
    loose_cosine: Annotated[float, typer.Option(help="What is transformed has this cosine with its predecessor,", min=-1.0, max=1.0)] = 0.5,
    loose_phi: Annotated[float, typer.Option(help="or this correlation.", min=-1.0, max=1.0)] = 0.3,
    least: Annotated[int, typer.Option(help="Tokens a feature must fire on to be followed.", min=1)] = 10,
    check: Annotated[bool, typer.Option("--check", help="Of one feature: ablate each predecessor in the model and measure its successor.")] = False,
    contexts: Annotated[int, typer.Option(help="With --check: contexts to run.", min=1)] = 12,
    device: Annotated[str | None, typer.Option(help="With --check: cpu or cuda; default: a GPU if there is one.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw what becomes of features from layer to layer: .svg, .png or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")] = False,
) -> None:  # fmt: skip
    """Follow features through the layers: born, passed on, transformed, vanished."""
    from gemscope import hub, relate
    from gemscope.features import Store

    _check(feature, stream, like, check, plot)
    if plot is not None:
        relate.check_figure(plot)
    if loose_cosine > cosine or loose_phi > phi:
        raise InputError("what is passed on must be more alike than what is transformed: take "
                         "--loose-cosine and --loose-phi below --cosine and --phi")  # fmt: skip
    limits = relate.Limits(
        cosine=cosine, phi=phi, loose_cosine=loose_cosine, loose_phi=loose_phi, least=least
    )
    opened = Store.open(store)
    if feature is None:
        steps = _all(opened, stream, like, limits)
        if plot is not None:
            relate.plot_track(steps, plot)
        if json:
            print_json([step.json() for step in steps])
            return
        _print_steps(steps)
        if plot is not None:
            console().print(f"The figure: {plot}")
        return
    address, number = hub.feature_of(feature)
    opened.check_feature(address, number)
    layers = relate.layers_of(opened, like=address)
    chain = relate.chain(opened, layers, address, number, limits)
    checks = None
    if check:
        from gemscope.lm import load_model

        lm = load_model(opened.dictionary(address)["loaded_model"], device=device)
        checks = relate.check_chain(opened, lm, chain, contexts=contexts)
    if json:
        said = {} if checks is None else {"check": [one.json() for one in checks]}
        print_json(chain.json() | said)
        return
    _print_chain(opened, chain, checks)


def _all(opened: Any, stream: str | None, like: str | None, limits: Any) -> "list[Step]":
    from gemscope import relate

    if like is not None and stream not in (None, opened.dictionary(like)["reads"].split(".")[-1]):
        raise InputError(f"{like} does not read {stream}; give one of --stream and --like")
    return relate.track(opened, relate.layers_of(opened, like=like, stream=stream), limits)


def _check(
    feature: str | None, stream: str | None, like: str | None, check: bool, plot: Path | None
) -> None:
    if feature is None and stream is None and like is None:
        raise InputError("nothing to follow: give ADDRESS/FEATURE, or --stream such as resid_post")
    if feature is not None and (stream is not None or like is not None or plot is not None):
        raise InputError("one feature is followed through the layers of its own dictionary: "
                         "--stream, --like and --plot are for all features")  # fmt: skip
    if feature is None and check:
        raise InputError("--check ablates the predecessors of one feature: give ADDRESS/FEATURE")


def _print_steps(steps: "list[Step]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layers")
    kinds = ("passed on", "transformed", "born", "vanished")
    for kind in (*kinds, "silent"):
        table.add_column(kind, justify="right")
    for step in steps:
        counts = [f"{step.counts[kind]:,}" for kind in kinds]
        table.add_row("{} to {}".format(*step.layers), *counts, f"{step.silent[1]:,}")
    out = console()
    for address in (steps[0].before, *(step.after for step in steps)):
        out.print(address, markup=False)
    out.print()
    out.print(table)
    out.print(
        "\nPassed on, transformed and born are features of the later layer, vanished of the "
        "earlier; silent ones fire too seldom in the later to be followed."
    )


def _print_chain(store: Any, chain: "Chain", checks: "list[Ablation] | None") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in ("layer", "feature", "density"):
        table.add_column(head, justify="right")
    table.add_column("from the last layer", no_wrap=True)
    for head in ("cosine", "phi", "P(it|last)", "P(last|it)"):
        table.add_column(head, justify="right", no_wrap=True)
    if checks is not None:
        table.add_column("drop (control)", justify="right", min_width=14)
    table.add_column("fires on", no_wrap=True, overflow="ellipsis")
    for place, stage in enumerate(chain.stages):
        link, cells = stage.link, [""] * 5
        if link is None:
            cells[0] = "born here" if chain.born is not None else ""
        else:
            said = link.json()
            of = f" ({link.change})" if link.change else ""
            cells = [
                f"{link.kind}{of}", f"{link.cosine:.2f}", f"{link.phi:.2f}",
                percent(said["after_given_before"]["value"]),
                percent(said["before_given_after"]["value"]),
            ]  # fmt: skip
        if checks is not None:
            one = checks[place - 1] if place else None
            cells.append("" if one is None else f"{one.drop:.0%} ({one.control_drop:.0%})")
        mark = "*" if place == chain.start else ""
        tokens = Text(words(store, stage.address)[stage.feature])
        table.add_row(
            f"{mark}{stage.layer}", str(stage.feature), percent(stage.density), *cells, tokens
        )
    console().print(table)
    end = "" if chain.vanished is None else f"It has no successor after layer {chain.vanished}. "
    console().print(f"\n{end}* marks the feature asked for.")
    if checks:
        console().print(
            "Drop: by how much its pre-activation falls when the feature before is taken out of "
            "the stream; control: when another feature is that fires on the same tokens."
        )
