"""A row of rounds, cut into batches of one size without a rest.

Rounds of tokens stand one after another, `before(round)` tokens ahead of each. Batch `k` of the
row is tokens `k * batch` to `(k + 1) * batch`, wherever rounds end. So a position is only another
name for a token's place in the row, and no state has to be carried from round to round.
"""

from collections.abc import Callable

from ._source import Position


class Cutting:
    """The batches of a row of rounds, by position."""

    def __init__(self, batch: int, before: Callable[[int], int]):
        self.batch, self.before = batch, before

    def start(self, position: Position) -> tuple[int, int]:
        """The batch at `position`: its number in the row, and the round its first token is in."""
        number = self.before(position.round) // self.batch + position.batch
        found = position.round
        while self.before(found) > number * self.batch:
            found -= 1
        while self.before(found + 1) <= number * self.batch:
            found += 1
        return number, found

    def after(self, number: int, ends: int) -> Position:
        """The position behind batch `number` of the row, which ends in round `ends`."""
        first = self.before(ends) // self.batch
        if (number + 2) * self.batch > self.before(ends + 1):
            return Position(ends + 1, 0)
        return Position(ends, number + 1 - first)
