"""Addresses, the catalog of artefacts, and loading from it."""

from ._catalog import Entry as Entry
from ._catalog import catalog as catalog
from ._catalog import locate as locate
from ._catalog import published as published
from ._load import build as build
from ._load import digest as digest
from ._load import load_sae as load_sae
from ._load import model_source as model_source
