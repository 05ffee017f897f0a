"""`gemscope train`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._show import bar, console

if TYPE_CHECKING:
    from gemscope.train import TrainConfig


def train_command(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in configs/.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as data.tokens=100000.")] = None,
    smoke_test: Annotated[bool, typer.Option("--smoke-test", help="The whole path in thirty small steps.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Insist on going on from a checkpoint.")] = False,
) -> None:  # fmt: skip
    """Train a dictionary; run it again to go on."""
    from gemscope import train

    chosen = train.read_config(config, set_)
    if smoke_test:
        chosen = _fresh(train.smoke_test(chosen))
    try:
        artefact = _with_progress(chosen, resume)
    except train.Stopped as stopped:
        print(f"gemscope: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.signum) from None
    console().print(f"The dictionary: {artefact}\nEvaluate it: gemscope eval {artefact}")


def _fresh(config: "TrainConfig") -> "TrainConfig":
    """The config, in a folder where no earlier smoke test is finished or under way."""
    number, folder = 1, Path(config.out)
    while folder.exists():
        number += 1
        folder = Path(f"{config.out}-{number}")
    return config.model_copy(update={"out": str(folder)})


def _with_progress(config: "TrainConfig", resume: bool) -> Path:
    from rich import progress as bars

    from gemscope import train

    columns = (
        bars.TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        bars.BarColumn(bar_width=24),
        bars.TextColumn("{task.fields[state]}"),
        bars.TimeRemainingColumn(),
    )
    with bar(*columns) as progress:
        task = progress.add_task("train", total=config.steps, state="reading activations")

        def report(p: train.Progress) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed * config.data.batch:,.0f} tokens/s" if speed else ""
            state = (
                f"loss {p.loss:.4f}  FVU {p.fvu:.3f}  L0 {p.l0:.1f} (target "
                f"{config.sparsity.l0:g})  dead {p.dead:.1%}  {rate}"
            )
            progress.update(task, completed=p.step, state=state)

        return train.train(config, resume=resume, report=report)
