"""`gemscope heads`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, number, percent, print_json
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.circuits import Attended, Direct, EdgePath
    from gemscope.lm import LanguageModel


def heads_command(
    prompt: Annotated[str | None, typer.Argument(help="The text that is read; with --graph, the graph's own.")] = None,
    feature: Annotated[str | None, typer.Option(metavar="ADDRESS/INDEX", help="A feature of attention (attn_heads or attn_out): what each head adds to it from each token.")] = None,
    at: Annotated[int | None, typer.Option(help="Position of the feature; default: the last token. BOS is 0.")] = None,
    head: Annotated[str | None, typer.Option(metavar="LAYER/HEAD", help="A head: why it attends from --query to --key.")] = None,
    query: Annotated[int | None, typer.Option(help="Position that attends; default: the last token.")] = None,
    key: Annotated[int | None, typer.Option(help="Position that is attended to.")] = None,
    dictionaries: Annotated[list[str] | None, typer.Option("--with", metavar="SET", help="Transcoders, as of gemscope trace, or one dictionary of the stream before the layer. May be repeated.")] = None,
    graph: Annotated[Path | None, typer.Option(metavar="FILE", help="A graph of gemscope trace: which heads carry --edge.")] = None,
    edge: Annotated[tuple[str, str] | None, typer.Option(metavar="SOURCE TARGET", help="Two ids of nodes of the graph.")] = None,
    top: Annotated[int, typer.Option(help="How many rows are shown.", min=1)] = 20,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the model's chat template.")] = False,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionaries' own.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Tell what attention does: heads that carry an edge, feed a feature, or why one attends."""
    from gemscope import circuits, hub

    _check(
        prompt,
        {"--feature": {"--at": at},
         "--head": {"--query": query, "--key": key, "--with": dictionaries},
         "--graph": {"--edge": edge}},
        {"--feature": feature, "--head": head, "--graph": graph},
        chat=chat,
    )  # fmt: skip

    def load(address: str) -> Any:
        return hub.build(hub.obtain(hub.locate(address, given(reads, writes, model))))

    if feature is not None:
        lm = _model([hub.feature_of(feature)[0]], model, device, dtype)
        direct = circuits.direct_attribution(
            lm, prompt or "", feature, position=-1 if at is None else at, chat=chat, load=load
        )
        print_json(direct.json()) if json else _print_direct(direct, top)
    elif head is not None:
        place = _head(head)
        lm = _model(circuits.transcoder_set(dictionaries or ()), model, device, dtype)
        found = circuits.attribute_attention(
            lm, prompt or "", *place, query=-1 if query is None else query, key=key or 0,
            dictionaries=dictionaries or (), top=top, chat=chat, load=load,
        )  # fmt: skip
        print_json(found.json()) if json else _print_attended(found)
    else:
        assert graph is not None
        assert edge is not None
        whole = circuits.load_graph_file(graph)
        lm = _model(list(whole.dictionaries), model, device, dtype)
        path = circuits.explain_edge(whole, lm, *edge, load=load)
        print_json(path.json()) if json else _print_path(path)


def _check(
    prompt: str | None, own: dict[str, dict[str, Any]], asked: dict[str, Any], *, chat: bool
) -> None:
    chosen = [name for name, value in asked.items() if value is not None]
    if len(chosen) != 1:
        raise InputError(
            f"{' and '.join(chosen) or 'nothing'} to be explained: give one of --feature, --head "
            "(with --key and --with) and --graph (with --edge)"
        )
    (mine,) = chosen
    for name, options in own.items():
        extra = [option for option, value in options.items() if value is not None]
        if name != mine and extra:
            raise InputError(f"{', '.join(extra)} is for {name}; it does not apply to {mine}")
    needed = {"--head": ("--key", "--with"), "--graph": ("--edge",)}.get(mine, ())
    if missing := [option for option in needed if not own[mine][option] and own[mine][option] != 0]:
        raise InputError(f"{mine} needs {' and '.join(missing)}")
    if mine == "--graph" and (prompt is not None or chat):
        raise InputError("a graph has its own prompt; leave out the prompt and --chat")
    if mine != "--graph" and not prompt:
        raise InputError(f"{mine} is about a prompt; give one")


def _head(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if match is None:
        raise InputError(f"{text!r} names no head; write LAYER/HEAD, such as 3/0")
    return int(match[1]), int(match[2])


def _model(
    addresses: list[str], model: str | None, device: str | None, dtype: str | None
) -> "LanguageModel":
    from gemscope import hub
    from gemscope.lm import load_model

    if model is None:
        found = sorted({hub.locate(address).model for address in addresses})
        if len(found) != 1:
            raise InputError(
                f"these dictionaries belong to {' and '.join(found)}: name a model with --model"
            )
        (model,) = found
    return load_model(model, device=device, dtype=dtype)


def _table(*columns: str) -> Any:
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    return out


def _print_direct(found: "Direct", top: int) -> None:
    from rich.text import Text

    out, shown = console(), found.prompt.shown
    line = (f"{found.name} at position {found.position} ({shown(found.position)}): "
            f"pre-activation {number(found.value)}, of which biases {number(found.bias)}\n")  # fmt: skip
    out.print(line, markup=False, soft_wrap=True)
    by_head = _table("head", "adds", "most from")
    for head, row in enumerate(found.parts):
        best = int(row.abs().argmax())
        told = Text(f"{best} {shown(best)}  {row[best].item():+.4g}")
        by_head.add_row(f"{found.layer}/{head}", f"{row.sum().item():+.4g}", told)
    out.print(by_head)
    tokens = found.parts.sum(0)
    by_token = _table("token", "adds")
    for place in tokens.abs().argsort(descending=True)[:top].tolist():
        by_token.add_row(Text(f"{place} {shown(place)}"), f"{tokens[place].item():+.4g}")
    out.print()
    out.print(by_token)


def _print_attended(found: "Attended") -> None:
    from rich.text import Text

    out, shown = console(), found.prompt.shown
    line = (f"Head {found.layer}/{found.head} from position {found.query} ({shown(found.query)}) "
            f"to {found.key} ({shown(found.key)}): score {number(found.score)}, "
            f"{percent(found.pattern)} of its attention\n")  # fmt: skip
    out.print(line, markup=False, soft_wrap=True)
    table = _table("adds", "query", "key")
    for column in table.columns[1:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for q, k, value in found.pairs:
        ends = (found.parts[q], found.parts[k])
        table.add_row(f"{value:+.4g}", *(Text(part.label) for part in ends))
    out.print(table)
    rest = found.summed - sum(value for *_, value in found.pairs)
    out.print(f"\nAll other pairs together: {rest:+.4g}")


def _print_path(found: "EdgePath") -> None:
    out = console()
    out.print(f"{found.source} adds {found.weight:+.4g} to {found.target}\n", markup=False,
              soft_wrap=True)  # fmt: skip
    written = any(one.later for one in found.layers)
    skips = any(one.skip is not None for one in found.layers)
    heads = [f"head {i}" for i in range(len(found.layers[0].heads))] if found.layers else []
    table = _table("layer", *heads, "bypass", *(["written later"] if written else []),
                   *(["then by skip"] if skips else []))  # fmt: skip
    for one in found.layers:
        cells = [*one.heads, one.bypass, *([one.later] if written else [])]
        skip = [number(one.skip)] if skips else []
        table.add_row(str(one.layer), *(f"{x:+.4g}" for x in cells), *skip)
    out.print(table)
