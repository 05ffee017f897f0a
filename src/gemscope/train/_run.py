"""A run from its config to finished artefacts: sources, signals, what is written where.

`out` becomes a folder that is read like a release: each artefact under its name. Beside them are
`config.yaml`, `metrics/NAME.jsonl`, `evaluations.jsonl`, the report, and, while the run is
unfinished, `checkpoint`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from gemscope import formats, hub
from gemscope.activations import ActivationStream, Source, stop_signals
from gemscope.corpus import Context, contexts, read_dataset, read_text
from gemscope.errors import InputError
from gemscope.lm import LanguageModel, load_model
from gemscope.sites import each

from ._checkpoint import Checkpoints
from ._config import TrainConfig
from ._export import write_artefact
from ._floor import Floor
from ._log import logging
from ._look import Looks
from ._metrics import clear
from ._report import Journal, write_training_report
from ._trainer import Progress, Trainer


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and has written a checkpoint."""

    def __init__(self, signum: int, step: int, steps: int, folder: Path):
        self.signum = signum
        super().__init__(
            f"stopped at step {step} of {steps}; the checkpoint is in {folder}: "
            "run the same command to go on"
            if step
            else f"stopped before the first of {steps} steps: run the same command to begin"
        )


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    begun: Callable[[Floor], None] = lambda _: None,
    model: LanguageModel | None = None,
) -> Path:
    """Train what `config` says; the folder of the finished artefacts.

    A run that was interrupted goes on where it stopped. With `resume`, there must be one.
    `report` is called after every step, `begun` before the first: what a step takes at least.
    Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint: `Stopped`.
    """
    folder = Path(config.out)
    checkpoints = Checkpoints(folder)
    if resume and not checkpoints.exists():
        raise InputError(f"nothing to resume: no checkpoint in {folder}; leave --resume out")
    if not checkpoints.exists() and (there := _there(config)):
        # Refused now: after training it would be too late.
        told = "is finished" if len(there) == len(config.artefacts) else f"holds {there[0]} already"
        raise InputError(f"{folder} {told}; choose another out, or remove that folder")
    _prepare(folder)
    with stop_signals() as received, logging(config) as logs:
        model = model or _model(config)
        source = _source(config, model)
        trainer = Trainer(config, source, _starts(config, model))
        if checkpoints.exists():
            trainer.restore(folder)
        else:
            clear(folder)  # of what a run left that ended before its first checkpoint
            told = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write(folder / "config.yaml", told)
        looks = Looks(config, model, trainer, folder)
        journal = Journal(folder, config, model, trainer)
        begun(journal.floor)
        report = logs.before(report, journal.began, trainer.metrics.every)
        look = journal.timed(looks.after)
        done = trainer.train(folder, report=report, stopping=lambda: bool(received), look=look)
        journal.write(ended=done)
    if not done:
        if received:
            raise Stopped(received[0], trainer.step, config.steps, folder)
        raise InputError(
            f"the data ended at step {trainer.step} of {config.steps}; the checkpoint is in "
            f"{folder}: give more data, or larger epochs, and run the command again"
        )
    for learner in trainer.learners:
        artefact = folder / learner.config.name
        if not artefact.exists():  # or it was written before an interruption
            write_artefact(artefact, learner, config, model)
    looks.at_the_end()
    write_training_report(folder)
    checkpoints.remove()
    return folder


def _model(config: TrainConfig) -> LanguageModel:
    return load_model(config.model, dtype=config.model_dtype)


def _there(config: TrainConfig) -> list[str]:
    return [a.name for a in config.artefacts if (Path(config.out) / a.name).exists()]


def _source(config: TrainConfig, model: LanguageModel) -> Source:
    for a in config.artefacts:
        for site in (*each(a.reads), *each(a.writes)):
            model.width(site)
    data = config.data
    if data.store is not None:
        from gemscope.activations import open_store

        source: Source = open_store(
            data.store, model_name=model.name or hub.model_source(config.model),
            sites=config.sites, batch=data.batch, seed=data.seed, skip_corrupt=data.skip_corrupt,
        )  # fmt: skip
    else:
        rows = _rows(config, model)
        if config.artefacts[0].end_to_end:
            from ._end_to_end import ThroughStream

            source = ThroughStream(model, rows, config.sites[0], batch=data.batch, seed=data.seed)
        else:
            import torch

            source = ActivationStream(
                model, rows, config.sites, batch=data.batch, buffer=data.buffer, seed=data.seed,
                dtype=getattr(torch, data.dtype),
            )  # fmt: skip
    # A buffer leaves out what does not fill its last batch.
    if source.tokens * data.epochs < data.tokens:
        raise InputError(
            f"data.tokens is {data.tokens:,}, and {data.epochs} epoch{'s' * (data.epochs > 1)} of "
            f"the data are {source.tokens * data.epochs:,}; set data.epochs to "
            f"{-(-data.tokens // source.tokens)} to repeat it, or give more data"
        )
    return source


def _rows(config: TrainConfig, model: LanguageModel) -> list[Context]:
    data = config.data
    if data.context > model.max_context:
        raise InputError(
            f"data.context is {data.context}, and {config.model} reads at most "
            f"{model.max_context} tokens"
        )
    documents = read_dataset(data.dataset) if data.dataset else read_text(data.text or "")
    return list(contexts(documents, model.tokenizer, length=data.context))


def _starts(config: TrainConfig, model: LanguageModel) -> Mapping[str, Sequence[formats.Part]]:
    """The tensors of the artefacts that are trained on."""
    out = {}
    for a in config.artefacts:
        if a.start is None:
            continue
        given = hub.Given(reads=a.reads, writes=a.writes, model=config.model)
        entry = hub.obtain(hub.locate(a.start, given))
        assert entry.path is not None
        if (entry.reads, entry.writes) != (a.reads, a.writes):
            raise InputError(
                f"{a.name}: reads is {a.reads} and writes {a.writes}, and {a.start} reads "
                f"{entry.reads} and writes {entry.writes}; set them so"
            )
        parts = formats.read(entry.path)
        for part, site in zip(parts, each(a.reads), strict=False):
            if (d_in := part.w_enc.shape[0]) != (width := model.width(site)):
                raise InputError(
                    f"{a.name}: {site} of {config.model} is {width} wide, "
                    f"and {a.start} reads {d_in}"
                )
        d_sae = sum(p.w_enc.shape[1] for p in parts)
        if d_sae != a.d_sae or len(parts) != len(each(a.reads)):
            raise InputError(
                f"{a.name}: d_sae is {a.d_sae}, and {a.start} has {d_sae} features of "
                f"{len(parts)} layers; set d_sae: {d_sae} and the sites it was made for"
            )
        if (parts[0].skip is not None) != a.affine:
            raise InputError(
                f"{a.name}: affine is {a.affine}, and {a.start} "
                f"{'has' if parts[0].skip is not None else 'has no'} skip connection"
            )
        out[a.name] = parts
    return out


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror}; choose another out"
        ) from None


def write(file: Path, text: str) -> None:
    """Replace `file`, atomically."""
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(file)
