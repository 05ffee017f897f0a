"""What is steered with: one feature of a dictionary, or a vector of any origin."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError
from gemscope.sae import SAE, BatchTopK, Dictionary, JumpReLU, TopK
from gemscope.sites import Site


@dataclass(frozen=True, eq=False, kw_only=True)
class Feature:
    """One feature with all that an edit needs: its column and rows, nothing else of the width."""

    name: str
    """As a person names it, such as ADDRESS/INDEX."""
    index: int
    sae: Dictionary
    maximum: float | None
    """Its largest activation on a text, if somebody measured it."""
    reads: Site
    column: Float[Tensor, " d_in"]
    """Of the encoder, float32."""
    bias: float
    threshold: float | None
    """The activation it must exceed; None where others decide whether it fires (`TopK`)."""
    rows: dict[Site, Float[Tensor, " d_out"]]
    """What it writes where at an activation of 1, float32: its decoder rows."""

    def to(self, device: torch.device) -> "Feature":
        """The same with its tensors on another device; the dictionary stays where it is."""
        if self.column.device == device:
            return self
        rows = {site: row.to(device) for site, row in self.rows.items()}
        return replace(self, column=self.column.to(device), rows=rows)

    def values(self, x: Float[Tensor, "n_tokens d_in"]) -> Float[Tensor, " n_tokens"]:
        """Its activations at tokens of the site it reads, float32."""
        if self.threshold is None:
            assert isinstance(self.sae, SAE)
            found = self.sae.encode(x.to(self.sae.w_enc.device))
            own = found.indices == self.index
            out = torch.zeros(len(x), device=found.values.device)
            out[found.rows[own]] = found.values[own]
            return out.to(x.device)
        pre = x.float() @ self.column + self.bias
        return F.threshold(pre, max(self.threshold, 0.0), 0.0)


def feature(
    sae: Dictionary, index: int, *, maximum: float | None = None, name: str | None = None
) -> Feature:
    """One feature of `sae`; of a mapped file only its column and rows are read."""
    if isinstance(sae, SAE):
        if isinstance(sae.activation, BatchTopK):
            raise InputError(
                "whether a feature of a BatchTopK dictionary fires depends on the whole batch; "
                "give it the threshold that its training measured, as published ones have"
            )
        rows, bias = sae.rows([index])[0], float(sae.b_enc[index])
        column, reads = sae.w_enc[:, index].float(), sae.reads
        writes: tuple[Site, ...] = (sae.writes,)
        threshold = None if isinstance(sae.activation, TopK) else 0.0
        if isinstance(sae.activation, JumpReLU):
            threshold = float(sae.activation.threshold[index])
    else:
        place = sae.layer_of(index)
        layer, own = sae.layers[place], index - sae.firsts[place]
        rows, bias = sae.rows([index])[0][place:], float(layer.b_enc[own])
        column, reads, writes = layer.w_enc[:, own].float(), sae.reads[place], sae.writes[place:]
        threshold = float(layer.threshold[own])
    return Feature(
        name=name or f"{sae.origin.address or 'dictionary'}/{index}", index=index, sae=sae,
        maximum=maximum, reads=reads, column=column.contiguous(), bias=bias, threshold=threshold,
        rows=dict(zip(writes, rows, strict=True)),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector of any origin, written at a site."""

    vector: Float[Tensor, " d"]
    site: Site
    name: str = "vector"

    def __post_init__(self):
        if not bool(torch.isfinite(self.vector).all()):
            raise InputError(f"{self.name} holds numbers that are not finite")

    @property
    def rows(self) -> dict[Site, Tensor]:
        """The vector by the site it is written at, float32."""
        return {self.site: self.vector.float()}
