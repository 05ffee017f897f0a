"""What an activation store holds, as the JSON file that is written last."""

import json
import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gemscope.errors import InputError
from gemscope.sites import Site

from ._records import DTYPES
from ._shard_file import ShardFile

FORMAT = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"

Count = Annotated[int, Field(gt=0, lt=2**48)]
Checksum32 = Annotated[int, Field(ge=0, lt=2**32)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Contents(_Strict):
    """What is harvested: the same contents are the same bytes."""

    model: str
    model_hash: str
    """Of the model's config."""
    tokenizer_hash: str
    text: str
    """Where the text is from, in words."""
    text_hash: str
    """Of all its tokens."""
    context: Count
    """Longest context, BOS included."""
    seed: int
    dtype: str
    tokens: Count
    sites: dict[str, Annotated[int, Field(gt=0, lt=2**24)]]
    """Width of each site."""
    shard: Count
    """Tokens of a shard; of the last, what is left."""
    chunk: Count
    """Rows that share a checksum; it divides `shard`."""

    @model_validator(mode="after")
    def _consistent(self) -> "Contents":
        if self.dtype not in DTYPES or not self.sites or self.shard % self.chunk:
            raise ValueError("contents that contradict themselves")
        if [str(Site.parse(site)) for site in self.sites] != list(self.sites):
            raise ValueError("sites that are written otherwise")
        return self

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.tokens // self.shard)

    def shard_tokens(self, index: int) -> int:
        """Tokens of one shard."""
        return min(self.shard, self.tokens - index * self.shard)

    def file(self, site: str, index: int) -> ShardFile:
        """The layout of one shard of one site."""
        return ShardFile(self.dtype, self.sites[site], self.shard_tokens(index), self.chunk)


class Statistics(_Strict):
    """Sums over every token of a site, as stored, in float64; the mean is a file of its own."""

    count: Count
    mean_norm: float
    """Mean of the vectors' norms."""
    mean_square: float
    """Mean of the vectors' squared norms."""


class Manifest(_Strict):
    """A finished store."""

    format: int
    gemscope: str
    """Version that wrote it."""
    contents: Contents
    statistics: dict[str, Statistics]
    checksums: tuple[dict[str, Checksum32], ...]
    """Of each shard, for each site: the CRC-32 of the bytes of its tensor `checksums`."""

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        sites = self.contents.sites.keys()
        if len(self.checksums) != self.contents.shards:
            raise ValueError("not one list of checksums for each shard")
        if sites != self.statistics.keys() or any(sites != c.keys() for c in self.checksums):
            raise ValueError("statistics or checksums of other sites")
        numbers = [n for s in self.statistics.values() for n in (s.mean_norm, s.mean_square)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a statistic that is not a number")
        return self


def file_name(site: str, index: int) -> str:
    """Where in a store the shard of a site is."""
    return f"{site}/{index:06d}.safetensors"


def parse_manifest(raw: bytes, *, store: str) -> Manifest:
    """The manifest in `raw`, checked; `store` is what a message calls it."""
    try:
        version = json.loads(raw)["format"]
        if isinstance(version, int) and version > FORMAT:
            raise InputError(
                f"the activation store {store} is of format {version}, and this gemscope reads "
                f"formats up to {FORMAT}; install a newer gemscope"
            )
        if version != FORMAT:
            raise ValueError("a format that never was")
        return Manifest.model_validate_json(raw)
    except InputError as error:
        if "newer" in str(error):
            raise
        raise _unreadable(store) from None
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError):
        raise _unreadable(store) from None


def _unreadable(store: str) -> InputError:
    return InputError(
        f"the manifest of the activation store {store} cannot be read; get the store again, or "
        "harvest it anew"
    )
