"""The trained form of a dictionary: normalised inputs, a pre-encoder bias, unit decoder rows.

With `x_l` and `y_l` the activations of layer `l` over `c_in[l]` and `c_out[l]`, of unit mean
squared norm, and one layer only in an SAE or transcoder,

    z_l = (x_l - b_dec_l) w_enc_l + b_enc_l        (without b_dec where other sites are written)
    f_l = z_l 1[z_l > theta_l]                     (or the largest, or the positive ones)
    y'_m = sum over l <= m of f_l w_dec_lm + b_dec_m (+ x_m skip_m)

and it is saved folded, so that raw activations go in and out:

    w_enc' = w_enc c_out / c_in                    theta' = c_out theta
    b_enc' = c_out (b_enc - b_dec w_enc)           b_dec' = c_out b_dec
    skip'  = skip c_out / c_in                     w_dec'_lm = w_dec_lm c_out[m] / c_out[l]

(2408.05147, appendix A, where `c_in = c_out`, of one layer: there `w_dec' = w_dec`.)
Encoders are kept as rows of features, `[n_features, d_in]`: a feature's weights lie together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.formats import Part

_RIDGE = 1e-2
_LEAST = 0.3
"""Length of what features write at the start, over that of what they are to write, at least."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The norms that inputs and targets of each layer are divided by."""

    c_in: tuple[float, ...]
    c_out: tuple[float, ...]


@dataclass(eq=False)
class Weights:
    """Parameters in the trained form, float32, lists over layers."""

    w_enc: list[Float[Tensor, "n_features d_in"]]
    b_enc: list[Float[Tensor, " n_features"]]
    threshold: list[Float[Tensor, " n_features"]]
    w_dec: list[Float[Tensor, "n_features _"]]
    """Of layer `l`, what its features write to layers `l` and later, side by side."""
    b_dec: Float[Tensor, " d_all"]
    """Of all layers, side by side."""
    skip: list[Float[Tensor, "d_in d_out"]]
    """None, or one for each layer."""
    pre_bias: bool

    @property
    def n_layers(self) -> int:
        """Layers that are read."""
        return len(self.w_enc)

    @property
    def d_out(self) -> int:
        """Width of what is written in each layer."""
        return len(self.b_dec) // self.n_layers

    def named(self) -> dict[str, Tensor]:
        """Every parameter by name."""
        out = {"b_dec": self.b_dec}
        for name in ("w_enc", "b_enc", "threshold", "w_dec", "skip"):
            out |= {f"{name}.{i}": value for i, value in enumerate(getattr(self, name))}
        return out

    def to(self, device: torch.device) -> "Weights":
        """The same on another device."""

        def moved(values: list[Tensor]) -> list[Tensor]:
            return [value.to(device) for value in values]

        return Weights(
            moved(self.w_enc), moved(self.b_enc), moved(self.threshold), moved(self.w_dec),
            self.b_dec.to(device), moved(self.skip), self.pre_bias,
        )  # fmt: skip

    def centre(self, layer: int) -> Float[Tensor, " d_in"] | None:
        """What is taken from the input of a layer before it is encoded."""
        if not self.pre_bias:
            return None
        return self.b_dec[layer * self.d_out : (layer + 1) * self.d_out]

    def bias(self, layer: int) -> Float[Tensor, " n_features"]:
        """`b_enc - b_dec w_enc`: what is added to the product of the input as it is."""
        centre = self.centre(layer)
        if centre is None:
            return self.b_enc[layer]
        return torch.addmv(self.b_enc[layer], self.w_enc[layer], centre, alpha=-1)

    def pre_activations(
        self, layer: int, x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch n_features"]:
        """`z` of normalised inputs."""
        return torch.addmm(self.bias(layer), x, self.w_enc[layer].T)

    def folded(self, scales: Scales) -> list[Part]:
        """The parameters as published files hold them, in raw units: a part for each layer."""
        n, d = self.n_layers, self.d_out
        parts = []
        for i, (c_in, c_out) in enumerate(zip(scales.c_in, scales.c_out, strict=True)):
            w_dec = self.w_dec[i].unflatten(1, (n - i, d))
            w_dec = w_dec * (w_dec.new_tensor(scales.c_out[i:]) / c_out)[:, None]
            if n > 1:
                w_dec = torch.cat((w_dec.new_zeros(len(w_dec), i, d), w_dec), dim=1)
            parts.append(
                Part(
                    w_enc=self.w_enc[i].T * (c_out / c_in),
                    b_enc=self.bias(i) * c_out,
                    w_dec=w_dec if n > 1 else w_dec[:, 0],
                    b_dec=self.b_dec[i * d : (i + 1) * d] * c_out,
                    threshold=self.threshold[i] * c_out,
                    skip=self.skip[i] * (c_out / c_in) if self.skip else None,
                )
            )
        return parts


def unfolded(parts: Sequence[Part], scales: Scales, *, pre_bias: bool) -> Weights:
    """`parts` in the trained form: the inverse of `folded`.

    Decoder rows that are not of unit length are made so, and their features' scale absorbs it.
    """
    w = Weights([], [], [], [], torch.cat([p.b_dec.float() / c for p, c in _zip(parts, scales)]),
                [], pre_bias)  # fmt: skip
    for i, (part, c_out) in enumerate(_zip(parts, scales)):
        c_in = scales.c_in[i]
        w_dec = part.w_dec.float().reshape(len(part.w_dec), -1, part.w_dec.shape[-1])
        if len(parts) > 1:
            w_dec = w_dec[:, i:]
        w_dec = w_dec * (c_out / w_dec.new_tensor(scales.c_out[i:]))[:, None]
        lengths = w_dec.flatten(1).norm(dim=1).clamp_min(1e-12)
        rows = part.w_enc.float().T * (c_in / c_out * lengths)[:, None]
        threshold = part.threshold
        if threshold is None:
            threshold = torch.zeros_like(part.b_enc)
        w.w_enc.append(rows.contiguous())
        w.w_dec.append((w_dec.flatten(1) / lengths[:, None]).contiguous())
        w.threshold.append(threshold.float() / c_out * lengths)
        w.b_enc.append(part.b_enc.float() / c_out * lengths)
        if part.skip is not None:
            w.skip.append(part.skip.float() * (c_in / c_out))
    for i in range(len(parts)):
        if (centre := w.centre(i)) is not None:
            w.b_enc[i] = torch.addmv(w.b_enc[i], w.w_enc[i], centre)
    return w


def _zip(parts: Sequence[Part], scales: Scales) -> list[tuple[Part, float]]:
    return list(zip(parts, scales.c_out, strict=True))


def drawn(
    d_in: int,
    d_out: int,
    n_features: Sequence[int],
    *,
    sae: bool,
    affine: bool,
    centre: Float[Tensor, " d_all"],
    threshold: float,
    generator: torch.Generator,
) -> Weights:
    """Parameters before the first step, `n_features` of each layer.

    Decoder rows are He-uniform, then of unit norm; an SAE's encoder is the decoder's transpose.
    `b_dec` starts at `centre`, the mean of normalised targets: with the published zero it takes
    the first thousands of steps to get there, which a run of billions of tokens has.
    """
    n = len(n_features)
    w = Weights([], [], [], [], centre.clone(), [], pre_bias=sae)
    for i, count in enumerate(n_features):
        width = (n - i) * d_out
        bound = math.sqrt(6 / width)
        uniform = torch.rand(count, width, generator=generator) * 2 - 1
        w.w_dec.append(F.normalize(uniform * bound, dim=1))
        if sae and n == 1:
            w.w_enc.append(w.w_dec[i].clone())
        else:
            rows = torch.rand(count, d_in, generator=generator) * 2 - 1
            w.w_enc.append(F.normalize(rows, dim=1))
        w.b_enc.append(torch.zeros(count))
        w.threshold.append(torch.full((count,), threshold))
        if affine:
            w.skip.append(torch.zeros(d_in, d_out))
    return w


def measure_thresholds(w: Weights, xs: Sequence[Float[Tensor, "n d_in"]], start_l0: float) -> None:
    """Set thresholds, in place, at which all features fire equally often, `start_l0` on a token."""
    share = min(1.0, start_l0 / sum(map(len, w.w_enc)))
    for i, x in enumerate(xs):
        rank = min(len(x), max(1, round(share * len(x))))
        # A few features at a time, for memory.
        for first in range(0, len(w.w_enc[i]), 1_024):
            some = slice(first, first + 1_024)
            z = torch.addmm(w.bias(i)[some], x, w.w_enc[i][some].T)
            found = z.kthvalue(len(x) - rank + 1, dim=0).values
            w.threshold[i][some] = found.clamp_min(1e-4)


def align(w: Weights, xs: Sequence[Float[Tensor, "n d_in"]], y: Float[Tensor, "n d_all"]) -> None:
    """Give features of unrelated encoder and decoder, in place, something to say.

    Random encoder and decoder rows have nothing to do with each other: what the features add is
    noise, and the first thing training learns is to silence them, for good. So each decoder row
    becomes the direction of what is to be written where its feature fires, and the encoder is
    scaled so that all of them together explain as much as they can.
    """
    around, out = y - w.b_dec, torch.zeros_like(y)
    for i, skip in enumerate(w.skip):
        around[:, i * w.d_out : (i + 1) * w.d_out] -= xs[i] @ skip
    for i, x in enumerate(xs):
        z = w.pre_activations(i, x)
        f = z * (z > w.threshold[i])
        first = i * w.d_out
        w.w_dec[i].copy_(F.normalize(f.T @ around[:, first:], dim=1))
        out[:, first:] += f @ w.w_dec[i]
    size, wanted = out.square().sum(), around.square().sum()
    # Where a linear map has explained most already, what random features add is nearly useless at
    # first; scaled down to nothing, their thresholds would be within a step or two of 0.
    scale = torch.maximum((out * around).sum() / size, _LEAST * (wanted / size).sqrt())
    for values in (w.w_enc, w.b_enc, w.threshold):
        for value in values:
            value.mul_(scale)


def fit_skips(
    w: Weights, xs: Sequence[Float[Tensor, "n d_in"]], y: Float[Tensor, "n d_all"]
) -> None:
    """Start skip connections, in place, at the linear map that explains most: ridge regression.

    From zero they compete with the features for it, and features that learnt a linear map have to
    forget it again.
    """
    for i, skip in enumerate(w.skip):
        x, part = xs[i], slice(i * w.d_out, (i + 1) * w.d_out)
        centred = x - x.mean(0)
        cross = centred.T @ (y[:, part] - y[:, part].mean(0))
        square = centred.T @ centred
        square.diagonal().add_(_RIDGE * square.diagonal().mean())
        skip.copy_(torch.linalg.solve(square.double(), cross.double()))
        # The mean of the target is what the bias held: now less what the skip gives to it.
        w.b_dec[part] -= x.mean(0) @ skip
