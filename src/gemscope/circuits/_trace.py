"""From a prompt to its attribution graph."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope import __version__
from gemscope.errors import InputError
from gemscope.features import marked
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel, load_model
from gemscope.steering import Prompt

from ._frozen import Frozen
from ._graph import CONSTANTS, Books, Graph, Kind, Node, Scores
from ._influence import Flow, flow_scores, pruned
from ._memory import Estimate, check_memory
from ._rows import Progress, Rows, Tracer
from ._sources import Sources
from ._targets import Aimed, aimed, aims
from ._transcoders import Load, Transcoders, transcoder_set


def trace(
    prompt: str,
    dictionaries: Sequence[str],
    *,
    model: LanguageModel | str | None = None,
    targets: Sequence[str] = (),
    node_threshold: int | float = 0.8,
    edge_threshold: int | float = 0.98,
    max_features: int = 7_500,
    chat: bool = False,
    load: Load = load_sae,
    progress: Progress | None = None,
    planned: Any = None,
) -> Graph:
    """Why the model says what follows `prompt`: its attribution graph through transcoders.

    `dictionaries` are addresses of transcoders, one for each layer, or of a cross-layer one, or
    the beginning of several, such as `miniature/transcoder_all`. `targets` are written as
    `logit:TOKEN`, `difference:TOKEN:TOKEN`, `feature:ADDRESS/INDEX` (at the last position, or at
    another with `@POSITION`) or `vector:FILE`; without any, the likeliest next tokens are taken.
    Of more than `max_features` active features, those that matter most are traced. `planned` is
    called with an `Estimate` of the memory before any of it is used.

    Raises:
        InputError: Layers without a transcoder, dictionaries of another model or tensor, a prompt
            of one token or one that does not fit, no such target; a graph whose books do not close.
    """
    addresses = transcoder_set(dictionaries)
    for name, number in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < number <= 1:
            raise InputError(f"{name} is {number}; give a share above 0 and up to 1")
    if max_features < 1:
        raise InputError(f"max_features is {max_features}; give at least 1")
    known = {address: load(address) for address in addresses}
    lm = _model(model, known)
    said = _prompt(lm, prompt, chat)
    whole = _whole(lm, said, addresses, known, targets, max_features, load, progress, planned)
    settings = {
        "node_threshold": float(node_threshold), "edge_threshold": float(edge_threshold),
        "max_features": max_features, "chat": chat, "dtype": str(lm.dtype).removeprefix("torch."),
        "gemscope": __version__, "with": list(dictionaries), "targets": list(targets),
    }  # fmt: skip
    whole = replace(whole, settings=settings)
    return pruned(whole, nodes=node_threshold, edges=edge_threshold, known=whole.influence)


@torch.no_grad()
def _whole(
    lm: LanguageModel, said: Prompt, addresses: Sequence[str], known: dict[str, Any],
    targets: Sequence[str], most: int, load: Load, progress: Progress | None, planned: Any,
) -> Graph:  # fmt: skip
    """The graph with all of its edges."""
    transcoders = Transcoders.of(lm, [known[a] for a in addresses])
    asked = aims(targets, lm, said, lambda address: known.get(address) or load(address))
    for one in asked:
        if one.site is not None:
            lm.width(one.site)
    read = [*Frozen.needs(lm), *transcoders.reads, *transcoders.writes,
            *(one.site for one in asked if one.site is not None)]  # fmt: skip
    run = lm.run(said.batch, read=read, logits=True, attention=True)
    active = transcoders.encode(run)
    estimate = Estimate.of(lm, len(said), len(active), most)
    if planned is not None:
        planned(estimate)
    check_memory(estimate, lm.device)
    frozen = Frozen.of(lm, run, transcoders.skips)
    sources = Sources(frozen, transcoders, active, run)
    found = aimed(asked, lm, run, frozen)
    rows = Tracer(frozen, transcoders, sources, found, progress).rows(most)
    nodes = (*sources.nodes(), *_target_nodes(found))
    constants = torch.tensor([node.kind in CONSTANTS for node in nodes])
    starts = torch.tensor(
        [0.0] * sources.count + [one.target.weight for one in found], dtype=torch.float64
    )
    # Every edge leads to a later site.
    flow = Flow(rows.edges, constants, acyclic=True)
    through = flow.through(starts)
    return Graph(
        prompt=said.text, tokens=tuple(marked(piece) for piece in said.pieces),
        token_ids=tuple(said.ids), model=lm.name or "a local model",
        dictionaries=transcoders.addresses, nodes=nodes, edges=rows.edges,
        targets=tuple(one.target for one in found), books=_books(rows, lm, len(transcoders.reads)),
        influence=through, scores=_scores(flow, through, nodes),
    )  # fmt: skip


def _model(model: LanguageModel | str | None, known: dict[str, Any]) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model
    name = model
    if name is None:
        names = sorted({one.origin.model for one in known.values() if one.origin.model})
        if len(names) != 1:
            found = f"belong to {' and '.join(names)}" if names else "do not say whose they are"
            raise InputError(f"these transcoders {found}: name a model, such as miniature")
        (name,) = names
    return load_model(name)


def _prompt(model: LanguageModel, text: str, chat: bool) -> Prompt:
    if not text:
        raise InputError("the prompt is empty; give at least one token")
    said = Prompt(text, model.prompts(text, chat=chat), model.tokenizer)
    if int(said.ordinary.sum()) < 2:
        raise InputError(
            f"the prompt {text!r} is one token, whose graph is a row of numbers; give two or more"
        )
    return said


def _target_nodes(found: Sequence[Aimed]) -> list[Node]:
    return [
        Node(Kind.TARGET, position=one.target.position, activation=one.target.value, number=number)
        for number, one in enumerate(found)
    ]


def _books(rows: Rows, model: LanguageModel, n_layers: int) -> Books:
    """What every row should sum to beside what it does: more than rounding is a mistake."""
    there = ~rows.values.isnan()
    off = (rows.values - rows.sums).abs()
    # A value is the end of a chain of sums over layers, each rounded; what cancels is counted by
    # its size. Weights of less than 32 bits round where the model adds, and attention in bfloat16.
    unit = torch.finfo(min((model.dtype, torch.float32), key=lambda d: d.itemsize)).eps
    allowed = unit * (16 * n_layers + 64) * (rows.sizes + rows.values.abs())
    worst = off[there].max().item()
    if bool((off > allowed)[there].any()):
        place = int((off - allowed).masked_fill(~there, float("-inf")).argmax())
        raise InputError(
            f"the books do not close: what comes into node {place} sums to "
            f"{rows.sums[place].item():.6g} and not to {rows.values[place].item():.6g}; the model "
            "computes something that a graph does not know of, so none is made"
        )
    return Books(rows.values, torch.where(there, rows.values - rows.sums, rows.values), worst,
                 allowed[there].max().item())  # fmt: skip


def _scores(flow: Flow, through: Float[Tensor, " n_nodes"], nodes: Sequence[Node]) -> Scores:
    errors = torch.tensor([node.kind is Kind.ERROR for node in nodes])
    tokens = torch.tensor([node.kind is Kind.EMBEDDING for node in nodes])
    return flow_scores(flow, through, errors=errors, tokens=tokens)
