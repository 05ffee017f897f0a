"""The published suites, expanded from the compact `catalog.json`.

`scripts/catalog/make.py` writes that file and says where its facts come from. A group is a product:
each of its layers, widths, labels and suffixes with each. What follows from an artefact's name by a
rule its makers published (features, nominal L0, sites, files) is not in the file but here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gemscope.sites import Site, Sites, Stream, each

from ._entry import Entry, Remote

FEATURES = {
    "4k": 4_096, "16k": 16_384, "32k": 32_768, "65k": 65_536, "131k": 131_072, "262k": 262_144,
    "524k": 524_288, "1m": 1_048_576, "8x": 32_768, "32x": 131_072,
}  # fmt: skip
"""Features of a width's name. Llama Scope names multiples of Llama's 4,096."""

# What each part of a suite is: its kind, the stream it reads and the one it writes.
_PARTS = {
    "res": ("sae", Stream.RESID_POST, Stream.RESID_POST),
    "mlp": ("sae", Stream.MLP_OUT, Stream.MLP_OUT),
    "att": ("sae", Stream.ATTN_HEADS, Stream.ATTN_HEADS),
    "embedding": ("sae", Stream.EMBED, Stream.EMBED),
    "transcoders": ("transcoder", Stream.MLP_IN_UNSCALED, Stream.MLP_OUT),
    "resid_post": ("sae", Stream.RESID_POST, Stream.RESID_POST),
    "mlp_out": ("sae", Stream.MLP_OUT, Stream.MLP_OUT),
    "attn_out": ("sae", Stream.ATTN_HEADS, Stream.ATTN_HEADS),
    "transcoder": ("transcoder", Stream.MLP_IN, Stream.MLP_OUT),
    "crosscoder": ("crosscoder", Stream.RESID_POST, Stream.RESID_POST),
    "clt": ("clt", Stream.MLP_IN, Stream.MLP_OUT),
    "R": ("sae", Stream.RESID_POST, Stream.RESID_POST),
    "M": ("sae", Stream.MLP_OUT, Stream.MLP_OUT),
    "A": ("sae", Stream.ATTN_OUT, Stream.ATTN_OUT),
    "TC": ("transcoder", Stream.MLP_IN_UNSCALED, Stream.MLP_OUT),
}
_CANONICAL_PARTS = ("res", "mlp", "att")
_JOINT = {"medium": 50, "big": 150}
_LLAMA_L0 = 50.0
# Files that loading needs, those it can do without, and the type they are stored in.
_FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "gemma-scope": (("params.npz",), (), "float32"),
    "gemma-scope-2": (("params.safetensors",), ("config.json",), "float32"),
    "llama-scope": (("hyperparams.json", "checkpoints/final.safetensors"), (), "bfloat16"),
    "llama-scope-r1-distill": (("config.json", "sae_weights.safetensors"), (), "float32"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model gives the shapes of its dictionaries."""

    n_layers: int
    d_model: int
    d_heads: int
    """Attention heads, concatenated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Artefacts of one suite that differ in layer, width, label or suffix."""

    part: str
    layers: str = ""
    """Such as `0-25` or `7,13,17,22`."""
    widths: tuple[str, ...]
    labels: tuple[str, ...] = ("",)
    """Of the nominal L0."""
    suffixes: tuple[str, ...] = ("",)
    measured: tuple[str, ...] = ()
    """Gemma Scope: of each layer, the L0 of its folders, such as `5: 18* 34 68 143`. A starred one
    has dashboards of its own, named with its L0; the one nearest to 100 has the group's, of two as
    near the first, or the one with an exclamation mark."""
    dashboard: str = ""
    """Name of the dashboards, with `{layer}` and `{width}`; empty if there are none."""
    by_rule: bool = False
    """Whether no list has these artefacts: that they exist follows from what their makers wrote."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Suite:
    """What was published together: a release."""

    name: str
    """First part of its artefacts' addresses."""
    repos: tuple[str, ...]
    model: str
    licence: str | None
    layout: str
    about: str
    shape: Shape = field(repr=False)
    groups: tuple[Group, ...] = field(repr=False)

    def entries(self) -> tuple[Entry, ...]:
        """Its artefacts, part by part, in each by layer, width and L0."""
        return _expanded(self)

    def by_rule(self) -> frozenset[str]:
        """Addresses that no list has: their artefacts may turn out not to be there."""
        return frozenset(e.address for g in self.groups if g.by_rule for e in _entries(self, g))


@cache
def suites() -> tuple[Suite, ...]:
    """The published suites."""
    return parse((Path(__file__).parent / "catalog.json").read_text("utf-8"))


def parse(text: str) -> tuple[Suite, ...]:
    """The suites that the text of a catalog file describes."""
    file = json.loads(text)
    return tuple(
        Suite(
            **{name: _frozen(value) for name, value in suite.items() if name != "groups"},
            shape=Shape(**file["models"][suite["model"]]),
            groups=tuple(
                Group(**{name: _frozen(value) for name, value in group.items()})
                for group in suite["groups"]
            ),
        )
        for suite in file["suites"]
    )


def canonical_address(address: str) -> str | None:
    """The address that `.../width_16k/canonical` stands for; None if it stands for nothing."""
    release, _, rest = address.partition("/")
    stem = address.removesuffix("canonical")
    if not rest.endswith("/canonical"):
        return None
    for suite in suites():
        if suite.name == release:
            for entry in suite.entries():
                if entry.canonical and entry.address.startswith(stem):
                    return entry.address
    return None


def model_shape(name: str) -> tuple[int, int] | None:
    """Layers and width of the residual stream of a model that has a suite."""
    for suite in suites():
        if suite.model == name:
            return suite.shape.n_layers, suite.shape.d_model
    return None


def nominal_l0(label: str, layer: int, n_layers: int, *, every_layer: bool) -> int:
    """Gemma Scope 2's target of a single layer: it rises over the first third of the model.

    `big` is less in the folders that have every layer (`resid_post_all`) than in the others.
    """
    low, high = {"small": (10, 20), "medium": (30, 60), "big": (60, 150)}[label]
    if label == "big" and every_layer:
        high = 120
    return low + (high - low) * min(n_layers, 3 * layer) // n_layers


def layers_of(text: str) -> tuple[int, ...]:
    """The layers that a group's `0-3,5` stands for."""
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return tuple(out)


class _Row(NamedTuple):
    """What tells an artefact from the others of its group."""

    folder: str
    layers: int | tuple[int, ...]
    d_sae: int
    l0: float | None
    affine: bool = False
    canonical: bool = False
    dashboard: str | None = None
    repo: str = ""
    """Where it is not the suite's only one."""
    name: str = ""
    """In addresses, where that is not the folder."""


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@cache
def _expanded(suite: Suite) -> tuple[Entry, ...]:
    parts: dict[str, list[Entry]] = {}
    for group in suite.groups:
        parts.setdefault(group.part, []).extend(_entries(suite, group))
    for entries in parts.values():
        entries.sort(key=lambda e: (each(e.reads)[0].layer, e.d_sae, e.l0 or 0.0, e.address))
    return tuple(entry for entries in parts.values() for entry in entries)


def _entries(suite: Suite, group: Group) -> Iterator[Entry]:
    # Llama Scope's distilled part is named after the mix of text it was trained on.
    mixed = suite.layout == "llama-scope-r1-distill"
    kind, reads, writes = _PARTS["R" if mixed else group.part.removesuffix("_all")]
    d_in, d_out = _width(suite.shape, reads), _width(suite.shape, writes)
    files, optional, dtype = _FILES[suite.layout]
    if kind in ("crosscoder", "clt"):
        count = len(layers_of(group.layers))
        files = tuple(f"params_layer_{i}.safetensors" for i in range(count))
    for row in _ROWS[suite.layout](suite, group):
        yield Entry(
            address=f"{suite.name}/{row.name or row.folder}",
            kind=kind,
            reads=_sites(row.layers, reads),
            writes=_sites(row.layers, writes),
            d_in=d_in,
            d_out=d_out,
            d_sae=row.d_sae,
            l0=row.l0,
            affine=row.affine,
            dtype=dtype,
            model=suite.model,
            licence=suite.licence,
            layout=suite.layout,
            canonical=row.canonical,
            neuronpedia=row.dashboard,
            remote=Remote(row.repo or suite.repos[0], row.folder, files, optional),
        )


def _width(shape: Shape, stream: Stream) -> int:
    return shape.d_heads if stream is Stream.ATTN_HEADS else shape.d_model


@cache
def _sites(layers: int | tuple[int, ...], stream: Stream) -> Site | Sites:
    if isinstance(layers, int):
        return Site(layers, stream)
    return Sites(Site(layer, stream) for layer in layers)


def _dashboard(group: Group, layer: int, width: str) -> str | None:
    return group.dashboard.format(layer=layer, width=width) if group.dashboard else None


def _gemma_scope(suite: Suite, group: Group) -> Iterator[_Row]:
    (width,) = group.widths
    for line in group.measured:
        number, _, values = line.partition(": ")
        layer = int(number)
        place = "embedding" if group.part == "embedding" else f"layer_{layer}"
        dashboard = _dashboard(group, layer, width)
        found = [(int(value.rstrip("*!")), value) for value in values.split()]
        chosen = min(found, key=lambda f: (abs(f[0] - 100), f[1][-1] != "!"))[0]
        for l0, value in found:
            own = f"{dashboard}__l0-{l0}" if value[-1] == "*" else None
            yield _Row(
                folder=f"{place}/width_{width}/average_l0_{l0}",
                layers=layer,
                d_sae=FEATURES[width],
                l0=float(l0),
                canonical=l0 == chosen and group.part in _CANONICAL_PARTS,
                dashboard=dashboard if l0 == chosen else own,
            )


def _gemma_scope_2(suite: Suite, group: Group) -> Iterator[_Row]:
    if group.part in ("crosscoder", "clt"):
        yield from _joint(group)
        return
    every = group.part.endswith("_all")
    for layer in layers_of(group.layers):
        for label in group.labels:
            l0 = nominal_l0(label, layer, suite.shape.n_layers, every_layer=every)
            for width in group.widths:
                dashboard = _dashboard(group, layer, width)
                for suffix in group.suffixes:
                    yield _Row(
                        folder=f"{group.part}/layer_{layer}_width_{width}_l0_{label}{suffix}",
                        layers=layer,
                        d_sae=FEATURES[width],
                        l0=float(l0),
                        affine=suffix.startswith("_affine"),
                        dashboard=dashboard,
                    )


def _joint(group: Group) -> Iterator[_Row]:
    """Gemma Scope 2's artefacts of several layers together."""
    layers = layers_of(group.layers)
    for width in group.widths:
        if group.part == "clt":
            # As many in each layer, and a multiple of 32: 262k is 262,080 with 18 or 26 layers.
            d_sae = FEATURES[width] // len(layers) // 32 * 32 * len(layers)
            stem = f"clt/width_{width}"
        else:
            d_sae = FEATURES[width]
            stem = f"crosscoder/layer_{'_'.join(map(str, layers))}_width_{width}"
        for label in group.labels:
            for suffix in group.suffixes:
                yield _Row(
                    folder=f"{stem}_l0_{label}{suffix}",
                    layers=layers,
                    d_sae=d_sae,
                    l0=float(_JOINT[label]),
                    affine=suffix == "_affine",
                )


def _llama_scope(suite: Suite, group: Group) -> Iterator[_Row]:
    for layer in layers_of(group.layers):
        for width in group.widths:
            name = f"L{layer}{group.part}-{width}"
            yield _Row(
                folder=f"Llama3_1-8B-Base-{name}",
                layers=layer,
                d_sae=FEATURES[width],
                l0=_LLAMA_L0,
                dashboard=_dashboard(group, layer, width),
                repo=f"fnlp/Llama3_1-8B-Base-LX{group.part}-{width}",
                name=name,
            )


def _llama_scope_r1_distill(suite: Suite, group: Group) -> Iterator[_Row]:
    (width,) = group.widths
    for layer in layers_of(group.layers):
        yield _Row(
            folder=f"{group.part}/L{layer}R",
            layers=layer,
            d_sae=FEATURES[width],
            l0=None,  # not published
            dashboard=_dashboard(group, layer, width),
        )


_ROWS = {
    "gemma-scope": _gemma_scope,
    "gemma-scope-2": _gemma_scope_2,
    "llama-scope": _llama_scope,
    "llama-scope-r1-distill": _llama_scope_r1_distill,
}
