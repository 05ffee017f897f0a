"""A million features out of a file: in little memory, and the exact ones.

The files are sparse: most columns are zeros under a threshold of 1, which take no room on the disk
and fire nothing; some, spread over the whole width, hold numbers. What is read of them and what is
multiplied is no less for it.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gemscope.sae import SAE, JumpReLU
from gemscope.sites import Site

HERE = Site.parse("0.resid_post")
BLOCK, N_BLOCKS, N_TOKENS = 16, 16, 1_024
STORED = {"F32": 4, "BF16": 2}
STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="memory is asked of Linux")

PROGRAM = """
import json, sys, threading, time
import torch
from gemscope import hub

def anonymous():
    with open("/proc/self/status") as stream:
        return next(int(x.split()[1]) * 1024 for x in stream if x.startswith("RssAnon"))

folder, tokens, result = sys.argv[1:]
x = torch.load(tokens, weights_only=True)
seen, done, before = [], threading.Event(), anonymous()

def watch():
    while not done.wait(0.005):
        seen.append(anonymous())

threading.Thread(target=watch, daemon=True).start()
times = [time.perf_counter()]
with torch.no_grad():
    sae = hub.load_sae(folder)
    times.append(time.perf_counter())
    features = sae.encode(x)
    times.append(time.perf_counter())
    out = sae.decode(features)
    times.append(time.perf_counter())
done.set()
torch.save([features.offsets, features.indices, features.values, out], result)
took = [b - a for a, b in zip(times, times[1:])]
print(json.dumps({"before": before, "peak": max(seen), "samples": len(seen), "took": took}))
"""


def bits(values, dtype):
    """Numbers as they are stored: bfloat16 is the upper half of float32."""
    raw = values.astype("<f4").view("<u4")
    return raw if dtype == "F32" else (raw >> 16).astype("<u2")


def stored(values, dtype):
    """What is stored, in float64."""
    raw = bits(values, dtype).astype("<u4") << (0 if dtype == "F32" else 16)
    return torch.from_numpy(raw.view("<f4").astype(np.float64))


def chosen(d_sae):
    """The columns that hold numbers: blocks from the first feature to the last."""
    starts = np.linspace(0, d_sae - BLOCK, N_BLOCKS).astype(int)
    return (starts[:, None] + np.arange(BLOCK)).ravel()


def wide(folder, d_in, d_sae, dtype):
    """A sparse folder in Gemma Scope 2's layout, and the columns and rows that hold numbers."""
    g, size = np.random.default_rng(0), STORED[dtype]
    shapes = {
        "w_enc": (d_in, d_sae), "w_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,),
        "threshold": (d_sae,),
    }  # fmt: skip
    header, end = {}, 0
    for name, shape in shapes.items():
        first, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    columns = chosen(d_sae)
    count, ones = len(columns), np.ones(d_sae)
    ones[columns] = g.random(count) * 2
    numbers = {
        "w_enc": g.standard_normal((d_in, count)) / d_in**0.5,
        "w_dec": g.standard_normal((count, d_in)),
        "b_enc": g.standard_normal(count) / 10,
        "b_dec": g.standard_normal(d_in),
        "threshold": ones,
    }
    folder.mkdir()
    with (folder / "params.safetensors").open("wb") as stream:
        stream.truncate(8 + len(raw) + end)
        stream.write(len(raw).to_bytes(8, "little") + raw)

        def put(name, place, values):
            stream.seek(8 + len(raw) + header[name]["data_offsets"][0] + size * place)
            stream.write(bits(values, dtype).tobytes())

        for block in range(0, count, BLOCK):
            here, first = slice(block, block + BLOCK), int(columns[block])
            for row in range(d_in):
                put("w_enc", row * d_sae + first, numbers["w_enc"][row, here])
            put("w_dec", first * d_in, numbers["w_dec"][here])
            put("b_enc", first, numbers["b_enc"][here])
        put("b_dec", 0, numbers["b_dec"])
        put("threshold", 0, numbers["threshold"])
    config = {
        "hf_hook_point_in": "model.layers.0.output", "hf_hook_point_out": "model.layers.0.output",
        "width": d_sae, "model_name": "gemma-2-2b", "architecture": "jump_relu", "l0": 50.0,
        "affine_connection": False, "type": "sae",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    numbers["threshold"] = ones[columns]
    return columns, {name: stored(values, dtype) for name, values in numbers.items()}


def encoded(folder, tmp_path, d_in):
    """What a process of its own makes of `folder`, and the memory it took."""
    x = torch.randn(N_TOKENS, d_in, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "tokens.pt")
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, tmp_path / "tokens.pt", tmp_path / "found.pt"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return x, json.loads(told), torch.load(tmp_path / "found.pt", weights_only=True)


def checked(tmp_path, d_in, d_sae, dtype, *, most):
    # Where temporary files lie in memory, so does what is read of a sparse one.
    if shutil.disk_usage(tmp_path).free < 4 * STORED[dtype] * d_in * d_sae:
        pytest.skip("no room for a file of this size")
    columns, weights = wide(tmp_path / "made", d_in, d_sae, dtype)
    x, told, (offsets, indices, values, out) = encoded(tmp_path / "made", tmp_path, d_in)
    shutil.rmtree(tmp_path / "made")
    pre = x.double() @ weights["w_enc"] + weights["b_enc"]
    sizes = x.double().abs() @ weights["w_enc"].abs() + weights["b_enc"].abs()
    bound = (d_in + 2) * 2.0**-24 * sizes
    above = pre - weights["threshold"]
    place = torch.full((d_sae,), -1)
    place[columns] = torch.arange(len(columns))
    at = place[indices.long()]
    assert (at >= 0).all(), "features of zeros do not fire"
    rows = torch.arange(N_TOKENS).repeat_interleave(offsets.diff())
    got = torch.zeros_like(pre)
    got[rows, at] = values.double()
    decided = above.abs() > bound
    assert decided.double().mean() > 0.99
    assert torch.equal((got != 0) & decided, (above > 0) & decided)
    assert ((got - pre).abs() <= bound)[got != 0].all()
    assert 0.05 < (got != 0).double().mean() < 0.5
    expected = got @ weights["w_dec"] + weights["b_dec"]
    sizes = got @ weights["w_dec"].abs() + weights["b_dec"].abs()
    assert ((out.double() - expected).abs() <= (len(columns) + 2) * 2.0**-24 * sizes).all()
    assert told["samples"] > 20
    assert told["peak"] - told["before"] < most, told
    return told


@pytest.mark.slow
@pytest.mark.parametrize("dtype", STORED)
def test_a_wide_dictionary_is_encoded_tile_by_tile(dtype, tmp_path):
    # All of it in float32, or all pre-activations, would be 1 GB.
    checked(tmp_path, 1_024, 262_144, dtype, most=600e6)


@pytest.mark.slow
def test_a_million_features_take_little_memory(tmp_path):
    checked(tmp_path, 2_304, 1_048_576, "BF16", most=1e9)


def resident():
    """Bytes of files that are in this process's memory."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return sum(1024 * int(lines[name].split()[0]) for name in ("RssFile", "RssShmem"))


def test_of_a_mapped_file_a_few_features_are_read(tmp_path):
    d_in, d_sae, d_out = 128, 262_144, 128
    size, few = 4 * d_in * d_sae, [5, 200_000]

    def mapped(name, *shape):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
            for feature in few:
                for row in range(d_in):
                    place = row * d_sae + feature if name == "w_enc" else feature * d_out + row
                    stream.seek(4 * place)
                    stream.write(np.float32(row + feature / 2**18).tobytes())
        flat = np.memmap(tmp_path / name, "<f4", "c", shape=(d_in * d_sae,))
        return torch.from_numpy(np.asarray(flat)).reshape(shape)

    sae = SAE(
        w_enc=mapped("w_enc", d_in, d_sae), w_dec=mapped("w_dec", d_sae, d_out),
        b_enc=torch.zeros(d_sae), b_dec=torch.zeros(d_out),
        activation=JumpReLU(torch.ones(d_sae)), reads=HERE, writes=HERE,
    )  # fmt: skip
    x, before = torch.ones(3, d_in), resident()
    some, pre, rows = sae.only(few), sae.pre_activations(x, few), sae.rows(few)
    read = resident() - before
    wanted = torch.arange(128)[None] + torch.tensor(few)[:, None] / 2**18
    assert torch.equal(some.w_enc.T, wanted)
    assert torch.equal(some.w_dec, wanted)
    assert torch.equal(rows[:, 0], wanted)
    torch.testing.assert_close(pre, wanted.sum(1).expand(3, 2))
    # A page for each number, and what the system maps around it: up to 64 KB of 1 MB rows.
    assert read < size / 2
    out = sae.reconstruct(x)
    assert resident() - before > 0.9 * size, "encoding all reads all"
    torch.testing.assert_close(out, (pre[:1] @ wanted).expand(3, -1))
