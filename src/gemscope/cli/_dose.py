"""`gemscope dose`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemscope.errors import InputError

from ._show import console, number, print_json, token_progress
from ._sites import Reads, Writes, given

if TYPE_CHECKING:
    from gemscope.steering import Dose, Measure

_STRENGTHS = "0,0.25xmax,0.5xmax,1xmax,2xmax,4xmax"


def dose_command(
    name: Annotated[str, typer.Argument(metavar="ADDRESS/INDEX", help="The feature.")],
    store: Annotated[Path | None, typer.Option(metavar="STORE", help="Catalog store that knows the feature's maximum.")] = None,
    mode: Annotated[str, typer.Option(help="How to steer: add, set, floor, multiply or another mode of gemscope steer that takes a strength.")] = "add",
    strengths: Annotated[str, typer.Option(metavar="LIST", help="Numbers or multiples such as 0.5xmax, 0.1xnorm, with commas between.")] = _STRENGTHS,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt. May be repeated; default: neutral ones.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts, one a line.")] = None,
    positions: Annotated[str, typer.Option(help="all, prompt, generated, last or a span of the prompt such as 3:7; several joined by +.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt; with a temperature.", min=1)] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token; default: 0 for one sample, 1 for several.")] = None,
    seed: Annotated[int, typer.Option(help="Of samples and of the resamples of prompts.", min=0)] = 0,
    figure: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw effect and cost: .png, .svg or .pdf.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to run; default: the dictionary's own.")] = None,
    reads: Reads = None,
    writes: Writes = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's: float32, bfloat16; default: by device.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:  # fmt: skip
    """Measure what a feature's steering does and what it costs, strength by strength."""
    from gemscope import relate, steering
    from gemscope.features import Store
    from gemscope.lm import load_model

    if samples > 1 and temperature == 0:
        raise InputError(f"at a temperature of 0 all {samples} samples are the same; leave it out")
    if figure is not None:
        relate.check_figure(figure)
    asked = _prompts(prompt, prompts)
    how = steering.Mode.parse(mode)
    sweep = [steering.Strength.parse(part) for part in strengths.split(",")]
    feature = steering.load_feature(
        name, store=None if store is None else Store.open(store), given=given(reads, writes, model)
    )
    change = steering.Change(what=feature, mode=steering.Mode.ABLATE)
    lm = load_model(model or steering.model_of([change]), device=device, dtype=dtype)
    with token_progress(unit="continuations") as progress:
        found = steering.dose(
            lm, feature, asked or steering.neutral_prompts(lm), sweep, mode=how,
            positions=steering.Positions.parse(positions), max_new_tokens=max_new_tokens,
            samples=samples, seed=seed, progress=progress,
            temperature=(0.0 if samples == 1 else 1.0) if temperature is None else temperature,
        )  # fmt: skip
    if figure is not None:
        steering.draw_dose(found, figure)
    if json:
        print_json(found.json())
        return
    _print(found)
    if figure is not None:
        console().print(f"The figure: {figure}")


def _prompts(texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts that were given; none if none were."""
    if texts and file is not None:
        raise InputError("--prompt and --prompts were given; give one of them")
    if file is None:
        return list(texts or ())
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"the prompts in {file} cannot be read: {said}") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise InputError(f"{file} holds no prompt; write one a line")
    return found


def _print(found: "Dose") -> None:
    from rich.table import Table

    to = console()
    to.print(f"[bold]{found.feature}[/bold], {found.mode} at {found.positions}, {len(found.prompts)} "
             f"prompts of {found.settings['model'] or 'the model'}")  # fmt: skip
    if found.promoted is None:
        to.print("It does not write to the residual stream: which tokens it promotes is not known, "
                 "and its effect is its activation.")  # fmt: skip
    else:
        to.print(f"promotes {' '.join(map(repr, found.promoted))}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("strength", no_wrap=True)
    shown = [(n, h) for n, h in _SHOWN.items() if n != "promoted" or found.promoted is not None]
    for _, heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for point in (found.baseline, *found.points):
        label = "unsteered" if point.strength is None else str(point.strength)
        style = "bold" if point.strength is not None and point.strength == found.knee else ""
        label += "  knee" if style else ""
        cells = [_cell(measure, point.measures[measure]) for measure, _ in shown]
        table.add_row(label, *cells, style=style)
    to.print()
    to.print(table)
    to.print(f"\n{found.reason[:1].upper()}{found.reason[1:]}.", markup=False)
    for point in (found.baseline, *found.points):
        if point.strength is None or point.strength == found.knee:
            label = "unsteered" if point.strength is None else str(point.strength)
            to.print(f"{label}: {found.prompts[0] + point.continuations[0]!r}", markup=False,
                     no_wrap=True, overflow="ellipsis")  # fmt: skip


_SHOWN = {
    "promoted": "promoted", "activation": "activation", "kl": "KL", "perplexity": "perplexity",
    "repetition": "repetition",
}  # fmt: skip


def _cell(name: str, measure: "Measure | None") -> str:
    """A figure and its interval; probabilities and shares in percent."""
    if measure is None:
        return "-"
    shares = name in ("promoted", "repetition")

    def shown(value: float) -> str:
        return f"{100 * value:.{2 if value < 0.1 else 1}f}" if shares else number(value, 2)

    value = f"{shown(measure.value)}%" if shares else number(measure.value, 3)
    if measure.low is None or measure.high is None or measure.low == measure.high:
        return value
    return f"{value} [{shown(measure.low)}, {shown(measure.high)}]"
