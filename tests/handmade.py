"""Parameter files made by hand, byte by byte."""

import json
import struct

import torch

from gemscope import formats

D_IN, D_SAE, D_OUT = 3, 5, 4
SKIP = "affine_skip_connection"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CONFIG = {
    "hf_hook_point_in": "model.layers.1.output",
    "hf_hook_point_out": "model.layers.1.output",
    "width": 3,
    "model_name": "some/model",
    "architecture": "jump_relu",
    "l0": 2.0,
    "affine_connection": False,
    "type": "sae",
}
VALUES = {
    "w_dec": ([3, 2], [0.5, -0.5, 1.5, 2.5, -3.0, 4.0]),
    "b_dec": ([2], [0.25, -0.75]),
    "w_enc": ([2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "threshold": ([3], [0.0, 0.125, 8.0]),
    "b_enc": ([3], [-1.0, 0.0, 1.0]),
}


def encoded(values, dtype):
    single = b"".join(struct.pack("<f", v) for v in values)
    if dtype == "F32":
        return single
    return b"".join(single[i + 2 : i + 4] for i in range(0, len(single), 4))


def made(values=VALUES, dtype="F32"):
    """Header and bytes of a parameter file, made by hand."""
    header, data = {}, b""
    for name, (shape, numbers) in values.items():
        raw = encoded(numbers, dtype)
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    return header, data


def whole(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def place(folder, parameters=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "params.safetensors").write_bytes(parameters or whole(*made()))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def parsed(raw):
    """What a parameter file says, by the letter of its format and without its library."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]])
        out[name] = flat.reshape(entry["shape"])
    return out


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def drawn(generator, dtype, *, affine):
    shapes = {
        "w_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "w_dec": (D_SAE, D_OUT),
        "b_dec": (D_OUT,),
        "threshold": (D_SAE,),
    } | ({SKIP: (D_IN, D_OUT)} if affine else {})
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return tensors | {"threshold": tensors["threshold"].abs()}


def facts(**changes):
    return formats.Config(**CONFIG | {"width": D_SAE} | changes)
