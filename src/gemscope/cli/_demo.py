"""`gemscope demo`."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._show import console
from ._sites import given

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemscope.corpus import Document
    from gemscope.features import Explanation
    from gemscope.hub import Entry

_TEXT = """def mean(values):
    \"\"\"Return the arithmetic mean.\"\"\"
    if not values:
        raise ValueError("empty")
"""
_TOKENS = 16_384
_MOST = 4
"""Dictionaries that are evaluated: all of the bundled ones take minutes."""
_INDEXED = "miniature/transcoder_all/layer_2_width_192_l0_small_affine"
_INDEX_TOKENS = 60_000


def _beginnings(tokens: int) -> list["Document"]:
    """The first part of each held-out document: a few tokens of every one say more of how a
    dictionary does than many of two.
    """
    from gemscope import corpus

    documents = corpus.read_text(corpus.BUNDLED)
    letters = 3 * tokens // len(documents)
    return [corpus.Document(d.path, d.text[:letters]) for d in documents]


def _spread(entries: "Sequence[Entry]") -> "list[Entry]":
    """The widest of some kinds, then SAEs from the deepest layer down."""
    from gemscope.sites import each

    chosen = []
    for kind in ("sae", "transcoder", "crosscoder"):
        alike = [e for e in entries if e.kind == kind]
        chosen += sorted(alike, key=lambda e: (-e.d_sae, -(e.l0 or 0)))[:1]
    rest = [e for e in entries if e.kind == "sae" and e not in chosen]
    rest.sort(key=lambda e: (-each(e.reads)[0].layer, -(e.l0 or 0)))
    return [*chosen, *rest][:_MOST]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports"),
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, at most.")] = _TOKENS,
    serve: Annotated[
        bool, typer.Option("--serve", help="Then show it in the explorer, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port of the explorer; 0 takes a free one.", min=0, max=65535)
    ] = 8421,
) -> None:
    """Evaluate the bundled dictionaries, offline, and look at one."""
    from gemscope import explorer, features, hub
    from gemscope.evaluate import Settings

    from . import _eval, _look, _serve

    if serve:
        # A port that is taken is told now rather than after minutes.
        explorer.listen("127.0.0.1", port).close()
    began = time.monotonic()
    to = console()
    bundled = hub.catalog(release="miniature")
    entries = _spread(bundled)
    to.print(
        f"[bold]gemscope demo[/bold]: {len(entries)} of the {len(bundled)} dictionaries of the "
        "miniature, a small Gemma 3 trained\non Python's standard library, spliced into it on modules it "
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
    chosen = max((e for e in entries if e.kind == "sae"), key=lambda e: e.d_sae)
    to.print(f"\n[bold]What {chosen.address} sees in a few lines of code[/bold]\n")
    from gemscope.lm import load_model

    _look._print(features.look(load_model(entries[0].model), hub.build(chosen), _TEXT), 5)
    store = page.parent / "catalog"
    _telling(store)
    to.print(
        f"\nThe report: {page} (open it in a browser)\n"
        f"Next: gemscope search {store} 'string or comment'\n"
        f"      gemscope feature {store} {_INDEXED}/0\n"
        f"      gemscope look 'import os' --sae {chosen.address}\n"
        f"      gemscope eval 'miniature/*'\n      gemscope list miniature\n"
        f"      gemscope serve {store} --reports {page.parent}   # as gemscope demo --serve does\n"
        f"[dim]{time.monotonic() - began:.0f} seconds[/dim]",
        soft_wrap=True,
    )
    if serve:
        _serve.serve_command([store], reports=page.parent, port=port)


def _telling(folder: Path) -> None:
    """Index a dictionary, find a rule for every feature, and show three that tell something."""
    from gemscope import explain, features

    from . import _index
    from ._feature import print_brief

    to = console()
    to.print(f"\n[bold]What the features of {_INDEXED} fire on[/bold]\n")
    lm, subjects, name = _index.subjects_of([_INDEXED], given(None, None, None), None)
    store = features.Store.create(folder)
    settings = features.Settings(tokens=_INDEX_TOKENS, keep_activations=True)
    _index.run(lm, subjects, features.sources_of(tokens=_INDEX_TOKENS), store, settings, name)
    text, activations = store.text(_INDEXED), store.activations(_INDEXED)
    assert activations is not None
    made = list(
        explain.explain_by_rules(text, activations, _INDEXED, tokenizer=lm.tokenizer)
    )  # fmt: skip
    store.add_explanations(made)
    told = explain.rule_summary(made, features=subjects[0].sae.d_sae)
    to.print(
        f"[dim]A rule was found for {told['rules']} of {told['features']} features on some documents "
        f"and scored on others: {told['above']['0.8']:.0%} reach a balanced accuracy of\n0.8, "
        f"{told['above_null']['0.8']:.0%} with another feature's rule. Three of them:[/dim]"
    )
    for e in _different(made):
        to.print()
        print_brief(features.card(store, _INDEXED, e.feature), contexts=3)


def _different(made: "Sequence[Explanation]") -> "list[Explanation]":
    """Three features of which a short rule tells reliably, each about other words."""

    def words(e: "Explanation") -> set[str]:
        return set(re.findall(r"`·?([A-Za-z]{2,})`", e.text))

    told = [e for e in made if e.scores[0].detail["precision"] > 0.7 and len(e.text) < 80]
    told = [e for e in told if "⏎" not in e.text and "line break" not in e.text] or told
    told.sort(key=lambda e: (-e.scores[0].low, e.feature))
    chosen: list[Explanation] = []
    for e in told:
        if 3 * len(words(e)) > e.text.count("`") and not words(e) & {
            w for other in chosen for w in words(other)
        }:
            chosen.append(e)
    return [*chosen, *(e for e in told if e not in chosen)][:3]
