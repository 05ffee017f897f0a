"""The standard edits, each with its formula, and the strengths that each understands.

`x` is what the written site holds, `f` the feature's activation, read from the unsteered stream,
`d` its decoder row, `u` that row at length one, `s` the strength. What is left over by the
dictionary stays where it is in every mode but `replace`.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from gemscope.errors import InputError, did_you_mean


class Mode(StrEnum):
    """What to do to a feature or a direction."""

    ADD = "add"
    """`x + s d`"""
    SET = "set"
    """`x + (s - f) d`: the clamp"""
    SET_IF_ACTIVE = "set-if-active"
    """`x + [f > 0] (s - f) d`"""
    FLOOR = "floor"
    """`x + (max(f, s) - f) d`"""
    CAP = "cap"
    """`x + (min(f, s) - f) d`"""
    MULTIPLY = "multiply"
    """`x + (s - 1) f d`"""
    ABLATE = "ablate"
    """`x - f d`"""
    OFFSET_IF_ACTIVE = "offset-if-active"
    """`x + [f > 0] s d`"""
    MAX_RELATIVE = "max-relative"
    """`x + s m d` with `m` the largest `f` of the row's prompt (2505.20063)"""
    ABLATE_DIRECTION = "ablate-direction"
    """`x - (x . u) u`"""
    SCALE_DIRECTION = "scale-direction"
    """`x + (s - 1) (x . u) u`"""
    SET_PROJECTION = "set-projection"
    """`x + (s - x . u) u`"""
    NORM_RELATIVE = "norm-relative"
    """`x + s |x| u`"""
    REPLACE = "replace"
    """`decode(f')` with `f' = s`, or as it is without a strength: drops the error"""

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """The mode called `text`."""
        if text not in list(cls):
            raise InputError(f"no mode named {text!r}; {did_you_mean(text, cls)}")
        return cls(text)


class Unit(StrEnum):
    """What a strength is a multiple of."""

    ABSOLUTE = ""
    MAX = "xmax"
    """The feature's catalogued maximum."""
    NORM = "xnorm"
    """The length of what the written site holds, token by token."""
    CURRENT = "xcurrent"
    """The feature's activation at the token."""


@dataclass(frozen=True, slots=True)
class Strength:
    """A number, or one for each row of a batch, and its unit."""

    value: float | tuple[float, ...]
    unit: Unit = Unit.ABSOLUTE

    def __post_init__(self):
        if not self.values or not all(math.isfinite(v) for v in self.values):
            raise InputError(f"a strength of {self} is no number; give one such as 4 or 0.5xmax")

    @classmethod
    def parse(cls, text: str) -> "Strength":
        """`4`, `-2.5`, `0.5xmax`, `0.1xnorm` or `2xcurrent`."""
        number, times, unit = text.strip().partition("x")
        try:
            return cls(float(number), Unit(times + unit))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"no strength {text!r}: write a number such as 4 or -2.5, or a multiple such as "
                "0.5xmax, 0.1xnorm or 2xcurrent"
            ) from None

    @property
    def values(self) -> tuple[float, ...]:
        """The number, or all of them."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    def __str__(self) -> str:
        return ", ".join(f"{v:g}{self.unit}" for v in self.values)


_PLAIN = frozenset({Unit.ABSOLUTE})
_OF_FEATURE = _PLAIN | {Unit.MAX}
UNITS: dict[Mode, frozenset[Unit]] = {
    Mode.ADD: frozenset(Unit), Mode.SET: _OF_FEATURE, Mode.SET_IF_ACTIVE: _OF_FEATURE,
    Mode.FLOOR: _OF_FEATURE, Mode.CAP: _OF_FEATURE, Mode.MULTIPLY: _PLAIN,
    Mode.ABLATE: frozenset(), Mode.OFFSET_IF_ACTIVE: frozenset(Unit), Mode.MAX_RELATIVE: _PLAIN,
    Mode.ABLATE_DIRECTION: frozenset(), Mode.SCALE_DIRECTION: _PLAIN,
    Mode.SET_PROJECTION: frozenset({Unit.ABSOLUTE, Unit.NORM}), Mode.NORM_RELATIVE: _PLAIN,
    Mode.REPLACE: _OF_FEATURE,
}  # fmt: skip
"""The units of strength that each mode understands; none where it takes no strength."""

OF_DIRECTIONS = frozenset(
    {Mode.ADD, Mode.ABLATE_DIRECTION, Mode.SCALE_DIRECTION, Mode.SET_PROJECTION,
     Mode.NORM_RELATIVE}
)  # fmt: skip
"""Modes that need a direction and no activation, so that any vector can be steered with."""

READS_ACTIVATION = frozenset(Mode) - OF_DIRECTIONS
"""Modes that read how strongly the feature fires."""


def check_strength(mode: Mode, strength: Strength | None, what: str, *, bare: bool) -> None:
    """Refuse a strength that a mode does not understand, or the lack of one that it needs.

    `bare` says that a vector of no dictionary is steered with.
    """
    if bare and mode not in OF_DIRECTIONS:
        raise InputError(
            f"{what} is a vector of no dictionary and fires on nothing, so {mode} does not apply; "
            f"take {', '.join(sorted(OF_DIRECTIONS))}"
        )
    units = UNITS[mode]
    if strength is None:
        if units and mode is not Mode.REPLACE:
            raise InputError(f"{mode} needs a strength, such as {_example(units)}")
        return
    if not units:
        raise InputError(f"{mode} takes no strength, and {strength} was given; leave it out")
    if strength.unit not in units:
        accepted = ", ".join(f"2{unit}" for unit in Unit if unit in units)
        raise InputError(f"{mode} does not take a strength of {strength}; write it as {accepted}")
    if bare and strength.unit in (Unit.MAX, Unit.CURRENT):
        raise InputError(
            f"{what} is a vector of no dictionary and has no activations to be a multiple of; "
            "write its strength as 2 or 0.1xnorm"
        )


def _example(units: frozenset[Unit]) -> str:
    return "0.5xmax" if Unit.MAX in units else "0.5"
