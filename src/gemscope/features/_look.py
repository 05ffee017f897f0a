"""The features of one text, token by token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gemscope.errors import InputError
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, CrossLayer, Dictionary, JumpReLU, SparseFeatures


@dataclass(frozen=True, slots=True)
class Look:
    """What a dictionary says of each token of a text; nothing of tokens that do not count."""

    sae: Dictionary
    tokens: list[str]
    counted: list[bool]
    features: SparseFeatures
    activations: Tensor
    """What the dictionary read `[n_tokens, d_in]`; of several layers, `n_layers` before `d_in`."""

    @property
    def shown(self) -> list[str]:
        """The tokens with line breaks and tabs made visible."""
        visible = {ord("\n"): "⏎", ord("\r"): "⏎", ord("\t"): "⇥"}
        return [token.translate(visible) for token in self.tokens]

    @property
    def l0(self) -> list[int]:
        """Features that fire on each token."""
        return self.features.counts.tolist()

    def name(self, feature: int) -> str:
        """A feature's number, and in a multi-layer model the layer it is read in."""
        if isinstance(self.sae, SAE):
            return str(feature)
        return f"{feature} ({self.sae.reads[self.sae.layer_of(feature)].layer})"

    def json(self, top: int) -> dict[str, Any]:
        """`{"tokens": [...], "features": [[{"feature", "value"}, ...] per token]}`; with `layer`,
        the one it is read in, for each feature of a multi-layer model.
        """
        return {
            "tokens": self.tokens,
            "features": [
                [{"feature": index, "value": value} | self._layer(index) for index, value in pairs]
                for pairs in self.features.top(top)
            ],
        }

    def _layer(self, feature: int) -> dict[str, int]:
        if isinstance(self.sae, SAE):
            return {}
        return {"layer": self.sae.reads[self.sae.layer_of(feature)].layer}


@torch.no_grad()
def look(model: LanguageModel, sae: Dictionary, text: str) -> Look:
    """Run `text` as one context and encode every token that counts."""
    run = model.run(text, read=[sae.reads])
    x, counts = run[sae.reads][0].float(), run.tokens.counts[0]
    found = sae.encode(x)
    code = masked(found, counts)
    decode = model.tokenizer.decode
    tokens = [decode([i]) for i in run.tokens.ids[0].tolist()]
    return Look(sae, tokens, counts.tolist(), code, x)


def masked(code: SparseFeatures, counts: Bool[Tensor, " n_tokens"]) -> SparseFeatures:
    """`code` without what it says of tokens that do not count."""
    keep = counts.to(code.indices.device)[code.rows]
    return SparseFeatures.from_entries(
        code.rows[keep], code.indices[keep].long(), code.values[keep], len(counts), code.d_sae
    )


def check_plot(sae: Dictionary, file: Path, feature: int | None) -> None:
    """Refuse a figure that cannot be drawn, before anything is computed for it."""
    if file.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"a figure is written as .svg, .png or .pdf, not as {file.name!r}")
    if feature is not None and not 0 <= feature < sae.d_sae:
        raise InputError(f"no feature {feature}: this dictionary has 0 to {sae.d_sae - 1}")


def plot_look(seen: Look, file: Path, *, feature: int | None = None, rows: int = 16) -> None:
    """Draw the strongest features over the tokens, or one feature with its threshold."""
    from matplotlib.figure import Figure

    check_plot(seen.sae, file, feature)
    figure = Figure(figsize=(max(6.0, 1.5 + 0.3 * len(seen.tokens)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    if feature is None:
        _heat(figure, axes, seen, rows)
    else:
        _bars(axes, seen, feature)
    axes.set_xticks(
        range(len(seen.tokens)), [_escaped(t) for t in seen.shown], rotation=90, fontsize=8
    )
    axes.set_xlabel("token")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None


def _heat(figure: Any, axes: Any, seen: Look, rows: int) -> None:
    dense = seen.features.dense().cpu()
    chosen = dense.amax(0).topk(min(rows, seen.sae.d_sae)).indices.sort().values
    image = axes.imshow(
        dense[:, chosen].T.numpy(), aspect="auto", cmap="Oranges", interpolation="nearest"
    )
    axes.set_yticks(range(len(chosen)), [seen.name(i) for i in chosen.tolist()], fontsize=8)
    axes.set_ylabel("feature")
    axes.set_title(f"The {len(chosen)} strongest features at {seen.sae.reads}", loc="left")
    figure.colorbar(image, label="activation (raw units)")


def _bars(axes: Any, seen: Look, feature: int) -> None:
    sae = seen.sae
    pre = sae.pre_activations(seen.activations, [feature])[:, 0].cpu()
    counted = torch.tensor(seen.counted)
    pre = torch.where(counted, pre, torch.nan)
    threshold = _threshold(sae, feature)
    fires = pre > threshold
    colours = ["#d8702a" if f else "#b9bfc4" for f in fires.tolist()]
    axes.bar(range(len(pre)), pre.tolist(), color=colours)
    axes.axhline(threshold, color="#333333", linewidth=1, linestyle="--")
    axes.annotate(f"threshold {threshold:.3g}", (1, threshold), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", fontsize=8)  # fmt: skip
    axes.set_ylabel("pre-activation (raw units)")
    axes.set_title(
        f"Feature {feature} at {sae.reads}: it fires where the bar is coloured", loc="left"
    )


def _threshold(sae: Dictionary, feature: int) -> float:
    if isinstance(sae, CrossLayer):
        place = sae.layer_of(feature)
        return float(sae.layers[place].threshold[feature - sae.firsts[place]])
    # TopK has no threshold of its own: what fires is above 0.
    return float(sae.activation.threshold[feature]) if isinstance(sae.activation, JumpReLU) else 0.0


def _escaped(token: str) -> str:
    # A dollar sign would begin mathematics.
    return token.replace("$", r"\$")
