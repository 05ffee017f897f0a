"""Attribution patching: every feature's effect on a metric, estimated in one backward pass.

With `g` the gradient of the metric at the site that a feature writes, its effect at a position is
about `(g . d_i) (f' - f)`: the change of the metric, to first order, when its activation `f`
becomes `f'`, that of the corrupted run or 0. The same of an error term `e` is `g . (e' - e)`.
Gradients are those of a zero that is added at the site, so nothing else is touched. (The method:
Nanda's attribution patching; on dictionaries, 2403.19647.) Estimates are checked: the features
with the largest are changed for real, each by itself, in rows of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.errors import InputError
from gemscope.hub import load_sae
from gemscope.lm import Edit, LanguageModel, Run, Tokens
from gemscope.sae import SAE, Dictionary, row_offsets, sampled_products
from gemscope.sites import Site, each

from ._attribute_exact import Agreement, agreement, exact_effects
from ._intervene import Progress, once
from ._intervene_places import Prompt, same_length
from ._intervene_view import View
from ._metric import Measure, Measuring, Metric
from ._metric import metric as read_metric
from ._target import Load, Part, dictionary_name, order


@dataclass(frozen=True, eq=False, kw_only=True)
class Active:
    """The features of one dictionary that fire on either prompt, entry by entry."""

    sae: Dictionary
    name: str
    features: Int[Tensor, " nnz"]
    positions: Int[Tensor, " nnz"]
    clean: Float[Tensor, " nnz"]
    other: Float[Tensor, " nnz"]
    """Activations that the clean ones become: the corrupted run's, or 0."""
    effects: Float[Tensor, " nnz"]
    """Estimated change of the metric, float64."""
    errors: dict[Site, Float[Tensor, " seq"]]
    """The same of the error at each site written, by position."""

    def sums(self) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The features, and of each the sum over positions."""
        which, place = self.features.unique(return_inverse=True)
        return which, self.effects.new_zeros(len(which)).index_add_(0, place, self.effects)


@dataclass(eq=False, kw_only=True)
class Node:
    """A feature, or a dictionary's error at a site: its estimated and its true effect."""

    name: str
    sae: Dictionary
    index: int | None
    """None for an error term."""
    sites: tuple[Site, ...]
    positions: list[int]
    clean: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    parts: list[float]
    """Estimate for each of `positions`."""
    exact: float | None = None
    """Change of the metric when it is changed at all its positions at once."""

    @property
    def attribution(self) -> float:
        """The estimate summed over positions."""
        return sum(self.parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution:
    """Estimates for every active feature and error term, and how good they are."""

    metric: Metric
    prompt: Prompt
    corrupted_prompt: Prompt | None
    at: int | None
    clean: float
    corrupted: float | None
    active: list[Active]
    top: list[Node]
    """Those with the largest estimates, largest first, with exact effects."""
    agreement: Agreement

    def json(self) -> dict[str, Any]:
        """All of it; `positions` of a feature are those where it changes."""
        other = self.corrupted_prompt
        return {
            "metric": self.metric.text,
            "at": self.at,
            "clean": {"text": self.prompt.text, "tokens": self.prompt.pieces, "metric": self.clean},
            "corrupted": None
            if other is None
            else {"text": other.text, "tokens": other.pieces, "metric": self.corrupted},
            "toward": "zero" if other is None else "corrupted",
            "dictionaries": [_summary(one) for one in self.active],
            "agreement": self.agreement.json(),
            "top": [_node_json(node, self.prompt, other) for node in self.top],
        }


def _summary(one: Active) -> dict[str, Any]:
    return {
        "address": one.name,
        "active_features": len(one.features.unique()),
        "entries": len(one.features),
        "sum_features": float(one.effects.sum()),
        "sum_errors": {str(site): float(e.sum()) for site, e in one.errors.items()},
    }


def _node_json(node: Node, prompt: Prompt, other: Prompt | None) -> dict[str, Any]:
    rows = []
    for i, place in enumerate(node.positions):
        row: dict[str, Any] = {"position": place, "token": prompt.pieces[place]}
        if node.clean:
            row["clean"] = node.clean[i]
            row |= {} if other is None else {"corrupted": node.other[i]}
        rows.append(row | {"attribution": node.parts[i]})
    return {
        "name": node.name, "feature": node.index, "attribution": node.attribution,
        "exact": node.exact, "positions": rows,
    }  # fmt: skip


def attribute(
    model: LanguageModel,
    clean: str,
    saes: Sequence[str | Dictionary],
    *,
    metric: str | Metric,
    corrupted: str | None = None,
    top: int = 20,
    at: int | None = None,
    load: Load = load_sae,
    progress: Progress | None = None,
) -> Attribution:
    """What each feature and error term of `saes` does to the metric, estimated and checked.

    Estimates are of changes toward the run on `corrupted`, whose tokens stand opposite the clean
    ones, or toward 0 without it; they are for every ordinary token. The `top` largest, by the size
    of their sum over positions, are then changed for real. Memory grows with the entries that are
    active on either prompt, never with the number of features.

    Raises:
        InputError: Prompts of different lengths; a metric that has no slope at the clean run, or
            is computed before what the dictionaries write; another model's dictionary.
    """
    load = once(load, model)
    chosen = [load(s) if isinstance(s, str) else s.to(model.device) for s in saes]
    _check(model, chosen, top)
    written = sorted({s for sae in chosen for s in each(sae.writes)}, key=order)
    what = read_metric(metric, model, load, at=at, after=written)
    prompt = Prompt.of(model, clean)
    other = None if corrupted is None else Prompt.of(model, corrupted)
    if other is not None:
        same_length(
            prompt, other, "attribution compares them position by position",
            "make them equally long",
        )  # fmt: skip
    measuring = Measuring(model, what, prompt)
    reads = tuple(dict.fromkeys(s for sae in chosen for s in (*each(sae.reads), *each(sae.writes))))
    run, gradients, before = _gradients(measuring, written, reads)
    base, view = None, None
    with torch.no_grad():
        if other is not None:
            there, base = measuring.beside(other, reads)
            view = View.of(there)
        here = View.of(run)
        active = [_active(sae, here, view, gradients, prompt) for sae in chosen]
        nodes = [node for one in active for node in _largest(one, top)]
        nodes = sorted(nodes, key=lambda node: -abs(node.attribution))[:top]
        exact_effects(measuring, nodes, here, view, before, progress)
    return Attribution(
        metric=what, prompt=prompt, corrupted_prompt=other, at=measuring.at, clean=before,
        corrupted=base, active=active, top=nodes,
        agreement=agreement([(node.attribution, node.exact or 0.0) for node in nodes]),
    )  # fmt: skip


def _check(model: LanguageModel, saes: Sequence[Dictionary], top: int) -> None:
    if not saes:
        raise InputError("no dictionary was named; give the address of at least one")
    if top < 1:
        raise InputError(f"the {top} largest are none; take 1 or more")
    for sae in saes:
        model.check(sae)
    names = [dictionary_name(sae) for sae in saes]
    if len(set(names)) < len(names):
        raise InputError(f"a dictionary was named twice: {', '.join(sorted(names))}")


def _gradients(
    measuring: Measuring, sites: Sequence[Site], reads: tuple[Site, ...]
) -> tuple[Run, dict[Site, Float[Tensor, "seq d"]], float]:
    """The clean run, the gradient of the metric at each site, and the metric."""
    model, length = measuring.model, len(measuring.clean)
    if measuring.metric.kind is Measure.KL:
        raise InputError(
            "kl is smallest at the clean run, where its slope is 0: attribute another metric, such "
            "as logit:TOKEN, and measure kl with --on"
        )
    dtype = torch.float64 if model.dtype is torch.float64 else torch.float32
    zeros = {
        site: torch.zeros(length, model.width(site), dtype=dtype, device=model.device)
        for site in sites
    }
    with torch.enable_grad():
        for zero in zeros.values():
            zero.requires_grad_()
        edits = tuple(_plus(site, zero) for site, zero in zeros.items())
        run, value = measuring.run(measuring.clean.batch, edits=edits, read=reads)
        if measuring.metric.feature is not None and float(value.detach()[0]) == 0:
            raise InputError(
                f"{measuring.metric.feature.name} is silent at position {measuring.place} "
                f"({measuring.clean.shown(measuring.place)}), so its slope is 0: take a position "
                "where it fires with --at"
            )
        found = torch.autograd.grad(value.sum(), list(zeros.values()))
    return run, dict(zip(zeros, found, strict=True)), float(value.detach()[0])


def _plus(site: Site, zero: Tensor) -> Edit:
    def function(tokens: Tokens, x: Tensor) -> Tensor:
        return x + zero[tokens.positions].to(x.dtype)

    return Edit(site, site, function, placed=True)


def _active(
    sae: Dictionary, here: View, there: View | None, gradients: dict[Site, Tensor], prompt: Prompt
) -> Active:
    """Every entry of `sae` on either prompt with its estimate."""
    blocks = [
        _entries(sae, place, here, there, gradients, prompt)
        for place in range(len(each(sae.reads)))
    ]
    ordinary = prompt.ordinary.to(blocks[0][0].device)
    errors = {}
    for site in each(sae.writes):
        moved = -here.part(sae, Part.ERROR, site)
        if there is not None:
            moved = moved + there.part(sae, Part.ERROR, site)
        errors[site] = (gradients[site].double() * moved).sum(1) * ordinary
    joined = [torch.cat(column) for column in zip(*blocks, strict=True)]
    features, positions, clean, other, effects = joined
    return Active(
        sae=sae, name=dictionary_name(sae), features=features, positions=positions, clean=clean,
        other=other, effects=effects, errors=errors,
    )  # fmt: skip


def _entries(
    sae: Dictionary, place: int, here: View, there: View | None, gradients: dict[Site, Tensor],
    prompt: Prompt,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Features read in one layer: number, position, both activations, estimate."""
    codes = [here.code(sae, place)] + ([there.code(sae, place)] if there else [])
    width = codes[0].d_sae
    keys = torch.cat([code.rows * width + code.indices.long() for code in codes])
    key, inverse = keys.unique(return_inverse=True)
    values = torch.zeros(2, len(key), dtype=torch.float64, device=key.device)
    first = codes[0].indices.numel()
    values[0, inverse[:first]] = codes[0].values.double()
    if there is not None:
        values[1, inverse[first:]] = codes[1].values.double()
    position = key // width
    kept = prompt.ordinary.to(key.device)[position] & (values[0] != values[1])
    key, position, values = key[kept], position[kept], values[:, kept]
    used, own = (key % width).unique(return_inverse=True)
    slopes = torch.zeros(len(key), dtype=torch.float64, device=key.device)
    offsets = row_offsets(position, len(prompt))
    for site, rows in _decoders(sae, place).items():
        # A site's rows of the features in use: never all of a wide dictionary.
        slopes += sampled_products(offsets, own, gradients[site].float(), rows[used].float())
    index = key % width + (0 if isinstance(sae, SAE) else sae.firsts[place])
    return index, position, values[0], values[1], slopes * (values[1] - values[0])


def _decoders(sae: Dictionary, place: int) -> dict[Site, Float[Tensor, "n_features d_out"]]:
    """Decoder rows of the features read at `place`, for each site that they write."""
    if isinstance(sae, SAE):
        return {sae.writes: sae.w_dec}
    rows = sae.layers[place].w_dec
    return {site: rows[:, m] for m, site in enumerate(sae.writes) if m >= place}


def _largest(one: Active, count: int) -> list[Node]:
    """The `count` features of a dictionary with the largest estimates, and its errors."""
    which, sums = one.sums()
    nodes = []
    for place in sums.abs().topk(min(count, len(sums))).indices.tolist():
        index = int(which[place])
        mine = one.features == index
        nodes.append(
            Node(
                name=f"{one.name}/{index}", sae=one.sae, index=index, sites=(),
                positions=one.positions[mine].tolist(), clean=one.clean[mine].tolist(),
                other=one.other[mine].tolist(), parts=one.effects[mine].tolist(),
            )
        )  # fmt: skip
    for site, effects in one.errors.items():
        where = f"{one.name}/error" + ("" if len(one.errors) == 1 else f"@{site}")
        positions = effects.nonzero()[:, 0]
        nodes.append(
            Node(
                name=where, sae=one.sae, index=None, sites=(site,),
                positions=positions.tolist(), parts=effects[positions].tolist(),
            )
        )  # fmt: skip
    return nodes
