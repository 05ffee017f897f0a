"""What a step cannot be faster than on this machine, and so how far from it a run is.

Whatever is sparse in a step, every feature of every artefact must be compared with every token,
each parameter's row must go through the optimizer, and the activations must be read:

    products     sum of 2 B d_in m over the layers of all artefacts, at the speed of a product
    parameters   20 bytes for each: read gradient, weight and second moment, write the latter two;
                 28 where a first moment is kept (beta1 > 0)
    inputs       B d entries of each site, as they are held, once for all artefacts

with B tokens, m features, widths d. The floor is the largest of the three, as if the others were
done meanwhile. Products and copies are measured here, with shapes and sizes like the run's: tables
that fit into a cache move faster than memory does.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gemscope.sae import screens_pay
from gemscope.sites import Site, each

from ._config import Artefact, TrainConfig

_SECONDS = 0.025
"""Time of each of the two measurements."""
_RUNS = 4
"""And runs of each, at least."""
_KEPT, _MOMENT = 20, 8
"""Bytes a step moves for each parameter, and more for a first moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a device does at best, at the shapes of a run."""

    product: str
    """Type of the fastest products whose answers the trainer can use."""
    flop: float
    """Floating-point operations a second of such a product."""
    bytes: float
    """Bytes a second that a copy reads and writes together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Seconds that a step takes at least."""

    products: float
    """By the encoders' products."""
    parameters: float
    """By the weights and moments that are read and written."""
    inputs: float
    """By the activations that are read."""

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.products, self.parameters, self.inputs)

    @property
    def bound(self) -> str:
        """Which of the three that is: `products`, `parameters` or `inputs`."""
        return max(("products", "parameters", "inputs"), key=lambda name: getattr(self, name))


def floor_seconds(config: TrainConfig, widths: Mapping[Site, int], machine: Machine) -> Floor:
    """The floor of a step of `config` on `machine`; `widths` are those of the sites."""
    batch = config.data.batch
    products = sum(2 * batch * widths[s] * n for s, n in _encoders(config))
    moved = 0
    for a in config.artefacts:
        per_parameter = _KEPT + (_MOMENT if a.optimizer.beta1 else 0)
        moved += per_parameter * _parameters(a, widths)
    # A store says itself how it holds them: in a byte each at least.
    entry = 1 if config.data.store else 2 if config.data.dtype == "bfloat16" else 4
    inputs = batch * entry * sum(widths[s] for s in config.sites)
    return Floor(
        products=products / machine.flop,
        parameters=moved / machine.bytes,
        inputs=inputs / machine.bytes,
    )


def measure_machine(
    config: TrainConfig, widths: Mapping[Site, int], device: torch.device
) -> Machine:
    """How fast `device` is at what a step of `config` does, in about 50 ms."""
    together: dict[Site, int] = {}
    for site, n in _encoders(config):
        together[site] = together.get(site, 0) + n
    site = max(together, key=lambda s: together[s] * widths[s])
    product = torch.bfloat16 if screens_pay(device) else torch.float32
    held = 8 * sum(_parameters(a, widths) for a in config.artefacts)
    return Machine(
        product=str(product).removeprefix("torch."),
        flop=_product_speed(config.data.batch, widths[site], together[site], product, device),
        bytes=_copy_speed(held, device),
    )


def _encoders(config: TrainConfig) -> list[tuple[Site, int]]:
    """The site that every layer of every artefact reads, and its features there."""
    return [
        (site, a.d_sae // len(each(a.reads))) for a in config.artefacts for site in each(a.reads)
    ]


def _parameters(a: Artefact, widths: Mapping[Site, int]) -> int:
    """Parameters of the matrices: a layer's features write to that layer and all later ones."""
    reads, writes = each(a.reads), each(a.writes)
    n = a.d_sae // len(reads)
    total = 0
    for i, (r, w) in enumerate(zip(reads, writes, strict=True)):
        total += n * (widths[r] + sum(widths[s] for s in writes[i:]))
        total += widths[r] * widths[w] if a.affine else 0
    return total


def _product_speed(
    batch: int, d: int, features: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Operations a second of `batch` tokens by `features` rows, or as many as are enough."""
    # A few milliseconds of work on either: more would not be faster.
    most = 2**28 if device.type == "cpu" else 2**38
    tokens = min(batch, 4_096 if device.type == "cpu" else 2**16)
    features = max(1, min(features, most // (2 * tokens * d)))
    x = torch.ones(tokens, d, dtype=dtype, device=device)
    rows = torch.ones(features, d, dtype=dtype, device=device)
    out = torch.empty(tokens, features, dtype=dtype, device=device)
    return 2 * tokens * d * features / _best(lambda: torch.mm(x, rows.T, out=out), device)


def _copy_speed(held: int, device: torch.device) -> float:
    """Bytes a second of a copy within a table of `held` bytes, or as many as show it."""
    size = min(max(held, 2**20), 2**26 if device.type == "cpu" else 2**30) // 2
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs of `work`: what disturbs it only adds."""

    def timed() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()  # the first one finds kernels and touches memory
    best, count, until = timed(), 1, time.perf_counter() + _SECONDS
    while count < _RUNS or time.perf_counter() < until:
        best, count = min(best, timed()), count + 1
    return max(best, 1e-9)
