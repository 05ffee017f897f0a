"""A sparse autoencoder or transcoder as a value: weights, an activation function, two sites."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.sites import Site

from ._activation import Activation, BatchTopK, JumpReLU
from ._decode import decoded
from ._encode import Encoder, in_chunks
from ._origin import Origin
from ._sparse import SparseFeatures


@dataclass(frozen=True, eq=False, kw_only=True)
class SAE:
    """A sparse autoencoder; a transcoder when `writes` differs from `reads`.

    `f = activation(x @ w_enc + b_enc)`, `y = f @ w_dec + b_dec (+ x @ skip)`: weights in the
    folded form of the published files, without normalisation or subtracted bias. Weights may be
    bfloat16 or float32, in memory or mapped from a file; pre-activations, features and
    reconstructions are float32, and the threshold always is.
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

    @property
    def kind(self) -> str:
        """`sae` or `transcoder`."""
        return "transcoder" if self.is_transcoder else "sae"

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseFeatures:
        """The features of every token of `x`, leading axes flattened in order.

        Weights are read a tile of features at a time, and pre-activations exist for a tile only.
        """
        x = self._tokens(x)
        if isinstance(self.activation, BatchTopK):  # a batch is one thing to it
            return self._encoder.encode(x)
        return in_chunks(self._encoder.encode, x)

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
        out = decoded(features, self.w_dec) + self.b_dec.float()
        if self.skip is not None and x is not None:
            out = out + self._tokens(x) @ self.skip.float()
        return out

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`decode(encode(x))`, the skip connection included, with the leading axes of `x`."""
        tokens = self._tokens(x)
        out = self.decode(self.encode(tokens), tokens)
        return out.reshape(*x.shape[:-1], self.d_out)

    def pre_activations(
        self, x: Float[Tensor, "n_tokens d_in"], features: Sequence[int]
    ) -> Float[Tensor, "n_tokens n_features"]:
        """`x @ w_enc + b_enc` of a few features; of a mapped file only their columns are read."""
        chosen = self._chosen(features)
        return torch.addmm(self.b_enc[chosen].float(), self._tokens(x), self.columns(features))

    def only(self, features: Sequence[int]) -> "SAE":
        """The dictionary of a few features, numbered by their place in `features`.

        Of a mapped file only their rows and columns are read. A `TopK` activation would choose
        among other features, so it is refused.
        """
        if not isinstance(self.activation, JumpReLU):
            raise InputError("features can be taken out of JumpReLU dictionaries only")
        chosen = self._chosen(features)
        return replace(
            self,
            w_enc=self.columns(features),
            b_enc=self.b_enc[chosen],
            w_dec=self.w_dec[chosen],
            activation=JumpReLU(self.activation.threshold[chosen]),
        )

    def columns(self, features: Sequence[int]) -> Float[Tensor, "d_in n_features"]:
        """What a few features are read by, in float32: their encoder columns."""
        # Column by column: an index over the whole matrix may copy all of it first.
        return torch.stack([self.w_enc[:, int(i)] for i in self._chosen(features)], dim=1).float()

    def rows(self, features: Sequence[int]) -> Float[Tensor, "n_features n_writes d_out"]:
        """What a few features write, in float32: their decoder rows, one for each site written."""
        return self.w_dec[self._chosen(features)].float()[:, None]

    def to(self, device: torch.device | str) -> "SAE":
        """The same dictionary on another device."""
        if torch.device(device) == self.w_enc.device:
            return self  # with what its encoder has prepared
        moved = {
            name: value.to(device)
            for name in ("w_enc", "b_enc", "w_dec", "b_dec", "skip")
            if (value := getattr(self, name)) is not None
        }
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(activation.threshold.to(device))
        return replace(self, **moved, activation=activation)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.w_enc, self.b_enc, self.activation)

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"activations of width {x.shape[-1]} for a dictionary that reads {self.d_in} "
                f"at {self.reads}"
            )
        return x.reshape(-1, self.d_in).float()

    def _chosen(self, features: Sequence[int]) -> Tensor:
        return chosen_features(features, self.d_sae, self.w_enc.device)


def chosen_features(features: Sequence[int], d_sae: int, device: torch.device) -> Tensor:
    """`features` as an index, after checking that each exists."""
    if not features or not all(0 <= i < d_sae for i in features):
        raise InputError(
            f"no features {list(features)}: this dictionary has features 0 to {d_sae - 1}"
        )
    return torch.tensor(list(features), device=device)
