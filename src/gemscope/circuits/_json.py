"""JSON of strangers: within bounds, and the same to every reader."""

import json
from typing import Any

_DEEPEST = 64


def parse(raw: str | bytes) -> Any:
    """A JSON value; ValueError, with a short reason, for what is not one that all can read."""
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        value = json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
        text.encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def clean(text: str) -> str:
    """`text` without control characters, which would act in a terminal; line breaks become ⏎."""
    shown = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "→")
    return shown if shown.isprintable() else "".join(c if c.isprintable() else "�" for c in shown)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            x for one in level if isinstance(one, dict | list)
            for x in (one.values() if isinstance(one, dict) else one)
        ]  # fmt: skip
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value
