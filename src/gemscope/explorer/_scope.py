"""The scope: every artefact of a release at its place, coloured by a figure, and its ladders."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import log
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gemscope import hub
from gemscope.errors import InputError, did_you_mean
from gemscope.sites import Site, Sites, each, parse_sites

from ._render import page
from ._scope_figures import Figures, Measured, first
from ._scope_plots import plots
from ._workbench import Workbench
from ._worker import Worker

OTHERS = "others"
"""Stands for what is indexed or reported and in no release."""
_FEW = 8
"""Layers beside which cells have room for their figures."""


class Colour(StrEnum):
    """What cells are coloured by."""

    L0 = "l0"
    FVU = "fvu"
    DELTA_LOSS = "delta_loss"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Cell:
    """An artefact of the scope."""

    address: str
    part: str
    """What its panel is called."""
    layer: str
    d_sae: int
    nominal_l0: float | int | None
    affine: bool
    indexed: bool
    here: bool
    figures: dict[str, float | int | None]
    """`l0`, `fvu`, `delta_loss` and `dead`; None is not measured."""
    sources: dict[str, str]

    def value(self, colour: str) -> float | None:
        """What it is coloured by: an L0 that nobody measured is the nominal one."""
        found = self.figures[colour]
        return self.nominal_l0 if found is None and colour == Colour.L0 else found


def router(bench: Workbench, worker: Worker) -> APIRouter:
    """`/scope` and its JSON."""
    made, measured = APIRouter(), Measured(bench)
    name = Query(max_length=100, description="Release of the catalog, or `others`.")

    @made.get("/scope", include_in_schema=False)
    def scope_page(
        request: Request,
        release: Annotated[str | None, name] = None,
        colour: Colour = Colour.FVU,
        at: Annotated[str | None, Query(max_length=300)] = None,
    ) -> Response:
        # An address says which release it is of.
        found = _scope(bench, measured, release or (at and _release_of(at)))
        chosen = next((c for c in found["cells"] if c.address == at), None)
        if at is not None and chosen is None:
            raise InputError(f"{at!r} is not in the release {found['release']}")
        if request.headers.get("hx-target") == "chosen":
            return page(request, "scope_chosen.html", chosen=chosen, figures=FIGURES)
        panels = _panels(found["cells"])
        return page(
            request, "scope.html", scope=found, colour=colour, chosen=chosen, figures=FIGURES,
            panels=panels, scale=_Scale.of(found["cells"], colour),
            plots=plots(found["cells"], colour), releases=_releases(bench, measured),
            few=all(len(panel.layers) <= _FEW for panel in panels),
            told=[c for c in found["cells"] if c.indexed or c.sources],
        )  # fmt: skip

    @made.get(
        "/api/scope", tags=["scope"], summary="Artefacts of a release with their figures",
        responses={422: {"description": "No such release."}},
    )  # fmt: skip
    def scope_json(release: Annotated[str | None, name] = None) -> dict[str, Any]:
        found = _scope(bench, measured, release)
        return found | {"cells": [asdict(cell) for cell in found["cells"]]}

    return made


FIGURES = {
    "l0": ("L0", "features per token"),
    "fvu": ("FVU", "share of variance not explained"),
    "delta_loss": ("Delta loss", "nats per token, when spliced in"),
    "dead": ("Dead", "share of features"),
}
"""Names and units of what cells are coloured by."""


def _scope(bench: Workbench, measured: Measured, release: str | None) -> dict[str, Any]:
    """The artefacts of a release, by default that of what is open."""
    known = bench.known()
    if release is None:
        names = [s.name for s in hub.releases()] + [hub.BUNDLED_RELEASE]
        firsts = [a.partition("/")[0] for a in known]
        release = next((n for n in firsts if n in names), OTHERS if known else hub.BUNDLED_RELEASE)
    entries = _entries(bench, measured, release)
    figures = measured.of(entries)
    cells = [_cell(entry, figures[entry.address], known) for entry in entries]
    return {
        "release": release,
        "model": entries[0].model if entries else bench.model_name,
        "artefacts": len(cells),
        "indexed": sum(c.indexed for c in cells),
        "measured": sum(bool(c.sources) for c in cells),
        "unreadable": measured.wrong(),
        "cells": cells,
    }


def _releases(bench: Workbench, measured: Measured) -> list[str]:
    names = [hub.BUNDLED_RELEASE, *(s.name for s in hub.releases())]
    return names + ([OTHERS] if _others(bench, measured) else [])


def _release_of(address: str) -> str:
    name = address.partition("/")[0]
    known = [hub.BUNDLED_RELEASE, *(s.name for s in hub.releases())]
    return name if name in known else OTHERS


def _entries(bench: Workbench, measured: Measured, release: str) -> list[hub.Entry]:
    if release == OTHERS:
        return _others(bench, measured)
    names = [hub.BUNDLED_RELEASE, *(s.name for s in hub.releases())]
    if release not in names:
        raise InputError(f"no release {release[:100]!r}; {did_you_mean(release, names)}")
    return hub.catalog(release=release)


def _others(bench: Workbench, measured: Measured) -> list[hub.Entry]:
    """What is indexed and in no release: enough of an entry to have a place."""
    names = {hub.BUNDLED_RELEASE, *(s.name for s in hub.releases())}
    out = []
    for address, facts in bench.known().items():
        if address.partition("/")[0] in names:
            continue
        out.append(
            hub.Entry(
                address=address, kind=facts["kind"], reads=parse_sites(facts["reads"]),
                writes=parse_sites(facts["writes"]), d_in=facts["d_in"], d_out=facts["d_out"],
                d_sae=facts["d_sae"], l0=facts["nominal_l0"], affine="affine" in address,
                dtype=facts["dtype"], model=facts["model"], licence=None, layout="",
            )
        )  # fmt: skip
    return out


def _cell(entry: hub.Entry, found: Sequence[Figures], known: dict[str, Any]) -> Cell:
    said = {name: first(found, name) for name in Colour}
    return Cell(
        address=entry.address,
        part=_part(entry),
        layer=_layers(entry.reads),
        d_sae=entry.d_sae,
        nominal_l0=entry.l0,
        affine=entry.affine,
        indexed=entry.address in known,
        here=entry.path is not None,
        figures={name: one and one[0] for name, one in said.items()},
        sources={name: one[1] for name, one in said.items() if one},
    )


def _part(entry: hub.Entry) -> str:
    """Artefacts of a part differ in layer, width and L0."""
    reads, writes = each(entry.reads)[0].stream, each(entry.writes)[0].stream
    name = str(reads) if reads == writes else f"{reads} → {writes}"
    # In some releases every layer has some widths, and some layers have all.
    folder = entry.address.split("/")[1] if entry.address.count("/") else ""
    every = ", every layer" if folder.endswith("_all") else ""
    kind = {"sae": "SAE", "clt": "cross-layer transcoder"}.get(entry.kind, entry.kind)
    return f"{kind}: {name}{', affine' if entry.affine else ''}{every}"


def _layers(sites: Site | Sites) -> str:
    layers = [site.layer for site in each(sites)]
    if len(layers) > 2 and layers == [*range(layers[0], layers[-1] + 1)]:
        return f"{layers[0]}–{layers[-1]}"
    return "+".join(map(str, layers))


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of a panel: the artefacts of one width, of which L0 has the same rank in its layer."""

    d_sae: int
    l0: str
    cells: list[Cell | None]


@dataclass(frozen=True, slots=True)
class _Panel:
    name: str
    layers: list[str]
    lines: list[_Line]


def _panels(cells: Sequence[Cell]) -> list[_Panel]:
    """The grid: a panel of each part, layers across, widths and L0 down."""
    parts: dict[str, dict[tuple[str, int], list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        parts[cell.part][cell.layer, cell.d_sae].append(cell)
    out = []
    for name, places in parts.items():
        layers = list(dict.fromkeys(layer for layer, _ in places))
        lines = []
        for d_sae in sorted({d for _, d in places}):
            stacks = [
                sorted(places.get((layer, d_sae), []), key=lambda c: (c.nominal_l0 or 0, c.address))
                for layer in layers
            ]
            for rank in range(max(map(len, stacks))):
                row = [stack[rank] if rank < len(stack) else None for stack in stacks]
                lines.append(_Line(d_sae, _range([c.nominal_l0 for c in row if c]), row))
        out.append(_Panel(name, layers, lines))
    return out


def _range(values: Sequence[float | None]) -> str:
    known = sorted(v for v in values if v is not None)
    if not known:
        return "?"
    low, high = f"{known[0]:g}", f"{known[-1]:g}"
    return low if low == high else f"{low}–{high}"


@dataclass(frozen=True, slots=True)
class _Scale:
    """From a figure to how dark its cell is: 0 is the least of all, 1 the most."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, cells: Sequence[Cell], colour: str) -> "_Scale | None":
        values = [v for c in cells if (v := c.value(colour)) is not None]
        if not values:
            return None
        return cls(min(values), max(values), colour == Colour.L0 and min(values) > 0)

    def share(self, value: float | int) -> float:
        """Between 0 and 1."""
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            return log(value / self.low) / log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def steps(self) -> list[float]:
        """Five figures for the legend."""
        if self.logarithmic:
            return [self.low * (self.high / self.low) ** (i / 4) for i in range(5)]
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]
