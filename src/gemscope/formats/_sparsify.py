"""Sparsify's layout: `cfg.json` and `sae.safetensors`.

`encoder.weight [d_sae, d_in]`, `encoder.bias`, `W_dec [d_sae, d_out]`, `b_dec`, and `W_skip
[d_out, d_in]` in transcoders with a skip connection. `b_dec` is taken from the input, which is
folded into the encoder's bias, unless the configuration says `transcode`: transcoders of the time
before that setting were trained with `b_dec` taken from their input too. The `k` largest features
of a token are kept, as far as they are positive. Which module a dictionary belongs to is the name
of its folder, and not in its files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemscope.errors import InputError

from ._facts import (
    DTYPES,
    Facts,
    Part,
    checked_shapes,
    checked_values,
    field,
    is_there,
    read_json,
    shown,
)
from ._foreign import agreeing, chosen_k, headed, less_bias
from ._safetensors_read import map_tensors

NAME = "sparsify"
CONFIG = "cfg.json"
PARAMETERS = "sae.safetensors"
_NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_SKIP = "W_skip"
_UNREPRESENTED = {
    "signed": "features below zero count there",
    "embed_skip": "its output depends on the embeddings too",
    "gram_lookup": "its output depends on the tokens before too",
    "normalize_io": "its scales are not in the files",
}
"""Settings that change the function, and why they cannot be represented."""


def matches(folder: Path) -> bool:
    """Whether `folder` is in this layout."""
    return is_there(folder / PARAMETERS)


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`, its two files checked against each other."""
    file, weights = folder / CONFIG, folder / PARAMETERS
    raw = read_json(file)
    skip = field(file, raw, "skip_connection", bool, False)
    transcode = _transcodes(file, raw)
    infos = headed(weights, (*_NAMES, _SKIP) if skip else _NAMES)
    shapes = {
        "w_enc": infos["encoder.weight"].shape[::-1],
        "b_enc": infos["encoder.bias"].shape,
        "w_dec": infos["W_dec"].shape,
        "b_dec": infos["b_dec"].shape,
    }
    if skip:
        shapes["skip"] = infos[_SKIP].shape[::-1]
    d_in, d_sae, d_out = checked_shapes(weights, shapes)
    agreeing(file, raw, d_in=d_in)
    if field(file, raw, "num_latents", int, 0) != 0:  # 0 leaves it to the expansion factor
        agreeing(file, raw, num_latents=d_sae)
    if not transcode and d_in != d_out:
        raise InputError(
            f"{weights} reads {d_in} and writes {d_out} numbers, and {file} does not say "
            "transcode: one of the two files is of another dictionary"
        )
    chosen_k(file, field(file, raw, "k", int), d_sae)
    known = "transcode" in raw
    return Facts(
        layout=NAME,
        kind="transcoder" if transcode or skip else "sae" if known else None,
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        affine=skip,
        activation="topk",
        dtype=DTYPES[infos["encoder.weight"].dtype],
        files=(weights,),
        shapes={name: info.shape for name, info in infos.items()},
    )


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors, mapped from the file; the encoder's bias of an autoencoder is float32."""
    file, weights = folder / CONFIG, folder / PARAMETERS
    tensors = map_tensors(weights, inspect(folder).shapes)
    raw = read_json(file)
    w_enc, b_enc = tensors["encoder.weight"].T, tensors["encoder.bias"]
    if not _transcodes(file, raw):
        b_enc = less_bias(b_enc, w_enc, tensors["b_dec"])
    part = Part(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=field(file, raw, "k", int),
        skip=tensors[_SKIP].T if _SKIP in tensors else None,
    )
    return (checked_values(weights, part),)


def _transcodes(file: Path, raw: Mapping[str, Any]) -> bool:
    activation = field(file, raw, "activation", str, "topk")
    if activation != "topk":
        raise InputError(
            f"{file} says activation {shown(activation)}: only topk can be represented, which "
            "keeps the largest features of a token"
        )
    for name, why in _UNREPRESENTED.items():
        if field(file, raw, name, bool, False):
            raise InputError(f"{file} says {name}, which cannot be represented: {why}")
    return bool(field(file, raw, "transcode", bool, False))
