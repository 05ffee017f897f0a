"""The prompt of a graph, run again: what its nodes write and what they are read from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.lm import LanguageModel, Run
from gemscope.sites import Site, Stream
from gemscope.steering import Prompt

from ._frozen import Frozen
from ._graph import Graph, Kind, Node
from ._targets import Aim, aims
from ._transcoders import Active, Load, Transcoders


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """A vector that is added at one position of `embed` or of a layer's `mlp_out`."""

    site: Site
    position: int
    vector: Float[Tensor, " d_model"]


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A number that is read: a site's activations at a position, along a direction."""

    site: Site
    position: int
    vector: Float[Tensor, " d"]
    final: bool = False
    """Whether the final norm lies between them: the direction is one of logits, before a cap."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """A graph's prompt in its model, and the dictionaries that stand for the MLPs."""

    model: LanguageModel
    prompt: Prompt
    run: Run
    """Of one row, with attention and all sites that `Frozen` needs."""
    transcoders: Transcoders
    active: Active
    graph: Graph | None = None
    load: Load | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, graph: Graph, model: LanguageModel, load: Load) -> "Replay":
        """The prompt of `graph` as it was traced.

        Raises:
            InputError: Another model, a tokenizer that cuts the prompt otherwise, dictionaries that
                are not to be had, or features that are silent now.
        """
        # A folder's model has no name to compare: its tokens and features say whether it fits.
        if model.name is not None and graph.model not in (model.name, "a local model"):
            raise InputError(f"the graph is of {graph.model}, not of {model.name}; load that model")
        chat = bool(graph.settings.get("chat", False))
        prompt = Prompt(graph.prompt, model.prompts(graph.prompt, chat=chat), model.tokenizer)
        if tuple(prompt.ids) != tuple(graph.token_ids):
            raise InputError(
                f"the model's tokenizer cuts the graph's prompt into other tokens ({len(prompt)}, "
                f"where the graph has {len(graph.token_ids)}): it was traced in another model"
            )
        made = cls.of_prompt(model, prompt, graph.dictionaries, load, graph=graph)
        for node in graph.nodes:
            if node.kind is Kind.FEATURE:
                made.place(node)
        return made

    @classmethod
    @torch.no_grad()
    def of_prompt(
        cls,
        model: LanguageModel,
        prompt: Prompt,
        addresses: Sequence[str],
        load: Load,
        *,
        graph: Graph | None = None,
    ) -> "Replay":
        """`prompt` with the transcoders at these addresses."""
        transcoders = Transcoders.of(model, [load(one) for one in dict.fromkeys(addresses)])
        read = [*Frozen.needs(model), *transcoders.reads, *transcoders.writes]
        run = model.run(prompt.batch, read=read, attention=True)
        return cls(
            model=model, prompt=prompt, run=run, transcoders=transcoders,
            active=transcoders.encode(run), graph=graph, load=load,
        )  # fmt: skip

    @cached_property
    def frozen(self) -> Frozen:
        """The frozen model of the prompt."""
        return Frozen.of(self.model, self.run, self.transcoders.skips)

    @cached_property
    def _places(self) -> dict[tuple[int, int, int], int]:
        a = self.active
        columns = (a.layers.tolist(), a.positions.tolist(), a.features.tolist())
        return {key: i for i, key in enumerate(zip(*columns, strict=True))}

    def place(self, node: Node) -> int:
        """The place of a feature's node among the features that are active."""
        key = (node.layer or 0, node.position or 0, node.feature or 0)
        if key not in self._places:
            raise InputError(
                f"{node.id} is silent in this model: the graph was made with another precision, "
                "model or dictionary; trace the prompt again"
            )
        return self._places[key]

    def writes(self, node: Node) -> list[Write]:
        """All that a node adds to the model, as it is in the run."""
        layer, position = node.layer or 0, node.position or 0
        match node.kind:
            case Kind.FEATURE:
                at = self.place(node)
                feature, value = self.active.features[at : at + 1], self.active.values[at]
                return [
                    Write(Site(m, Stream.MLP_OUT), position,
                          value * self.transcoders.rows(layer, feature, m)[0])
                    for m in self.transcoders.written(layer)
                ]  # fmt: skip
            case Kind.ERROR | Kind.BOS:
                site = self.transcoders.writes[layer]
                out = self.run[site][0, position]
                made = self.active.outputs[layer][position]
                wide = torch.promote_types(out.dtype, made.dtype)
                return [Write(site, position, out.to(wide) - made.to(wide))]
            case Kind.EMBEDDING:
                vector = self.run[Site(0, Stream.RESID_PRE)][0, position]
                return [Write(Site(0, Stream.EMBED), position, vector)]
        raise InputError(
            f"{node.id} is no single thing that is written; give a feature, an error, BOS or a "
            "token"
        )

    def probe(self, node: Node) -> Probe:
        """Where the value of a feature or a target is read, less its bias."""
        if node.kind is Kind.FEATURE:
            layer, at = node.layer or 0, self.place(node)
            columns, _ = self.transcoders.columns(layer, self.active.features[at : at + 1])
            return Probe(self.transcoders.reads[layer], node.position or 0, columns[0])
        if node.kind is not Kind.TARGET:
            raise InputError(f"nothing comes into {node.id}; give a feature or a target")
        return self._probes[node.number or 0]

    @cached_property
    def _probes(self) -> list[Probe]:
        """Of each target."""
        assert self.graph is not None
        assert self.load is not None
        out = []
        for one in self.graph.targets:
            if one.token is None:
                (aim,) = aims([one.text], self.model, self.prompt, self.load)
            else:
                aim = Aim(text=one.text, label="", position=one.position, tokens=(one.token,))
            out.append(_probe(aim, one.position, self.model))
        return out


def _probe(aim: Aim, position: int, model: LanguageModel) -> Probe:
    if aim.site is not None and aim.vector is not None:
        return Probe(aim.site, position, aim.vector.to(model.device))
    rows = model.weights.unembedding
    wide = torch.promote_types(rows.dtype, torch.float32)
    first = rows[aim.tokens[0]].to(wide)
    other = rows[aim.tokens[1]].to(wide) if aim.tokens[1:] else rows.mean(0, dtype=wide)
    return Probe(Site(model.n_layers - 1, Stream.RESID_POST), position, first - other, final=True)
