"""Answers that come piece by piece."""

import json
from collections.abc import AsyncIterator
from typing import Any

from gemscope.errors import InputError


async def json_lines(
    first: Any, pieces: AsyncIterator[Any], *, too_long: str
) -> AsyncIterator[str]:
    """One JSON value a line; a mistake on the way is the last. `too_long` says what to do about
    work that takes longer than one request may.
    """
    try:
        yield json.dumps(first) + "\n"
        async for piece in pieces:
            yield json.dumps(piece) + "\n"
    except InputError as error:
        yield json.dumps({"error": str(error)}) + "\n"
    except TimeoutError:
        said = f"this took longer than one request may; {too_long}"
        yield json.dumps({"error": said}) + "\n"
    finally:
        # Whoever leaves must not leave the model at work.
        await pieces.aclose()  # type: ignore[attr-defined]
