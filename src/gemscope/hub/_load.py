"""From an address to a dictionary: locate, read, rename, build."""

import hashlib
from typing import TYPE_CHECKING

from gemscope import formats, miniature

from ._catalog import RELEASE, Entry, locate

if TYPE_CHECKING:
    from gemscope.sae import SAE


def load_sae(address: str, *, device: str = "cpu") -> "SAE":
    """The dictionary at `address`: a catalog address or a local folder.

    Weights stay memory-mapped in their storage type until they are used.
    """
    return build(locate(address), device=device)


def build(entry: Entry, *, device: str = "cpu") -> "SAE":
    """The dictionary that `entry` describes."""
    from gemscope.sae import SAE, JumpReLU, Origin  # torch: listing does without it

    _, tensors = formats.read(entry.path)
    sae = SAE(
        w_enc=tensors["w_enc"],
        b_enc=tensors["b_enc"],
        w_dec=tensors["w_dec"],
        b_dec=tensors["b_dec"],
        # In bfloat16 a threshold would be rounded, and features near it would flip.
        activation=JumpReLU(tensors["threshold"].float()),
        skip=tensors.get("affine_skip_connection"),
        reads=entry.reads,
        writes=entry.writes,
        origin=Origin(
            address=entry.address,
            model=entry.model,
            l0=entry.l0,
            licence=entry.licence,
        ),
    )
    return sae if device == "cpu" else sae.to(device)


def digest(entry: Entry) -> str:
    """SHA-256 of the artefact's parameter file, in hexadecimal."""
    with (entry.path / formats.PARAMETERS).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_source(name: str) -> str:
    """What `transformers` is to load for a model's name: the bundled folder, or the name itself."""
    return str(miniature.MODEL) if name in (RELEASE, miniature.MODEL_NAME) else name
