"""The metrics, as formulas over sums; what they mean is in `DEFINITIONS`.

`fvu` is the papers' fraction of variance unexplained (2408.05147), against the mean vector;
`fvu_global` is the official notebook's, against one scalar mean over all elements. Loss is the
cross-entropy, in nats, of every counted token as a target: the first one is predicted from BOS.
"""

import numpy as np

from ._sums import Formula

SUMS = (
    "n", "l0", "error", "variance", "global_variance", "cosine", "norm_ratio", "written_square",
    "written_dot", "targets", "clean", "spliced", "zero", "mean", "kl",
)  # fmt: skip

LAYER_SUMS = ("n", "l0", "error", "variance", "targets", "clean", "spliced")
"""What is summed of each layer of a multi-layer model."""

Columns = dict[str, np.ndarray]


def _recovered(ablated: str) -> Formula:
    def formula(s: Columns) -> np.ndarray | np.floating:
        return (s[ablated] - s["spliced"]) / (s[ablated] - s["clean"])

    return formula


def formulas(d_out: int) -> dict[str, Formula]:
    """Every metric that is a function of sums, for outputs of width `d_out`."""
    return {
        "l0": lambda s: s["l0"] / s["n"],
        "fvu": lambda s: s["error"] / s["variance"],
        "fvu_global": lambda s: (
            (s["error"] / (s["n"] * d_out)) / (s["global_variance"] / (s["n"] * d_out - 1))
        ),
        "mse": lambda s: s["error"] / (s["n"] * d_out),
        "cosine": lambda s: s["cosine"] / s["n"],
        "norm_ratio": lambda s: s["norm_ratio"] / s["n"],
        "reconstruction_bias": lambda s: s["written_square"] / s["written_dot"],
        "loss_clean": lambda s: s["clean"] / s["targets"],
        "loss_spliced": lambda s: s["spliced"] / s["targets"],
        "loss_zero": lambda s: s["zero"] / s["targets"],
        "loss_mean": lambda s: s["mean"] / s["targets"],
        "delta_loss": lambda s: (s["spliced"] - s["clean"]) / s["targets"],
        "kl": lambda s: s["kl"] / s["n"],
        "loss_recovered_zero": _recovered("zero"),
        "loss_recovered_mean": _recovered("mean"),
    }


def layer_formulas(d_out: int) -> dict[str, Formula]:
    """The metrics of one layer of a multi-layer model: what it reads, and what is written in it.

    `l0` counts the features read there; the rest is of the layer's output, spliced alone.
    """
    whole = formulas(d_out)
    return {name: whole[name] for name in ("l0", "fvu", "mse", "loss_spliced", "delta_loss")}


DEFINITIONS = {
    "l0": "features that fire (activation above 0), mean per token",
    "fvu": "fraction of variance unexplained: mean squared error over mean squared distance from "
    "the mean vector (the papers' definition)",
    "fvu_global": "the official notebook's variant: squared error over the variance about one "
    "scalar mean of all elements; never above fvu",
    "mse": "squared error, mean over tokens and dimensions, in squared activation units",
    "cosine": "cosine of reconstruction and target, mean over tokens",
    "norm_ratio": "norm of the reconstruction over norm of the target, mean over tokens",
    "reconstruction_bias": "mean squared norm of the reconstruction over its mean product with "
    "the target; 1 is unbiased, below 1 is shrunk",
    "loss_clean": "cross-entropy of the model, nats per token",
    "loss_spliced": "the same with the reconstruction in the place of the activation",
    "loss_zero": "the same with zeros in its place",
    "loss_mean": "the same with the mean activation in its place",
    "delta_loss": "loss_spliced less loss_clean, nats per token",
    "kl": "Kullback-Leibler divergence of the spliced prediction from the clean one, in nats",
    "loss_recovered_zero": "share of the loss of zero ablation that the reconstruction avoids",
    "loss_recovered_mean": "share of the loss of mean ablation that the reconstruction avoids",
    "dead_fraction": "share of features that fired on none of the counted tokens",
    "dense_fraction": "share of features that fire on more than a tenth of the tokens",
    "importance_uniformity": "r_L0 of 2408.05147: exp(entropy) of the shares of the features of a "
    "token in its prediction, over their number; 1 is even",
}
