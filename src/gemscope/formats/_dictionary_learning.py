"""dictionary_learning's layout: `config.json` and `ae.pt`, the state of a torch module.

Its `trainer.dict_class` says which: weights lie as `encoder.weight [d_sae, d_in]` and
`decoder.weight [d_in, d_sae]`, or as `W_enc [d_in, d_sae]` and `W_dec [d_sae, d_in]`. Most take a
bias from their input, which is folded into the encoder's. BatchTopK dictionaries, Matryoshka ones
among them, are used with the one threshold that training measured.

`ae.pt` is a zip with a pickle in it. It is read by torch's reader of weights alone, which builds
tensors and nothing else, after the sizes in the zip's directory have been checked.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemscope.errors import InputError
from gemscope.sites import Site, Stream, family_named

from ._facts import (
    Facts,
    Part,
    checked_shapes,
    checked_values,
    field,
    is_there,
    listed,
    read_json,
    shown,
    size_of,
)
from ._foreign import agreeing, chosen_k, hub_name, less_bias
from ._zip import opened_zip

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dictionary-learning"
CONFIG = "config.json"
PARAMETERS = "ae.pt"
_LARGEST_PICKLE = 2**20
_MOST_MEMBERS = 1_000
_STREAMS = {
    "resid_post": Stream.RESID_POST,
    "resid_out": Stream.RESID_POST,
    "mlp_out": Stream.MLP_OUT,
    "attention_out": Stream.ATTN_OUT,
    "attn_out": Stream.ATTN_OUT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """One of the library's classes: its names for the tensors, and what it does with them."""

    activation: str
    b_dec: str = "b_dec"
    linear: bool = True
    """Whether its matrices are those of linear modules: transposed, with names of their own."""
    less_bias: bool = True
    """Whether the bias is taken from the input."""
    others: tuple[str, ...] = ()
    """Tensors that are not weights."""

    @property
    def names(self) -> dict[str, str]:
        """The names of the weights, by those of `Part`."""
        if self.linear:
            return {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "decoder.weight",
                    "b_dec": self.b_dec}  # fmt: skip
        return {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": self.b_dec}


_CLASSES = {
    "AutoEncoder": _Class(activation="relu", b_dec="bias"),
    "AutoEncoderNew": _Class(activation="relu", b_dec="decoder.bias", less_bias=False),
    # Its threshold is an estimate that its encoder does not use.
    "AutoEncoderTopK": _Class(activation="topk", others=("k", "threshold")),
    "BatchTopKSAE": _Class(activation="jumprelu", others=("k",)),
    "MatryoshkaBatchTopKSAE": _Class(
        activation="jumprelu", linear=False, others=("k", "group_sizes")
    ),
    "JumpReluAutoEncoder": _Class(activation="jumprelu", linear=False, less_bias=False),
}


def matches(folder: Path) -> bool:
    """Whether `folder` is in this layout."""
    return is_there(folder / PARAMETERS)


def inspect(folder: Path) -> Facts:
    """The facts of the artefact in `folder`; its file can be looked into with torch only."""
    file, weights = folder / CONFIG, folder / PARAMETERS
    trainer, kind = _trainer(file)
    state = _state(weights, kind)
    shapes = {n: _weight(state, kind, n).shape for n in kind.names}
    d_in, d_sae, d_out = checked_shapes(weights, {n: tuple(s) for n, s in shapes.items()})
    if d_in != d_out:
        raise InputError(f"{weights} reads {d_in} and writes {d_out} numbers: it is damaged")
    agreeing(file, trainer, activation_dim=d_in, dict_size=d_sae)
    if kind.activation == "topk":
        _k(file, trainer, weights, state, d_sae)
    model = hub_name(field(file, trainer, "lm_name", str, None))
    site = _site(file, trainer, model)
    return Facts(
        layout=NAME,
        kind="sae",
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        affine=False,
        activation=kind.activation,
        dtype=str(state[kind.names["w_enc"]].dtype).removeprefix("torch."),
        files=(weights,),
        shapes={n: tuple(t.shape) for n, t in state.items()},
        reads=site,
        writes=site,
        model=model,
    )


def read(folder: Path) -> tuple[Part, ...]:
    """The tensors, mapped from the file; a folded bias and a threshold are float32."""
    found = inspect(folder)
    file, weights = folder / CONFIG, folder / PARAMETERS
    trainer, kind = _trainer(file)
    state = _state(weights, kind)
    w_enc, b_enc, w_dec, b_dec = (_weight(state, kind, n) for n in kind.names)
    if kind.less_bias or field(file, trainer, "apply_b_dec_to_input", bool, False):
        b_enc = less_bias(b_enc, w_enc, b_dec)
    part = Part(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        threshold=_threshold(weights, state, found) if kind.activation == "jumprelu" else None,
        k=_k(file, trainer, weights, state, found.d_sae) if kind.activation == "topk" else None,
    )
    return (checked_values(weights, part),)


def _trainer(file: Path) -> tuple[dict[str, Any], _Class]:
    trainer = field(file, read_json(file), "trainer", dict)
    name = field(file, trainer, "dict_class", str)
    if name not in _CLASSES:
        raise InputError(
            f"{file} says dict_class {shown(name)}, which cannot be represented: readable are "
            f"{', '.join(_CLASSES)}"
        )
    return trainer, _CLASSES[name]


def _state(weights: Path, kind: _Class) -> "dict[str, Tensor]":
    """The tensors of `weights` by name, with all that `kind` needs and nothing it does not know."""
    state = _load(weights)
    needed = [*kind.names.values(), *(["threshold"] if kind.activation == "jumprelu" else [])]
    if missing := [name for name in needed if name not in state]:
        raise InputError(f"{weights} lacks {', '.join(missing)}; it has {listed(state)}")
    if unknown := sorted(state.keys() - {*needed, *kind.others}):
        raise InputError(
            f"{weights} has {shown(unknown[0])}, which has no place in this layout: a dictionary "
            f"of this class has {', '.join([*needed, *kind.others])}"
        )
    for name in needed:
        if str(state[name].dtype) not in ("torch.float32", "torch.bfloat16", "torch.float16"):
            raise InputError(
                f"{weights}: {name} is {str(state[name].dtype).removeprefix('torch.')}, not "
                "float32, bfloat16 or float16"
            )
    return state


def _load(weights: Path) -> "dict[str, Tensor]":
    room = _checked_zip(weights)
    import torch

    try:
        # Weights alone: whatever else the pickle asks for is refused before it is made.
        state = torch.load(str(weights), weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a pickle can make its reader raise anything
        asked = re.search(r"(?:GLOBAL|class) ([\w.]{1,100})", str(error))
        raise InputError(
            f"{weights} cannot be read as weights alone"
            + (f", it asks for {asked[1]}" if asked else "")
            + ", and nothing else in such a file is ever loaded: get it again, or save the state "
            "of the dictionary alone"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputError(f"{weights} holds no tensors by name: save the state of the dictionary")
    storages = {}
    for name, value in state.items():
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise InputError(
                f"{weights}: {shown(name)} is no plain tensor: save the dictionary again"
            )
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes():
            raise InputError(
                f"{weights}: {shown(name)} is larger than its bytes: get the file again"
            )
    # Each tensor has bytes of its own in the file: one that claims more reads its neighbours', one
    # that claims less is of another type than what was written.
    if (claimed := sum(storages.values())) != room:
        raise InputError(
            f"{weights}: tensors claim {claimed:,} bytes, and there are {room:,}: get the file "
            "again"
        )
    return {name: value.detach() for name, value in state.items()}


def _checked_zip(weights: Path) -> int:
    """Bytes of tensors in `weights`, after checking its directory against its size."""
    size = size_of(weights)
    try:
        with zipfile.ZipFile(weights) as archive:
            infos = archive.infolist()
    except OSError as error:
        raise InputError(f"{weights} cannot be read: {error.strerror or error}") from None
    # NotImplementedError is zipfile's word for a compression or version it does not know.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError):
        raise InputError(
            f"{weights} is not a file that torch.save writes, or it is cut short: get it again"
        ) from None
    if len(infos) > _MOST_MEMBERS or len({i.filename for i in infos}) != len(infos):
        raise InputError(f"{weights} holds {len(infos)} members, or one of them twice: "
                         "get the file again")  # fmt: skip
    for info in infos:
        most = _LARGEST_PICKLE if info.filename.endswith(".pkl") else size
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 1 or info.file_size > most:
            raise InputError(
                f"{weights}: {shown(info.filename)} claims {info.file_size:,} bytes, compressed "
                f"or more than a file of {size:,} holds: get the file again"
            )
    if sum(info.file_size for info in infos) > size:
        raise InputError(f"{weights} claims more than its {size:,} bytes: get the file again")
    # torch maps each member from where its own header puts it: that has to be where it is listed.
    with opened_zip(weights):
        pass
    return sum(i.file_size for i in infos if re.search(r"/data/\d+$", i.filename))


def _weight(state: "Mapping[str, Tensor]", kind: _Class, name: str) -> "Tensor":
    """One of the weights of `Part`, as there."""
    tensor = state[kind.names[name]]
    return tensor.T if kind.linear and tensor.ndim == 2 else tensor


def _k(
    file: Path, trainer: Mapping[str, Any], weights: Path, state: "Mapping[str, Tensor]", d_sae: int
) -> int:
    """How many features are kept; if both the weights and the configuration say it, as one."""
    said = field(file, trainer, "k", int, None)
    if "k" in state:
        stored = state["k"]
        if stored.numel() != 1 or stored.is_floating_point() or stored.is_complex():
            raise InputError(f"{weights}: k is no whole number: get the file again")
        if said is not None and said != int(stored):
            raise InputError(
                f"{file} says k {said}, {weights.name} says {int(stored)}: one of the two is of "
                "another dictionary"
            )
        said = int(stored)
    if said is None:
        raise InputError(f"{file} lacks k, and so does {weights.name}")
    return chosen_k(weights, said, d_sae)


def _threshold(weights: Path, state: "Mapping[str, Tensor]", found: Facts) -> "Tensor":
    """`[d_sae]` in float32; one number stands for all features."""
    threshold = state["threshold"].float()
    if threshold.numel() == 1 and threshold.item() < 0:
        raise InputError(
            f"{weights}: threshold is {threshold.item():g}: training has not measured it, so the "
            "dictionary cannot be used one token at a time; train it for longer"
        )
    if threshold.ndim == 0:
        threshold = threshold.repeat(found.d_sae)
    if tuple(threshold.shape) != (found.d_sae,):
        raise InputError(
            f"{weights}: threshold is {list(threshold.shape)}, not one number or [{found.d_sae}]"
        )
    return threshold


def _site(file: Path, trainer: Mapping[str, Any], model: str | None) -> Site | None:
    layer = field(file, trainer, "layer", int, None)
    name = field(file, trainer, "submodule_name", str, None)
    match = re.fullmatch(rf"({'|'.join(_STREAMS)})(_layer_?([0-9]{{1,4}}))?", name or "")
    if layer is None or match is None:
        return None
    if not 0 <= layer < 10_000 or (match[3] is not None and int(match[3]) != layer):
        raise InputError(
            f"{file} says layer {layer} and submodule_name {shown(name)}: the two must name one "
            "layer"
        )
    stream = _STREAMS[match[1]]
    # The library hooks modules: where a norm follows them, their output is not what is added.
    if stream is not Stream.RESID_POST and family_named(model).attn_post_norm is not None:
        return None
    return Site(layer, stream)
