"""Addresses, the catalog of artefacts, downloading and loading."""

from ._catalog import RELEASE as BUNDLED_RELEASE
from ._catalog import catalog as catalog
from ._catalog import locate as locate
from ._catalog import published as published
from ._catalog import releases as releases
from ._describe import Given as Given
from ._describe import describe as describe
from ._entry import Entry as Entry
from ._entry import Remote as Remote
from ._expected import expected_bytes as expected_bytes
from ._expected import expected_shapes as expected_shapes
from ._feature import feature_of as feature_of
from ._fetch import cached as cached
from ._fetch import fetch as fetch
from ._fetch import fetch_model as fetch_model
from ._fetch import find as find
from ._fetch import has_model as has_model
from ._load import build as build
from ._load import digest as digest
from ._load import load_sae as load_sae
from ._load import model_source as model_source
from ._load import obtain as obtain
from ._save import LAYOUTS as SAVED_LAYOUTS
from ._save import save_sae as save_sae
from ._suites import model_shape as model_shape
from ._tokenizer import IMPORTING as IMPORTING
from ._tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "BUNDLED_RELEASE", "SAVED_LAYOUTS", "Entry", "Given", "Remote", "build", "cached", "catalog",
    "describe", "digest", "expected_bytes", "expected_shapes", "feature_of", "fetch", "fetch_model",
    "find", "has_model", "load_sae", "locate", "model_shape", "model_source", "obtain", "published",
    "releases", "save_sae",
]  # fmt: skip
