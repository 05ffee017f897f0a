"""A training step on a GPU, beside what no step of these sizes can be faster than."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator

_D, _BATCH, _L0 = 2_304, 8_192, 70
_WIDTHS = (16_384, 65_536, 262_144)
_STEPS = 10


def gpu() -> Iterator[dict]:
    """Encoding and whole steps of a JumpReLU dictionary that fires 70 times a token.

    The floor is the largest of three: the encoder's product at this GPU's speed, measured on a
    square one, in bfloat16 (the other two are told as well); weights, second moments and what is
    read of them once more, 40 bytes for each weight of one matrix, at the speed of a plain copy;
    and the batch, likewise. Steps change nothing much: the rate is tiny, so that L0 stays.
    """
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing of the theme gpu is measured", file=sys.stderr)
        return
    with torch.no_grad():
        speeds, bandwidth = _product_speeds(), _copy_bandwidth()
        for width in _WIDTHS:
            yield from _of_width(width, speeds, bandwidth)
            torch.cuda.empty_cache()


def _of_width(width: int, speeds: dict[str, float], bandwidth: float) -> Iterator[dict]:
    import torch

    from gemscope.train._bank import encode

    learner, x = _learner(width)

    def code():
        (member,) = learner.members()
        return encode(x, member.w_enc, [member])

    def step():
        return learner.learn([x], x, code())

    torch.cuda.reset_peak_memory_stats()
    found = {"encode": _seconds(code), "step": _seconds(step)}
    product = {name: 2 * _BATCH * _D * width / speed for name, speed in speeds.items()}
    batch = 4 * _BATCH * _D / bandwidth
    # Encoding reads the encoder's weights once.
    traffic = {"encode": 4 * _D * width / bandwidth, "step": 40 * _D * width / bandwidth}
    for what, seconds in found.items():
        floors = {name: max(p, traffic[what], batch) for name, p in product.items()}
        yield {
            "command": f"{what} {_BATCH} tokens, {_D} x {width}, L0 {step().l0:.0f}",
            "seconds": seconds,
            "tokens": _BATCH,
            "floor_seconds": floors["bfloat16"],
            "ratio_to_floor": seconds / floors["bfloat16"],
            "ratio_to_tf32_floor": seconds / floors["tf32"],
            "ratio_to_float32_floor": seconds / floors["float32"],
            "product_flops": speeds,
            "copy_bytes_per_second": bandwidth,
            "device": torch.cuda.get_device_name(),
            "max_memory_bytes": torch.cuda.max_memory_allocated(),
        }


def _learner(width: int):
    """A dictionary at which normal inputs of unit length fire 70 times, and a batch of them."""
    import torch
    import torch.nn.functional as F

    from gemscope.train._config import Artefact, Optimizer, Sparsity
    from gemscope.train._learner import Learner
    from gemscope.train._weights import Scales, Weights

    g = torch.Generator("cuda").manual_seed(0)
    rows = F.normalize(torch.randn(width, _D, generator=g, device="cuda"), dim=1)
    x = F.normalize(torch.randn(_BATCH, _D, generator=g, device="cuda"), dim=1)
    threshold = statistics.NormalDist(0, _D**-0.5).inv_cdf(1 - _L0 / width)
    nothing = torch.zeros(width, device="cuda")
    weights = Weights(
        w_enc=[rows.clone()], b_enc=[nothing.clone()], threshold=[nothing + threshold],
        w_dec=[rows], b_dec=torch.zeros(_D, device="cuda"), skip=[], pre_bias=True,
    )  # fmt: skip
    config = Artefact(
        name="x", reads="0.resid_post", writes="0.resid_post", d_sae=width, l0=float(_L0),
        sparsity=Sparsity(coefficient=1e-3, warm_up=0, bandwidth=1e-3, threshold=threshold),
        optimizer=Optimizer(lr=1e-9, warm_up=0),
    )  # fmt: skip
    learner = Learner(config, weights, Scales((1.0,), (1.0,)), steps=1_000)
    learner.density = _L0 / width
    return learner, x


def _product_speeds() -> dict[str, float]:
    """Floating-point operations a second of a square product, by how it multiplies."""
    import torch

    n, out = 8_192, {}
    before = torch.backends.cuda.matmul.allow_tf32
    for name in ("float32", "tf32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        out[name] = 2 * n**3 / _seconds(lambda a=a, b=b: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = before
    return out


def _copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a copy of a gigabyte."""
    import torch

    a = torch.zeros(2**28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(lambda: b.copy_(a))


def _seconds(run: Callable[[], object]) -> float:
    """The median, after three to compile and warm up."""
    import torch

    found = []
    for _ in range(3 + _STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[3:])
