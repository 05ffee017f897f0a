"""Neuronpedia's exports read: labels, and what its feature rows measured."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from gemscope.errors import InputError
from gemscope.features import Explanation

from . import _neuronpedia as np_
from ._catalog import refuse
from ._files import clean, map_text, parse, read_lines
from ._kept import Measurement
from ._labels import (
    MOST_FEATURES,
    Incoming,
    Index,
    Label,
    Plain,
    PlainExplanation,
    PlainNote,
    Problem,
    cleaned,
    explanation_of,
    note_of,
    problems_of,
)

_CONFIGS = ("model", "release", "sourceset", "source")
_MOST_PROBLEMS = 1000
_Numbers = list[float | int | None]


class _Row(Plain):
    modelId: Annotated[str, Field(min_length=1)]  # noqa: N815
    layer: Annotated[str, Field(min_length=1)]
    index: Annotated[str, Field(pattern=r"^\d{1,10}$")] | Annotated[int, Field(ge=0)]


class FeatureRow(_Row):
    """A row of `features`: what is read of it."""

    maxActApprox: float | None = None  # noqa: N815
    frac_nonzero: Annotated[float, Field(ge=0, le=1)] | None = None
    pos_str: list[str | None] = Field(default_factory=list)
    neg_str: list[str | None] = Field(default_factory=list)
    pos_values: _Numbers = Field(default_factory=list)
    neg_values: _Numbers = Field(default_factory=list)
    correlated_features_indices: list[Index] = Field(default_factory=list)
    correlated_features_pearson: _Numbers = Field(default_factory=list)
    topkCosSimIndices: list[Index] = Field(default_factory=list)  # noqa: N815
    topkCosSimValues: _Numbers = Field(default_factory=list)  # noqa: N815
    freq_hist_data_bar_values: _Numbers = Field(default_factory=list)
    freq_hist_data_bar_heights: _Numbers = Field(default_factory=list)
    logits_hist_data_bar_values: _Numbers = Field(default_factory=list)
    logits_hist_data_bar_heights: _Numbers = Field(default_factory=list)


class ActivationRow(_Row):
    """A row of `activations`."""

    tokens: list[str]
    values: _Numbers
    maxValue: float | None = None  # noqa: N815
    binMin: float | None = None  # noqa: N815
    binMax: float | None = None  # noqa: N815
    binContains: float | None = None  # noqa: N815

    @model_validator(mode="after")
    def _one_value_a_token(self) -> "ActivationRow":
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.values)} values of {len(self.tokens)} tokens")
        return self


class ExplanationRow(_Row):
    """A row of `explanations`."""

    description: str | None
    notes: str | None = None
    authorId: str | None = None  # noqa: N815
    explanationModelName: str | None = None  # noqa: N815
    typeName: str | None = None  # noqa: N815
    createdAt: str | None = None  # noqa: N815


_MODELS: dict[str, type[_Row]] = {
    "features": FeatureRow, "activations": ActivationRow, "explanations": ExplanationRow,
}  # fmt: skip


def read_neuronpedia(path: Path, *, everything: bool = False) -> Incoming:
    """Labels and measurements of a folder of an export, or of one of its files.

    Activations are read, and checked, only with `everything`: no label is in them. Measurements
    are then not called lost.
    """
    found = Incoming(format="neuronpedia")
    addresses = _addresses(path)
    skipped = 0
    for file in row_files(path):
        if len(found.problems) >= _MOST_PROBLEMS:
            break
        kind = kind_of(file)
        if kind == "activations" and not everything:
            skipped += 1
            continue
        for place, raw in _rows(file, path, kind, found.problems):
            if kind == "explanations":
                label = _label(raw, place)
                named = addresses.get(label.dictionary, label.dictionary)
                found.labels.append(replace(label, dictionary=named))
                continue
            label = _bare_label(raw, addresses, place)
            densities = found.densities.setdefault(label.dictionary, [])
            if kind == "features" and raw.get("frac_nonzero") is not None:
                densities.append((label, float(raw["frac_nonzero"])))
    if skipped:
        found.lost.append(f"{skipped:,} file(s) of activations: --statistics keeps them")
    if found.densities and not everything:
        found.lost.append("what feature rows measured: --statistics keeps it")
    return found


def checked(path: Path, *, everything: bool = False) -> Incoming:
    """Labels and measurements; InputError if any row is wrong."""
    found = read_neuronpedia(path, everything=everything)
    refuse(path, found.problems)
    return found


def measurements(path: Path) -> Iterator[Measurement]:
    """The rows of features and activations of what has been checked."""
    addresses = _addresses(path)
    for file in row_files(path):
        kind = kind_of(file)
        if kind != "explanations":
            for place, raw in _rows(file, path, kind, []):
                yield Measurement(kind, _bare_label(raw, addresses, place), raw)


def row_files(path: Path) -> list[Path]:
    """The files of rows below a folder, or the file itself; links are not followed."""
    if path.is_file():
        return [path]
    files = [
        file
        for file in path.rglob("*.jsonl*")
        if file.is_file()
        and not file.is_symlink()
        and re.fullmatch(r"[^.].*\.jsonl(\.gz)?", file.name)
        and not re.match(rf"({'|'.join(_CONFIGS)}|inference_hosts.*)\.jsonl", file.name)
    ]
    if not files:
        raise InputError(f"{path} holds no .jsonl or .jsonl.gz files of rows")
    return sorted(files, key=lambda f: (str(f.parent), _number(f), f.name))


def kind_of(file: Path) -> str:
    """Whether a file's rows are features, activations or explanations: by its first one."""
    for number, line in read_lines(file):
        try:
            row = parse(line)
        except ValueError as error:
            raise InputError(f"line {number} of {file} is not valid JSON: {error}") from None
        keys = row.keys() if isinstance(row, dict) else set()
        if "description" in keys and "index" in keys:
            return "explanations"
        if {"tokens", "values"} <= keys:
            return "activations"
        if {"frac_nonzero", "pos_str", "maxActApprox"} & keys:
            return "features"
        raise InputError(
            f"line {number} of {file} is no row of Neuronpedia's features, activations or "
            "explanations"
        )
    return file.parent.name if file.parent.name in np_.KINDS else "explanations"


def _number(file: Path) -> int:
    match = re.search(r"(\d{1,9})\.jsonl", file.name)
    return int(match[1]) if match else -1


def _rows(
    file: Path, path: Path, kind: str, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file that are right, and where they are; the others into `problems`."""
    name = "" if file == path else f"{file.relative_to(path)}, "
    model = _MODELS[kind]
    for number, line in read_lines(file):
        place = f"{name}line {number}"
        try:
            raw = parse(line)
            model.model_validate(raw)
            if int(raw["index"]) >= MOST_FEATURES:
                raise ValueError(f"index {raw['index']} is beyond any dictionary")
        except ValidationError as error:
            for problem in problems_of(error, ""):
                problems.append(Problem(f"{place}, {problem.place}", problem.problem))
        except ValueError as error:
            problems.append(Problem(place, str(error)))
        else:
            yield place, raw
        if len(problems) >= _MOST_PROBLEMS:
            return


def _addresses(path: Path) -> dict[str, str]:
    """Of exports of ours, the dictionary that a source is."""
    found: dict[str, str] = {}
    for file in [] if path.is_file() else path.rglob("source.jsonl"):
        for _, line in read_lines(file):
            try:
                row = parse(line)
                address = json.loads(row["notes"])["gemscope"]["address"]
                found[f"{row['modelId']}/{row['id']}"] = str(address)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # not of ours
    return found


def _bare_label(raw: dict[str, Any], addresses: dict[str, str], place: str) -> Label:
    """Which feature a row is of, and nothing said of it."""
    name = f"{raw['modelId']}/{raw['layer']}"
    return Label(
        dictionary=addresses.get(name, name),
        feature=int(raw["index"]),
        layer=np_.layer_of(raw["layer"]),
        place=place,
        within_layer=True,
    )


def _label(raw: dict[str, Any], place: str) -> Label:
    dictionary = f"{raw['modelId']}/{raw['layer']}"
    feature, layer = int(raw["index"]), np_.layer_of(raw["layer"])
    explanations, notes = [], []
    made = _ours(raw, dictionary, feature)
    if isinstance(made, Explanation):
        explanations.append(made)
    elif made is not None:
        notes.append(made)
    elif (raw["description"] or "").strip():
        explanations.append(_theirs(raw, dictionary, feature))
    return Label(
        dictionary=dictionary,
        feature=feature,
        layer=layer,
        place=place,
        explanations=tuple(explanations),
        notes=tuple(notes),
        within_layer=True,
    )


def _ours(raw: dict[str, Any], dictionary: str, feature: int) -> Any:
    """The label that an export of ours wrote into a row, unless its text was changed since."""
    try:
        kept = json.loads(raw.get("notes") or "null")["gemscope"]
        kind = kept.pop("kind")
        if kept["text"] != raw["description"]:
            return None
        if kind == "note":
            return note_of(PlainNote.model_validate(kept), dictionary, feature)
        return explanation_of(PlainExplanation.model_validate(kept), dictionary, feature)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _theirs(raw: dict[str, Any], dictionary: str, feature: int) -> Explanation:
    used = ("modelId", "layer", "index", "description", "embedding", "createdAt")
    kept = {k: v for k, v in raw.items() if k not in used and v not in (None, "", [])}
    author = raw.get("explanationModelName") or raw.get("authorId") or "Neuronpedia"
    return cleaned(
        Explanation(
            dictionary=dictionary,
            feature=feature,
            text=raw["description"],
            method="imported",
            author=str(author),
            detail={"neuronpedia": map_text(kept, clean)},
            created=clean(raw.get("createdAt") or ""),
        )
    )
