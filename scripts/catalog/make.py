"""Make the catalog of published suites from the registry of SAELens (MIT licence).

    python scripts/catalog/make.py [PRETRAINED_SAES_YAML]

Writes `src/gemscope/hub/catalog.json`, which `hub/_suites.py` expands. Without a path, the registry
of an installed `sae_lens` is read. What the registry lacks or has wrong is completed and corrected
here, each by a table or rule below. Before anything is written, the result is expanded again and
compared with the registry entry by entry.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gemscope.hub._suites import FEATURES, Suite, parse

CATALOG = Path(__file__).parents[2] / "src" / "gemscope" / "hub" / "catalog.json"
PREFIXES = ("gemma-scope-", "llama_scope_")

# Layers, width of the residual stream, and attention heads times their width.
SHAPES = {
    "google/gemma-2-2b": (26, 2304, 8 * 256),
    "google/gemma-2-9b": (42, 3584, 16 * 256),
    "google/gemma-2-27b": (46, 4608, 32 * 128),
    "google/gemma-3-270m": (18, 640, 4 * 256),
    "google/gemma-3-1b": (26, 1152, 4 * 256),
    "google/gemma-3-4b": (34, 2560, 8 * 256),
    "google/gemma-3-12b": (48, 3840, 16 * 256),
    "google/gemma-3-27b": (62, 5376, 32 * 128),
    "meta-llama/Llama-3.1-8B": (32, 4096, 32 * 128),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (32, 4096, 32 * 128),
}
LICENCES = {"gemma-scope": "CC-BY-4.0", "gemma-scope-2": "CC-BY-4.0"}

# The registry gives these the pre-trained model.
WRONG_MODELS = {"gemma-scope-9b-it-res": "gemma-2-9b-it"}
# The registry gives these an L0 that is not their folder's: the folder's is the right one.
WRONG_L0 = {("gemma-scope-9b-pt-res-canonical", "layer_20/width_524k/average_l0_48")}
# The registry gives these the dashboards of another layer, width or L0.
WRONG_DASHBOARDS = {
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"),
    ("gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"),
}
# Two folders are as near to an L0 of 100, and the registry's canonical one is the second.
TIES = {("google/gemma-scope-9b-pt-att", "layer_27/width_16k/average_l0_136")}
# The registry has the sparsest transcoder of each layer, circuit-tracer two more.
TRANSCODERS = (
    "115 104 87 96 157 153 176 130 92 130 159 10 10 14 14 14 17 20 21 19 19 22 24 41 59 68",
    "165 173 155 167 282 272 329 245 168 235 287 17 18 26 24 25 29 34 34 32 31 36 40 69 96 110",
)
# No list has Gemma Scope 2's crosscoders and CLTs; its paper and notebook say for which models and
# in which sizes they are. Crosscoders read the layers of the folders that are not for every layer.
CROSSCODER_WIDTHS = ["65k", "262k", "524k", "1m"]
CLT_WIDTHS = ["262k", "524k"]
CLT_MODELS = ("270m", "1b")
# No list has Llama Scope's transcoders; its paper has one of each layer and width.
LLAMA_WIDTHS = ["8x", "32x"]
# The order of the catalog.
PARTS = (
    "resid_post", "resid_post_all", "attn_out", "attn_out_all", "mlp_out", "mlp_out_all",
    "transcoder", "transcoder_all", "R", "M", "A", "800M-Slimpajama-0-OpenR1-Math-220k",
    "400M-Slimpajama-400M-OpenR1-Math-220k", "0-Slimpajama-800M-OpenR1-Math-220k",
)  # fmt: skip
LABELS = ("", "small", "medium", "big")
ABOUT = {
    "gemma-scope-2b-pt-transcoders": "transcoders of every MLP",
    "llama-scope": "SAEs (R: residual stream, M: MLP, A: attention), transcoders (TC)",
    "llama-scope-r1-distill": "SAEs of the residual stream, for three mixes of text",
}
SITES = {"res": "residual stream", "mlp": "MLP output", "att": "attention output"}


class Artefact(NamedTuple):
    """One entry of the registry, corrected."""

    repo: str
    folder: str
    model: str
    l0: float | None
    dashboard: str | None


class Place(NamedTuple):
    """What tells an artefact from the others of its part; a product has tuples of these."""

    layer: Any
    width: Any
    label: Any
    suffix: Any
    dashboard: str


def artefacts(registry: dict[str, Any]) -> list[Artefact]:
    """What the registry has, each once, corrected."""
    found: dict[tuple[str, str], Artefact] = {}
    for release, listed in registry.items():
        if not release.startswith(PREFIXES):
            continue
        for sae in listed["saes"]:
            made = _corrected(release, listed, sae)
            known = found.get((made.repo, made.folder), made)
            assert (known.model, known.l0) == (made.model, made.l0), (known, made)
            # Of two names of its dashboards, the shorter is the canonical one.
            names = filter(None, (known.dashboard, made.dashboard))
            best = min(names, key=len, default=None)
            found[made.repo, made.folder] = made._replace(dashboard=best)
    return list(found.values())


def _corrected(release: str, listed: dict[str, Any], sae: dict[str, Any]) -> Artefact:
    model, folder = WRONG_MODELS.get(release, listed["model"]), sae["path"]
    l0, dashboard = sae.get("l0"), sae.get("neuronpedia")
    if named := re.search(r"average_l0_(\d+)$", folder):
        # Embedding SAEs and canonical names have no L0 but the folder's.
        wrong = l0 is not None and l0 != int(named[1])
        assert wrong == ((release, folder) in WRONG_L0), (release, folder, l0)
        l0 = int(named[1])
    if dashboard:
        wrong = not _fits(dashboard, folder)
        assert wrong == ((release, folder) in WRONG_DASHBOARDS), (release, folder, dashboard)
        dashboard = None if wrong else dashboard
    return Artefact(
        repo=listed["repo_id"],
        folder=folder,
        model=model if "/" in model else f"google/{model}",
        l0=None if l0 is None else float(l0),
        dashboard=dashboard,
    )


def _fits(dashboard: str, folder: str) -> bool:
    """Whether the layer, width and L0 in the dashboards' name are those in the folder's."""
    layer = re.search(r"(?:layer_|L)(\d+)", folder)
    width = re.search(r"width_([^_/]+)", folder)
    own = re.search(r"__l0-(\d+)$", dashboard)
    return (
        (layer is None or f"/{layer[1]}-" in dashboard)
        and (width is None or dashboard.split("__")[0].endswith(f"-{width[1]}"))
        and (own is None or folder.endswith(f"_{own[1]}"))
    )


def catalog(found: Iterable[Artefact]) -> dict[str, Any]:
    """The content of the catalog file."""
    by_suite: dict[str, list[Artefact]] = defaultdict(list)
    for artefact in found:
        by_suite[_suite_name(artefact.repo)].append(artefact)
    suites = [_suite(name, by_suite[name]) for name in sorted(by_suite, key=_suite_order)]
    return {"models": {s["model"]: _shape(s["model"]) for s in suites}, "suites": suites}


def _suite_name(repo: str) -> str:
    """Release of a repository: its name, but Llama Scope's repositories are one release."""
    name = repo.split("/")[1]
    return "llama-scope" if name.startswith("Llama3_1-8B-Base-LX") else name.lower()


def _suite_order(name: str) -> tuple[Any, ...]:
    """Gemma Scope, Gemma Scope 2, Llama Scope; in each by the model's size, pre-trained first."""
    size = re.search(r"-(\d+)([mb])-(pt|it)", name)
    if size is None:
        return ("llama", name)
    millions = int(size[1]) * (1000 if size[2] == "b" else 1)
    site = [*SITES, "transcoders"].index(name.rsplit("-", 1)[1]) if size.end() < len(name) else 0
    return (_layout(name), millions, size[3] == "it", site)


def _layout(name: str) -> str:
    if name.startswith("llama"):
        return name
    return "gemma-scope-2" if re.match(r"gemma-scope-2-\d", name) else "gemma-scope"


def _shape(model: str) -> dict[str, int]:
    shape = SHAPES[re.sub(r"-(pt|it)$", "", model)]
    return dict(zip(("n_layers", "d_model", "d_heads"), shape, strict=True))


def _suite(name: str, found: list[Artefact]) -> dict[str, Any]:
    layout, repos = _layout(name), sorted({a.repo for a in found})
    (model,) = {a.model for a in found}
    first = layout == "gemma-scope"
    groups = _gemma_scope_groups(name, found) if first else _product_groups(found)
    if layout == "gemma-scope-2":
        layers = {int(a.folder.split("_")[2]) for a in found if a.folder.startswith("resid_post/")}
        groups += _joint_groups(name, _shape(model)["n_layers"], spans(sorted(layers)))
    if layout == "llama-scope":
        groups.append({"part": "TC", "layers": "0-31", "widths": LLAMA_WIDTHS, "by_rule": True})
        repos = [*repos, *(f"fnlp/Llama3_1-8B-Base-LXTC-{width}" for width in LLAMA_WIDTHS)]
    return {
        "name": name,
        "repos": repos,
        "model": model,
        "licence": LICENCES.get(layout),
        "layout": layout,
        "about": _about(name, [g["part"] for g in groups]),
        "groups": groups,
    }


def _about(name: str, parts: list[str]) -> str:
    if name in ABOUT:
        return ABOUT[name]
    if site := SITES.get(name.rsplit("-", 1)[1]):
        return f"SAEs of the {site}" + (" and of the embedding" if "embedding" in parts else "")
    known = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}
    sites = ", ".join(text for part, text in known.items() if part in parts)
    others = {"transcoder_all": "transcoders", "crosscoder": "crosscoders", "clt": "CLTs"}
    return ", ".join([f"SAEs ({sites})", *(t for p, t in others.items() if p in parts)])


def _gemma_scope_groups(name: str, found: list[Artefact]) -> list[dict[str, Any]]:
    """A group of each width: of each layer, the L0 of its folders."""
    part = name.rsplit("-", 1)[1]
    widths: dict[tuple[str, str], dict[int, list[Artefact]]] = defaultdict(dict)
    for a in found:
        match = re.fullmatch(r"(?:layer_(\d+)|embedding)/width_(\w+)/average_l0_\d+", a.folder)
        assert match, a.folder
        key = (part if match[1] else "embedding", match[2])
        widths[key].setdefault(int(match[1] or 0), []).append(a)
    groups = []
    for of, width in sorted(widths, key=lambda key: (key[0] == "embedding", FEATURES[key[1]])):
        layers = widths[of, width]
        names = {
            re.sub(r"/\d+-", "/{layer}-", a.dashboard.split("__")[0]).replace(width, "{width}")
            for layer in layers.values()
            for a in layer
            if a.dashboard
        }
        assert len(names) <= 1, names
        measured = [f"{layer}: {_measured(layers[layer])}" for layer in sorted(layers)]
        group = {"part": of, "widths": [width], "measured": measured}
        groups.append(group | ({"dashboard": names.pop()} if names else {}))
    if part == "transcoders":
        for values in TRANSCODERS:
            more = [f"{layer}: {l0}" for layer, l0 in enumerate(values.split())]
            groups.append({"part": part, "widths": ["16k"], "measured": more})
    return groups


def _measured(found: list[Artefact]) -> str:
    """The L0 of one layer's folders; starred are those with dashboards of their own."""

    def mark(a: Artefact) -> str:
        own = "*" if "__l0-" in (a.dashboard or "") else ""
        return "!" if (a.repo, a.folder) in TIES else own

    return " ".join(f"{a.l0:.0f}{mark(a)}" for a in sorted(found, key=lambda a: a.l0 or 0))


def _product_groups(found: list[Artefact]) -> list[dict[str, Any]]:
    """Few groups, of each of which the artefacts are a full product."""
    parts: dict[str, list[Place]] = defaultdict(list)
    for artefact in found:
        part, place = _place(artefact)
        parts[part].append(place)
    groups = []
    for part, places in sorted(parts.items(), key=lambda item: PARTS.index(item[0])):
        for p in products(places):
            group = {
                "part": part,
                "layers": spans(p.layer),
                "widths": list(p.width),
                "labels": list(p.label),
                "suffixes": list(p.suffix),
                "dashboard": p.dashboard,
            }
            groups.append({n: v for n, v in group.items() if v not in ("", [""])})
    return groups


def _place(artefact: Artefact) -> tuple[str, Place]:
    """The part that an artefact belongs to, and its place there."""
    folder, dashboard = artefact.folder, artefact.dashboard or ""
    dashboard = re.sub(r"/\d+-", "/{layer}-", dashboard)
    if m := re.fullmatch(r"(\w+)/layer_(\d+)_width_(\w+?)_l0_([a-z]+)(\w*)", folder):
        dashboard = re.sub(rf"-{m[3]}$", "-{width}", dashboard)
        return m[1], Place(int(m[2]), m[3], m[4], m[5], dashboard)
    if m := re.fullmatch(r"Llama3_1-8B-Base-L(\d+)([A-Z]+)-(\d+x)", folder):
        return m[2], Place(int(m[1]), m[3], "", "", dashboard)
    m = re.fullmatch(r"([\w-]+-Math-220k)/L(\d+)R", folder)
    assert m, folder
    return m[1], Place(int(m[2]), "32k", "", "", dashboard)


def products(places: Iterable[Place]) -> list[Place]:
    """`places` as few full products: layers first, for that leaves the fewest."""
    orders: tuple[Callable[[Any], Any], ...] = (int, FEATURES.__getitem__, LABELS.index, str)
    merged: list[tuple[Any, ...]] = list(places)
    assert len(set(merged)) == len(merged)
    for axis, order in enumerate(orders):
        same: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for place in merged:
            same[(*place[:axis], None, *place[axis + 1 :])].append(place[axis])
        merged = [
            (*rest[:axis], tuple(sorted(values, key=order)), *rest[axis + 1 :])
            for rest, values in same.items()
        ]
    return sorted(
        (Place(*place) for place in merged),
        key=lambda p: (p.suffix, FEATURES[p.width[0]], LABELS.index(p.label[0]), p.layer),
    )


def spans(layers: Iterable[int]) -> str:
    """Layers in ascending order, such as `0-3,5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _joint_groups(name: str, n_layers: int, subset: str) -> list[dict[str, Any]]:
    rule: dict[str, Any] = {"labels": ["medium", "big"], "by_rule": True}
    groups = [{"part": "crosscoder", "layers": subset, "widths": CROSSCODER_WIDTHS, **rule}]
    if name.split("-")[3] in CLT_MODELS:
        place = {"part": "clt", "layers": f"0-{n_layers - 1}", "widths": CLT_WIDTHS}
        groups.append({**place, "suffixes": ["", "_affine"], **rule})
    return groups


def written(content: dict[str, Any]) -> str:
    """The catalog file: a line for each model, suite and group."""
    models = ",\n".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in content["models"].items())
    suites = []
    for suite in content["suites"]:
        groups = ",\n".join(json.dumps(group) for group in suite["groups"])
        head = json.dumps({n: v for n, v in suite.items() if n != "groups"})
        suites.append(f'{head[:-1]}, "groups": [\n{groups}\n]}}')
    joined = ",\n".join(suites)
    return f'{{"models": {{\n{models}\n}}, "suites": [\n{joined}\n]}}\n'


def check(suites: tuple[Suite, ...], registry: dict[str, Any]) -> dict[str, int]:
    """Hold the expanded catalog against the registry, entry by entry; the numbers of entries."""
    made = {}
    for suite in suites:
        for e in suite.entries():
            assert e.remote is not None
            known = Artefact(e.remote.repo, e.remote.folder, e.model, e.l0, e.neuronpedia)
            assert (known.repo, known.folder) not in made, known
            made[known.repo, known.folder] = (known, e)
    listed = {(a.repo, a.folder): a for a in artefacts(registry)}
    for place, artefact in listed.items():
        assert made[place][0] == artefact, (made[place][0], artefact)
    by_rule = {address for suite in suites for address in suite.by_rule()}
    more = {e.address for place, (_, e) in made.items() if place not in listed}
    transcoders = {address for address in more if "-transcoders/" in address}
    assert more == by_rule | transcoders, more ^ (by_rule | transcoders)
    assert len(transcoders) in (0, 26 * len(TRANSCODERS))
    shown = Counter(e.neuronpedia for _, e in made.values() if e.neuronpedia)
    assert max(shown.values(), default=1) == 1
    _check_canonical(registry, {place: e.canonical for place, (_, e) in made.items()})
    return {"listed": len(listed), "by rule": len(by_rule), "2b transcoders": len(transcoders)}


def _check_canonical(registry: dict[str, Any], canonical: dict[tuple[str, str], bool]) -> None:
    """The rule "nearest to an L0 of 100" finds every one that the registry names."""
    named = {
        (listed["repo_id"], sae["path"])
        for release, listed in registry.items()
        if release.startswith(PREFIXES) and release.endswith("-canonical")
        for sae in listed["saes"]
    }
    ruled = {place for place, is_canonical in canonical.items() if is_canonical}
    assert named <= ruled, named - ruled
    # One of each layer and width: those that the rule adds have no rival in the registry.
    stems = Counter((repo, folder.rpartition("/")[0]) for repo, folder in ruled)
    assert max(stems.values(), default=1) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("registry", type=Path, nargs="?")
    file = parser.parse_args().registry
    if file is None:
        if not (spec := find_spec("sae_lens")) or not spec.origin:
            sys.exit("make.py: no sae_lens is installed: give the path of its pretrained_saes.yaml")
        file = Path(spec.origin).with_name("pretrained_saes.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # thirty times faster where it exists
    registry = yaml.load(file.read_text("utf-8"), Loader=loader)  # noqa: S506
    text = written(catalog(artefacts(registry)))
    counts = check(parse(text), registry)
    CATALOG.write_text(text, "utf-8")
    print(f"{CATALOG}: {len(text):,} bytes; {counts}")


if __name__ == "__main__":
    main()
