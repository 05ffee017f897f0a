"""The tables of the catalog store, column by column."""

import pyarrow as pa  # type: ignore[import-untyped]

VERSION = 2
"""Of the layout; a store of a newer one is refused, an older one is moved forward: each number has
its step in `_migrate.py`.
"""

_TOKENS = pa.list_(
    pa.struct([("token", pa.string()), ("id", pa.int32()), ("count", pa.int64()),
               ("share", pa.float64())])
)  # fmt: skip
_LOGITS = pa.list_(pa.struct([("token", pa.string()), ("id", pa.int32()), ("logit", pa.float32())]))
_INTERVALS = pa.list_(pa.struct([(n, pa.float64()) for n in ("low", "high", "share", "mass")]))
_TOGETHER = pa.list_(
    pa.struct([("feature", pa.int32()), ("count", pa.int64()), ("phi", pa.float64()),
               ("jaccard", pa.float64()), ("lift", pa.float64())])
)  # fmt: skip
_NEIGHBOURS = pa.list_(pa.struct([("feature", pa.int32()), ("cosine", pa.float32())]))
_HISTOGRAM = pa.struct([("first", pa.int32()), ("counts", pa.list_(pa.int64()))])
_LOGIT_HISTOGRAM = pa.struct(
    [("low", pa.float64()), ("high", pa.float64()), ("counts", pa.list_(pa.int64()))]
)

MEASURED = pa.schema(
    [
        ("count", pa.int64()),
        ("density", pa.float64()),
        ("mean", pa.float64()),
        ("mean_active", pa.float64()),
        ("max", pa.float32()),
        ("quantiles", pa.list_(pa.float64())),
        ("histogram", _HISTOGRAM),
        ("positions", pa.list_(pa.int64())),
        ("first_share", pa.float64()),
        ("documents", pa.int64()),
        ("source_densities", pa.list_(pa.float64())),
        ("intervals", _INTERVALS),
        ("tokens", _TOKENS),
        ("before", _TOKENS),
        ("after", _TOKENS),
        ("together", _TOGETHER),
    ]
)
"""What a text says of a feature."""

WEIGHED = pa.schema(
    [
        ("layer", pa.int32()),
        ("threshold", pa.float32()),
        ("bias", pa.float32()),
        ("encoder_norm", pa.float32()),
        ("decoder_norm", pa.float32()),
        ("encoder_decoder_cosine", pa.float32()),
        ("promoted", _LOGITS),
        ("suppressed", _LOGITS),
        ("logit_histogram", _LOGIT_HISTOGRAM),
        ("logit_mean", pa.float32()),
        ("logit_std", pa.float32()),
        ("logit_skew", pa.float32()),
        ("logit_kurtosis", pa.float32()),
        ("neighbours", _NEIGHBOURS),
    ]
)
"""What the weights say of a feature."""

_KEYS = [("run", pa.string()), ("dictionary", pa.string()), ("feature", pa.int32())]

FEATURES = pa.schema(
    [
        *(pa.field(*k) for k in _KEYS),
        *MEASURED,
        *WEIGHED,
        pa.field("words", pa.string()),
        pa.field("promotes", pa.list_(pa.string())),
        pa.field("output_score", pa.float64()),
    ]
)
"""One row each; `words` are the tokens it fires on and promotes, for full text, and `promotes` the
promoted ones without the space around them, to be found by. `output_score` is null until it is
measured: how far amplifying the feature brings its promoted tokens out of a neutral prompt.
"""

CONTEXTS = pa.schema(
    [
        *_KEYS,
        ("group", pa.string()),
        ("rank", pa.int32()),
        ("value", pa.float32()),
        ("place", pa.int64()),
        ("context", pa.int32()),
        ("position", pa.int32()),
        ("share", pa.float64()),
        ("positions", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float32())),
    ]
)

EXPLANATIONS = pa.schema(
    [
        ("key", pa.string()),
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("text", pa.string()),
        ("method", pa.string()),
        ("author", pa.string()),
        ("score", pa.float64()),
        ("scores", pa.string()),
        ("detail", pa.string()),
        ("created", pa.string()),
    ]
)

NOTES = pa.schema(
    [
        ("key", pa.string()),
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("text", pa.string()),
        ("author", pa.string()),
        ("confidence", pa.float64()),
        ("limitations", pa.list_(pa.string())),
        ("detail", pa.string()),
        ("created", pa.string()),
    ]
)

DICTIONARIES = pa.schema(
    [("address", pa.string()), ("run", pa.string()), ("d_sae", pa.int64()), ("facts", pa.string())]
)
"""`facts` is the whole row as JSON; `run` says which rows of the other tables are its own."""

RUNS = pa.schema([("run", pa.string()), ("created", pa.string()), ("facts", pa.string())])

TABLES = {
    "dictionaries": DICTIONARIES,
    "features": FEATURES,
    "contexts": CONTEXTS,
    "explanations": EXPLANATIONS,
    "notes": NOTES,
    "runs": RUNS,
}


def vector_schema(width: int) -> pa.Schema:
    """Decoder rows of `width`; rows of different widths are in tables of their own."""
    return pa.schema(
        [*(pa.field(*k) for k in _KEYS), pa.field("vector", pa.list_(pa.float32(), width))]
    )
