"""Good folders in every layout, damage done to their files, and what may come of it.

A new layout is a new row of `ROWS`.
"""

import io
import json
import math
import signal
import struct
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import golden_layouts as golden
import numpy as np
import torch
from handmade import (
    CLT,
    LAYERS,
    arrays,
    parsed,
    place,
    place_layers,
    place_npz,
    zipped,
)

from gemscope import formats
from gemscope.errors import InputError

W, _ = golden.drawn()
W = {name: tensor[:6].contiguous() for name, tensor in W.items()}
W |= {"w_enc": torch.ones(4, 6) / 2, "w_dec": W["w_dec"][:, :4], "b_dec": W["b_dec"][:4]}
D, F = W["w_enc"].shape
NORM = f"dataset_average_activation_norm.{golden.HOOK}"
SPARSIFY = {
    "encoder.weight": W["w_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["w_dec"],
    "b_dec": W["b_dec"],
}  # fmt: skip


def _numpy(folder, save):
    save(folder / "params.npz", **{n[:-4]: _array(raw) for n, raw in arrays().items()})
    return folder


def _array(raw):
    return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)


ROWS = {
    "gemma-scope": place_npz,
    "gemma-scope, numpy's": lambda folder: _numpy(folder, np.savez),
    "gemma-scope, compressed": lambda f: place_npz(f, zipped(arrays(), method=8)),
    "gemma-scope-2": place,
    "gemma-scope-2, no config": lambda f: _without(place(f), "config.json"),
    "gemma-scope-2, clt": lambda folder: place_layers(folder, LAYERS, CLT),
    "llama-scope": lambda folder: golden.llama_scope(
        folder, golden.linear(W), d_model=D, d_sae=F, top_k=2
    ),
    "llama-scope-r1-distill": lambda folder: golden.r1_distill(
        folder,
        golden.linear(W)
        | {"log_jumprelu_threshold": W["threshold"].log(), NORM: torch.tensor(9.0)},
        d_model=D,
        expansion_factor=F / D,
    ),
    "saelens": lambda folder: golden.saelens(
        folder, golden.capital(W, "threshold"), d_in=D, d_sae=F
    ),
    "sparsify": lambda f: golden.sparsify(f, SPARSIFY, d_in=D, num_latents=F, k=2),
    "dictionary-learning": lambda folder: golden.dictionary_learning(
        folder,
        golden.linear(W, bias="b_dec") | {"k": torch.tensor(2), "threshold": torch.tensor(1.5)},
        activation_dim=D,
        dict_size=F,
        k=2,
    ),
}
"""Name to a function that makes a good folder in a folder that is there."""


def _without(folder, name):
    (folder / name).unlink()
    return folder


def files_of(row):
    """The files of a good folder: path to content."""
    with tempfile.TemporaryDirectory() as made:
        folder = ROWS[row](Path(made))
        found = [f for f in sorted(folder.rglob("*")) if f.is_file()]
        return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def laid_out(folder, files):
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


# Damage


KINDS = ("flip", "set", "cut", "insert", "truncate", "copy", "integer", "json", "key")
ANCHORS = ("start", "end", "any")
INTEGERS = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
WRONG = (
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308, 5e-324,
    math.nan, math.inf, "", "x", "a\nb", "\ud800", "y" * 2_000, "{all}", "model.layers.{,}.output",
    "model.layers.{1,2}.output", [], {}, [1], [[[]]], {"in": 1}, json.loads("[" * 90 + "]" * 90),
    json.loads("[" * 300 + "]" * 300), "relu", "topk", "crosscoder", [0, 0], [2**40, 1], [0, 2**62],
)  # fmt: skip


def damaged(raw, damage):
    """`raw` after each of `damage`: `(kind, anchor, offset, value)`."""
    for kind, anchor, offset, value in damage:
        if kind in ("json", "key"):
            raw = _in_json(raw, kind, offset, value)
            continue
        at = offset % (len(raw) + 1)
        if anchor != "any":
            at = offset % min(len(raw) + 1, 600)
            at = at if anchor == "start" else len(raw) - at
        raw = _at(raw, kind, at, value)
    return raw


def _at(raw, kind, at, value):
    byte = bytes([value % 256])
    match kind:
        case "flip":
            return raw[:at] + bytes(b ^ (1 << value % 8) for b in raw[at : at + 1]) + raw[at + 1 :]
        case "set":
            return raw[:at] + byte + raw[at + 1 :]
        case "cut":
            return raw[:at] + raw[at + 1 + value % 16 :]
        case "insert":
            return raw[:at] + byte * (1 + value // 256 % 3) + raw[at:]
        case "truncate":
            return raw[:at]
        case "copy":
            to = value % (len(raw) + 1)
            return raw[:to] + raw[at : at + 64] + raw[to:]
        case _:
            width = (2, 4, 8)[value % 3]
            number = INTEGERS[value // 3 % len(INTEGERS)] % 256**width
            return raw[:at] + number.to_bytes(width, "little") + raw[at + width :]


def _in_json(raw, kind, offset, value):
    """`raw` with one value or one key of its JSON changed, be it a config or a header."""
    length = int.from_bytes(raw[:8], "little")
    begin, end = (8, 8 + length) if length < len(raw) else (0, len(raw))
    try:
        said = json.loads(raw[begin:end])
    except (ValueError, RecursionError):
        return _at(raw, "set", offset % (len(raw) + 1), value)
    nodes, level = [], [said]
    while level:
        found = [x for x in level if isinstance(x, dict | list)]
        pairs = [(x, k) for x in found for k in (x if isinstance(x, dict) else range(len(x)))]
        nodes += pairs
        level = [x[k] for x, k in pairs]
    if not nodes:
        return raw
    where, key = nodes[offset % len(nodes)]
    if kind == "json":
        where[key] = WRONG[value % len(WRONG)]
    elif isinstance(where, dict) and value % 3:
        where["a\nb" if value % 3 == 1 else "threshold"] = where.pop(key)
    else:
        del where[key]
    text = json.dumps(said).encode()
    return (
        raw if text == raw else (struct.pack("<Q", len(text)) if begin else b"") + text + raw[end:]
    )


# What may come of it


@contextmanager
def at_most(seconds):
    """End what runs for longer than that: a hang is a failure."""

    def late(*_):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def examined(files):
    """Whether `files` are read: by the letter if so, and otherwise refused in one sentence."""
    with tempfile.TemporaryDirectory() as made, at_most(20):
        folder = laid_out(Path(made), files)
        try:
            facts = formats.inspect(folder)
            parts = formats.read(folder)
        except InputError as error:
            told = str(error)
        else:
            told = None
        if told is not None:
            assert told.isprintable(), repr(told)
            assert len(told) < 5_000
            return False
        check_facts(folder, facts, parts)
        with tempfile.TemporaryDirectory() as other:
            check_same(parts, formats.read(rewritten(folder, Path(other))))
    return True


def check_facts(folder, facts, parts):
    """Facts and tensors say the same."""
    assert facts.layout in {layout.name for layout in formats.LAYOUTS}
    assert facts.kind in (None, "sae", "transcoder", "crosscoder", "clt")
    assert len(parts) == len(facts.files)
    assert all(file.is_relative_to(folder) and file.is_file() for file in facts.files)
    assert facts.d_sae == sum(part.w_enc.shape[1] for part in parts)
    assert facts.l0 is None or 0 < facts.l0 <= facts.d_sae
    for part in parts:
        (d_in, d_sae), many = part.w_enc.shape, part.w_dec.shape[1:-1]
        assert (d_in, part.w_dec.shape[-1]) == (facts.d_in, facts.d_out)
        assert many in ((), (len(parts),))
        assert part.w_dec.shape[0] == d_sae
        assert part.b_enc.shape == (d_sae,)
        assert part.b_dec.shape == (facts.d_out,)
        assert (part.skip is not None) == facts.affine
        assert (part.threshold is not None) == (facts.activation == "jumprelu")
        assert (part.k is not None) == (facts.activation == "topk")
        assert part.k is None or 1 <= part.k <= d_sae
        tensors = tensors_of(part)
        assert all(t.isfinite().all() and t.is_floating_point() for t in tensors.values())
        if part.threshold is not None:
            assert part.threshold.shape == (d_sae,)
            assert (part.threshold >= 0).all()


def tensors_of(part):
    names = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold", "skip")
    return {n: t for n in names if (t := getattr(part, n)) is not None}


def check_same(parts, others):
    for part, other in zip(parts, others, strict=True):
        mine, theirs = tensors_of(part), tensors_of(other)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
        assert part.k == other.k


def rewritten(folder, other):
    """`folder` with every file read by another parser than ours, and written anew."""
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        raw, to = file.read_bytes(), other / file.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        match file.suffix:
            case ".json":
                to.write_text(json.dumps(json.loads(raw)))
            case ".safetensors":
                to.write_bytes(golden.stored(parsed(raw)))
            case ".npz":
                to.write_bytes(zipped(_members(file)))
            case _:
                state = torch.load(_zip_anew(file), map_location="cpu", weights_only=True)
                torch.save(state, to)
    return other


def _zip_anew(file):
    """A zip of what the standard library finds in `file`: torch's own reader believes more of what
    a directory says, that a file is a folder say, and then gives whatever was in memory.
    """
    made = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(made, "w") as anew:
        for info in archive.infolist():
            info.CRC = None
            anew.writestr(info.filename, archive.read(info))
    made.seek(0)
    return made


def _members(file):
    """The arrays of an npz as the standard library and numpy read them, checksums aside."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            info.CRC = None
            raw = io.BytesIO()
            np.lib.format.write_array(raw, _array(archive.read(info)))
            found[info.filename] = raw.getvalue()
    return found
