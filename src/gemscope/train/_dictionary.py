"""The trained form of a dictionary: normalised inputs, a pre-encoder bias, unit decoder rows.

With `x = x_raw / c_in` and `y = y_raw / c_out` of unit mean squared norm,

    z = (x - b_dec) w_enc + b_enc      (a transcoder does not subtract b_dec)
    f = z 1[z > theta]
    y' = f w_dec + b_dec (+ x skip)

and it is saved folded, so that raw activations go in and out and decoder rows stay unit:

    w_enc' = w_enc c_out / c_in                    theta' = c_out theta
    b_enc' = c_out (b_enc - b_dec w_enc)           b_dec' = c_out b_dec
    skip'  = skip c_out / c_in                     w_dec' = w_dec

(2408.05147, appendix A, where `c_in = c_out`; the subtraction only with a pre-encoder bias).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.formats import Part

from ._jumprelu import jumprelu


@dataclass(frozen=True, slots=True)
class Scales:
    """The norms that inputs and targets are divided by."""

    c_in: float
    c_out: float


@dataclass(frozen=True, slots=True)
class Output:
    """What the trained form gives for a batch."""

    y: Float[Tensor, "batch d_out"]
    features: Float[Tensor, "batch d_sae"]
    active: Float[Tensor, "batch d_sae"]
    """1 where a feature fires, with a straight-through gradient."""


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Parameters in the trained form; all float32, all trained."""

    w_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    w_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    skip: Float[Tensor, "d_in d_out"] | None
    pre_bias: bool

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        names = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold", "skip")
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    def to(self, device: torch.device) -> "Dictionary":
        """The same on another device; drawn on the processor, it is the same everywhere."""
        moved: dict[str, Any] = {n: v.to(device) for n, v in self.parameters().items()}
        return replace(self, **moved)

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """`z` of normalised inputs."""
        centred = x - self.b_dec if self.pre_bias else x
        return torch.addmm(self.b_enc, centred, self.w_enc)

    def __call__(self, x: Float[Tensor, "batch d_in"], bandwidth: float) -> Output:
        features, active = jumprelu(self.pre_activations(x), self.threshold, bandwidth)
        y = torch.addmm(self.b_dec, features, self.w_dec)
        return Output(y if self.skip is None else y + x @ self.skip, features, active)

    @torch.no_grad()
    def folded(self, scales: Scales) -> Part:
        """The parameters as published files hold them, in raw units."""
        up = scales.c_out
        b_enc = self.b_enc - self.b_dec @ self.w_enc if self.pre_bias else self.b_enc
        return Part(
            w_enc=self.w_enc * (up / scales.c_in),
            b_enc=b_enc * up,
            w_dec=self.w_dec.clone(),
            b_dec=self.b_dec * up,
            threshold=self.threshold * up,
            skip=None if self.skip is None else self.skip * (up / scales.c_in),
        )


def initial(
    d_in: int,
    d_sae: int,
    d_out: int,
    *,
    transcoder: bool,
    affine: bool,
    centre: Float[Tensor, " d_out"],
    threshold: float,
    generator: torch.Generator,
) -> Dictionary:
    """Parameters before the first step.

    Decoder rows are He-uniform, then of unit norm; an SAE's encoder is the decoder's transpose.
    `b_dec` starts at `centre`, the mean of normalised targets: with the published zero it takes
    the first thousands of steps to get there, which a run of billions of tokens has.
    """
    bound = math.sqrt(6 / d_out)
    w_dec = F.normalize((torch.rand(d_sae, d_out, generator=generator) * 2 - 1) * bound, dim=1)
    if transcoder:
        rows = torch.rand(d_sae, d_in, generator=generator) * 2 - 1
        w_enc = F.normalize(rows, dim=1).T.contiguous()
    else:
        w_enc = w_dec.T.clone()
    return Dictionary(
        w_enc=w_enc,
        b_enc=torch.zeros(d_sae),
        w_dec=w_dec,
        b_dec=centre.clone(),
        threshold=torch.full((d_sae,), threshold),
        skip=torch.zeros(d_in, d_out) if affine else None,
        pre_bias=not transcoder,
    )


@torch.no_grad()
def measured_thresholds(
    dictionary: Dictionary, x: Float[Tensor, "n d_in"], start_l0: float
) -> Float[Tensor, " d_sae"]:
    """Thresholds at which all features fire equally often on `x`, `start_l0` on a token."""
    z = dictionary.pre_activations(x)
    share = min(1.0, start_l0 / z.shape[1])
    rank = min(len(x), max(1, round(share * len(x))))
    return z.kthvalue(len(x) - rank + 1, dim=0).values.clamp_min(1e-4)


@torch.no_grad()
def align(dictionary: Dictionary, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]) -> None:
    """Give a transcoder's features, in place, something to say before the first step.

    Random encoder and decoder rows have nothing to do with each other: what the features add is
    noise, and the first thing training learns is to silence them, for good. So each decoder row
    becomes the direction of what is to be written where its feature fires, and the encoder is
    scaled so that all of them together explain as much as they can.
    """
    z = dictionary.pre_activations(x)
    f = z * (z > dictionary.threshold)
    around = y - dictionary.b_dec
    dictionary.w_dec.copy_(F.normalize(f.T @ around, dim=1))
    out = f @ dictionary.w_dec
    scale = ((out * around).sum() / out.square().sum()).clamp_min(1e-3)
    for value in (dictionary.w_enc, dictionary.b_enc, dictionary.threshold):
        value.mul_(scale)


@torch.no_grad()
def remove_parallel(gradient: Float[Tensor, "d_sae d"], rows: Float[Tensor, "d_sae d"]) -> None:
    """Take out of `gradient`, in place, what only lengthens the unit vectors `rows`."""
    gradient -= (gradient * rows).sum(1, keepdim=True) * rows


def l0_penalty(active: Float[Tensor, "batch d_sae"], target: float) -> Tensor:
    """Gemma Scope 2's quadratic penalty: mean over tokens of `(2 / target) (L0 - target)^2`."""
    return (2 / target) * (active.sum(1) - target).square().mean()


def frequency_penalty(active: Float[Tensor, "batch d_sae"], scale: float) -> Tensor:
    """Sum over features of `w^2 / scale`, `w` a feature's share of the batch.

    Small for features rarer than `scale`, and dear for those that always fire: the quadratic part
    of the frequency penalty that Gemma Scope 2 names without its weight.
    """
    return active.mean(0).square().sum() / scale
