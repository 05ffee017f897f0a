"""Dictionaries over several layers: crosscoders and cross-layer transcoders.

Each feature is read in one layer and written to that layer and later ones:
`f[l] = jumprelu(x[l] @ w_enc[l] + b_enc[l])`,
`y[m] = sum over l <= m of f[l] @ w_dec[l][:, m] + b_dec[m] (+ x[m] @ skip[m])`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.sites import Sites

from ._activation import JumpReLU
from ._decode import decoded
from ._encode import Encoder, in_chunks
from ._origin import Origin
from ._sae import chosen_features
from ._sparse import SparseFeatures


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """The features that one layer's activations are encoded into."""

    w_enc: Float[Tensor, "d_in n_features"]
    b_enc: Float[Tensor, " n_features"]
    threshold: Float[Tensor, " n_features"]
    w_dec: Float[Tensor, "n_features n_layers d_out"]
    """Axis 1 is the place of the layer written, counted over all of them; places before this
    layer's own are not used."""
    b_dec: Float[Tensor, " d_out"]
    skip: Float[Tensor, "d_in d_out"] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class CrossLayer:
    """A crosscoder, or a cross-layer transcoder when `writes` differs from `reads`.

    Features are numbered through all layers, the first layer's first. Activations are stacked:
    `[..., n_layers, d_in]` in, `[..., n_layers, d_out]` out, as a run gives them for `reads`.
    """

    layers: tuple[Layer, ...]
    reads: Sites
    writes: Sites
    origin: Origin = Origin()

    def __post_init__(self):
        n = len(self.layers)
        if not n or len(self.reads) != n or len(self.writes) != n:
            raise InputError(
                f"{n} layers for a model that reads {len(self.reads)} sites and writes "
                f"{len(self.writes)}"
            )
        if [s.layer for s in self.reads] != [s.layer for s in self.writes]:
            raise InputError(f"{self.reads} and {self.writes} are not of the same layers")
        d_in, d_out = self.d_in, self.d_out
        for place, layer in enumerate(self.layers):
            count = layer.w_enc.shape[1]
            wanted = {
                "w_enc": (d_in, count),
                "b_enc": (count,),
                "threshold": (count,),
                "w_dec": (count, n, d_out),
                "b_dec": (d_out,),
                "skip": (d_in, d_out),
            }
            for name, shape in wanted.items():
                value = getattr(layer, name)
                if value is not None and tuple(value.shape) != shape:
                    raise InputError(
                        f"{name} of layer {place} of {n} is {list(value.shape)}, not {list(shape)}"
                    )

    @property
    def d_in(self) -> int:
        """Width of what is read in each layer."""
        return self.layers[0].w_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features, of all layers together."""
        return self.firsts[-1]

    @property
    def d_out(self) -> int:
        """Width of what is written in each layer."""
        return self.layers[0].w_dec.shape[2]

    @property
    def is_transcoder(self) -> bool:
        """Whether other sites are written than are read."""
        return self.reads != self.writes

    @property
    def kind(self) -> str:
        """`crosscoder` or `clt`."""
        return "clt" if self.is_transcoder else "crosscoder"

    @cached_property
    def firsts(self) -> list[int]:
        """Number of each layer's first feature, and the number of all features."""
        return list(accumulate((layer.w_enc.shape[1] for layer in self.layers), initial=0))

    def encode(self, x: Float[Tensor, "*batch n_layers d_in"]) -> SparseFeatures:
        """The features of every token of `x`, leading axes flattened in order."""
        return in_chunks(self._encode, self._tokens(x), 1_024)

    def encode_layer(self, x: Float[Tensor, "n_tokens d_in"], place: int) -> SparseFeatures:
        """The features of one layer alone, from its activations, numbered from 0."""
        return self._encoders[place].encode(x.float())

    def decode(
        self,
        features: SparseFeatures,
        x: Float[Tensor, "n_tokens n_layers d_in"] | None = None,
    ) -> Float[Tensor, "n_tokens n_layers d_out"]:
        """What the features reconstruct in every layer, in float32.

        A model with a skip connection needs the input `x` of the same tokens as well.
        """
        parts = self.split(features)
        tokens = None if x is None else self._tokens(x)
        return torch.stack(
            [
                self.decode_layer(parts[: m + 1], m, None if tokens is None else tokens[:, m])
                for m in range(len(self.layers))
            ],
            dim=1,
        )

    def decode_layer(
        self,
        parts: Sequence[SparseFeatures],
        place: int,
        x: Float[Tensor, "n_tokens d_in"] | None = None,
    ) -> Float[Tensor, "n_tokens d_out"]:
        """What is written in one layer, from the features of the layers up to it."""
        own = self.layers[place]
        if own.skip is not None and x is None:
            raise InputError("this model has a skip connection: decoding it needs its input x")
        out = own.b_dec.float().expand(parts[0].n_tokens, -1)
        for layer, part in zip(self.layers, parts[: place + 1], strict=False):
            out = out + decoded(part, layer.w_dec[:, place])
        if own.skip is not None and x is not None:
            out = out + x.float() @ own.skip.float()
        return out

    def reconstruct(
        self, x: Float[Tensor, "*batch n_layers d_in"]
    ) -> Float[Tensor, "*batch n_layers d_out"]:
        """`decode(encode(x))`, skip connections included, with the leading axes of `x`."""
        tokens = self._tokens(x)
        out = self.decode(self.encode(tokens), tokens)
        return out.reshape(*x.shape[:-1], self.d_out)

    def split(self, features: SparseFeatures) -> list[SparseFeatures]:
        """The features of each layer, numbered from 0 in it."""
        if features.d_sae != self.d_sae:
            raise InputError(f"features of width {features.d_sae} for a model of {self.d_sae}")
        rows, out = features.rows, []
        for first, stop in zip(self.firsts[:-1], self.firsts[1:], strict=True):
            mine = (features.indices >= first) & (features.indices < stop)
            out.append(
                SparseFeatures.from_entries(
                    rows[mine],
                    features.indices[mine].long() - first,
                    features.values[mine],
                    features.n_tokens,
                    stop - first,
                )
            )
        return out

    def layer_of(self, feature: int) -> int:
        """Place of the layer that `feature` is read in."""
        chosen_features([feature], self.d_sae, torch.device("cpu"))
        return sum(first <= feature for first in self.firsts) - 1

    def pre_activations(
        self, x: Float[Tensor, "n_tokens n_layers d_in"], features: Sequence[int]
    ) -> Float[Tensor, "n_tokens n_features"]:
        """`x @ w_enc + b_enc` of a few features, each from its own layer."""
        chosen_features(features, self.d_sae, x.device)
        tokens, out = self._tokens(x), []
        for feature in features:
            place = self.layer_of(feature)
            layer, own = self.layers[place], feature - self.firsts[place]
            out.append(tokens[:, place] @ layer.w_enc[:, own].float() + layer.b_enc[own].float())
        return torch.stack(out, dim=1)

    def rows(self, features: Sequence[int]) -> Float[Tensor, "n_features n_layers d_out"]:
        """What a few features write in every layer, in float32; nothing before their own."""
        chosen_features(features, self.d_sae, torch.device("cpu"))
        out = []
        for feature in features:
            place = self.layer_of(feature)
            row = self.layers[place].w_dec[feature - self.firsts[place]].float().clone()
            row[:place] = 0
            out.append(row)
        return torch.stack(out)

    def to(self, device: torch.device | str) -> "CrossLayer":
        """The same model on another device."""
        if torch.device(device) == self.layers[0].w_enc.device:
            return self  # with what its encoders have prepared
        moved = []
        for layer in self.layers:
            values = {f.name: getattr(layer, f.name) for f in fields(layer)}
            there = {n: v.to(device) for n, v in values.items() if v is not None}
            moved.append(replace(layer, **there))
        return replace(self, layers=tuple(moved))

    @cached_property
    def _encoders(self) -> list[Encoder]:
        return [Encoder(x.w_enc, x.b_enc, JumpReLU(x.threshold)) for x in self.layers]

    def _encode(self, x: Tensor) -> SparseFeatures:
        parts = [self.encode_layer(x[:, place], place) for place in range(len(self.layers))]
        row, order = torch.cat([p.rows for p in parts]).sort(stable=True)
        columns = [p.indices.long() + f for p, f in zip(parts, self.firsts, strict=False)]
        values = torch.cat([p.values for p in parts])
        return SparseFeatures.from_entries(
            row, torch.cat(columns)[order], values[order], len(x), self.d_sae
        )

    def _tokens(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != (len(self.layers), self.d_in):
            raise InputError(
                f"activations of shape {list(x.shape)} for a model that reads {len(self.layers)} "
                f"layers of {self.d_in} at {self.reads}"
            )
        return x.reshape(-1, len(self.layers), self.d_in).float()
