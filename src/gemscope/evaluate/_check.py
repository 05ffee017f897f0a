"""Whether an artefact does on a short text what its makers published: a check of the attachment.

A dictionary on the wrong tensor, with a wrong scale or of another model gives figures far outside
these bands; a text other than its makers' stays well inside them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemscope.corpus import Document, contexts, pack
from gemscope.errors import InputError
from gemscope.hub import Entry, published
from gemscope.lm import LanguageModel, splice
from gemscope.sae import CrossLayer, Dictionary
from gemscope.sites import Stream, each

from ._losses import Losses

L0_FACTOR = 2.0
"""L0 on another text is within this factor of the nominal one."""
FVU_LIMIT = 0.75
"""Published dictionaries explain at least a quarter of the variance; most explain over half."""
NORM_FACTOR = 1.5
"""The mean input norm on another text is within this factor of the published one."""
NEAR = 0.02
"""On the very text of a published figure: relative tolerance, for other versions and kernels."""
_TOKENS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: measured, expected, and the band in which it fits."""

    name: str
    measured: float
    expected: float | None
    low: float
    high: float
    why: str
    """Where the expectation and the band come from."""

    @property
    def fits(self) -> bool:
        """Whether the measured figure lies in the band."""
        return self.low <= self.measured <= self.high


def check_text() -> Document:
    """The short English text that dictionaries are checked on."""
    file = Path(__file__).parent / "check.txt"
    return Document(file.name, file.read_text("utf-8"))


@torch.no_grad()
def check(
    model: LanguageModel,
    sae: Dictionary,
    entry: Entry,
    documents: Sequence[Document],
    *,
    input_norm: float | None = None,
) -> list[Row]:
    """L0, FVU and input norm on `documents`, and the published figures of a known prompt.

    `input_norm` is the mean norm of activations that the artefact's files state, if they do.
    """
    x, y = _activations(model, sae, documents)
    features = sae.encode(x)
    l0 = features.counts.float().mean().item()
    rows = [
        _l0_row(l0, entry.l0, sae.d_sae),
        Row(
            name="FVU",
            measured=_unexplained(sae.decode(features, x), y),
            expected=None,
            low=0.0,
            high=FVU_LIMIT,
            why=f"published dictionaries stay below {FVU_LIMIT:g}",
        ),
        _norm_row(x, sae, input_norm),
    ]
    known = published(entry)
    if known and "text" in known:
        rows += _prompt_rows(model, sae, known)
    return rows


def _activations(
    model: LanguageModel, sae: Dictionary, documents: Sequence[Document]
) -> tuple[Tensor, Tensor]:
    length = min(256, model.max_context)
    rows = contexts(documents, model.tokenizer, length=length)
    xs, ys = [], []
    for batch in pack(rows, model.tokenizer, batch=4, tokens=_TOKENS, prefix=model.prefix):
        run = model.run(batch, read=[sae.reads, sae.writes])
        counts = batch.counts.to(model.device)
        xs.append(run[sae.reads][counts].float())
        ys.append(run[sae.writes][counts].float())
    if sum(map(len, xs)) < 2:
        raise InputError("the text holds no two tokens that count; give a longer one")
    return torch.cat(xs), torch.cat(ys)


def _unexplained(out: Tensor, target: Tensor) -> float:
    """FVU against the mean vector, of everything written together."""
    out, target = out.double().flatten(1), target.double().flatten(1)
    around = (target - target.mean(0)).square().sum()
    return float((out - target).square().sum() / around)


def _l0_row(l0: float, nominal: float | None, d_sae: int) -> Row:
    if nominal is None:
        return Row(
            name="L0", measured=l0, expected=None, low=1.0, high=d_sae / 10,
            why="no L0 was published: at least one feature, at most a tenth of them",
        )  # fmt: skip
    return Row(
        name="L0",
        measured=l0,
        expected=nominal,
        low=nominal / L0_FACTOR,
        high=nominal * L0_FACTOR,
        why=f"nominal L0, within a factor of {L0_FACTOR:g} on another text",
    )


def _norm_row(x: Tensor, sae: Dictionary, stated: float | None) -> Row:
    norm = x.norm(dim=-1).mean().item()
    if each(sae.reads)[0].stream is Stream.MLP_IN_UNSCALED:
        root = math.sqrt(sae.d_in)
        return Row(
            name="input norm", measured=norm, expected=root, low=0.98 * root, high=1.02 * root,
            why="a norm without gain gives the root of d_model",
        )  # fmt: skip
    if stated is not None:
        return Row(
            name="input norm", measured=norm, expected=stated, low=stated / NORM_FACTOR,
            high=stated * NORM_FACTOR, why="the mean norm that its files state",
        )  # fmt: skip
    return Row(
        name="input norm", measured=norm, expected=None, low=0.0, high=math.inf,
        why="no input norm was published",
    )  # fmt: skip


def _prompt_rows(model: LanguageModel, sae: Dictionary, known: dict[str, Any]) -> list[Row]:
    """The published figures of one prompt, measured as their source does."""
    batch = model.tokens(known["text"])
    run = model.run(batch, read=[sae.reads, sae.writes])
    counts = batch.counts.to(model.device)
    x, y = run[sae.reads][counts].float(), run[sae.writes][counts].float()
    features = sae.encode(x)
    measured = {
        "l0": float((features.values > known.get("l0_above", 0.0)).sum()) / len(x),
        "fvu_global": _global(sae.decode(features, x), y),
        **_losses(model, sae, known.get("loss_text", known["text"])),
    }
    rows = []
    for name, value in measured.items():
        if name in known:
            expected = float(known[name])
            # A difference of two losses is compared at the scale of a loss.
            band = NEAR * max(abs(expected), 0.5 if name.startswith("delta") else 0.0)
            rows.append(
                Row(
                    name=f"{name}, its prompt", measured=value, expected=expected,
                    low=expected - band, high=expected + band,
                    why=f"{known['source']}; within {band:.2g}",
                )
            )  # fmt: skip
    return rows


def _losses(model: LanguageModel, sae: Dictionary, text: str) -> dict[str, float]:
    """Clean loss, and what splicing each site written alone adds to it."""
    batch = model.tokens(text)
    reference = Losses(model.run(batch, logits=True).logits, batch)
    out = {"loss_clean": reference.clean.mean().item()}
    for site in each(sae.writes):
        spliced = model.run(batch, edits=[splice(sae, [site])], logits=True).logits
        delta = reference.loss_of(spliced).mean().item() - out["loss_clean"]
        out[f"delta_loss at {site}" if isinstance(sae, CrossLayer) else "delta_loss"] = delta
    return out


def _global(out: Tensor, target: Tensor) -> float:
    """The official notebook's FVU: squared error over the variance of all elements."""
    return float((out - target).square().mean() / target.var())
