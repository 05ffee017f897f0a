"""The options that say what an artefact's files do not."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gemscope.hub import Given

Reads = Annotated[str | None, typer.Option("--reads", metavar="SITE", help="Where it reads, such as 20.resid_post, if its files do not say.")]  # fmt: skip
Writes = Annotated[str | None, typer.Option("--writes", metavar="SITE", help="Where it writes, if its files do not say; default: where it reads.")]  # fmt: skip


def given(reads: str | None, writes: str | None, model: str | None) -> "Given":
    """What the options say."""
    from gemscope.hub import Given
    from gemscope.sites import parse_sites

    return Given(
        reads=None if reads is None else parse_sites(reads),
        writes=None if writes is None else parse_sites(writes),
        model=model,
    )
