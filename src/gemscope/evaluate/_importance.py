"""How evenly the features of a token share its effect on the prediction.

r_L0 of 2408.05147, appendix C.3: with `g` the gradient, at the dictionary's output site, of the
mean-centred logit of the correct next token, summed over tokens, the attribution of feature `i` is
`y_i = f_i * (w_dec_i . g)`; with `p = |y| / sum |y|`, `r = exp(entropy(p)) / (number of y != 0)`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.lm import Edit, LanguageModel
from gemscope.sae import SAE, SparseFeatures

_ENTRIES = 16_384


def importance_uniformity(model: LanguageModel, sae: SAE, batch: TokenBatch) -> Tensor:
    """r_L0 of every counted token on which a feature fires `[n]`, in float64."""
    leaves = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().float().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        run = model.run(
            batch, read=[sae.reads], edits=[Edit(sae.writes, sae.writes, leaf)], logits=True
        )
        logits, wanted = _targets(run.logits, batch)
        centred = logits.gather(1, wanted[:, None])[:, 0] - logits.mean(1)
        (gradient,) = torch.autograd.grad(centred.sum(), leaves)
    features = sae.encode(run[sae.reads][batch.counts.to(model.device)].detach())
    return uniformity(features, sae.w_dec, gradient)


def uniformity(
    features: SparseFeatures,
    w_dec: Float[Tensor, "d_sae d_out"],
    gradient: Float[Tensor, "n_tokens d_out"],
) -> Tensor:
    """r_L0 of the tokens with at least one non-zero attribution."""
    rows = features.rows
    # A few entries at a time: each has a whole row of the decoder to itself.
    along = [
        (w_dec[some.long()].float() * gradient[tokens]).sum(1)
        for some, tokens in zip(features.indices.split(_ENTRIES), rows.split(_ENTRIES), strict=True)
    ]
    y = (features.values * torch.cat(along)).double().abs()
    sums = y.new_zeros(features.n_tokens).index_add_(0, rows, y)
    used = y.new_zeros(features.n_tokens).index_add_(0, rows, (y > 0).double())
    p = y / sums[rows]
    terms = torch.where(p > 0, -p * p.log(), 0.0)
    entropy = y.new_zeros(features.n_tokens).index_add_(0, rows, terms)
    return (entropy.exp() / used)[used > 0]


def _targets(logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    counted = batch.counts[:, 1:].to(logits.device)
    return logits[:, :-1][counted].float(), batch.ids[:, 1:].to(logits.device)[counted]
