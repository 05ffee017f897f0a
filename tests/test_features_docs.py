"""The output that docs/features.md and docs/steering.md show is what the commands print."""

import re
import shlex
from pathlib import Path

import pytest

from gemscope.features import Store

DOCS = Path(__file__).parents[1] / "docs"
TEXT = "".join((DOCS / name).read_text("utf-8") for name in ("features.md", "steering.md"))
BLOCKS = [b for b in re.findall(r"```\n(.*?)```", TEXT, re.S) if b.startswith("$ ")]


def shown():
    """`(command, lines)` of every command with its output."""
    for block in BLOCKS:
        for part in block.split("$ ")[1:]:
            first, *rest = part.splitlines()
            yield first, rest


def same(line, printed):
    """Whether a printed line begins with the words of `line`, numbers to two parts in a hundred."""
    wanted, found = line.split(), printed.split()
    return len(found) >= len(wanted) and all(map(close, wanted, found))


def close(wanted, found):
    a, b = (re.sub(r"[,%()]", "", word) for word in (wanted, found))
    try:
        return float(a) == pytest.approx(float(b), rel=0.02)
    except ValueError:
        return wanted.rstrip(",") == found.rstrip(",")


@pytest.mark.parametrize(("line", "lines"), list(shown()), ids=[c[:45] for c, _ in shown()])
def test_commands_print_what_is_shown(line, lines, small_store, command, tmp_path):
    arguments = shlex.split(line)[1:]
    store = tmp_path / "catalog" if arguments[0] == "index" else small_store
    code, out, _ = command(*[str(store) if a == "catalog" else a for a in arguments])
    assert code == 0
    printed = out.splitlines()
    for wanted in lines:
        assert any(same(wanted, p) for p in printed), f"{wanted!r} is not in {out}"


def test_the_statistics_that_conditions_may_use_are_columns(small_store, indexed):
    from gemscope.features._search import _STATISTICS

    columns = Store.open(small_store).features(indexed[0]).column_names
    assert set(_STATISTICS) <= set(columns)
