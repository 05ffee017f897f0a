"""A sparse autoencoder or transcoder as a value: weights, an activation function, two sites."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.sites import Site

from ._activation import Activation, BatchTopK, JumpReLU
from ._sparse import SparseFeatures

_CHUNK_BYTES = 64 * 2**20
"""Pre-activations that exist at one time while encoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a dictionary comes from: facts of its release, as far as they are known."""

    address: str | None = None
    model: str | None = None
    """The language model it was trained on."""
    l0: float | None = None
    """Nominal number of features per token."""
    licence: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class SAE:
    """A sparse autoencoder; a transcoder when `writes` differs from `reads`.

    `f = activation(x @ w_enc + b_enc)`, `y = f @ w_dec + b_dec (+ x @ skip)`: weights in the
    folded form of the published files, without normalisation or subtracted bias. Weights may be
    bfloat16 or float32; pre-activations, features and reconstructions are float32, and the
    threshold always is.
    """

    w_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    w_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation
    reads: Site
    writes: Site
    skip: Float[Tensor, "d_in d_out"] | None = None
    origin: Origin = Origin()

    def __post_init__(self):
        (d_in, d_sae), d_out = self.w_enc.shape, self.w_dec.shape[1]
        wanted = {"b_enc": (d_sae,), "w_dec": (d_sae, d_out), "b_dec": (d_out,)}
        given = {name: tuple(getattr(self, name).shape) for name in wanted}
        if isinstance(self.activation, JumpReLU):
            wanted["threshold"] = (d_sae,)
            given["threshold"] = tuple(self.activation.threshold.shape)
        if self.skip is not None:
            wanted["skip"], given["skip"] = (d_in, d_out), tuple(self.skip.shape)
        if wrong := [
            f"{n} is {list(given[n])}, not {list(wanted[n])}"
            for n in wanted
            if given[n] != wanted[n]
        ]:
            raise InputError(f"shapes contradict w_enc {[d_in, d_sae]}: {'; '.join(wrong)}")

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.w_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.w_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is written."""
        return self.w_dec.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether another site is written than is read."""
        return self.reads != self.writes

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseFeatures:
        """The features of every token of `x`, leading axes flattened in order.

        Pre-activations exist for a chunk of tokens at a time, never for all of them.
        """
        x = self._tokens(x)
        if isinstance(self.activation, BatchTopK):
            return self._encode_batch_top_k(x, self.activation.k)
        parts = []
        for pre in self._pre_activations(x):
            rows, columns = self.activation.mask(pre).nonzero(as_tuple=True)
            parts.append(
                SparseFeatures.from_entries(rows, columns, pre[rows, columns], len(pre), self.d_sae)
            )
        return SparseFeatures.join(parts) if parts else _nothing(x, self.d_sae)

    def decode(
        self, features: SparseFeatures, x: Float[Tensor, "n_tokens d_in"] | None = None
    ) -> Float[Tensor, "n_tokens d_out"]:
        """What the features reconstruct, in float32.

        A dictionary with a skip connection needs the input `x` of the same tokens as well: its
        output is not a function of the features alone.
        """
        if features.d_sae != self.d_sae:
            raise InputError(f"features of width {features.d_sae} for a dictionary of {self.d_sae}")
        if self.skip is not None and x is None:
            raise InputError("this transcoder has a skip connection: decode(features, x) needs x")
        rows, indices = self.w_dec, features.indices.long()
        if rows.dtype != torch.float32:
            # Only the rows in use are converted: a wide dictionary stays in its storage type.
            used, indices = indices.unique(return_inverse=True)
            rows = rows[used].float()
        if indices.numel() == 0:
            out = torch.zeros(features.n_tokens, self.d_out, device=self.w_dec.device)
        else:
            out = F.embedding_bag(
                indices,
                rows,
                features.offsets,
                mode="sum",
                per_sample_weights=features.values,
                include_last_offset=True,
            )
        out = out + self.b_dec.float()
        if self.skip is not None and x is not None:
            out = out + self._tokens(x) @ self.skip.float()
        return out

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`decode(encode(x))`, the skip connection included, with the leading axes of `x`."""
        tokens = self._tokens(x)
        out = self.decode(self.encode(tokens), tokens)
        return out.reshape(*x.shape[:-1], self.d_out)

    def to(self, device: torch.device | str) -> "SAE":
        """The same dictionary on another device."""
        moved = {
            name: value.to(device)
            for name in ("w_enc", "b_enc", "w_dec", "b_dec", "skip")
            if (value := getattr(self, name)) is not None
        }
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(activation.threshold.to(device))
        return replace(self, **moved, activation=activation)

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"activations of width {x.shape[-1]} for a dictionary that reads {self.d_in} "
                f"at {self.reads}"
            )
        return x.reshape(-1, self.d_in).float()

    def _pre_activations(self, x: Tensor) -> Iterator[Tensor]:
        w_enc, b_enc = self.w_enc.float(), self.b_enc.float()
        chunk = max(1, _CHUNK_BYTES // (4 * self.d_sae))
        for start in range(0, len(x), chunk):
            yield torch.addmm(b_enc, x[start : start + chunk], w_enc)

    def _encode_batch_top_k(self, x: Tensor, k: int) -> SparseFeatures:
        # The largest entries of the whole batch are among the largest of each chunk.
        wanted, first = k * len(x), 0
        places, values = x.new_zeros(0, dtype=torch.int64), x.new_zeros(0)
        for pre in self._pre_activations(x):
            flat = pre.reshape(-1)
            best = flat.topk(min(wanted, flat.numel()), sorted=False)
            values = torch.cat((values, best.values))
            places = torch.cat((places, best.indices + first * self.d_sae))
            keep = values.topk(min(wanted, len(values)), sorted=False).indices
            values, places = values[keep], places[keep]
            first += len(pre)
        order = places[values > 0].argsort()
        values, places = values[values > 0][order], places[values > 0][order]
        return SparseFeatures.from_entries(
            places // self.d_sae, places % self.d_sae, values, len(x), self.d_sae
        )


def _nothing(x: Tensor, d_sae: int) -> SparseFeatures:
    empty = torch.zeros(0, dtype=torch.int64, device=x.device)
    return SparseFeatures.from_entries(empty, empty, x.new_zeros(0), len(x), d_sae)
