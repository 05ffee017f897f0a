"""From a config to a circuit over SAEs: effects, exact effects, edges, curves (2403.19647).

Where every site has an SAE, at residual streams, attention or MLPs, no transcoder is needed. The
work is done example by example, and what is done can be kept in a folder.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemscope.errors import InputError
from gemscope.features import Store
from gemscope.hub import load_sae
from gemscope.lm import LanguageModel, load_model
from gemscope.sae import SAE
from gemscope.steering import Prompt, agreement, order

from ._sparse_case import (
    Case,
    Load,
    Means,
    Progress,
    case_of,
    check_dictionaries,
    means_over,
    metric_of,
)
from ._sparse_config import CircuitConfig, CircuitExample
from ._sparse_curves import (
    Curves,
    Spread,
    check_ends,
    circuits_of,
    curves_of,
    ends_of,
    measure_circuits,
    sizes_of,
)
from ._sparse_edges import edges_of
from ._sparse_effects import effects_of, gradients
from ._sparse_found import METRIC, Circuit, CircuitEdge, CircuitNode, Measured
from ._sparse_parts import Parts, digest_of, digest_of_model, digest_of_sae
from ._sparse_run import EVERYTHING
from ._sparse_space import Space

_RESAMPLES = 2000


def sparse_circuit(
    config: CircuitConfig,
    *,
    model: LanguageModel | None = None,
    load: Load = load_sae,
    load_model: Callable[[str], LanguageModel] = load_model,
    parts: Path | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """The circuit that `config` asks for.

    `load` makes dictionaries of addresses, and `load_model` the model they belong to, unless one is
    given. In the folder `parts` what is done is kept, example by
    example, and a later call with the same question goes on from there. `progress` is told
    `(what, done, total)`.

    Raises:
        InputError: What is no SAE, or another model's; prompts of other lengths than those they
            are compared with; a token that is none; a metric that nothing ablated changes.
    """
    labels = None if config.store is None else Store.open(config.store)
    found = [load(address) for address in config.dictionaries]
    if model is None:
        model = load_model(_model_of(config, found))
    saes = check_dictionaries(model, [_moved(one, model) for one in found])
    named = sorted(zip(saes, config.dictionaries, strict=True), key=lambda p: order(p[0].reads))
    work = _Work(config, model, tuple(n for _, n in named), tuple(s for s, _ in named), load,
                 parts, progress)  # fmt: skip
    return work.circuit(labels)


def _moved(one: object, model: LanguageModel) -> object:
    return one.to(model.device) if isinstance(one, SAE) else one


def _model_of(config: CircuitConfig, saes: Sequence[object]) -> str:
    """The model to run: the config's, or the dictionaries' own."""
    if config.model is not None:
        return config.model
    known = {o.model for sae in saes if (o := getattr(sae, "origin", None)) and o.model}
    if len(known) != 1:
        said = f"belong to {' and '.join(sorted(known))}" if known else "do not say whose they are"
        raise InputError(f"these dictionaries {said}: name one model in the config, as model: ...")
    return known.pop()


class _Work:
    """One circuit in the making."""

    def __init__(
        self, config: CircuitConfig, model: LanguageModel, names: tuple[str, ...],
        saes: tuple[SAE, ...], load: Load, parts: Path | None, progress: Progress | None,
    ):  # fmt: skip
        self.config, self.model, self.saes, self.names = config, model, saes, names
        self.load = lambda address: _moved(load(address), model)
        self.progress = progress or (lambda *_: None)
        self.metrics = [self._metrics(name) for name in ("examples", "held_out")]
        self.space = Space(names, tuple(s.reads for s in saes), tuple(s.d_sae for s in saes),
                           self._length())  # fmt: skip
        self.means: Means | None = None
        if config.mean is not None:
            self.means = means_over(model, saes, config.mean, progress)
        about = {
            "model": [model.name, str(model.dtype), model.device.type, digest_of_model(model)],
            "dictionaries": [[n, digest_of_sae(s)] for n, s in zip(names, saes, strict=True)],
            "means": [digest_of(*one) for one in self.means or ()],
            "ablation": config.ablation, "aggregate": config.aggregate, "length": self.space.length,
            "method": config.method, "steps": config.steps if config.method != "attribution" else 1,
        }  # fmt: skip
        self.parts = Parts(parts, about)

    def _metrics(self, name: str) -> list[Any]:
        found = []
        for number, one in enumerate(getattr(self.config, name), start=1):
            with _about(name, number):
                found.append(
                    metric_of(one, self.config, self.model, self.load,
                              [sae.reads for sae in self.saes])
                )  # fmt: skip
        return found

    def _length(self) -> int | None:
        if self.config.aggregate == "positions":
            return None
        lengths = {}
        for name in ("examples", "held_out"):
            for number, one in enumerate(getattr(self.config, name), start=1):
                with _about(name, number):
                    lengths[f"{name} {number}"] = self.model.tokens(one.clean).ids.shape[1]
        first, *rest = lengths.items()
        for where, length in rest:
            if length != first[1]:
                raise InputError(
                    f"{first[0]} has {first[1]} tokens and {where} has {length}: a node at a "
                    "position is compared across prompts of one length; make them equally long, "
                    "or take aggregate: positions"
                )
        return first[1]

    def case(self, name: str, number: int) -> Case:
        """An example, run anew: only one is in memory at a time."""
        with _about(name, number + 1):
            return case_of(
                getattr(self.config, name)[number], self.metrics[name == "held_out"][number],
                self.model, self.saes, self.config.ablation, self.means,
            )  # fmt: skip

    def circuit(self, labels: Store | None) -> Circuit:
        """All steps, one after the other."""
        config = self.config
        first = self._first("examples", ("keys", "values", "metrics", "ends"))
        check_ends(torch.stack([one["ends"] for one in first]))
        keys, effects = _joined(first)
        means = effects.mean(0)
        ranked = means.abs().argsort(descending=True, stable=True)
        above = int((means.abs() >= config.node_threshold).sum())
        kept = ranked[: min(above, config.max_nodes)]
        exact, pairs = self._exact(keys, means, ranked[: config.top_exact])
        nodes = self._nodes(keys, effects, kept, exact, labels)
        edges = self._edges(keys[kept.sort().values])
        tested = "held_out" if config.held_out else "examples"
        second = self._first("held_out", ("metrics", "ends")) if config.held_out else first
        check_ends(torch.stack([one["ends"] for one in second]))
        curves = self._curves(tested, keys[ranked], len(kept), second)
        return Circuit(
            config=config, model=self.model.name, examples=self._measured("examples", first),
            held_out=self._measured("held_out", second) if config.held_out else (), nodes=nodes,
            above=above, count=len(keys), edges=edges, agreement=agreement(pairs).json(),
            sums=self._sums(keys, means), curves=curves,
        )  # fmt: skip

    def _first(self, name: str, wanted: Sequence[str]) -> list[dict[str, Tensor]]:
        """Estimates, if wanted, and ends of each example."""
        examples: tuple[CircuitExample, ...] = getattr(self.config, name)
        done = []
        for number, example in enumerate(examples):
            asked = self._asked(name, number, example, "effects", list(wanted))

            def make(number: int = number) -> dict[str, Tensor]:
                case = self.case(name, number)
                out = {"ends": torch.tensor(ends_of(case, self.space), dtype=torch.float64)}
                pair = case.clean, float("nan") if case.corrupted is None else case.corrupted
                out["metrics"] = torch.tensor(pair, dtype=torch.float64)
                if "keys" in wanted:
                    with _about(name, number + 1):
                        slopes = gradients(case, self.space, self.config.method, self.config.steps)
                    found = effects_of(case, self.space, slopes)
                    out |= {"keys": found.keys, "values": found.values}
                return out

            done.append(self.parts.get(asked, wanted, make))
            what = "effects" if name == "examples" else "held out"
            self.progress(what, number + 1, len(examples))
        return done

    def _asked(self, name: str, number: int, example: CircuitExample, *what: Any) -> dict[str, Any]:
        metric = self.metrics[name == "held_out"][number]
        return {"example": example.model_dump(), "metric": [metric.text, metric.at], "what": what}

    def _exact(
        self, keys: Int[Tensor, " n"], means: Float[Tensor, " n"], top: Int[Tensor, " n_top"]
    ) -> tuple[dict[int, float], list[tuple[float, float]]]:
        """The exact effects of the largest nodes by key, and pairs with their estimates."""
        total = torch.zeros(len(top), dtype=torch.float64)
        examples = self.config.examples
        for number, example in enumerate(examples):
            asked = self._asked("examples", number, example, "exact", keys[top].tolist())

            def make(number: int = number) -> dict[str, Tensor]:
                case = self.case("examples", number)
                circuits = [EVERYTHING, *((keys[one : one + 1], True) for one in top.tolist())]
                found = measure_circuits(case, self.space, circuits)
                return {"exact": found[1:] - found[0]}

            total += self.parts.get(asked, ("exact",), make)["exact"] / len(examples)
            self.progress("exact effects", number + 1, len(examples))
        exact = dict(zip(keys[top].tolist(), total.tolist(), strict=True))
        return exact, list(zip(means[top].tolist(), total.tolist(), strict=True))

    def _nodes(
        self, keys: Int[Tensor, " n"], effects: Float[Tensor, "prompts n"],
        kept: Int[Tensor, " n_kept"], exact: dict[int, float], labels: Store | None,
    ) -> tuple[CircuitNode, ...]:  # fmt: skip
        spreads = _spreads(effects[:, kept], self.config.seed)
        found = []
        for key, spread in zip(keys[kept].tolist(), spreads, strict=True):
            node = self.space.node(key)
            label = None
            if labels is not None and node.feature is not None:
                said = labels.explanations(node.dictionary, node.feature)
                label = said[0].text if said else None
            found.append(
                CircuitNode(node=node, effect=spread, exact=exact.get(key), label=label)
            )  # fmt: skip
        return tuple(found)

    def _edges(self, keys: Int[Tensor, " n"]) -> tuple[CircuitEdge, ...]:
        """Edges among the nodes with `keys`, ascending: means over the examples."""
        examples = self.config.examples
        total = torch.zeros(len(keys), len(keys) + 1, dtype=torch.float64)
        for number, example in enumerate(examples):
            asked = self._asked("examples", number, example, "edges", keys.tolist())

            def make(number: int = number) -> dict[str, Tensor]:
                case = self.case("examples", number)
                slopes = gradients(case, self.space, self.config.method, self.config.steps)
                return {"edges": edges_of(case, self.space, slopes, keys)}

            if len(keys):
                total += self.parts.get(asked, ("edges",), make)["edges"] / len(examples)
            self.progress("edges", number + 1, len(examples))
        ids = [*(self.space.node(key).id for key in keys.tolist()), METRIC]
        large = (total.abs() >= self.config.edge_threshold) & (total != 0)
        found = [
            CircuitEdge(ids[u], ids[d], float(total[u, d])) for u, d in large.nonzero().tolist()
        ]
        return tuple(sorted(found, key=lambda e: (-abs(e.weight), e.source, e.target)))

    def _curves(
        self, name: str, ranked: Int[Tensor, " n"], kept: int, ends: list[dict[str, Tensor]]
    ) -> Curves:
        config, examples = self.config, getattr(self.config, name)
        sizes = sizes_of(len(ranked), config.sizes, kept)
        circuits = circuits_of(ranked, sizes, config.random_circuits, config.seed)
        whole = digest_of(ranked, torch.tensor([*sizes, config.random_circuits, config.seed]))
        rows = []
        for number, example in enumerate(examples):
            asked = self._asked(name, number, example, "curves", whole)

            def told(done: int, number: int = number) -> None:
                self.progress("curves", number * len(circuits) + done,
                              len(examples) * len(circuits))  # fmt: skip

            def make(number: int = number, told: Any = told) -> dict[str, Tensor]:
                case = self.case(name, number)
                return {"metrics": measure_circuits(case, self.space, circuits, told)}

            rows.append(self.parts.get(asked, ("metrics",), make)["metrics"])
            told(len(circuits))
        return curves_of(
            torch.stack(rows), torch.stack([one["ends"] for one in ends]), sizes,
            config.random_circuits, seed=config.seed, held_out=name == "held_out",
        )  # fmt: skip

    def _sums(
        self, keys: Int[Tensor, " n"], means: Float[Tensor, " n"]
    ) -> dict[str, dict[str, float]]:
        out = {}
        for site, name in enumerate(self.names):
            first, stop = self.space.firsts[site], self.space.firsts[site + 1]
            own = (keys >= first) & (keys < stop)
            width = self.saes[site].d_sae
            error = (keys - first) % (width + 1) == width
            out[name] = {"features": float(means[own & ~error].sum()),
                         "errors": float(means[own & error].sum())}  # fmt: skip
        return out

    def _measured(self, name: str, found: list[dict[str, Tensor]]) -> tuple[Measured, ...]:
        out = []
        for number, (one, part) in enumerate(zip(getattr(self.config, name), found, strict=True)):
            metric = self.metrics[name == "held_out"][number]
            clean, corrupted = part["metrics"].tolist()
            out.append(
                Measured(
                    text=one.clean, tokens=tuple(Prompt.of(self.model, one.clean).pieces),
                    corrupted_text=one.corrupted, metric=metric.text, at=metric.at, clean=clean,
                    corrupted=None if corrupted != corrupted else corrupted,
                    empty=float(part["ends"][1]),
                )
            )  # fmt: skip
        return tuple(out)


@contextmanager
def _about(name: str, number: int) -> Iterator[None]:
    """Say of a mistake which example it is in."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name} {number}: {error}") from None


def _joined(
    found: Sequence[dict[str, Tensor]],
) -> tuple[Int[Tensor, " n"], Float[Tensor, "prompts n"]]:
    """The nodes of all examples by ascending key, and the effects, 0 where one does not change."""
    keys = torch.cat([one["keys"] for one in found]).unique()
    effects = torch.zeros(len(found), len(keys), dtype=torch.float64)
    for row, one in zip(effects, found, strict=True):
        row[torch.searchsorted(keys, one["keys"])] = one["values"]
    return keys, effects


def _spreads(effects: Float[Tensor, "prompts n"], seed: int) -> list[Spread]:
    """Means over prompts, with intervals of resampled prompts where there are two or more."""
    values = effects.mean(0).tolist()
    count = len(effects)
    if count < 2 or not values:
        return [Spread(value, None, None) for value in values]
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    times = np.stack([(drawn == row).mean(1) for row in range(count)], 1)
    low, high = np.quantile(times @ effects.numpy(), [0.025, 0.975], axis=0)
    return [Spread(v, float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]
