"""A store's dictionaries as a Neuronpedia export."""

import gzip
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.features import Explanation, Note

from . import _neuronpedia as np_
from ._files import MARK, dump, finite, new_folder
from ._labels import plain_explanation, plain_note
from ._measured import Measured, Progress

LOST = (
    "counts, quantiles, means, densities by source, places in the context, tokens before and after",
    "near misses, and of an activation what is outside its window",
    "thresholds, biases, norms, logit moments; of pairs counts, Jaccard, lift",
)
_PEAK_AT = 0.75
"""Where in a window its peak is, if there is text enough: what comes before matters more."""


def write_neuronpedia(
    target: Path,
    measured: Sequence[Measured],
    *,
    vectors: bool = False,
    window: int = 128,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> int:
    """Write `target/v1/{modelId}/{sourceId}/...`; the number of features.

    `window` is the number of tokens of an activation row, 0 for whole contexts.
    """
    done, total = 0, sum(len(one.chosen) for one in measured)
    with new_folder(target, force=force) as folder:
        for one in measured:
            for layer in sorted({one.layers[f] for f in one.chosen}):
                source = _Source(one, layer, folder, vectors=vectors, window=window)
                for row in source.write():
                    done += row
                    progress("writing", done, total)
        made = {"format": "neuronpedia", "addresses": [one.address for one in measured]}
        (folder / MARK).write_text(dump(made), "utf-8")
    return done


class _Source:
    """The rows of one layer of a dictionary."""

    def __init__(self, one: Measured, layer: int, folder: Path, *, vectors: bool, window: int):
        self.one, self.layer, self.window = one, layer, window
        self.model, self.source, self.set = np_.source_of(one.dictionary, layer)
        self.folder = folder / "v1" / self.model / self.source
        self.first = one.layers.index(layer)
        """Features of several layers are numbered through; there, within each."""
        self.created = str(one.dictionary.get("created") or "")
        self.vectors: np.ndarray | None = one.store.vectors(one.address) if vectors else None

    def write(self) -> Iterator[int]:
        """Write all files; yields the features done since the last time."""
        for kind in np_.KINDS:
            (self.folder / kind).mkdir(parents=True)
        rows = (row for row in self.one.rows() if row["layer"] == self.layer)
        number = 0
        while batch := list(islice(rows, np_.BATCH)):
            _jsonl(self._file("features", number), (finite(self.feature(row)) for row in batch))
            _jsonl(
                self._file("activations", number),
                (activation for row in batch for activation in self.activations(row)),
            )
            number += 1
            yield len(batch)
        said = iter(self.explanations())
        number = 0
        while labels := list(islice(said, np_.BATCH)):
            _jsonl(self._file("explanations", number), labels)
            number += 1
        for name, row in self._about().items():
            (self.folder / f"{name}.jsonl").write_text(dump(finite(row)) + "\n", "utf-8")

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / kind / f"batch-{number}.jsonl.gz"

    def _keys(self, feature: int) -> dict[str, Any]:
        return {
            "modelId": self.model,
            "layer": self.source,
            "index": str(feature - self.first),
            "createdAt": self.created,
        }

    def feature(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of `features`."""
        feature = int(row["feature"])
        top = row["max"] if row["count"] else 0
        same = [n for n in row["neighbours"] or [] if self.one.layers[n["feature"]] == self.layer]
        pairs = [p for p in row["together"] or [] if self.one.layers[p["feature"]] == self.layer]
        found = np_.FEATURE | self._keys(feature) | _logits(row) | _histograms(row)
        found |= {
            "maxActApprox": top,
            "vectorDefaultSteerStrength": top or 10,
            "hookName": str(self.one.dictionary["writes"]),
            "topkCosSimIndices": [n["feature"] - self.first for n in same],
            "topkCosSimValues": [n["cosine"] for n in same],
            "correlated_features_indices": [p["feature"] - self.first for p in pairs],
            "correlated_features_pearson": [p["phi"] for p in pairs],
            "frac_nonzero": row["density"],
            "sourceSetName": self.set,
        }
        if self.vectors is not None:
            found |= {"hasVector": True, "vector": self.vectors[feature].tolist()}
        return found

    def activations(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of `activations` of a feature."""
        feature = int(row["feature"])
        borders = row["intervals"] or []
        for one in self.one.contexts(feature):
            group, peak = str(one["group"]), int(one["position"])
            if group == "near":
                continue
            first, stop = self._window(int(one["context"]), peak)
            values = [0.0] * (stop - first)
            for position, value in zip(one["positions"], one["values"], strict=True):
                if first <= position < stop:
                    values[position - first] = value
            found = np_.ACTIVATION | self._keys(feature)
            name = f"{self.model}-{self.source}-{found['index']}-{group}-{one['rank']}"
            found |= {
                "id": name.replace(" ", "-"),
                "maxValue": one["value"],
                "maxValueTokenIndex": peak - first,
                "minValue": min(values),
                "dataSource": self._document(int(one["context"])),
                "dataIndex": f"{one['context']}:{first}",
                "qualifyingTokenIndex": peak - first,
                "binMin": np_.TOP,
                "binMax": row["max"],
                "binContains": np_.TOP,
            }
            if group != "top":
                border = borders[int(group.rsplit(" ", 1)[1]) - 1]
                found |= {
                    "binMin": border["low"],
                    "binMax": border["high"],
                    "binContains": one["share"],
                }
            # Activations are finite: looking at each would take longer than writing them.
            texts = self.one.pieces(int(one["context"]), first, stop)
            yield finite(found) | {"tokens": texts, "values": values}

    def _window(self, context: int, peak: int) -> tuple[int, int]:
        begin, end = (int(n) for n in self.one.text.offsets[context : context + 2])
        length = end - begin
        if not self.window or self.window >= length:
            return 0, length
        first = min(max(0, peak - int(_PEAK_AT * self.window)), length - self.window)
        return first, first + self.window

    def _document(self, context: int) -> str:
        text = self.one.text
        return text.paths[int(text.document[context])]

    def explanations(self) -> Iterator[dict[str, Any]]:
        """The rows of `explanations`: of each feature notes first, then explanations."""
        for feature in self.one.chosen:
            if self.one.layers[feature] != self.layer:
                continue
            for note in self.one.notes.get(feature, []):
                yield self._explanation(feature, note)
            for explanation in self.one.explanations.get(feature, []):
                yield self._explanation(feature, explanation)

    def _explanation(self, feature: int, label: Note | Explanation) -> dict[str, Any]:
        human = isinstance(label, Note)
        # Their table has a text for remarks: it holds what their other fields do not.
        whole = plain_note(label) if isinstance(label, Note) else plain_explanation(label)
        kept = {"gemscope": {"kind": "note" if human else "explanation", **finite(whole)}}
        author = label.author or np_.CREATOR
        typed = {"typeName": None if human else f"gemscope-{label.method}"}  # type: ignore[union-attr]
        return (
            np_.EXPLANATION
            | self._keys(feature)
            | typed
            | {
                "id": hashlib.sha256(f"{self.source}\0{label.key}".encode()).hexdigest()[:25],
                "description": label.text,
                "authorId": author if human else np_.CREATOR,
                "explanationModelName": None if human else author,
                "notes": dump(kept),
                "createdAt": label.created,
            }
        )

    def _about(self) -> dict[str, dict[str, Any]]:
        known = self.one.dictionary
        created = {"createdAt": self.created}
        release = str(known["address"]).split("/", 1)[0]
        about = {
            "model": np_.MODEL
            | {"id": self.model, "displayName": known["model"], "displayNameShort": self.model,
               "updatedAt": self.created},
            "release": np_.RELEASE | {"name": release, "description": f"{release}, by gemscope"},
            "sourceset": np_.SOURCE_SET
            | {"modelId": self.model, "name": self.set, "releaseName": release,
               "description": known["address"], "type": known["kind"]},
            "source": np_.SOURCE
            | {"id": self.source, "modelId": self.model, "setName": self.set,
               "hfFolderId": known["address"],
               "num_prompts": known.get("contexts"),
               "num_tokens_in_prompt": known.get("context_length"),
               "dataset": ", ".join(str(s["name"]) for s in known.get("sources") or []),
               "notes": dump({"gemscope": {"address": known["address"]}})},
        }  # fmt: skip
        return {name: row | created for name, row in about.items()}


def _logits(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in (("pos", "promoted"), ("neg", "suppressed")):
        found[f"{name}_str"] = [t["token"] for t in row[key] or []]
        found[f"{name}_values"] = [t["logit"] for t in row[key] or []]
    return found


def _histograms(row: dict[str, Any]) -> dict[str, Any]:
    """Bars at the lower borders of their bins."""
    counts = row["histogram"]["counts"] if row["histogram"] else []
    first = row["histogram"]["first"] if counts else 0
    found = {
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": [2 ** ((first + b) / 4) for b in range(len(counts))],
    }
    if logits := row["logit_histogram"]:
        bars = logits["counts"]
        edges = np.linspace(logits["low"], logits["high"], len(bars) + 1)
        found |= {
            "logits_hist_data_bar_heights": bars,
            "logits_hist_data_bar_values": edges[:-1].tolist(),
        }
    return found


def _jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    # Without the time in its header the same rows give the same bytes.
    with file.open("wb") as raw, gzip.GzipFile("", "wb", 5, raw, mtime=0) as stream:
        for row in rows:
            stream.write((dump(row) + "\n").encode())
