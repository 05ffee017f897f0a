"""From an address to a dictionary: locate, fetch, read, build."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemscope import formats, miniature
from gemscope.errors import InputError
from gemscope.sites import Site, Sites, Stream, parse_sites

from ._catalog import RELEASE, locate
from ._describe import Given, describe
from ._entry import Entry
from ._fetch import fetch

if TYPE_CHECKING:
    from gemscope.sae import SAE, CrossLayer, Dictionary, Origin


def load_sae(
    address: str,
    *,
    reads: str | Site | Sites | None = None,
    writes: str | Site | Sites | None = None,
    model: str | None = None,
    device: str = "cpu",
) -> "Dictionary":
    """The dictionary at `address`: a catalog address, a local folder, or `owner/repo/path`.

    Downloaded if it is not here. `reads`, `writes` and `model` say what the files do not. Weights
    stay memory-mapped in their storage type until they are used.
    """
    given = Given(reads=_parsed(reads), writes=_parsed(writes), model=model)
    return build(locate(address, given), device=device)


def obtain(entry: Entry) -> Entry:
    """`entry` with its files here, downloaded if they are not, and with what they say."""
    if entry.path is not None or entry.remote is None:
        return entry
    folder = fetch(entry.remote)
    return describe(folder, address=entry.address, known=entry, remote=entry.remote)


def build(entry: Entry, *, device: str = "cpu") -> "Dictionary":
    """The dictionary that `entry` describes."""
    from gemscope.sae import Origin  # torch: listing does without it

    entry = obtain(entry)
    parts = formats.read(_folder(entry))
    origin = Origin(address=entry.address, model=entry.model, l0=entry.l0, licence=entry.licence)
    many = isinstance(entry.reads, Sites)
    made = _cross_layer(entry, parts, origin) if many else _sae(entry, parts[0], origin)
    return made if device == "cpu" else made.to(device)


def digest(entry: Entry) -> str:
    """SHA-256 of the artefact's parameters in hexadecimal; of several files, of their digests."""
    files = formats.inspect(_folder(entry)).files
    found = []
    for file in files:
        with file.open("rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def model_source(name: str) -> str:
    """What `transformers` is to load for a model's name: the bundled folder, or the name itself."""
    return str(miniature.MODEL) if name in (RELEASE, miniature.MODEL_NAME) else name


def _folder(entry: Entry) -> Path:
    if entry.path is None:
        raise InputError(f"{entry.address} is not here: gemscope download {entry.address}")
    return entry.path


def _parsed(sites: str | Site | Sites | None) -> Site | Sites | None:
    return parse_sites(sites) if isinstance(sites, str) else sites


def _sae(entry: Entry, part: formats.Part, origin: "Origin") -> "SAE":
    from gemscope.sae import SAE, JumpReLU, ReLU, TopK

    assert isinstance(entry.reads, Site)
    assert isinstance(entry.writes, Site)
    if part.threshold is not None:
        # In bfloat16 a threshold would be rounded, and features near it would flip.
        activation: JumpReLU | TopK | ReLU = JumpReLU(part.threshold.float())
    else:
        activation = ReLU() if part.k is None else TopK(part.k)
    sae = SAE(
        w_enc=part.w_enc,
        b_enc=part.b_enc,
        w_dec=part.w_dec,
        b_dec=part.b_dec,
        activation=activation,
        skip=part.skip,
        reads=entry.reads,
        writes=entry.writes,
        origin=origin,
    )
    if entry.layout == "gemma-scope" and entry.reads.stream is Stream.EMBED:
        # Trained on embeddings before Gemma scales them by the root of its width; the site holds
        # them after. Features keep their units, everything that meets activations is converted.
        scale = sae.d_in**0.5
        sae = replace(
            sae,
            w_enc=sae.w_enc.float() / scale,
            w_dec=sae.w_dec.float() * scale,
            b_dec=sae.b_dec.float() * scale,
        )
    return sae


def _cross_layer(entry: Entry, parts: tuple[formats.Part, ...], origin: "Origin") -> "CrossLayer":
    from gemscope.sae import CrossLayer, Layer

    assert isinstance(entry.reads, Sites)
    assert isinstance(entry.writes, Sites)
    layers = []
    for part in parts:
        assert part.threshold is not None
        layers.append(
            Layer(
                w_enc=part.w_enc,
                b_enc=part.b_enc,
                threshold=part.threshold.float(),
                w_dec=part.w_dec,
                b_dec=part.b_dec,
                skip=part.skip,
            )
        )
    return CrossLayer(layers=tuple(layers), reads=entry.reads, writes=entry.writes, origin=origin)
