"""The plain model with its patterns, denominators and MLPs held: a referee of the frozen one.

Plain hooks put what a prompt's own pass had in the place of what would be computed anew: a norm
divides by the denominator it had, heads move the running values by the patterns they had, and MLPs
give what they gave. Nothing here uses the matrices of `_frozen`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gemscope.corpus import TokenBatch
from gemscope.lm import LanguageModel, wide
from gemscope.sites import Side, Site, Stream

from ._replay import Probe, Write
from ._transcoders import Active, Transcoders

_NUMBERS = 2**24
"""Of one tensor as wide as the model, in a batch of perturbed rows."""
_START = Site(0, Stream.RESID_PRE)


def rows_at_once(model: LanguageModel, seq: int) -> int:
    """Perturbed copies of a prompt in one batch."""
    return max(1, min(64, _NUMBERS // (seq * model.config.hidden_size)))


class Perturbed:
    """The model as it is, with vectors added: everything after them is computed anew."""

    def __init__(self, model: LanguageModel, batch: TokenBatch):
        self.model, self.batch = model, batch

    def run(
        self, rows: Sequence[Sequence[Write]], read: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "rows seq d"]]:
        """Activations at `read`, a row for each of `rows`, with what is written there."""
        with ExitStack() as hooks:
            self._attach(hooks, rows)
            for site, vectors in self._added(rows).items():
                hooks.enter_context(_hooked(self.model, site, partial(_plus, vectors)))
            wanted = [self._source(site) for site in read]
            run = self.model.run(_repeated(self.batch, len(rows)), read=wanted)
        return {site: self._read(site, run[at]) for site, at in zip(read, wanted, strict=True)}

    def probed(
        self, rows: Sequence[Sequence[Write]], probes: Sequence[Probe]
    ) -> Float[Tensor, "rows probes"]:
        """What each probe reads in each row, float64."""
        sites = list(dict.fromkeys(probe.site for probe in probes))
        found = self.run(rows, sites)
        columns = []
        for probe in probes:
            x = found[probe.site][:, probe.position].double()
            x = self._final(x, probe.position) if probe.final else x
            columns.append(x @ probe.vector.double())
        return torch.stack(columns, 1)

    def _attach(self, hooks: ExitStack, rows: Sequence[Sequence[Write]]) -> None:
        """Whatever else changes the pass; before what is written."""

    def _source(self, site: Site) -> Site:
        """What the model is to read for a site."""
        return site

    def _read(self, _site: Site, value: Tensor) -> Tensor:
        """The site, from what was read for it."""
        return value

    def _final(self, x: Float[Tensor, "rows d"], _position: int) -> Float[Tensor, "rows d"]:
        gain, eps = self.model.weights.final()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.double()

    def _added(self, rows: Sequence[Sequence[Write]]) -> dict[Site, Float[Tensor, "rows seq d"]]:
        """What is written, by the site it is added at."""
        by_site: dict[Site, list[tuple[int, int, Tensor]]] = {}
        for i, row in enumerate(rows):
            for write in row:
                entry = (i, write.position, wide(write.vector))
                by_site.setdefault(_written(write.site), []).append(entry)
        shape = (len(rows), self.batch.ids.shape[1], self.model.config.hidden_size)
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        out = {}
        for site, entries in by_site.items():
            row_of, position, vectors = zip(*entries, strict=True)
            at = (torch.tensor(row_of), torch.tensor(position))
            empty = torch.zeros(shape, dtype=dtype, device=self.model.device)
            out[site] = empty.index_put(at, torch.stack(vectors).to(dtype), accumulate=True)
        return out


class Held(Perturbed):
    """The model with patterns, denominators and MLP outputs as they are at a prompt.

    Skip connections of transcoders carry a change of what they read at tokens that count; with
    `respond`, so do active features, each by what its own pre-activation changes. Without `whole`,
    all that does not depend on what is written is left out: what is read are the changes alone,
    which small ones need where numbers have few digits.
    """

    def __init__(
        self, model: LanguageModel, batch: TokenBatch, transcoders: Transcoders, active: Active, *,
        respond: bool = False, whole: bool = False,
    ):  # fmt: skip
        super().__init__(model, batch)
        self._transcoders, self._active = transcoders, active
        self._respond, self._whole = respond, whole
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}
        self._counted = batch.counts[0].to(model.device)
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        """One pass as it is, and what it had."""
        model = self.model
        inputs: dict[str, Tensor] = {}
        facts = _norm_facts(model)
        handles = [
            self._module(path).register_forward_pre_hook(
                lambda _m, args, path=path: inputs.__setitem__(path, args[0])
            )
            for path in facts
        ]
        try:
            reads = [self._source(site) for site in self._transcoders.reads]
            wanted = [*self._transcoders.writes, *reads]
            run = model.run(self.batch, read=wanted, attention=True)
        finally:
            for handle in handles:
                handle.remove()
        for path, (gain, eps) in facts.items():
            x = wide(inputs[path][0])
            self._norms[path] = (torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), gain)
        self._patterns = [wide(pattern[0]) for pattern in run.patterns]
        self._outputs = [run[site][0] for site in self._transcoders.writes]
        self._inputs = [
            self._read(site, run[at][0])
            for site, at in zip(self._transcoders.reads, reads, strict=True)
        ]

    def _attach(self, hooks: ExitStack, rows: Sequence[Sequence[Write]]) -> None:
        model, family = self.model, self.model.family
        assert family.attn_value is not None
        if not self._whole:
            hooks.enter_context(_hooked(model, _START, torch.zeros_like))
        for path in self._norms:
            self._hook(hooks, path, partial(self._scaled, path))
        later: dict[int, Tensor] = {}
        for layer in range(model.n_layers):
            # Values wait here until the heads' own product is replaced, inputs until the MLP's.
            values: list[Tensor] = []
            inputs: list[Tensor] = []
            value = family.attn_value.format(layer=layer)
            self._hook(hooks, value, partial(self._keep, values, value))
            moves = partial(self._moved, layer, values)
            hooks.enter_context(_hooked(model, Site(layer, Stream.ATTN_HEADS), moves))
            out = family.attn_projection.format(layer=layer)
            self._hook(hooks, out, partial(self._linear, out))
            site = self._source(self._transcoders.reads[layer])
            hooks.enter_context(_hooked(model, site, inputs.append))
            gives = partial(self._mlp, layer, inputs, later)
            hooks.enter_context(_hooked(model, Site(layer, Stream.MLP_OUT), gives))

    def _module(self, path: str) -> nn.Module:
        return self.model.stack.get_submodule(path)

    def _hook(self, hooks: ExitStack, path: str, act: Callable[[Tensor, Tensor], Any]) -> None:
        handle = self._module(path).register_forward_hook(lambda _m, args, y: act(args[0], y))
        hooks.callback(handle.remove)

    def _scaled(self, path: str, x: Tensor, _y: Tensor) -> Tensor:
        inverse, gain = self._norms[path]
        return (x * inverse * gain).to(x.dtype)

    def _linear(self, path: str, _x: Tensor, y: Tensor) -> Tensor:
        """The output of a linear map, without its bias if changes alone are carried."""
        bias = getattr(self._module(path), "bias", None)
        return y if self._whole or bias is None else y - bias

    def _keep(self, values: list[Tensor], path: str, x: Tensor, y: Tensor) -> None:
        values.append(self._linear(path, x, y))

    def _moved(
        self, layer: int, values: list[Tensor], x: Float[Tensor, "rows seq width"]
    ) -> Float[Tensor, "rows seq width"]:
        """What heads move in the place of `x`."""
        pattern, config = self._patterns[layer], self.model.config
        kv = config.num_key_value_heads
        each = values.pop().to(pattern.dtype).unflatten(-1, (kv, -1))
        each = each.repeat_interleave(len(pattern) // kv, dim=2)
        return torch.einsum("hqk,bkhd->bqhd", pattern, each).flatten(2).to(x)

    def _mlp(self, layer: int, inputs: list[Tensor], later: dict[int, Tensor], y: Tensor) -> Tensor:
        """What an MLP gave, and what a change of its input makes of that, in the place of `y`."""
        x = wide(self._read(self._transcoders.reads[layer], inputs.pop()))
        change = (x - self._inputs[layer].to(x)) if self._whole else x
        change = change * self._counted[:, None]
        out = wide(self._outputs[layer]).expand_as(y) if self._whole else torch.zeros_like(x)
        if (skip := self._transcoders.skips.get(layer)) is not None:
            out = out + change @ skip[1].to(change)
        if self._respond:
            out = out + self._responses(layer, change, later)
        return out.to(y.dtype)

    def _responses(self, layer: int, change: Tensor, later: dict[int, Tensor]) -> Tensor:
        """What active features add here; a cross-layer transcoder's go on to later layers."""
        mine = (self._active.layers == layer).nonzero()[:, 0]
        features, places = self._active.features[mine], self._active.positions[mine]
        columns, _ = self._transcoders.columns(layer, features)
        moves = torch.einsum("bnd,nd->bn", change[:, places], columns.to(change))
        for m in self._transcoders.written(layer):
            rows = self._transcoders.rows(layer, features, m).to(change)
            added = torch.zeros_like(change).index_add(1, places, moves[..., None] * rows)
            later[m] = later[m] + added if m in later else added
        return later.pop(layer)

    def _source(self, site: Site) -> Site:
        # Where a gain is left out, the model would divide by a denominator of its own.
        unscaled = site.stream is Stream.MLP_IN_UNSCALED
        return Site(site.layer, Stream.RESID_MID) if unscaled else site

    def _read(self, site: Site, value: Tensor) -> Tensor:
        if site.stream is not Stream.MLP_IN_UNSCALED:
            return value
        assert self.model.family.mlp_norm is not None
        return value * self._norms[self.model.family.mlp_norm.format(layer=site.layer)][0]

    def _final(self, x: Float[Tensor, "rows d"], position: int) -> Float[Tensor, "rows d"]:
        inverse, gain = self._norms[self.model.family.final_norm]
        return x * inverse[position].double() * gain.double()


def _norm_facts(model: LanguageModel) -> dict[str, tuple[Tensor, float]]:
    """Gain and epsilon of each norm that is held, by its path; those after MLPs are not needed."""
    family = model.family
    paths = (family.attn_norm, family.attn_post_norm, family.mlp_norm)
    out: dict[str, tuple[Tensor, float]] = {}
    for layer in range(model.n_layers):
        block = model.weights.block(layer)
        gains = (block.before, block.after, block.mlp)
        for path, gain, eps in zip(paths, gains, block.eps, strict=True):
            if path is not None and gain is not None:
                out[path.format(layer=layer)] = (gain, eps)
    out[family.final_norm] = model.weights.final()
    return out


@contextmanager
def _hooked(model: LanguageModel, site: Site, act: Callable[[Tensor], Any]) -> Iterator[None]:
    """`act` on what a site holds, which gives what it is to hold, or nothing."""
    tap = model.family.tap(site)
    module = model.stack.get_submodule(tap.path(site.layer))
    if tap.side is Side.INPUT:

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args:
                new = act(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = act(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _m, _args, y: act(y))
    try:
        yield
    finally:
        handle.remove()


def _plus(vectors: Tensor, x: Tensor) -> Tensor:
    return (x + vectors).to(x)


def _written(site: Site) -> Site:
    # Where the embedding's module is read differs; what enters the first layer does not.
    return _START if site.stream is Stream.EMBED else site


def _repeated(batch: TokenBatch, count: int) -> TokenBatch:
    return TokenBatch(
        batch.ids.expand(count, -1).contiguous(), batch.counts.expand(count, -1).contiguous(),
        batch.documents.expand(count).contiguous(), batch.starts.expand(count).contiguous(),
    )  # fmt: skip
