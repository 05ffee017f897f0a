"""How much memory a graph takes, said before it is taken."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gemscope.errors import InputError
from gemscope.lm import LanguageModel

_EDGE = 12
"""Bytes of an edge: two places and a weight."""
_WORK = 2**29
"""Bytes of a batch of gradients and what is made of it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that tracing takes beside the model and its transcoders, at most."""

    tokens: int
    features: int
    """Active ones, at all positions together."""
    traced: int
    """Of which rows are made."""
    frozen: int
    """Matrices with gains folded in, and attention patterns."""
    edges: int

    @classmethod
    def of(cls, model: LanguageModel, tokens: int, features: int, most: int) -> "Estimate":
        """For a prompt of `tokens` with `features` active."""
        config, size = model.config, max(4, model.dtype.itemsize)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        matrices = config.hidden_size * width * (heads + shared)
        frozen = model.n_layers * (matrices + heads * tokens * tokens) * size
        traced = min(features, most)
        sources = features + model.n_layers * tokens
        # A feature gets edges from earlier layers and positions only: of a quarter, and as much
        # again while columns are joined.
        return cls(tokens, features, traced, frozen, traced * sources * _EDGE // 2)

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.frozen + self.edges + _WORK

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, {self.features:,} active features, {self.traced:,} traced: "
            f"up to {_gb(self.bytes)} beside the model"
        )


def check_memory(estimate: Estimate, device: torch.device) -> None:
    """Refuse what does not fit, and say what would."""
    free = _free(device)
    if free is None or estimate.bytes <= free:
        return
    left = max(0, free - estimate.frozen - _WORK)
    each = max(1, estimate.edges // max(1, estimate.traced))
    fits = left // each
    way_out = (
        f"trace {fits:,} features at most (--max-features {fits}), or a shorter prompt"
        if fits > 100
        else "give a shorter prompt"
    )
    raise InputError(f"{estimate}, and {_gb(free)} are free; {way_out}")


def _free(device: torch.device) -> int | None:
    """Bytes that are free where rows are made and kept; None where nothing says so."""
    found = []
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if facts.is_file():
        lines = dict(line.split(":", 1) for line in facts.read_text("ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _gb(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
