"""A training run from config to artefact."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gemscope import formats
from gemscope.activations import ActivationStream
from gemscope.corpus import contexts, read_dataset, read_text
from gemscope.errors import InputError
from gemscope.hub import model_source
from gemscope.lm import LanguageModel, load_model
from gemscope.sites import Site

from ._config import TrainConfig
from ._trainer import CHECKPOINT, Progress, Trainer

ARTEFACT = "artefact"
_SMOKE = {"tokens": 15_360, "batch": 512, "bucket": 4_096, "context": 128}


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and has written a checkpoint."""

    def __init__(self, signum: int, step: int, steps: int, folder: Path):
        self.signum = signum
        super().__init__(
            f"stopped at step {step} of {steps}; the checkpoint is in {folder}: "
            "run the same command to go on"
        )


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    model: LanguageModel | None = None,
) -> Path:
    """Train what `config` says; the folder of the finished artefact.

    A run that was interrupted goes on where it stopped. With `resume`, there must be one.
    Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint: `Stopped`.
    """
    folder = Path(config.out)
    artefact, checkpoint = folder / ARTEFACT, folder / CHECKPOINT
    if artefact.exists():
        raise InputError(f"{artefact} is finished; choose another out, or remove that folder")
    if resume and not checkpoint.is_file():
        raise InputError(f"nothing to resume: {checkpoint} does not exist; leave --resume out")
    _prepare(folder)
    model = model or load_model(config.model, dtype=config.model_dtype)
    facts = _facts(config, model)  # a site without a name in the layout is refused now
    trainer = Trainer(config, _stream(config, model))
    if checkpoint.is_file():
        trainer.restore(folder)
    else:
        _write(
            folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        )
    with _signals() as received:
        done = trainer.train(folder, report=report, stopping=lambda: bool(received))
    if not done:
        raise Stopped(received[0], trainer.step, config.steps, folder)
    formats.write_gemma_scope_2(artefact, facts, [trainer.dictionary.folded(trainer.scales)])
    return artefact


def smoke_test(config: TrainConfig) -> TrainConfig:
    """The same run in thirty steps of a narrow dictionary, in a folder of its own."""
    data = config.data.model_copy(update=_SMOKE)
    sparsity = config.sparsity.model_copy(
        update={"l0": min(config.sparsity.l0, 32.0), "warm_up": 10}
    )
    optimizer = config.optimizer.model_copy(update={"warm_up": 10})
    return config.model_copy(
        update={
            "d_sae": min(config.d_sae, 512),
            "out": f"{config.out.rstrip('/')}-smoke-test",
            "data": data,
            "sparsity": sparsity,
            "optimizer": optimizer,
        }
    )


def _stream(config: TrainConfig, model: LanguageModel) -> ActivationStream:
    for site in (config.reads, config.writes):
        model.width(site)
    length = config.data.context
    if length > model.max_context:
        raise InputError(
            f"data.context is {length}, and {config.model} reads at most {model.max_context} tokens"
        )
    source = config.data
    documents = read_dataset(source.dataset) if source.dataset else read_text(source.text or "")
    rows = list(contexts(documents, model.tokenizer, length=length))
    return ActivationStream(
        model,
        rows,
        config.reads,
        config.writes,
        batch=source.batch,
        bucket=source.bucket,
        seed=config.seed,
    )


def _facts(config: TrainConfig, model: LanguageModel) -> formats.Config:
    def hook(site: Site) -> str:
        return model.family.hook(site)

    return formats.Config(
        hf_hook_point_in=hook(config.reads),
        hf_hook_point_out=hook(config.writes),
        width=config.d_sae,
        model_name=model.name or model_source(config.model),
        architecture="jump_relu",
        l0=config.sparsity.l0,
        affine_connection=config.affine,
        type="sae" if config.reads == config.writes else "transcoder",
    )


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


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(file)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The stop signals received while the context lasts; a second Ctrl-C acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, _frame: object) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, note)
    except ValueError:  # not in the main thread: whoever runs us handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
