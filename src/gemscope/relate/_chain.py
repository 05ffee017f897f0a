"""Which dictionaries of a store are followed, and one feature followed through them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemscope.errors import InputError, did_you_mean
from gemscope.features import Store
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel
from gemscope.sae import SAE

from ._causal import Ablation, ablate
from ._pairs import from_store
from ._track import Limits, Link, Step, track_step


def layers_of(
    store: Store, *, like: str | None = None, stream: str | None = None
) -> list[dict[str, Any]]:
    """The dictionaries of a store to be followed, one a layer, ascending.

    Those of the same kind, stream and model as `like`, on the same text; where a layer has several,
    the one whose address differs in its layer alone, else the one most alike in width and L0.
    With `stream`, `like` is the dictionary of that stream with most layers to go with it.
    """
    known = [d for d in store.dictionaries() if re.fullmatch(r"\d+\.\w+", d["reads"])]
    if like is None:
        streams = sorted({_stream(d) for d in known})
        if stream not in streams:
            near = did_you_mean(stream or "", streams) if streams else "it holds none of one layer"
            raise InputError(f"no dictionary of {stream} is indexed in this store; {near}")
        of = [d for d in known if _stream(d) == stream]
        families = [_family(of, d) for d in of]
        # Of families with as many layers, the one of one series of addresses, and the narrowest.
        found = max(
            families,
            key=lambda f: (len(f), -len({_series(d) for d in f}), -sum(d["d_sae"] for d in f)),
        )
    else:
        start = store.dictionary(like)
        if start not in known:
            raise InputError(
                f"{like} reads several layers; track follows dictionaries of one layer"
            )
        found = _family([d for d in known if _stream(d) == _stream(start)], start)
    if len(found) < 2:
        raise InputError(
            f"only layer {_layer(found[0])} of {_stream(found[0])} is indexed on this text; index "
            "dictionaries of two layers or more in one command, with --keep-activations"
        )
    return found


def _family(known: Sequence[dict[str, Any]], start: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each layer the dictionary most like `start`."""
    alike = [
        d
        for d in known
        if all(d[key] == start[key] for key in ("kind", "model", "text_key", "d_out"))
    ]
    chosen: dict[int, dict[str, Any]] = {}
    for one in sorted(alike, key=lambda d: _unlike(d, start)):
        chosen.setdefault(_layer(one), one)
    return [chosen[layer] for layer in sorted(chosen)]


def _unlike(one: dict[str, Any], start: dict[str, Any]) -> tuple[bool, float, float, str]:
    l0 = [d.get("l0") or 1.0 for d in (one, start)]
    return (
        _series(one) != _series(start),
        abs(np.log(one["d_sae"] / start["d_sae"])),
        abs(np.log(l0[0] / l0[1])),
        one["address"],
    )


def _series(known: dict[str, Any]) -> str:
    """An address without its layer."""
    return re.sub(r"layer_?\d+", "layer", known["address"])


def _layer(known: dict[str, Any]) -> int:
    return int(known["reads"].split(".")[0])


def _stream(known: dict[str, Any]) -> str:
    return str(known["reads"].split(".")[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A feature of a chain, in its layer."""

    layer: int
    address: str
    feature: int
    density: float
    link: Link | None
    """To the stage before; None at the first."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "layer": self.layer,
            "dictionary": self.address,
            "feature": self.feature,
            "density": self.density,
            "link": None if self.link is None else self.link.json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One feature followed down and up from where it was asked for."""

    stages: list[Stage]
    start: int
    """Which of the stages was asked for."""
    born: int | None
    """The layer it has no predecessor in front of; None if the store's first was reached."""
    vanished: int | None
    """The layer it has no successor behind; None if the store's last was reached."""

    def json(self) -> dict[str, Any]:
        """The same as a dict."""
        return {
            "dictionary": self.stages[self.start].address,
            "feature": self.stages[self.start].feature,
            "born": self.born,
            "vanished": self.vanished,
            "stages": [stage.json() for stage in self.stages],
        }


def track(store: Store, layers: Sequence[dict[str, Any]], limits: Limits = Limits()) -> list[Step]:
    """Every step of `layers`, as `layers_of` gives them."""
    steps, before = [], from_store(store, layers[0]["address"])
    for known in layers[1:]:
        after = from_store(store, known["address"])
        steps.append(track_step(before, after, limits))
        before = after
    return steps


def chain(
    store: Store,
    layers: Sequence[dict[str, Any]],
    address: str,
    feature: int,
    limits: Limits = Limits(),
) -> Chain:
    """Follow one feature from its layer both ways, to its best partner at each step."""
    store.check_feature(address, feature)
    place = [d["address"] for d in layers].index(address)
    here = from_store(store, address)
    if here.fired[feature] < limits.least:
        raise InputError(
            f"feature {feature} of {address} fires on {int(here.fired[feature])} tokens of the "
            f"text, too few to follow; it takes {limits.least}"
        )
    links: dict[int, Link] = {}
    features, ends = {place: feature}, {-1: place, 1: place}
    for way in (-1, 1):
        at, one = place, here
        while 0 <= at + way < len(layers):
            other = from_store(store, layers[at + way]["address"])
            sides = (other, one) if way < 0 else (one, other)
            step = track_step(*sides, limits)
            link = (step.links if way < 0 else step.successors).get(features[at])
            if link is None:
                break
            links[at if way < 0 else at + 1] = link
            at, one = at + way, other
            features[at], ends[way] = (link.before if way < 0 else link.after), at
    stages = [
        Stage(
            layer=_layer(layers[at]),
            address=layers[at]["address"],
            feature=features[at],
            density=float(store.feature(layers[at]["address"], features[at])["density"]),
            link=links.get(at),
        )
        for at in range(ends[-1], ends[1] + 1)
    ]
    return Chain(
        stages=stages,
        start=place - ends[-1],
        born=_layer(layers[ends[-1]]) if ends[-1] else None,
        vanished=_layer(layers[ends[1]]) if ends[1] < len(layers) - 1 else None,
    )


def check_chain(
    store: Store, model: LanguageModel, made: Chain, *, contexts: int = 12
) -> list[Ablation]:
    """Ablate each stage of a chain and measure the next: one answer a link."""
    found = []
    for one, two in zip(made.stages, made.stages[1:], strict=False):
        first, second = (load_sae(stage.address).to(model.device) for stage in (one, two))
        if not isinstance(first, SAE) or not isinstance(second, SAE):
            raise InputError("the causal check needs SAEs of one layer each")
        sides = from_store(store, one.address), from_store(store, two.address)
        pair = (one.feature, two.feature)
        found.append(ablate(model, first, second, sides[0], sides[1], pair, contexts=contexts))
    return found
