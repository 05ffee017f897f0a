"""`gemscope list`."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError, did_you_mean

from ._show import print_json

if TYPE_CHECKING:
    from gemscope.hub import Entry

_SHOWN = 80


def list_command(
    query: Annotated[str, typer.Argument(help="Words that addresses, kinds or models must have.")] = "",
    release: Annotated[str | None, typer.Option(help="Of this release, such as gemma-scope-2b-pt-res.")] = None,
    model: Annotated[str | None, typer.Option(help="Of models whose name has this, such as gemma-3-1b-pt.")] = None,
    site: Annotated[str | None, typer.Option(help="Reading or writing this stream (resid_post), or site (20.resid_post).")] = None,
    layer: Annotated[int | None, typer.Option(help="Reading or writing this layer.")] = None,
    width: Annotated[str | None, typer.Option(help="With this many features: 16k, 65k, 1m or a number.")] = None,
    l0: Annotated[str | None, typer.Option("--l0", help="With this nominal L0: 50-150, or one number.")] = None,
    kind: Annotated[str | None, typer.Option(help="sae, transcoder, crosscoder or clt.")] = None,
    canonical: Annotated[bool, typer.Option("--canonical", help="Gemma Scope's nearest to an L0 of 100 only.")] = False,
    all_: Annotated[bool, typer.Option("--all", help=f"Print all that fit, not the first {_SHOWN}.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list of all that fit.")] = False,
) -> None:  # fmt: skip
    """List artefacts by address, or their releases."""
    from gemscope.hub import catalog

    stream, layer = _stream(site, layer)
    found = catalog(
        query,
        release=release,
        model=model,
        kind=_kind(kind),
        stream=stream,
        layer=layer,
        width=_width(width),
        l0=_range(l0),
        canonical=canonical,
    )
    if json:
        print_json([entry.row() for entry in found])
        return
    filters = (query, release, model, site, layer, width, l0, kind)
    if not found:
        known = [entry.address for entry in catalog(release=release) or catalog()]
        wanted = " ".join(str(f) for f in filters if f not in (None, "")) or "--canonical"
        raise InputError(f"no artefact matches {wanted!r}; {did_you_mean(wanted, known[::23])}")
    if not any(f not in (None, "") for f in filters) and not (all_ or canonical):
        _print_releases(found)
        return
    _print(found if all_ else found[:_SHOWN])
    if len(found) > _SHOWN and not all_:
        print(f"... and {len(found) - _SHOWN:,} more: narrow the list with filters, or give --all")


def _print(found: list["Entry"]) -> None:
    width = max(len(entry.address) for entry in found)
    shown = [str(e.reads) if e.reads == e.writes else f"{e.reads} > {e.writes}" for e in found]
    sites = max(map(len, shown))
    print(f"{'address':<{width}}  {'kind':<10}  {'site':<{sites}}  {'features':>9}  {'L0':>5}")
    for e, where in zip(found, shown, strict=True):
        l0 = "?" if e.l0 is None else f"{e.l0:g}"
        print(f"{e.address:<{width}}  {e.kind:<10}  {where:<{sites}}  {e.d_sae:>9,}  {l0:>5}")


def _print_releases(found: list["Entry"]) -> None:
    by_release: dict[str, list[Entry]] = {}
    for entry in found:
        by_release.setdefault(entry.release, []).append(entry)
    width = max(len(name) for name in by_release)
    print(f"{'release':<{width}}  {'artefacts':>9}  {'kinds':<36}  model")
    for name, entries in by_release.items():
        kinds = ", ".join(dict.fromkeys(e.kind for e in entries))
        print(f"{name:<{width}}  {len(entries):>9,}  {kinds:<36}  {entries[0].model}")
    print(
        f"\n{len(found):,} artefacts. Those of one release: gemscope list --release NAME; "
        "filters: --site, --layer, --width, --l0, --kind, --canonical, or words"
    )


def _stream(site: str | None, layer: int | None) -> tuple[str | None, int | None]:
    from gemscope.sites import Site, Stream

    if site is None:
        return None, layer
    if site in list(Stream):
        return site, layer
    if "." not in site:
        raise InputError(f"no stream named {site!r}; {did_you_mean(site, Stream)}")
    one = Site.parse(site)
    if layer not in (None, one.layer):
        raise InputError(f"--site {site} and --layer {layer} contradict each other; give one")
    return one.stream, one.layer


def _kind(kind: str | None) -> str | None:
    kinds = ("sae", "transcoder", "crosscoder", "clt")
    if kind is not None and kind not in kinds:
        raise InputError(f"no kind {kind!r}: the kinds are {', '.join(kinds)}")
    return kind


def _width(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})([km]?)", text.lower())
    if match is None or not int(match[1]):
        raise InputError(f"no width {text!r}: give 16k, 65k, 1m or a number of features")
    return int(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2]]


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    if match is None:
        raise InputError(f"no L0 {text!r}: give a number, or two such as 50-150")
    return float(match[1]), float(match[2] or match[1])
