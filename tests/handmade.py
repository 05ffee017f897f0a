"""Parameter files made by hand, byte by byte."""

import json
import struct
import zlib

import torch

from gemscope import formats

D_IN, D_SAE, D_OUT = 3, 5, 4
SKIP = "affine_skip_connection"
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
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


# safetensors


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


# Multi-layer models


LAYERS = [
    {
        "w_enc": ([2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "b_enc": ([3], [-1.0, 0.0, 1.0]),
        "w_dec": ([3, 2, 2], [0.5, -0.5, 1.5, 2.5, -3.0, 4.0, 7.0, 8.0, 9.0, 0.0, 0.0, 2.0]),
        "b_dec": ([2], [0.25, -0.75]),
        "threshold": ([3], [0.0, 0.125, 8.0]),
    },
    {
        "w_enc": ([2, 1], [-2.0, 0.5]),
        "b_enc": ([1], [3.0]),
        "w_dec": ([1, 2, 2], [0.0, 0.0, 1.5, -4.0]),
        "b_dec": ([2], [5.0, 6.0]),
        "threshold": ([1], [2.0]),
    },
]
"""A model of two layers with three features and one; the second writes to its own layer alone."""
CROSSCODER = CONFIG | {
    "type": "crosscoder",
    "hf_hook_point_in": "model.layers.{5,9}.output",
    "hf_hook_point_out": "model.layers.{5,9}.output",
    "width": 4,
}
CLT = CROSSCODER | {
    "type": "clt",
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
}


def place_layers(folder, layers=LAYERS, config=CROSSCODER):
    """The folder of a multi-layer model; `config` None leaves it out."""
    folder.mkdir(exist_ok=True)
    for number, values in enumerate(layers):
        (folder / f"params_layer_{number}.safetensors").write_bytes(whole(*made(values)))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# npz


def npy(shape, numbers=(), descr="<f4", **changes):
    """A `.npy` file by the letter of its format; `header` replaces all that is said of it."""
    said = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    text = changes.get("header", repr(said)).encode("latin1")
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    kind = {"f4": "f", "f2": "e", "f8": "d", "i8": "q"}.get(descr[1:], "f")
    data = struct.pack(f"{'>' if descr[0] == '>' else '<'}{len(numbers)}{kind}", *numbers)
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def arrays(values=VALUES, descr="<f4"):
    """The members of an npz: names as they are published."""
    return {f"{n.replace('w_', 'W_')}.npy": npy(s, v, descr) for n, (s, v) in values.items()}


def zipped(members, *, method=0, local=(), central=(), between=b""):
    """A zip of `members`: a name to its content, or a list of such pairs.

    `local` and `central` map a name to fields that a member's own header and the directory's entry
    are to have instead of the right ones; `between` lies before every member.
    """
    pairs = list(members.items()) if isinstance(members, dict) else list(members)
    data, directory = b"", b""
    for name, content in pairs:
        packed = content if method == 0 else deflated(content)
        right = {
            "flags": 0, "method": method, "crc": zlib.crc32(content), "packed": len(packed),
            "size": len(content), "name": name, "extra": b"",
        }  # fmt: skip
        data += between
        of = right | {"offset": len(data)} | dict(dict(central).get(name, {}))
        data += _local(**right | dict(dict(local).get(name, {}))) + packed
        directory += _central(**of)
    count = len(pairs)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(data), 0)
    return data + directory + end


def deflated(content):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def _local(*, flags, method, crc, packed, size, name, extra):
    raw = name.encode()
    sizes = (crc, packed, size, len(raw), len(extra))
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 33, *sizes) + raw + extra


def _central(*, flags, method, crc, packed, size, name, extra, offset):
    raw = name.encode()
    if max(packed, size, offset) >= 2**32:
        # Sizes too large for their fields stand in an extra one.
        extra = struct.pack("<2H3Q", 1, 24, size, packed, offset) + extra
        packed = size = offset = 2**32 - 1
    sizes = (crc, packed, size, len(raw), len(extra), 0, 0, 0, 0, offset)
    head = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, flags, method, 0, 33, *sizes)
    return head + raw + extra


def place_npz(folder, raw=None):
    folder.mkdir(exist_ok=True)
    (folder / "params.npz").write_bytes(zipped(arrays()) if raw is None else raw)
    return folder


# Parts


def fields(part):
    """The tensors of a part, under the names of Gemma Scope 2's files."""
    found = {name: getattr(part, name) for name in NAMES}
    return found if part.skip is None else found | {SKIP: part.skip}


def part_of(tensors):
    """The part that holds `tensors`, named as in Gemma Scope 2's files."""
    return formats.Part(**{"skip" if n == SKIP else n: t for n, t in tensors.items()})


def meant(values=VALUES, dtype=torch.float32):
    """What a reader is to give for `values`."""
    return {n: torch.tensor(v).reshape(s).to(dtype) for n, (s, v) in values.items()}


def only(folder):
    """The tensors of the one part in `folder`."""
    (part,) = formats.read(folder)
    return fields(part)


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def drawn(generator, dtype, *, affine, n_layers=None):
    """Weights of a single-layer dictionary, or of the first of `n_layers` layers."""
    many = () if n_layers is None else (n_layers,)
    shapes = {
        "w_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "w_dec": (D_SAE, *many, D_OUT),
        "b_dec": (D_OUT,),
        "threshold": (D_SAE,),
    } | ({SKIP: (D_IN, D_OUT)} if affine else {})
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return tensors | {"threshold": tensors["threshold"].abs()}


def facts(**changes):
    return formats.Config(**CONFIG | {"width": D_SAE} | changes)
