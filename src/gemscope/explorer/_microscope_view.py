"""The reading of a text as a page shows it: colours, one token's features, layers side by side."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemscope import hub
from gemscope.errors import InputError
from gemscope.features import shade, shown
from gemscope.sites import each, parse_sites

from ._microscope_reading import (
    Figures,
    Layers,
    Reading,
    Readings,
    chosen_of,
    default,
    entry,
    figures_of,
    fired,
    layers_of,
    said_of,
)
from ._render import short
from ._workbench import Workbench

Key = tuple[str, int]
SORTS = ("strength", "density", "frequency")


@dataclass(frozen=True, slots=True)
class Asked:
    """The state of the page, which its address holds."""

    text: str
    saes: tuple[str, ...] = ()
    feature: str = ""
    """ADDRESS/INDEX of the feature that colours; empty for the strongest."""
    token: int | None = None
    sort: str = "strength"
    dense: float = 0.01
    top: int = 8

    def query(self) -> dict[str, Any]:
        """The same as query parameters."""
        return {
            "text": self.text, "sae": list(self.saes), "feature": self.feature or None,
            "token": self.token, "sort": self.sort, "dense": self.dense, "top": self.top,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Seen:
    """A reading with what is known of its dictionaries."""

    reading: Reading
    figures: dict[str, Figures]
    fired: dict[str, list[list[tuple[int, float]]]]
    layers: dict[str, Layers]


def view(bench: Workbench, readings: Readings, asked: Asked, *, colours: bool) -> dict[str, Any]:
    """What the templates show of a text; `colours` if the tokens are drawn too."""
    chosen = chosen_of(bench, asked.saes)
    colouring = _colouring(bench, asked.feature)
    more = [colouring[0]] if colouring and colouring[0] not in chosen else []
    reading = readings.read(asked.text, [*chosen, *more])
    figures = {a: figures_of(bench, a) for a in (*chosen, *more)}
    seen = _Seen(
        reading, figures, {a: fired(reading, a, figures[a], asked.dense) for a in chosen},
        {a: layers_of(bench, a) for a in chosen},
    )  # fmt: skip
    n_tokens = len(reading.tokens)
    lock = asked.token
    if lock is not None and not (0 <= lock < n_tokens and reading.counted[lock]):
        lock = None
    totals = _totals(seen)
    rows = _at(seen, lock, totals, asked) if lock is not None else _over(seen, totals, asked)
    layers = _layers(bench, seen, lock, chosen) if lock is not None else []
    strongest = _strongest(seen) if colours and colouring is None else {}
    keys = {(r["address"], r["feature"]) for r in (*rows, *layers) if r["feature"] is not None}
    said = said_of(bench, keys | {(a, f) for a, f, _ in strongest.values()})
    for row in (*rows, *layers):
        if row["feature"] is not None:
            own = seen.figures[row["address"]]
            row |= entry(row["address"], row["feature"], row["value"], own, said, None)
            row["shade"] = shade(row["value"], row["max"] or row["value"])
            row["indexed"] = own.density is not None
    places = [i for i, counts in enumerate(reading.counted) if counts]
    out: dict[str, Any] = {
        "rows": rows, "layers": layers, "lock": lock, "n_tokens": n_tokens, "chosen": chosen,
        "n_counted": len(places),
        "before": max((i for i in places if lock is not None and i < lock), default=None),
        "after": min((i for i in places if lock is None or i > lock), default=None),
        "lock_text": None if lock is None else reading.tokens[lock],
        "l0": _counts(seen, lock) if lock is not None else {},
    }  # fmt: skip
    if colours:
        out |= _coloured(bench, seen, colouring, strongest, said)
    return out


def _counts(seen: _Seen, lock: int) -> dict[str, tuple[int, int]]:
    """How many features fire on a token, by dictionary, and how many of them are hidden."""
    all_of = {a: int(seen.reading.codes[a].counts[lock]) for a in seen.fired}
    return {a: (n, n - len(seen.fired[a][lock])) for a, n in all_of.items()}


def _colouring(bench: Workbench, name: str) -> Key | None:
    """The feature that colours, checked."""
    if not name:
        return None
    address, feature = hub.feature_of(name)
    d_sae = bench.facts(address)["d_sae"]
    if feature >= d_sae:
        raise InputError(f"no feature {feature}: {address} has 0 to {d_sae - 1}")
    return address, feature


def _totals(seen: _Seen) -> dict[Key, tuple[float, float, int, int]]:
    """Of each feature: summed activation, the largest, its place, and how many tokens."""
    out: dict[Key, tuple[float, float, int, int]] = {}
    for address, tokens in seen.fired.items():
        for place, pairs in enumerate(tokens):
            for feature, value in pairs:
                total, peak, at, n = out.get((address, feature), (0.0, 0.0, place, 0))
                if value > peak:
                    peak, at = value, place
                out[address, feature] = (total + value, peak, at, n + 1)
    return out


def _order(seen: _Seen, key: Key, value: float, total: float, sort: str) -> tuple:
    if sort == "density":
        density = seen.figures[key[0]].of(key[1])["density"]
        return (1.0 if density is None else density, -value, key)
    return (-total if sort == "frequency" else -value, key)


def _at(seen: _Seen, lock: int, totals: dict, asked: Asked) -> list[dict[str, Any]]:
    """The features of one token, dictionary by dictionary."""
    rows = []
    for address, tokens in seen.fired.items():
        pairs = sorted(
            tokens[lock],
            key=lambda p: _order(seen, (address, p[0]), p[1], totals[address, p[0]][0], asked.sort),
        )
        for feature, value in pairs[: asked.top]:
            rows.append(_row(seen, address, feature, value, totals[address, feature]))
    return rows


def _over(seen: _Seen, totals: dict, asked: Asked) -> list[dict[str, Any]]:
    """The features of the whole text."""
    rows = []
    for address in seen.fired:
        own = [(key, t) for key, t in totals.items() if key[0] == address]
        own.sort(key=lambda pair: _order(seen, pair[0], pair[1][1], pair[1][0], asked.sort))
        rows += [_row(seen, address, key[1], found[1], found) for key, found in own[: asked.top]]
    return rows


def _row(
    seen: _Seen, address: str, feature: int, value: float, found: tuple[float, float, int, int]
) -> dict[str, Any]:
    layers = seen.layers[address]
    return {
        "address": address, "feature": feature, "value": value, "total": found[0],
        "place": found[2], "token": seen.reading.tokens[found[2]], "n": found[3],
        "layer": None if layers is None else layers(feature),
    }  # fmt: skip


def _layers(
    bench: Workbench, seen: _Seen, lock: int, chosen: Sequence[str]
) -> list[dict[str, Any]]:
    """The strongest feature of the token in each layer of each dictionary, from below."""
    rows: list[dict[str, Any]] = []
    for address in chosen:
        reads = each(parse_sites(bench.facts(address)["reads"]))
        best: dict[int, tuple[int, float]] = {}
        own = seen.layers[address]
        for feature, value in seen.fired[address][lock]:
            best.setdefault(reads[0].layer if own is None else own(feature), (feature, value))
        for site in reads:
            found = best.get(site.layer)
            rows.append(
                {
                    "address": address, "site": str(site), "in_layer": site.layer,
                    "feature": found and found[0], "value": found and found[1],
                }
            )  # fmt: skip
    rows.sort(key=lambda row: row["in_layer"])
    return rows if len({row["site"] for row in rows}) > 1 else []


def _strongest(seen: _Seen) -> dict[int, tuple[str, int, float]]:
    """By token the feature nearest to its own maximum; among unknown maxima the largest value."""
    out: dict[int, tuple[float, str, int, float]] = {}
    for address, tokens in seen.fired.items():
        maxima = seen.figures[address].max
        for place, pairs in enumerate(tokens):
            for feature, value in pairs if maxima is not None else pairs[:1]:
                most = value if maxima is None or not maxima[feature] > 0 else maxima[feature]
                if value / most > out.get(place, (0.0,))[0]:
                    out[place] = (value / most, address, feature, value)
    return {place: found[1:] for place, found in out.items()}


def _coloured(
    bench: Workbench, seen: _Seen, colouring: Key | None,
    strongest: dict[int, tuple[str, int, float]], said: dict,
) -> dict[str, Any]:  # fmt: skip
    """The tokens with their colours, and what colours them."""
    reading = seen.reading
    if colouring is None:
        peaks: dict[str, float] = defaultdict(float)
        for address, _, value in strongest.values():
            peaks[address] = max(peaks[address], value)
        at = {
            place: (value, seen.figures[a].of(f)["max"] or peaks[a], f"{short(a)}/{f}",
                    said.get((a, f), (None,))[0])
            for place, (a, f, value) in strongest.items()
        }  # fmt: skip
        about = None
    else:
        address, feature = colouring
        code = reading.codes[address]
        chosen = code.indices == feature
        values = dict(zip(code.rows[chosen].tolist(), code.values[chosen].tolist(), strict=True))
        own = seen.figures[address].of(feature)
        text, score = said_of(bench, [colouring]).get(colouring, (None, None))
        most = own["max"] or max(values.values(), default=0.0)
        at = {place: (v, most, f"{short(address)}/{feature}", text) for place, v in values.items()}
        about = own | {
            "address": address, "feature": feature, "explanation": text, "score": score,
            "n": len(values), "peak": max(values.values(), default=0.0),
            "indexed": own["density"] is not None,
        }  # fmt: skip
    tokens = []
    for place, (piece, counts) in enumerate(zip(reading.pieces, reading.counted, strict=True)):
        value, most, name, text = at.get(place, (0.0, 0.0, "", None))
        tokens.append(
            {
                "place": place, "text": _drawn(piece), "counted": counts, "value": value,
                "shade": shade(value, most), "name": name, "said": text, "part": not piece,
            }
        )  # fmt: skip
    return {"tokens": tokens, "colouring": about}


def _drawn(piece: str) -> str:
    """A token in running text: breaks are marked, and made."""
    return "".join(shown(c) + ("\n" if c == "\n" else "") for c in piece)


def choices(bench: Workbench) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Dictionaries by stream and site to choose from; and sets of one a layer."""
    known = list(bench.known().values())
    if not known:
        known = [bench.facts(default(bench))]
    streams: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for facts in known:
        sites = parse_sites(facts["reads"])
        streams[str(each(sites)[0].stream)][str(sites)].append(facts)
    groups, sets = [], []
    for stream, sites_of in sorted(streams.items()):
        ordered = sorted(sites_of.items(), key=lambda pair: each(parse_sites(pair[0]))[0].layer)
        groups.append({"stream": stream, "sites": ordered})
        single = [own for site, own in ordered if len(each(parse_sites(site))) == 1]
        if len(single) > 1:
            widest = [max(own, key=lambda f: (f["d_sae"], f["address"])) for own in single]
            most = min(len(widest), bench.limits.dictionaries)
            step = (len(widest) - 1) / max(1, most - 1)
            chosen = [widest[round(i * step)]["address"] for i in range(most)]
            sets.append({"stream": stream, "addresses": chosen})
    return groups, sets
