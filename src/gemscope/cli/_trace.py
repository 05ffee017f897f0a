"""`gemscope trace`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gemscope.errors import InputError

from ._show import console, print_json, token_progress
from ._sites import Reads, Writes, given


def trace_command(
    prompt: Annotated[str, typer.Argument(help="The text whose continuation is explained.")],
    dictionaries: Annotated[list[str], typer.Option("--with", metavar="RELEASE_OR_ADDRESS", help="Transcoders, one for each layer, or a cross-layer one: addresses, or what several begin with, such as miniature/transcoder_all. May be repeated.")],
    target: Annotated[list[str] | None, typer.Option("--target", metavar="TARGET", help="logit:TOKEN, difference:TOKEN:TOKEN, feature:ADDRESS/INDEX (@POSITION), or vector:FILE. May be repeated; default: the likeliest next tokens.")] = None,
    nodes: Annotated[float, typer.Option(help="Share of the influence that the nodes shown carry.")] = 0.8,
    edges: Annotated[float, typer.Option(help="The same of edges.")] = 0.98,
    max_features: Annotated[int, typer.Option(help="Features traced at most: those that matter most.")] = 7_500,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the model's chat template.")] = False,
    check: Annotated[int | None, typer.Option(metavar="N", help="Perturb the N strongest edges and nodes in the model, and compare.", min=1)] = None,
    stability: Annotated[Path | None, typer.Option(metavar="FILE", help="Other prompts, one a line: how often each node and edge returns.")] = None,
    store: Annotated[list[Path] | None, typer.Option(metavar="STORE", help="Catalog store with what features are called. May be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the graph: .safetensors, or .json as circuit-tracer and Neuronpedia read it.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the transcoders' own.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device. Books close best in float32.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Explain what a model says next: the graph of features that lead to it, its books closed."""
    from gemscope import circuits, hub
    from gemscope.features import Store

    from ._graph import print_graph

    if out is not None:
        circuits.check_graph_file(out)
    stores = [Store.open(one) for one in store or ()]
    others = None if stability is None else _lines(stability)

    def load(address: str) -> Any:
        return hub.build(hub.obtain(hub.locate(address, given(reads, writes, model))))

    lm = _model(dictionaries, model, device, dtype)
    units = {"features traced": "features", "checks": "runs", "prompts": "prompts"}
    with token_progress(units) as progress:
        graph = circuits.trace(
            prompt, dictionaries, model=lm, targets=target or (), node_threshold=nodes,
            edge_threshold=edges, max_features=max_features, chat=chat, load=load,
            progress=progress, planned=_say,
        )  # fmt: skip
        if check is not None:
            graph = circuits.check(graph, lm, check, load=load, progress=progress)
        if others is not None:
            graph = circuits.stability(graph, lm, others, load=load, progress=progress)
    graph = circuits.labelled(graph, stores)
    if out is not None:
        circuits.save_graph_file(graph, out)
    if json:
        print_json(graph.json())
        return
    print_graph(graph)
    if out is not None:
        console().print(f"\nThe graph: {out}", markup=False, soft_wrap=True)


def _say(estimate: Any) -> None:
    console(stderr=True).print(str(estimate), markup=False, soft_wrap=True)


def _model(
    dictionaries: list[str], model: str | None, device: str | None, dtype: str | None
) -> Any:
    from gemscope import circuits, hub
    from gemscope.lm import load_model

    if model is None:
        found = {hub.locate(a).model for a in circuits.transcoder_set(dictionaries)}
        if len(found) != 1:
            raise InputError(
                f"these transcoders belong to {' and '.join(sorted(found))}: name a model with "
                "--model"
            )
        (model,) = found
    return load_model(model, device=device, dtype=dtype)


def _lines(file: Path) -> list[str]:
    try:
        found = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} cannot be read as text: {error}") from None
    if not found:
        raise InputError(f"{file} holds no prompt; write one a line")
    # A prompt of several lines is written with \n.
    return [line.replace("\\n", "\n") for line in found]
