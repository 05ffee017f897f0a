"""Looking at unfinished artefacts: spliced into the model on held-out text, a line of JSON each."""

import json
from pathlib import Path

from gemscope.corpus import Document, read_text
from gemscope.evaluate import Settings, evaluate
from gemscope.hub import model_source
from gemscope.lm import LanguageModel

from ._config import TrainConfig
from ._export import dictionary_of
from ._metrics import EVALUATIONS
from ._trainer import Trainer

KEPT = ("l0", "fvu", "delta_loss", "loss_recovered_mean", "dead_fraction")


class Looks:
    """When to look, and at what."""

    def __init__(self, config: TrainConfig, model: LanguageModel, trainer: Trainer, folder: Path):
        self.config, self.model, self.trainer, self.folder = config, model, trainer, folder
        self._documents: list[Document] | None = None

    def after(self, step: int) -> None:
        """Look, if it is time; the end has its own."""
        wanted = self.config.evaluate
        if wanted is not None and step % wanted.every == 0 and step < self.config.steps:
            self._look(step)

    def at_the_end(self) -> None:
        """The last look."""
        if self.config.evaluate is not None:
            self._look(self.config.steps)

    def _look(self, step: int) -> None:
        wanted = self.config.evaluate
        assert wanted is not None
        if self._documents is None:
            self._documents = list(read_text(wanted.text))
        name = self.model.name or model_source(self.config.model)
        learners = self.trainer.learners
        settings = Settings(tokens=wanted.tokens, context=self.config.data.context)
        lines = []
        # One at a time: what is folded for a look is gone before the next is.
        for learner in learners:
            (found,) = evaluate(
                self.model, [dictionary_of(learner, name)], self._documents, settings
            )
            told = {"name": learner.config.name, "step": step, "tokens": learner.tokens}
            lines.append(told | {key: found.metrics.get(key) for key in KEPT})
        with (self.folder / EVALUATIONS).open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)
