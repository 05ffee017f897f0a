"""One evaluation as plain data: what the report, the JSON and the command show."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from gemscope import __version__
from gemscope.corpus import Document
from gemscope.hub import Entry, digest, published
from gemscope.lm import LanguageModel
from gemscope.sae import Dictionary
from gemscope.sites import Site, Sites

from ._evaluate import Settings
from ._pass import Evaluation
from ._top import FeatureRecord, top_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a figure hangs on, so that it can be made again."""

    model: str
    model_dtype: str
    device: str
    sae_sha256: str
    sae_dtype: str
    text: str
    text_sha256: str
    context: int
    bos: str
    chat_prefix: str
    seed: int
    gemscope: str
    torch: str
    transformers: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything a report says of one dictionary."""

    address: str
    kind: str
    reads: str
    writes: str
    d_in: int
    d_out: int
    d_sae: int
    nominal_l0: float | None
    tokens: int
    documents: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    baseline: dict[str, float]
    published: dict[str, Any] | None
    layers: list[dict[str, str | float]]
    """Of a multi-layer model, the metrics of each layer."""
    spliced: str
    """The sites replaced together for the main figures."""
    density: dict[str, list]
    positions: list[dict[str, int | float]]
    features: dict[str, list[FeatureRecord]]
    provenance: Provenance

    @property
    def label(self) -> str:
        """A short name for figures and tables: the site, and what is left to tell by."""
        same = self.reads == self.writes
        site = self.writes if same else f"{self.reads} > {self.writes}"
        return f"{site}, {self.d_sae} wide"

    def json(self) -> dict[str, Any]:
        """The record with its metrics at the top level, ready for `json.dumps`."""
        fields = asdict(self)
        metrics = fields.pop("metrics")
        return finite({**{k: fields.pop(k) for k in _FIRST}, **metrics, **fields})


_FIRST = (
    "address", "kind", "reads", "writes", "d_in", "d_out", "d_sae", "nominal_l0", "tokens",
    "documents",
)  # fmt: skip


def record(
    model: LanguageModel,
    sae: Dictionary,
    entry: Entry,
    evaluation: Evaluation,
    documents: Sequence[Document],
    settings: Settings,
    *,
    text: str,
) -> Record:
    """The record of one evaluation; reads contexts of the top features from the model again."""
    return Record(
        address=entry.address,
        kind=entry.kind,
        reads=str(entry.reads),
        writes=str(entry.writes),
        d_in=entry.d_in,
        d_out=entry.d_out,
        d_sae=entry.d_sae,
        nominal_l0=entry.l0,
        tokens=evaluation.tokens,
        documents=evaluation.documents,
        metrics=evaluation.metrics,
        intervals=evaluation.intervals,
        baseline=evaluation.baseline,
        published=published(entry),
        layers=evaluation.layers,
        spliced=_spliced(entry, settings),
        density=evaluation.density,
        positions=evaluation.positions,
        features=top_features(model, sae, evaluation, documents),
        provenance=Provenance(
            model=model.name or str(model.config.name_or_path),
            model_dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            sae_sha256=digest(entry),
            sae_dtype=entry.dtype,
            text=text,
            text_sha256=_text_digest(documents),
            context=min(settings.context, model.max_context),
            bos="begins every context; outside every statistic and never spliced",
            chat_prefix="counted" if settings.count_prefix else "outside every statistic",
            seed=settings.seed,
            gemscope=__version__,
            torch=version("torch"),
            transformers=version("transformers"),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )


def _spliced(entry: Entry, settings: Settings) -> str:
    if isinstance(entry.writes, Site) or settings.layers is None:
        return str(entry.writes)
    return str(Sites(s for s in entry.writes if s.layer in settings.layers))


def _text_digest(documents: Sequence[Document]) -> str:
    whole = hashlib.sha256()
    for document in documents:
        whole.update(document.text.encode())
        whole.update(b"\0")
    return whole.hexdigest()


def finite(value: Any) -> Any:
    """`value` with what JSON cannot say (NaN, infinities) as None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {k: finite(v) for k, v in value.items()}
        case list() | tuple():
            return [finite(v) for v in value]
        case _:
            return value
