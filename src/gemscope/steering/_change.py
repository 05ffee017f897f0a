"""An edit as a value: what, how, how much, where and when."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gemscope.errors import InputError
from gemscope.sae import SAE

from ._modes import OF_DIRECTIONS, Mode, Strength, Unit, check_strength
from ._parts import Direction, Feature
from ._positions import Positions, Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """What to do with one feature or direction; strengths that do not fit the mode are refused."""

    what: Feature | Direction
    mode: Mode
    strength: Strength | None = None
    positions: Positions = Positions()
    schedule: Schedule = Schedule()
    amount: float = 1.0
    """Share of the change that is made: at 0 nothing changes, bit for bit, in every mode."""
    keep_norm: bool = False
    """Whether what is written gets the length that stood there before."""

    def __post_init__(self):
        bare = isinstance(self.what, Direction)
        check_strength(self.mode, self.strength, self.what.name, bare=bare)
        if not math.isfinite(self.amount):
            raise InputError(f"an amount of {self.amount} is no share; give a number such as 0.5")
        if self.strength is not None and self.strength.unit is Unit.MAX:
            self._check_maximum()
        sae = self.what.sae if isinstance(self.what, Feature) else None
        if self.mode is Mode.REPLACE and not isinstance(sae, SAE):
            raise InputError(
                f"replace works with dictionaries of one layer, and {self.what.name} is of "
                "several; gemscope.splice puts their reconstructions in place"
            )
        if self.mode in OF_DIRECTIONS and not any(bool(r.any()) for r in self.what.rows.values()):
            raise InputError(f"{self.what.name} is zero, which is no direction to steer in")

    def _check_maximum(self) -> None:
        assert isinstance(self.what, Feature)
        if self.what.maximum is None:
            raise InputError(
                f"nobody has measured how strongly {self.what.name} fires: index its dictionary "
                "(gemscope index ADDRESS --to STORE) and give --store STORE, or give an absolute "
                "strength such as 4"
            )
        if self.what.maximum <= 0:
            raise InputError(
                f"{self.what.name} never fired on the text it was measured on, so there is no "
                "maximum to be a multiple of; give an absolute strength such as 4"
            )

    def json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        what = self.what
        where = {"sites": [str(site) for site in what.rows]}
        named = {"vector": what.name} if isinstance(what, Direction) else {"feature": what.name}
        given = None if self.strength is None else str(self.strength)
        more = {"maximum": what.maximum} if isinstance(what, Feature) else {}
        return named | where | more | {
            "mode": str(self.mode), "strength": given, "positions": str(self.positions),
            "special": self.positions.special, "first": self.schedule.first,
            "decay": self.schedule.decay, "amount": self.amount, "keep_norm": self.keep_norm,
        }  # fmt: skip

    def largest(self) -> Iterator[float]:
        """The largest lengths of what is added, as far as they are known beforehand."""
        if self.strength is None or self.strength.unit in (Unit.NORM, Unit.CURRENT):
            return
        if self.mode in (Mode.MULTIPLY, Mode.MAX_RELATIVE, Mode.NORM_RELATIVE,
                         Mode.SCALE_DIRECTION):  # fmt: skip
            # A multiple of what is there, which is at least about 1.
            yield max(map(abs, self.strength.values))
            return
        times = 1.0
        if self.strength.unit is Unit.MAX:
            assert isinstance(self.what, Feature)
            times = self.what.maximum or 1.0
        longest = max(float(torch.linalg.vector_norm(r)) for r in self.what.rows.values())
        if self.mode is Mode.SET_PROJECTION:
            longest = 1.0
        yield max(map(abs, self.strength.values)) * times * longest * abs(self.amount)
