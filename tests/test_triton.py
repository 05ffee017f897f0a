"""The kernels for CUDA: in Triton's interpreter, without a GPU, and the same tests on one.

The interpreter has to be chosen before Triton is imported, and would stay chosen: one test runs
this file again in a process of its own. There, and where there is a GPU, the others run.
"""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
no_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not there"
)


def on_device(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


if not INTERPRETED:

    @no_triton
    @pytest.mark.slow
    def test_kernels_in_the_interpreter():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


if INTERPRETED:
    from triton import language as tl
    from triton.runtime import interpreter

    def _float32(self, a):
        return self.cast_impl(a, tl.float32) if a.dtype.scalar == tl.bfloat16 else a

    def _dot(self, a, b, *rest, given=interpreter.InterpreterBuilder.create_dot):
        # Triton 3.7's interpreter multiplies the bits of bfloat16 numbers, as integers.
        return given(self, _float32(self, a), _float32(self, b), *rest)

    def _patch_once(fn, given=interpreter._patch_lang, done=set()):  # noqa: B006
        # It does so for every call of every function, and undoes it: most of the time it takes.
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            given(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _patch_once
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, with long rows being those of more than 16 entries."""
    from gemscope.sae import _kernels, _triton, _triton_support
    from gemscope.train import _adam

    monkeypatch.setattr(_triton, "_SPLIT", 16)
    monkeypatch.setattr(_triton_support, "_MANY", 1.0)
    if INTERPRETED:
        monkeypatch.setattr(_kernels, "triton_runs", lambda device: True)
        monkeypatch.setattr(_adam, "triton_runs", lambda device: True)
    return _triton


def random(generator, *shape):
    return torch.randn(*shape, generator=generator).to(DEVICE)


def integers(generator, most, *shape):
    return torch.randint(0, most, shape, generator=generator).to(DEVICE)


def offsets_of(counts):
    counts = torch.tensor(counts, dtype=torch.int64)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(DEVICE)


COUNTS = {
    "empty rows": [0, 3, 0, 0, 1, 5, 0],
    "nothing": [0, 0, 0],
    "no rows": [],
    "around a piece": [16, 17, 33, 0, 1],
    "one feature fires on every token": [2, 0, 70, 4],
}
TABLES = [(1, torch.float32), (37, torch.bfloat16), (600, torch.float32)]


@on_device
@pytest.mark.parametrize(("d", "dtype"), TABLES)
@pytest.mark.parametrize("case", COUNTS)
def test_weighted_sums(case, d, dtype, kernels, generator):
    offsets = offsets_of(COUNTS[case])
    n = sum(COUNTS[case])
    indices, values = integers(generator, 50, n), random(generator, n)
    table = random(generator, 50, d).to(dtype)
    got = kernels.weighted_sums(offsets, indices, values, table)
    assert got.dtype == torch.float32
    assert got.shape == (len(COUNTS[case]), d)
    for r, (begin, end) in enumerate(pairwise(offsets.tolist())):
        terms = values[begin:end, None].double() * table[indices[begin:end]].double()
        # Each term is rounded at most once when made and once with each that is added.
        bound = (len(terms) + 1) * 2.0**-24 * terms.abs().sum(0)
        assert ((got[r].double() - terms.sum(0)).abs() <= bound).all(), r
    if d == 37:
        assert torch.equal(got, kernels.weighted_sums(offsets, indices, values, table))


@on_device
@pytest.mark.parametrize(("d", "dtype"), TABLES)
@pytest.mark.parametrize("case", COUNTS)
def test_sampled_products(case, d, dtype, kernels, generator):
    offsets = offsets_of(COUNTS[case])
    n, n_rows = sum(COUNTS[case]), len(COUNTS[case])
    indices = integers(generator, 50, n)
    a, b = random(generator, n_rows, d), random(generator, 50, d).to(dtype)
    got = kernels.sampled_products(offsets, indices.int(), a, b)
    assert got.dtype == torch.float32
    rows = torch.arange(n_rows, device=DEVICE).repeat_interleave(offsets.diff())
    terms = a[rows].double() * b[indices].double()
    bound = (d + 1) * 2.0**-24 * terms.abs().sum(1)
    assert ((got.double() - terms.sum(1)).abs() <= bound).all()
    if d == 37:
        assert torch.equal(got, kernels.sampled_products(offsets, indices.int(), a, b))


@on_device
def test_tables_may_be_parts_of_others(kernels, generator):
    offsets, indices = offsets_of([3, 20]), integers(generator, 9, 23)
    values, wide = random(generator, 23), random(generator, 9, 80)
    for table in (wide[:, 3:50], wide.T.contiguous().T[:, 3:50]):
        own = table.contiguous()
        got = kernels.weighted_sums(offsets, indices, values, table)
        assert torch.equal(got, kernels.weighted_sums(offsets, indices, values, own))
        got = kernels.sampled_products(offsets, indices, table[:2], table)
        assert torch.equal(got, kernels.sampled_products(offsets, indices, own[:2], own))


def exact_support(x, w, bias, low, found):
    """What must and what may be found, in float64, and the bound of the values' error."""
    terms = x.abs().double() @ w.abs().double().T + bias.abs().double()
    bound = (x.shape[1] + 2) * 2.0**-24 * terms
    z = x.double() @ w.double().T + bias.double()
    on = torch.zeros_like(z, dtype=torch.bool)
    on[found.rows, found.indices.long()] = True
    assert not ((z - bound > low) & ~on).any(), "something that fires is missing"
    assert not ((z + bound <= low) & on).any(), "something is there that does not fire"
    at = found.rows, found.indices.long()
    assert ((found.values - z[at]).abs() <= bound[at]).all()
    place = found.rows * z.shape[1] + found.indices
    assert (place.diff() > 0).all()  # sorted by token, then by feature, each once
    assert found.offsets[-1] == len(found.values)
    return z


@on_device
@pytest.mark.parametrize(
    ("tokens", "features", "d", "low"),
    [(1, 1, 5, 0.0), (20, 50, 70, 2.0), (3, 33, 130, 50.0)],
)  # fmt: skip
def test_support(tokens, features, d, low, kernels, generator):
    from gemscope.sae._triton_support import support

    x, w = random(generator, tokens, d), random(generator, features, d) / d**0.5
    bias, low = random(generator, features) * 0.1, torch.full((features,), low, device=DEVICE)
    found = support(x, w, bias, low)
    exact_support(x, w, bias, low, found)
    again = support(x, w, bias, low)
    assert torch.equal(found.indices, again.indices)
    assert torch.equal(found.values, again.values)


@on_device
def test_support_above_a_floor_for_each_token(kernels, generator):
    from gemscope.sae._triton_support import support

    x, w = random(generator, 20, 70), random(generator, 50, 70)
    bias, none = random(generator, 50), torch.zeros(50, device=DEVICE)
    z = x.double() @ w.double().T + bias.double()
    # Floors are entries themselves: those are not above them, or by rounding they are.
    floor = z.topk(9, dim=1).values[:, -1].clamp_min(0).float()
    floor[3], floor[4] = 0, 1e30
    found = support(x, w, bias, none, floor)
    exact_support(x, w, bias, floor[:, None], found)
    assert found.counts[4] == 0
    assert 7 <= found.counts[found.counts > 0].double().median() <= 10


@on_device
def test_support_in_runs_of_tokens_and_tiles_of_features(kernels, generator, monkeypatch):
    from gemscope.sae import _triton_support

    if INTERPRETED:  # a smaller tile than tensor cores take
        monkeypatch.setattr(_triton_support, "_M", 16)
    monkeypatch.setattr(_triton_support, "_N", 32)
    monkeypatch.setattr(_triton_support, "_TILE_BYTES", 32 * 20 * 4)
    monkeypatch.setattr(_triton_support, "_BITS_BYTES", 27 * 4 * 3)
    monkeypatch.setattr(_triton_support, "_WORDS", 2)
    x, w = random(generator, 40, 20), random(generator, 90, 20)
    bias, low = random(generator, 90), random(generator, 90).abs()
    found = _triton_support.support(x, w, bias, low)
    exact_support(x, w, bias, low, found)
    assert len(found.values) > 500
    floor = random(generator, 40).abs() * 5
    found = _triton_support.support(x, w, bias, low * 0, floor)
    exact_support(x, w, bias, floor[:, None], found)


@on_device
def test_support_decides_in_float32(kernels, generator):
    """Thresholds that are pre-activations themselves: half of them fires, in float32 alone."""
    from gemscope.sae._triton_support import support

    x, w = random(generator, 64, 64), random(generator, 64, 64)
    x[3], w[5] = 3e38, 1e-20  # rounded up to infinity; and far smaller than the others
    bias = torch.zeros(64, device=DEVICE)
    z = x.double() @ w.double().T
    low = z.diagonal().clone().clamp(0, 1e38).float()
    found = support(x, w, bias, low)
    # In float32 products with 3e38 leave its range.
    usual = torch.arange(64, device=DEVICE) != 3
    on = torch.zeros(64, 64, dtype=torch.bool, device=DEVICE)
    on[found.rows, found.indices.long()] = True
    clear = (z - low).abs() > 66 * 2.0**-24 * (x.abs().double() @ w.abs().double().T)
    assert torch.equal((on & clear)[usual], ((z > low) & clear)[usual])
    assert (found.values > low[found.indices.long()]).all()


@on_device
def test_too_many_are_left_to_a_dense_product(kernels, generator, monkeypatch):
    from gemscope.sae import Encoder, ReLU, _triton_support

    monkeypatch.setattr(_triton_support, "_MANY", 1 / 32)
    x, w, bias = random(generator, 64, 8), random(generator, 40, 8), random(generator, 40)
    assert _triton_support.support(x, w, bias, torch.zeros_like(bias)) is None
    found = Encoder(w.T, bias, ReLU()).encode(x)
    exact_support(x, w, bias, torch.zeros_like(bias), found)


@on_device
def test_where_gradients_are_asked_for_they_flow(kernels, generator):
    from gemscope.sae import weighted_sums

    table = random(generator, 9, 5).requires_grad_()
    offsets, indices = offsets_of([3, 4]), integers(generator, 9, 7)
    weighted_sums(offsets, indices, random(generator, 7), table).sum().backward()
    assert table.grad.abs().sum() > 0


@on_device
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("d", [5, 1_100])
def test_adam_rows_are_those_of_adam(d, beta1, unit, kernels, generator, monkeypatch):
    from gemscope.train import _adam
    from gemscope.train._config import Optimizer

    rows = F.normalize(random(generator, 7, d), dim=1)
    given = [random(generator, 7, d) for _ in range(3)]
    for g in given:
        g[2] = 0
    found = []
    for fused in (True, False, True):
        monkeypatch.setattr(_adam, "triton_runs", lambda device, fused=fused: fused)
        p = {"w": rows.clone()}
        adam = _adam.Adam(Optimizer(lr=1e-3, beta1=beta1), p)
        for g in given:
            adam.begin(1e-2)
            adam.rows("w", p["w"], 1, lambda a, b, g=g: g[1 + a : 1 + b].clone(), 6, unit=unit)
        found.append((p["w"], adam.second["w"], adam.first.get("w", p["w"])))
    ours, torchs, again = found
    for a, b, c in zip(ours, torchs, again, strict=True):
        assert torch.equal(a, c)
        # Sums of a row round differently: d terms of a size of 1 / d to each other.
        torch.testing.assert_close(a, b, rtol=(d + 40) * 2.0**-23, atol=1e-7)
    assert torch.equal(ours[0][[0, 6]], rows[[0, 6]])
    assert not torch.equal(ours[0][1], rows[1])


def move(weights):
    for name in ("w_enc", "b_enc", "threshold", "w_dec", "skip"):
        setattr(weights, name, [value.to(DEVICE) for value in getattr(weights, name)])
    weights.b_dec = weights.b_dec.to(DEVICE)


@on_device
@pytest.mark.parametrize(
    "case",
    ["quadratic", *(pytest.param(c, marks=pytest.mark.gpu) for c in ("batch-topk", "crosscoder"))],
)
def test_steps_are_those_of_float64_autograd(case, kernels, generator):
    import test_steps
    from reference import gradients

    a = test_steps.artefact(**test_steps.CASES[case])
    weights, xs, y = test_steps.start(a, generator, tokens=64)
    wanted, loss = gradients(a, weights, xs, y)
    move(weights)
    learner = test_steps.learner_of(a, weights, "sparse")
    measured = test_steps.step(learner, [x.to(DEVICE) for x in xs], y.to(DEVICE))
    test_steps.check({n: g.cpu() for n, g in learner.adam.seen.items()}, wanted, a)
    assert measured.loss == pytest.approx(loss, rel=1e-5)


@contextmanager
def waits():
    """Count how often the host waits for the device."""
    import warnings

    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [w for w in told if "synchroniz" in str(w.message)]


@pytest.mark.gpu
def test_products_wait_for_nothing_and_the_support_twice(generator):
    from gemscope.sae import _triton
    from gemscope.sae._triton_support import support

    x, w = random(generator, 256, 64), random(generator, 4_096, 64)
    bias, low = torch.zeros(4_096, device=DEVICE), torch.full((4_096,), 25.0, device=DEVICE)
    found = support(x, w, bias, low)
    torch.cuda.synchronize()
    with waits() as waited:
        support(x, w, bias, low)
    assert len(waited) <= 2
    with waits() as waited:
        _triton.weighted_sums(found.offsets, found.indices, found.values, w)
        _triton.sampled_products(found.offsets, found.indices, x, w)
    assert not waited


@pytest.mark.gpu
def test_a_step_waits_as_often_whatever_the_width(generator):
    import test_steps

    from gemscope.train._adam import Adam

    counts = []
    for width in (2_048, 65_536):
        a = test_steps.artefact(d_sae=width)
        weights, xs, y = test_steps.start(a, generator, tokens=4_096)
        weights.threshold[0].fill_(0.6)
        move(weights)
        xs, y = [x.to(DEVICE) for x in xs], y.to(DEVICE)
        learner = test_steps.learner_of(a, weights, "sparse")
        learner.adam = Adam(a.optimizer, weights.named())
        test_steps.step(learner, xs, y)
        with waits() as waited:
            test_steps.step(learner, xs, y)
        counts.append(len(waited))
    assert counts[0] == counts[1] <= 40


POINTERS = {
    "int64": "offsets pieces owners indices rows columns counts",
    "fp32": "values table parts out a b lengths losses x_lengths x_losses least w_lengths w_losses "
            "lift p g v m",
    "bf16": "low x w",
    "int32": "bits",
}  # fmt: skip
FLOATS = ("tiny", "sums", "lr", "root", "beta1", "rest1", "beta2", "rest2", "eps")
CONSTANTS = {
    "_sum_pieces": {"SPLIT": 256, "WIDTH": 512, "UNROLL": 4},
    "_sum_rows": {"SPLIT": 256, "LONG": True, "WIDTH": 512, "UNROLL": 4},
    "_multiply_rows": {"ENTRIES": 16, "DEEP": 128},
    "_round_rows": {"UP": 1.0078125, "BLOCK": 1_024},
    "_screen": {"M": 128, "N": 128, "K": 64, "GROUP": 8, "LANES": 32},
    "_count_bits": {"WORDS": 1_024},
    "_list_bits": {"WORDS": 1_024, "LANES": 32},
    "_adam_row": {"UNIT": True, "FIRST": True, "BLOCK": 8_192},
}
WARPS = {"_screen": 8, "_adam_row": 16}


def compiled(kernel, capability):
    """`kernel` for a GPU that need not be there, as it is launched at its largest."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, types = kernel.__name__, {}
    for argument in kernel.arg_names:
        kinds = [kind for kind, names in POINTERS.items() if argument in names.split()]
        types[argument] = (
            f"*{'fp32' if name == '_round_rows' else 'int64'}"
            if (argument == "rows")
            else f"*{kinds[0]}"
            if kinds
            else "i32"
        )
        if argument in FLOATS:
            types[argument] = "fp32"
        if argument in CONSTANTS[name]:
            types[argument] = "constexpr"
    types = {n: t.replace("int", "i") for n, t in types.items()}
    # As at a launch: tables begin, and so do their rows, at multiples of 16 bytes.
    even = [n for n in types if n in ("d", "width") or n.endswith("stride")]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, t) in enumerate(types.items())
        if t.startswith("*") or n in even
    }
    source = ASTSource(kernel, types, CONSTANTS[name], attributes)
    options = {"num_warps": WARPS.get(name, 4), "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@no_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CONSTANTS)
def test_kernels_compile_for_gpus_that_are_not_here(name, capability):
    from gemscope.sae import _triton, _triton_support
    from gemscope.train import _triton as _rows

    (kernel,) = {vars(m)[name] for m in (_triton, _triton_support, _rows) if name in vars(m)}
    made = compiled(kernel, capability)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 99 * 2**10  # the least that a block can have from Ampere on
