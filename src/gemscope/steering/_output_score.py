"""Output scores: how far amplifying a feature brings its own tokens out of a neutral prompt.

After Arad, Mueller and Belinkov, "SAEs Are Good for Steering - If You Select the Right Features"
(2505.20063). The tokens of feature `i` are the `top` 20 whose logits its decoder row raises most
(`LanguageModel.direct_logits`). At the last token of a neutral prompt `s max_i d_i` is added where
the dictionary writes, with `d_i` the decoder row, `max_i` the feature's catalogued maximum and
`s` = 3, and the error is kept. Of the next-token distribution `p` that comes of it

    S = (1 - r / V) P

with `P` the largest probability among the feature's tokens, `r` the best rank among them (0 is the
likeliest of all) and `V` the size of the vocabulary. The output score is `S` less the `S` of the
unsteered run, averaged over the prompts: about 0 for a feature that does nothing with its own
tokens, near 1 for one that makes the model say them, negative for one that drives them away.

The paper's own code differs in three things. It adds `s` times the largest activation of any
feature at that token, so a strong feature and a weak one are amplified alike; here `s` is in the
unit in which features are steered, `xmax`. It has `s` = 10, where most distributions are driven to
their end: over 89 features of the miniature's residual stream, the rank correlation of scores with
what steering at twice the maximum then does to the promoted tokens is 0.75 with `s` = 10 and 0.89
with `s` = 3. And it has no unsteered run, so a feature whose tokens are likely anyway scores high.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.corpus import TokenBatch
from gemscope.errors import InputError
from gemscope.lm import Edit, LanguageModel, Tokens
from gemscope.sae import SAE, Dictionary
from gemscope.sites import Site, each

from ._dose_prompts import neutral_prompts

TOP = 20
"""Tokens of a feature that are looked for."""
STRENGTH = 3.0
"""How far it is amplified, as a multiple of its maximum."""
PROMPTS = 4
"""Neutral prompts that are averaged over by default."""


def promoted_tokens(
    model: LanguageModel, sae: Dictionary, features: Sequence[int], count: int
) -> Int[Tensor, "n_features n_tokens"] | None:
    """The ids of the `count` tokens whose logits features raise most directly, strongest first.

    None where a feature does not write to the residual stream or what leads to it linearly.
    """
    rows = sae.rows(features)
    # Layers of a crosscoder reconstruct one stream each, of a transcoder they add to one.
    adds = isinstance(sae, SAE) or sae.is_transcoder
    chosen = (rows.sum(1) if adds else rows[:, -1]).to(model.device)
    with torch.no_grad():
        logits = model.direct_logits(chosen, each(sae.writes)[-1])
    if logits is None:
        return None
    size = min(len(model.tokenizer), logits.shape[1])  # rows that pad the embedding are no tokens
    return logits[:, :size].topk(min(count, size), dim=1).indices


@torch.no_grad()
def output_scores(
    model: LanguageModel,
    sae: Dictionary,
    features: Sequence[int],
    maxima: Sequence[float] | np.ndarray,
    *,
    prompts: Sequence[str] | None = None,
    strength: float = STRENGTH,
    batch: int = 64,
    other_model: bool = False,
) -> np.ndarray:
    """The output score of each of `features`, float64 `[n_features]`.

    The formula is the module's: the change of `(1 - rank / vocabulary) * probability` of the
    feature's best token at the end of a neutral prompt when `strength` times its maximum of its
    decoder row is added there, averaged over prompts (after 2505.20063). Rows of a batch are
    amplified by different features, `batch` at once.

    NaN for a feature whose maximum is 0, which never fired, and for all features of a dictionary
    that does not write to the residual stream. `prompts` are `neutral_prompts` by default, the
    first four. With `other_model` a dictionary of another model is taken on purpose: widths must
    fit.

    Raises:
        InputError: The dictionary does not fit the model, there are more or fewer maxima than
            features, or no prompts.
    """
    features, highest = list(features), [float(m) for m in maxima]
    if len(features) != len(highest):
        raise InputError(
            f"{len(highest)} maxima were given for {len(features)} features; give one of each"
        )
    if batch < 1:
        raise InputError(f"a batch of {batch} features is none; take 1 or more")
    model.check_widths(sae) if other_model else model.check(sae)
    given = neutral_prompts(model)[:PROMPTS] if prompts is None else tuple(prompts)
    if not given:
        raise InputError("no neutral prompt was given; give at least one")
    out = np.full(len(features), np.nan)
    alive = [place for place, maximum in enumerate(highest) if maximum > 0]
    plain = [_Neutral(model, text) for text in given]
    for some in _parts(alive, batch):
        chosen = [features[place] for place in some]
        tokens = promoted_tokens(model, sae, chosen, TOP)
        if tokens is None:
            break
        sizes = torch.tensor([highest[place] * strength for place in some], device=model.device)
        added = sae.rows(chosen).to(model.device) * sizes[:, None, None]
        found = [one.change(added, each(sae.writes), tokens) for one in plain]
        out[some] = torch.stack(found).mean(0).cpu().numpy()
    return out


class _Neutral:
    """One prompt, and what the model makes of it when nobody steers."""

    def __init__(self, model: LanguageModel, text: str):
        self.model, self.batch = model, model.tokens(text)
        self.logits = self._last(self.batch, ())[0]

    def change(
        self,
        added: Float[Tensor, "n_features n_writes d_out"],
        sites: Sequence[Site],
        tokens: Int[Tensor, "n_features n_tokens"],
    ) -> Float[Tensor, " n_features"]:
        """By how much each feature raises the score of its `tokens`, float64."""
        rows = torch.zeros(len(added), dtype=torch.long)
        many = TokenBatch(
            self.batch.ids[rows], self.batch.counts[rows], rows, self.batch.starts[rows]
        )
        edits = [_amplify(site, added[:, place]) for place, site in enumerate(sites)]
        steered = self._last(many, edits)
        return _score(steered, tokens) - _score(self.logits.expand_as(steered), tokens)

    def _last(self, batch: TokenBatch, edits: Sequence[Edit]) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token, float64."""
        return self.model.run(batch, edits=edits, logits=True).logits[:, -1].double()


def _amplify(site: Site, added: Float[Tensor, "batch d_out"]) -> Edit:
    """Adds to the last token of each row of a batch a vector of its own."""

    def function(tokens: Tokens, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        last = tokens.steps == -1
        new = x.clone()  # what is given may be the model's own tensor
        new[last] = (x[last].float() + added[tokens.rows[last]]).to(x.dtype)
        return new

    return Edit(site, site, function, placed=True)


def _score(
    logits: Float[Tensor, "n_features vocab"], tokens: Int[Tensor, "n_features n_tokens"]
) -> Float[Tensor, " n_features"]:
    best = logits.gather(1, tokens).amax(1, keepdim=True)
    rank = (logits > best).sum(1)
    probability = (best[:, 0] - logits.logsumexp(1)).exp()
    return (1 - rank / logits.shape[1]) * probability


def _parts(places: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(places), size):
        yield places[first : first + size]
