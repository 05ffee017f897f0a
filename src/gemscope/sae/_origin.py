"""Where a dictionary comes from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Facts of a dictionary's release, as far as they are known."""

    address: str | None = None
    model: str | None = None
    """The language model it was trained on."""
    l0: float | None = None
    """Nominal number of features per token."""
    licence: str | None = None
