"""What a graph explains: logits, differences of logits, features, directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemscope.errors import InputError, did_you_mean
from gemscope.features import marked
from gemscope.lm import LanguageModel, Run
from gemscope.sae import Dictionary
from gemscope.sites import Site
from gemscope.steering import Prompt, feature, load_vector, single_token, two_tokens

from ._frozen import Frozen, Start
from ._graph import Target

KINDS = ("logit:TOKEN", "difference:TOKEN:TOKEN", "feature:ADDRESS/INDEX", "vector:FILE")
"""How targets are written; a feature's may end in `@POSITION`."""

MASS, MOST = 0.95, 10
"""Of the likeliest next tokens, without other targets: to this probability, and at most so many."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Aim:
    """A target as it was asked for, before the model has run."""

    text: str
    label: str
    position: int
    tokens: tuple[int, ...] = ()
    """One of which the logit, or two of which the difference is explained."""
    site: Site | None = None
    vector: Float[Tensor, " d"] | None = None
    """A direction at `site`."""
    bias: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Aimed:
    """A target, where its gradient begins, and what its own bias adds to its value."""

    target: Target
    start: Start
    bias: float


def aims(
    texts: Sequence[str], model: LanguageModel, prompt: Prompt, load: Callable[[str], Dictionary]
) -> list[Aim]:
    """The targets that `texts` name.

    Raises:
        InputError: No such kind of target, token, feature, file or position.
    """
    return [_aim(text, model, prompt, load) for text in dict.fromkeys(texts)]


def _aim(text: str, model: LanguageModel, prompt: Prompt, load: Callable[[str], Dictionary]) -> Aim:
    kind, colon, rest = text.partition(":")
    last = len(prompt) - 1
    if not colon or not rest:
        raise InputError(f"{text!r} names no target; write {', '.join(KINDS)}")
    match kind:
        case "logit":
            token = single_token(rest, model.tokenizer)
            return Aim(text=text, label=_shown(model, token), position=last, tokens=(token,))
        case "difference":
            a, b = two_tokens(rest, model.tokenizer)
            label = f"{_shown(model, a)} − {_shown(model, b)}"
            return Aim(text=text, label=label, position=last, tokens=(a, b))
        case "feature":
            return _feature(text, rest, prompt, load)
        case "vector":
            (direction, *others) = load_vector(rest)
            if others:
                raise InputError(f"{rest} holds several vectors; give a file with one")
            if len(direction.vector) != (width := model.width(direction.site)):
                raise InputError(
                    f"{rest} holds {len(direction.vector)} numbers for {direction.site}, where the "
                    f"model has {width}: it belongs to another model"
                )
            return Aim(
                text=text, label=direction.name, position=last, site=direction.site,
                vector=direction.vector.float(),
            )  # fmt: skip
    kinds = [one.partition(":")[0] for one in KINDS]
    raise InputError(
        f"no target {kind!r} ({did_you_mean(kind, kinds)}); targets are {', '.join(KINDS)}"
    )


def _feature(text: str, rest: str, prompt: Prompt, load: Callable[[str], Dictionary]) -> Aim:
    from gemscope.hub import feature_of

    name, at, place = rest.partition("@")
    if at and not place.lstrip("-").isdecimal():
        raise InputError(f"{text!r}: after @ comes a position, such as @5 or @-1")
    address, index = feature_of(name)
    found = feature(load(address), index, name=name)
    return Aim(
        text=text, label=f"{name}", position=prompt.check(int(place) if at else -1, "position"),
        site=found.reads, vector=found.column.float(), bias=float(found.bias),
    )  # fmt: skip


def aimed(asked: Sequence[Aim], model: LanguageModel, run: Run, frozen: Frozen) -> list[Aimed]:
    """The targets with their values, or if none was asked for, the likeliest next tokens."""
    last = int(run.tokens.ids.shape[1]) - 1
    chances = run.logits[0, last].double().softmax(-1)
    if not asked:
        order = chances.argsort(descending=True)[:MOST]
        enough = int((chances[order].cumsum(0) < MASS).sum()) + 1
        tokens = order[:enough].tolist()
        asked = [
            Aim(text=f"logit:{model.tokenizer.decode([t])}", label=_shown(model, t), position=last,
                tokens=(t,))
            for t in tokens
        ]  # fmt: skip
    single = [len(one.tokens) == 1 for one in asked]
    # Among tokens their probabilities say how much each counts; among other things all alike.
    parts = [float(chances[one.tokens[0]]) if all(single) else 1.0 for one in asked]
    total = sum(parts)
    return [
        _aimed(one, part / total, chances, model, run, frozen)
        for one, part in zip(asked, parts, strict=True)
    ]


def _aimed(
    one: Aim, weight: float, chances: Tensor, model: LanguageModel, run: Run, frozen: Frozen
) -> Aimed:
    at = torch.tensor([one.position], device=model.device)
    if one.vector is not None and one.site is not None:
        vector = one.vector.to(model.device)
        start = Start(one.site, at, vector[None])
        x = run[one.site][0, one.position]
    else:
        start = frozen.logits(_direction(one.tokens, model)[None], at)
        vector, x = start.vectors[0], run[start.site][0, one.position]
    wide = torch.promote_types(x.dtype, vector.dtype)
    value = float(x.to(wide) @ vector.to(wide)) + one.bias
    token = one.tokens[0] if len(one.tokens) == 1 else None
    target = Target(
        text=one.text, label=one.label, position=one.position, value=value, weight=weight,
        token=token, probability=None if token is None else float(chances[token]),
    )  # fmt: skip
    return Aimed(target, start, one.bias)


def _direction(tokens: tuple[int, ...], model: LanguageModel) -> Float[Tensor, " d_model"]:
    """The unembedding of a token less the mean of all, or the difference of two."""
    u: Any = model.weights.unembedding
    wide = u.dtype if u.itemsize >= 4 else torch.float32
    if len(tokens) == 2:
        return u[tokens[0]].to(wide) - u[tokens[1]].to(wide)
    return u[tokens[0]].to(wide) - u.mean(0, dtype=wide)


def _shown(model: LanguageModel, token: int) -> str:
    return marked(model.tokenizer.decode([token]))
