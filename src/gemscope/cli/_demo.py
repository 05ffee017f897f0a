"""`gemscope demo`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._show import console

if TYPE_CHECKING:
    from gemscope.corpus import Document

_TEXT = """def mean(values):
    \"\"\"Return the arithmetic mean.\"\"\"
    if not values:
        raise ValueError("empty")
"""
_TOKENS = 16_384
_SHOWN = (
    "miniature/resid_post_all/layer_1_width_384_l0_big",
    "miniature/resid_post/layer_3_width_2k_l0_medium",
    "miniature/resid_post_all/layer_5_width_384_l0_big",
    "miniature/transcoder_all/layer_3_width_192_l0_small_affine",
)
"""Four of the bundled dictionaries: all of them take minutes."""


def _beginnings(tokens: int) -> list["Document"]:
    """The first part of each held-out document: a few tokens of every one say more of how a
    dictionary does than many of two.
    """
    from gemscope import corpus

    documents = corpus.read_text(corpus.BUNDLED)
    letters = 3 * tokens // len(documents)
    return [corpus.Document(d.path, d.text[:letters]) for d in documents]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports"),
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, at most.")] = _TOKENS,
) -> None:
    """Evaluate the bundled dictionaries, offline, and look at one."""
    from gemscope import features, hub
    from gemscope.evaluate import Settings

    from . import _eval, _look

    began = time.monotonic()
    to = console()
    entries, bundled = [hub.locate(a) for a in _SHOWN], len(hub.catalog(release="miniature"))
    to.print(
        f"[bold]gemscope demo[/bold]: {len(entries)} of the {bundled} dictionaries of the miniature, "
        "a small Gemma 3 trained\non Python's standard library, spliced into it on modules it "
        "never saw.\n"
    )
    records, page = _eval.run(
        [entry.address for entry in entries],
        Settings(tokens=tokens),
        text="the beginnings of the bundled held-out modules",
        documents=_beginnings(tokens),
        out=out,
        title="Demo",
    )
    _eval.print_summary(records)
    chosen = next(e for e in entries if e.kind == "sae" and "layer_3" in e.address)
    to.print(f"\n[bold]What {chosen.address} sees in a few lines of code[/bold]\n")
    from gemscope.lm import load_model

    _look._print(features.look(load_model(entries[0].model), hub.build(chosen), _TEXT), 5)
    to.print(
        f"\nThe report: {page} (open it in a browser)\n"
        f'Next: gemscope look "import os" --sae {chosen.address}\n'
        f"      gemscope eval 'miniature/*'\n      gemscope list miniature\n[dim]{time.monotonic() - began:.0f} seconds[/dim]"
    )
