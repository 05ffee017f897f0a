"""SAEDashboard's batches: what they measured of features, and examples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from gemscope.errors import InputError

from ._files import read_json
from ._kept import Measurement, batch_rows
from ._labels import Incoming, Index, Label, Layer, Plain, Problem, problems_of

_Numbers = list[float | int | None]


class Activation(Plain):
    """One of `activations`."""

    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: list[str]
    values: _Numbers

    @model_validator(mode="after")
    def _one_value_a_token(self) -> "Activation":
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.values)} values of {len(self.tokens)} tokens")
        return self


class Feature(Plain):
    """One of `features`: what is read of it."""

    feature_index: Index
    frac_nonzero: Annotated[float, Field(ge=0, le=1)] = 0
    pos_str: list[str] = Field(default_factory=list)
    pos_values: _Numbers = Field(default_factory=list)
    neg_str: list[str] = Field(default_factory=list)
    neg_values: _Numbers = Field(default_factory=list)
    n_prompts_total: Annotated[int, Field(ge=0)] = 0
    n_tokens_in_prompt: Annotated[int, Field(ge=0)] = 0
    dataset: str | None = ""
    correlated_features_indices: list[Index] = Field(default_factory=list)
    correlated_features_pearson: _Numbers = Field(default_factory=list)
    freq_hist_data_bar_values: _Numbers = Field(default_factory=list)
    freq_hist_data_bar_heights: _Numbers = Field(default_factory=list)
    logits_hist_data_bar_values: _Numbers = Field(default_factory=list)
    logits_hist_data_bar_heights: _Numbers = Field(default_factory=list)
    activations: list[Activation] = Field(default_factory=list)


class Batch(Plain):
    """What stands around the features."""

    model_id: str
    layer: Layer
    sae_set: str
    sae_id_suffix: str | None = None


def batch_files(path: Path) -> list[Path]:
    """The batches of a folder, or the file itself."""
    if path.is_file():
        return [path]
    files = [f for f in path.glob("batch-*.json*") if f.is_file() and ".jsonl" not in f.name]
    if not files:
        raise InputError(f"{path} holds no batch-N.json")
    return sorted(files, key=lambda f: (len(f.name), f.name))


def is_batch(value: Any) -> bool:
    """Whether a JSON value looks like a batch."""
    return isinstance(value, dict) and {"model_id", "layer", "sae_set", "features"} <= value.keys()


def read_batches(path: Path) -> Incoming:
    """What the batches below `path` measured; they hold no labels."""
    found = Incoming(format="saedashboard")
    for file in batch_files(path):
        value = read_json(file)
        name = "" if file == path else f"{file.name}, "
        if not is_batch(value) or not isinstance(value["features"], list):
            raise InputError(f"{file} is no batch of SAEDashboard: an object with model_id, layer, "
                             "sae_set and features is expected")  # fmt: skip
        try:
            batch = Batch.model_validate({k: v for k, v in value.items() if k != "features"})
        except ValidationError as error:
            found.problems.extend(problems_of(error, name.rstrip(", ")))
            continue
        densities = found.densities.setdefault(source_name(batch), [])
        seen: set[int] = set()
        for number, raw in enumerate(value["features"]):
            place = f"{name}features[{number}]"
            try:
                feature = Feature.model_validate(raw)
            except ValidationError as error:
                found.problems.extend(problems_of(error, place))
                continue
            if feature.feature_index in seen:
                found.problems.append(
                    Problem(f"{place}.feature_index", f"{feature.feature_index} is there twice")
                )
            seen.add(feature.feature_index)
            label = _label(batch, feature.feature_index, place)
            densities.append((label, float(feature.frac_nonzero)))
    return found


def measurements(path: Path) -> Iterator[Measurement]:
    """The rows that checked batches hold, as Neuronpedia has them."""
    for file in batch_files(path):
        value = read_json(file)
        batch = Batch.model_validate({k: v for k, v in value.items() if k != "features"})
        for number, raw in enumerate(value["features"]):
            label = _label(batch, raw["feature_index"], f"features[{number}]")
            for kind, row in batch_rows(raw):
                yield Measurement(kind, label, row)


def source_name(batch: Batch) -> str:
    """The name Neuronpedia would have for the dictionary of a batch."""
    suffix = f"__{batch.sae_id_suffix}" if batch.sae_id_suffix else ""
    return f"{batch.model_id}/{batch.layer}-{batch.sae_set}{suffix}"


def _label(batch: Batch, feature: int, place: str) -> Label:
    """Which feature an element of `features` is of."""
    return Label(
        dictionary=source_name(batch),
        feature=feature,
        layer=batch.layer,
        place=place,
        within_layer=True,
    )
