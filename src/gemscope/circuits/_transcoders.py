"""The transcoders that stand for a model's MLPs: one a layer, or one over all layers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope import hub
from gemscope.errors import InputError
from gemscope.hub import Entry
from gemscope.lm import LanguageModel, Run
from gemscope.sae import SAE, CrossLayer, Dictionary, Layer
from gemscope.sites import Site, Stream, each

Load = Callable[[str], Dictionary]
"""From an address to its dictionary."""

_READS = (Stream.MLP_IN, Stream.MLP_IN_UNSCALED)


@dataclass(frozen=True, eq=False, kw_only=True)
class Active:
    """The features that are active on a prompt, by layer, position and number, ascending."""

    layers: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    """Numbers in the dictionary; of a cross-layer transcoder through all layers."""
    values: Float[Tensor, " n"]
    outputs: tuple[Float[Tensor, "seq d_model"], ...]
    """What each layer's MLP is reconstructed as, where it is replaced; 0 elsewhere."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Transcoders:
    """Dictionaries that read every MLP's input and write its output."""

    addresses: tuple[str, ...]
    """One a layer; of a cross-layer transcoder the same for all."""
    parts: tuple[SAE, ...] | CrossLayer

    @classmethod
    def of(cls, model: LanguageModel, dictionaries: Sequence[Dictionary]) -> "Transcoders":
        """`dictionaries` in the order of layers, after checking that they stand for every MLP."""
        for one in dictionaries:
            _check(one)
            model.check(one)
        multi = [d for d in dictionaries if isinstance(d, CrossLayer)]
        if multi and len(dictionaries) > 1:
            raise InputError(
                "a cross-layer transcoder stands for all MLPs by itself; give it alone"
            )
        found: dict[int, Dictionary] = {}
        for one in dictionaries:
            for site in each(one.writes):
                if site.layer in found:
                    raise InputError(
                        f"{_name(found[site.layer])} and {_name(one)} both stand for the MLP of "
                        f"layer {site.layer}; give one for each layer"
                    )
                found[site.layer] = one
        missing = [n for n in range(model.n_layers) if n not in found]
        if missing:
            raise InputError(
                f"no transcoder for layer{'s' if len(missing) > 1 else ''} "
                f"{', '.join(map(str, missing))} of {model.n_layers}: a graph needs one for every "
                "MLP; gemscope list --kind transcoder shows which there are, and gemscope circuit "
                "finds circuits over SAEs of some layers"
            )
        ordered = [found[n] for n in range(model.n_layers)]
        addresses = tuple(_name(one) for one in ordered)
        if multi:
            return cls(addresses, multi[0].to(model.device))
        return cls(
            addresses, tuple(one.to(model.device) for one in ordered if isinstance(one, SAE))
        )

    @property
    def _layers(self) -> Sequence[SAE | Layer]:
        return self.parts.layers if isinstance(self.parts, CrossLayer) else self.parts

    @property
    def reads(self) -> tuple[Site, ...]:
        """The site that each layer's features are read at."""
        if isinstance(self.parts, CrossLayer):
            return tuple(self.parts.reads)
        return tuple(part.reads for part in self.parts)

    @property
    def writes(self) -> tuple[Site, ...]:
        """The outputs of the MLPs."""
        return tuple(Site(n, Stream.MLP_OUT) for n in range(len(self.reads)))

    @cached_property
    def skips(self) -> dict[int, tuple[Stream, Tensor]]:
        """Skip connections by layer, with the stream that they read."""
        return {
            layer: (site.stream, part.skip)
            for layer, (site, part) in enumerate(zip(self.reads, self._layers, strict=True))
            if part.skip is not None
        }

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """What is written in a layer whatever is read."""
        return self._layers[layer].b_dec.float()

    def encode(self, run: Run) -> Active:
        """The features that fire on the counted tokens of the first row of `run`."""
        counted = run.tokens.counts[0].to(run[self.reads[0]].device).nonzero()[:, 0]
        inputs = [run[site][0][counted].float() for site in self.reads]
        if isinstance(self.parts, CrossLayer):
            clt = self.parts
            codes = [clt.encode_layer(x, layer) for layer, x in enumerate(inputs)]
            outputs = [clt.decode_layer(codes, m, x) for m, x in enumerate(inputs)]
            firsts = clt.firsts
        else:
            codes = [part.encode(x) for part, x in zip(self.parts, inputs, strict=True)]
            outputs = [
                part.decode(code, x)
                for part, code, x in zip(self.parts, codes, inputs, strict=True)
            ]
            firsts = [0] * len(codes)
        return Active(
            layers=torch.cat([torch.full_like(c.indices, n) for n, c in enumerate(codes)]).long(),
            positions=torch.cat([counted[c.rows] for c in codes]),
            features=torch.cat([c.indices.long() + f for c, f in zip(codes, firsts, strict=False)]),
            values=torch.cat([c.values for c in codes]),
            outputs=tuple(_spread(y, counted, run.tokens.ids.shape[1]) for y in outputs),
        )

    def columns(
        self, layer: int, features: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
        """What features of one layer are read by, a row each, and their own biases."""
        if isinstance(self.parts, CrossLayer):
            own = self.parts.layers[layer]
            w, b, first = own.w_enc, own.b_enc, self.parts.firsts[layer]
        else:
            w, b, first = self.parts[layer].w_enc, self.parts[layer].b_enc, 0
        chosen = features - first
        # Column by column: an index over a whole mapped matrix may copy all of it first.
        rows = torch.stack([w[:, i] for i in chosen.tolist()]) if len(chosen) else w.T[:0]
        return rows.float(), b[chosen].float()

    def rows(
        self, layer: int, features: Int[Tensor, " n"], written: int
    ) -> Float[Tensor, "n d_model"]:
        """What features of one layer write in another, by an activation of 1."""
        if isinstance(self.parts, CrossLayer):
            first = self.parts.firsts[layer]
            return self.parts.layers[layer].w_dec[features - first, written].float()
        return self.parts[layer].w_dec[features].float()

    def written(self, layer: int) -> range:
        """The layers in which features of a layer write."""
        stop = len(self.reads) if isinstance(self.parts, CrossLayer) else layer + 1
        return range(layer, stop)


def _spread(y: Tensor, counted: Tensor, seq: int) -> Tensor:
    out = y.new_zeros(seq, y.shape[1])
    out[counted] = y
    return out


def _name(one: Dictionary) -> str:
    return one.origin.address or "a transcoder"


def _check(one: Dictionary) -> None:
    reads, writes = each(one.reads), each(one.writes)
    for read, written in zip(reads, writes, strict=True):
        fits = read.stream in _READS and written.stream is Stream.MLP_OUT
        if not fits or read.layer != written.layer:
            hint = (
                "gemscope circuit finds circuits over SAEs"
                if one.reads == one.writes
                else "transcoders of MLPs read mlp_in or mlp_in_unscaled and write mlp_out"
            )
            raise InputError(
                f"{_name(one)} reads {read} and writes {written}, and stands for no MLP: {hint}"
            )


def transcoder_set(names: Sequence[str]) -> list[str]:
    """Addresses of one transcoder a layer, or of a cross-layer one, from what a person gave.

    Each of `names` is an address, or the beginning of several, such as `miniature/transcoder_all`.
    Of several parts the one of most layers is taken; where a layer then has several, the narrowest,
    of those with a skip connection if there are some, and of the fewest active features.
    """
    out: list[str] = []
    for name in names:
        known = [e for e in _of_release(name) if _begins(e.address, name)]
        if not known or any(e.address == name for e in known):
            out.append(name)  # an address of the hub or a folder, or one to be refused by the hub
            continue
        fit = [e for e in known if e.kind == "transcoder"]
        if not fit and (multi := [e for e in known if e.kind == "clt"]):
            out.append(min(multi, key=_cost).address)
            continue
        if not fit:
            raise InputError(
                f"{name} holds no transcoders; gemscope list --kind transcoder shows them, and "
                "gemscope circuit finds circuits over SAEs"
            )
        by_layer = max(_by_part(fit), key=len)
        out += [min(some, key=_cost).address for _, some in sorted(by_layer.items())]
    return list(dict.fromkeys(out))


def _by_part(entries: Sequence[Entry]) -> list[dict[int, list[Entry]]]:
    """The parts of a release, each by layer: of Gemma Scope 2 some are of a few layers only."""
    parts: dict[str, dict[int, list[Entry]]] = {}
    for entry in entries:
        part = re.sub(r"\d+", "#", entry.address.split("/")[1])
        layer = each(entry.writes)[0].layer
        parts.setdefault(part, {}).setdefault(layer, []).append(entry)
    return list(parts.values())


def _of_release(name: str) -> list[Entry]:
    release = name.removeprefix("google/").partition("/")[0]
    return hub.catalog(release=release) if re.fullmatch(r"[\w.-]+", release) else []


def _begins(address: str, name: str) -> bool:
    name = name.removeprefix("google/").rstrip("/")
    if "*" in name:
        from fnmatch import fnmatchcase

        return fnmatchcase(address, name)
    return address == name or address.startswith(f"{name}/")


def _cost(entry: Entry) -> tuple[int, bool, float, str]:
    return entry.d_sae, not entry.affine, entry.l0 or 0.0, entry.address
