"""The report: one set of records as Markdown, JSON and a self-contained page."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
import markupsafe

from gemscope.errors import InputError

from ._figures import MANY, figures
from ._metrics import DEFINITIONS
from ._record import Record
from ._scope_figures import scope_figures
from ._top import ContextRecord, FeatureRecord

_TEMPLATES = Path(__file__).parent / "templates"
_KINDS = {
    "sae": "A sparse autoencoder",
    "transcoder": "A transcoder",
    "crosscoder": "A crosscoder",
    "clt": "A cross-layer transcoder",
}
_GROUPS = {
    "middle": "Features of middling density",
    "density": "Features that fire most often",
    "mean": "Features with the highest mean activation",
}


@contextmanager
def report_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder for a report under `parent`, named by the time; taken away again if it stays empty.

    Made before the work begins: a folder that cannot be written should say so first.
    """
    folder = _new_folder(parent, name)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _new_folder(parent: Path, name: str) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number, folder = 1, parent / f"{stamp}_{name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while folder.exists():  # of the same second: nothing is written over
            number += 1
            folder = parent / f"{stamp}_{name}-{number}"
        folder.mkdir()
    except OSError as error:
        raise InputError(
            f"no report can be written to {parent}: {error.strerror}; choose another --out"
        ) from None
    return folder


def write_report(folder: Path, records: Sequence[Record], *, title: str) -> Path:
    """Write `report.md`, `report.json`, `report.html` and `figures/`; the page's path."""
    drawn = scope_figures(records) if len(records) > MANY else figures(records)
    try:
        (folder / "figures").mkdir(exist_ok=True)
        for name, svg in drawn.items():
            write_text(folder / "figures" / f"{name}.svg", svg)
        write_text(
            folder / "report.json",
            json.dumps([r.json() for r in records], indent=1, ensure_ascii=False) + "\n",
        )
        for name in ("report.md", "report.html"):
            write_text(folder / name, _render(name, records, drawn, title))
    except OSError as error:
        raise InputError(f"the report cannot be written to {folder}: {error.strerror}") from None
    return folder / "report.html"


def write_text(file: Path, text: str) -> None:
    """Replace `file`, atomically."""
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(file)


def template(name: str, *folders: Path) -> jinja2.Template:
    """The template `name` of a report, from `folders` or those of evaluations.

    A page ends in `.html`: all that is put into it is escaped. `style.css` is there to include.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
        # Tokens come from untrusted text and vocabularies.
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure, "shown": shown_token, "code": _code, "inline": _inline,
    }  # fmt: skip
    return environment.get_template(name)


def _inline(svg: str) -> markupsafe.Markup:
    """A figure as a part of a page."""
    # Drawn by us; matplotlib escapes the labels.
    return markupsafe.Markup(svg[svg.index("<svg") :])  # noqa: S704


def _render(name: str, records: Sequence[Record], drawn: dict[str, str], title: str) -> str:
    return template(name).render(
        title=title,
        records=records,
        figures=drawn,
        definitions=DEFINITIONS,
        groups=_GROUPS,
        kinds=_KINDS,
        colour=_colour,
        peak=_peak,
    )


def _figure(value: float | None) -> str:
    """Four significant digits, without exponents where a person would not write one."""
    if value is None or not math.isfinite(value):
        return "not defined"
    if value and abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1_000 else f"{value:,.0f}"


def shown_token(token: str) -> str:
    """A token with its line breaks and tabs made visible."""
    return token.replace("\r", "⏎").replace("\n", "⏎").replace("\t", "⇥")


def _code(text: str) -> str:
    """`text` as Markdown code, whatever backticks and table bars are in it."""
    plain = shown_token(text).replace("|", "¦")
    longest = max((len(run) for run in _runs(plain, "`")), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or plain != plain.strip() or not plain else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def _runs(text: str, character: str) -> list[str]:
    return [run for run in "".join(c if c == character else " " for c in text).split(" ") if run]


def _colour(value: float, feature: FeatureRecord) -> str:
    """CSS background of a token, from white to the colour of the feature's maximum."""
    share = min(1.0, value / feature.maximum) if feature.maximum else 0.0
    return f"background:rgba(222,110,40,{0.85 * share:.2f})" if share > 0 else ""


def _peak(context: ContextRecord) -> tuple[str, str, str]:
    """The context as what stands before the peak, the peak, and what follows."""
    at = max(range(len(context.values)), key=context.values.__getitem__)
    return (
        "".join(context.tokens[:at]),
        context.tokens[at],
        "".join(context.tokens[at + 1 :]),
    )
