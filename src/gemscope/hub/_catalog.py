"""What artefacts there are, and what is known of each without loading it."""

import difflib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gemscope import formats, miniature
from gemscope.errors import InputError, nearest
from gemscope.sites import each

from ._describe import Given, describe
from ._entry import Entry
from ._fetch import cached, fetch, find
from ._suites import Suite, canonical_address, suites

RELEASE = "miniature"
"""Name of the bundled release."""


def catalog(
    query: str = "",
    *,
    release: str | None = None,
    model: str | None = None,
    kind: str | None = None,
    stream: str | None = None,
    layer: int | None = None,
    width: int | None = None,
    l0: tuple[float, float] | None = None,
    canonical: bool = False,
) -> list[Entry]:
    """The artefacts that fit, the bundled ones first, then suite by suite.

    Every word of `query` must be in the address, kind or model. `layer` and `stream` are those of
    a site read or written, `width` the number of features (within an eighth: `16k` is 16,384),
    `l0` the least and largest nominal features per token.
    """
    words = query.lower().split()

    def fits(e: Entry) -> bool:
        sites = (*each(e.reads), *each(e.writes))
        return (
            all(w in f"{e.address} {e.kind} {e.model}".lower() for w in words)
            and (model is None or model.lower() in e.model.lower())
            and (kind is None or e.kind == kind)
            and (stream is None or any(s.stream == stream for s in sites))
            and (layer is None or any(s.layer == layer for s in sites))
            and (width is None or abs(e.d_sae - width) <= width / 8)
            and (l0 is None or (e.l0 is not None and l0[0] <= e.l0 <= l0[1]))
            and (not canonical or e.canonical)
        )

    found = [*_bundled()] if release in (None, RELEASE) else []
    for suite in suites():
        if release in (None, suite.name):
            found += suite.entries()
    return [e for e in found if fits(e)]


def releases() -> list[Suite]:
    """The published suites of the catalog; the bundled release is not among them."""
    return list(suites())


def locate(address: str, given: Given = Given(), *, download: bool = True) -> Entry:
    """The artefact of a catalog address, of a local folder, or at `owner/repo/path` of the hub.

    What the files say wins over what names suggest; `given` says what neither does. Of what only
    the hub knows nothing can be said before its files are here: without `download`, it is refused.
    """
    if known := _known(address):
        return _here(known, given)
    # Unlike those of pathlib, these do not fail on what cannot be a path.
    folder = Path(os.path.expanduser(address))
    if address and os.path.isdir(folder):
        return describe(folder, address=str(folder), given=given, known=_of_path(folder))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.=+-]+)*", address) and not _is_release(address):
        remote = find(address)
        if not download and cached(remote) is None:
            raise InputError(
                f"{address} is not in the catalog, and its files are not here: "
                f"gemscope download {address}"
            )
        return describe(fetch(remote), address=address, given=given, remote=remote)
    raise InputError(
        f"no artefact at {address!r}: give an address that `gemscope list` shows, a local folder, "
        f"or owner/repo/path on the hub; nearest: {', '.join(_nearest(address))}"
    )


def published(entry: Entry) -> dict[str, Any] | None:
    """The figures its makers published for an artefact, named as `evaluate` names them.

    A local copy is known by the last two parts of its path, and only with the same model.
    """
    place = entry.path.as_posix() if entry.path else entry.address
    for known in _published():
        suite = known["address"].split("/", 1)[1]
        if known["model"] == entry.model and (
            entry.address == known["address"] or place.endswith("/" + suite)
        ):
            return known
    return None


@cache
def _published() -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / "published.json").read_text("utf-8"))


def _known(address: str) -> Entry | None:
    """The catalog's entry of `address`, in any of its spellings."""
    release, _, rest = address.partition("/")
    if release == RELEASE:
        return next((e for e in _bundled() if e.address == address), None)
    # `google/gemma-scope-2b-pt-res/...` is the same as without its owner, and so is a name with
    # `-canonical`, which SAELens gives.
    for spelling in (address, rest, f"{release.removesuffix('-canonical')}/{rest}"):
        named = canonical_address(spelling) or spelling
        for suite in suites():
            if named.startswith(suite.name + "/"):
                for entry in suite.entries():
                    if entry.address == named:
                        return entry
    remote = _by_remote().get(rest) if address.count("/") >= 2 else None
    return remote if remote and remote.remote and address.startswith(remote.remote.repo) else None


def _here(known: Entry, given: Given) -> Entry:
    """`known` with what its files say, if they are in the hub's cache."""
    if known.path is not None or known.remote is None:
        return known
    folder = cached(known.remote)
    if folder is None:
        return known
    entry = describe(folder, address=known.address, given=given, known=known, remote=known.remote)
    for what in ("reads", "writes"):
        if (said := getattr(entry, what)) != (meant := getattr(known, what)):
            raise InputError(
                f"{folder / formats.CONFIG} says that it {what} {said}, where {known.address} "
                f"{what} {meant}: the folder holds another artefact, get it again"
            )
    return entry


def _of_path(folder: Path) -> Entry | None:
    """The catalog's entry that a folder's place suggests: `.../<repository>/<folder>`."""
    parts = folder.resolve().parts
    for start in range(max(0, len(parts) - 8), len(parts) - 1):
        name, rest = parts[start], parts[start + 1 :]
        if name.startswith("models--"):  # the hub's cache: models--owner--name/snapshots/commit
            name, rest = name.split("--")[-1], rest[2:]
        if entry := _by_remote().get("/".join((name, *rest))):
            return entry
    return None


_NEAR = 20
"""Addresses that are compared letter by letter."""


def _is_release(address: str) -> bool:
    """Whether the first part is a release's name, or one misspelt."""
    name = address.split("/", 1)[0].removesuffix("-canonical")
    known = [RELEASE, *(s.name for s in suites())]
    return bool(difflib.get_close_matches(name, known, 1, 0.8))


def _nearest(address: str) -> list[str]:
    """The nearest addresses: of the nearest release, those that share most words and numbers."""
    names = [RELEASE, *(s.name for s in suites())]
    release, _, rest = address.removeprefix("google/").partition("/")
    known = catalog(release=nearest(release, names, 1)[0])
    wanted = _words(rest)

    l0 = re.search(r"l0_(\d+)$", rest)

    def distance(entry: Entry) -> tuple[int, int, float]:
        words = _words(entry.address.partition("/")[2])
        layers = abs(_first_number(words) - _first_number(wanted))
        # The measured L0 of a folder's name is near or far, not right or wrong.
        off = abs((entry.l0 or 0.0) - float(l0[1])) if l0 else 0.0
        return -len(words & wanted), layers, off

    def letters(entry: Entry) -> float:
        return difflib.SequenceMatcher(None, entry.address, address).ratio()

    near = sorted(known, key=distance)[:_NEAR]
    return [e.address for e in sorted(near, key=lambda e: (*distance(e), -letters(e)))[:3]]


def _words(address: str) -> set[str]:
    plain = re.sub(r"layer_\d+|average_l0_\d+", "", address.lower())
    layers = {f"layer_{n}" for n in re.findall(r"layer_(\d+)", address)}
    return layers | set(re.findall(r"\d*[a-z]+\d*|\d+", plain))


def _first_number(words: set[str]) -> int:
    return next((int(w[6:]) for w in words if w.startswith("layer_")), 0)


@cache
def _by_remote() -> dict[str, Entry]:
    """Entries by repository name, without its owner, and folder."""
    out = {}
    for suite in suites():
        for entry in suite.entries():
            if entry.remote is not None:
                name = entry.remote.repo.split("/")[-1]
                out[f"{name}/{entry.remote.folder}".rstrip("/")] = entry
    return out


@cache
def _bundled() -> tuple[Entry, ...]:
    return tuple(sorted(_scan(miniature.SCOPE), key=lambda e: (each(e.reads), e.address)))


def _scan(root: Path) -> Iterator[Entry]:
    for config in root.glob(f"*/*/{formats.CONFIG}"):
        folder = config.parent
        address = f"{RELEASE}/{folder.relative_to(root).as_posix()}"
        yield describe(folder, address=address, licence=miniature.LICENCE)
