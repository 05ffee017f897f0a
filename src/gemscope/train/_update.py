"""From what a batch's blocks hold to new parameters: gradients row by row, clipped, into Adam."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ._adam import Adam, remove_parallel
from ._auxk import AuxGradients
from ._blocks import Block
from ._config import Artefact
from ._weights import Weights

_SMALLEST_THRESHOLD = 1e-6


class Part(NamedTuple):
    """A block after its backward pass."""

    layer: int
    block: Block
    g: Float[Tensor, "batch d"]
    """The gradient of what it writes."""
    thresholds: Float[Tensor, " n_features"]
    """The gradient of its thresholds."""


def update(
    a: Artefact,
    w: Weights,
    adam: Adam,
    xs: Sequence[Float[Tensor, "batch d_in"]],
    parts: Sequence[Part],
    g: Float[Tensor, "batch d_all"],
    aux: AuxGradients | None,
    *,
    lr: float,
) -> None:
    """One step of every parameter, `g` the gradient of all that is written."""
    small = _small(a, w, xs, parts, g, aux)
    centres = [w.centre(i) for i in range(w.n_layers)]
    # With the centre taken out here, `dz^T x` of a few rows is their whole gradient.
    centred = [x if c is None else x - c for x, c in zip(xs, centres, strict=True)]
    large = []
    for part in parts:
        i, block = part.layer, part.block
        large.append(_Rows(f"w_enc.{i}", w.w_enc[i], block, centred[i], aux, unit=False))
        large.append(_Rows(f"w_dec.{i}", w.w_dec[i], block, part.g, aux, unit=True))
    adam.begin(lr)
    shrink = _shrink(a.optimizer.clip, small, large)
    for rows in large:
        rows.shrink = shrink
        adam.rows(
            rows.name, rows.parameter, rows.block.first, rows, rows.block.stop, unit=rows.unit
        )
    for name, (parameter, gradient) in small.items():
        scale = a.optimizer.threshold_lr if name.startswith("threshold") else 1.0
        adam.whole(name, parameter, _times(gradient, shrink), scale)
    if a.activation == "jumprelu":
        for threshold in w.threshold:
            threshold.clamp_(min=_SMALLEST_THRESHOLD)


def _small(
    a: Artefact,
    w: Weights,
    xs: Sequence[Tensor],
    parts: Sequence[Part],
    g: Tensor,
    aux: AuxGradients | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters other than the rows of features, each with its gradient."""
    biases = [torch.zeros_like(b) for b in w.b_enc]
    thresholds = [torch.zeros_like(t) for t in w.threshold]
    for layer, block, _, of_thresholds in parts:
        biases[layer][block.first : block.stop] = block.bias_gradient
        thresholds[layer][block.first : block.stop] = of_thresholds
    if aux:
        biases[0].index_add_(0, aux.features, aux.b_enc)
    b_dec = g.sum(0)
    small = {"b_dec": (w.b_dec, b_dec)}
    for i, bias in enumerate(biases):
        written = slice(i * w.d_out, (i + 1) * w.d_out)
        if w.centre(i) is not None:  # one product with the encoder, before its rows move
            b_dec[written] -= bias @ w.w_enc[i]
        small[f"b_enc.{i}"] = (w.b_enc[i], bias)
        if a.activation == "jumprelu":
            small[f"threshold.{i}"] = (w.threshold[i], thresholds[i])
        if w.skip:
            small[f"skip.{i}"] = (w.skip[i], xs[i].T @ g[:, written])
    return small


class _Rows:
    """The gradient of the rows of a matrix that belong to a block."""

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        block: Block,
        table: Tensor,
        aux: AuxGradients | None,
        *,
        unit: bool,
    ):
        self.name, self.parameter, self.block, self.unit = name, parameter, block, unit
        self.table, self.aux, self.shrink = table, aux, 1.0
        self.held: Tensor | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        if self.held is not None:
            return _times(self.held[start:stop], self.shrink)
        make = self.block.decoder_rows if self.unit else self.block.encoder_rows
        out = make(start, stop, self.table)
        if self.aux is not None:
            self._add(self.aux, out, start, stop)
        return _times(out, self.shrink)

    def _add(self, aux: AuxGradients, out: Tensor, start: int, stop: int) -> None:
        first = self.block.first
        mine = (aux.features >= first + start) & (aux.features < first + stop)
        places = aux.features[mine] - (first + start)
        out.index_add_(0, places, (aux.w_dec if self.unit else aux.w_enc)[mine])

    def hold(self) -> Tensor:
        """Make the whole gradient now, freed of what the update would leave out."""
        held = self(0, self.block.stop - self.block.first)
        if self.unit:
            remove_parallel(held, self.parameter[self.block.first : self.block.stop])
        self.held = held
        return held


def _shrink(
    most: float | None, small: Mapping[str, tuple[Tensor, Tensor]], large: Sequence[_Rows]
) -> float:
    """By what gradients are multiplied to be together no longer than `most`."""
    if most is None:
        return 1.0
    squares = sum(float(g.square().sum(dtype=torch.float64)) for _, g in small.values())
    squares += sum(float(rows.hold().square().sum(dtype=torch.float64)) for rows in large)
    return min(1.0, most / (squares**0.5 + 1e-6))


def _times(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1.0 else gradient * scale
