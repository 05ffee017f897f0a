"""The whole path of a config in thirty small steps, on whatever machine."""

from collections.abc import Mapping
from typing import Any

from gemscope import hub
from gemscope.sites import Site, Sites, each

from ._config import Artefact, TrainConfig

_MOST = 12
"""Artefacts of a smoke test."""
_WIDE, _SPARSE = 512, 32.0
_BUNDLED = "miniature"
_START = "miniature/resid_post/layer_3_width_2k_l0_medium"


def smoke_test(config: TrainConfig) -> TrainConfig:
    """The same run in thirty steps of narrow dictionaries, in a folder of its own.

    Where the model is not on this machine, the miniature stands in for it, each layer by the one
    at the same depth, with the bundled text: a smoke test downloads nothing.
    """
    data: dict[str, Any] = {
        "tokens": 15_360, "batch": 512, "buffer": 4_096, "context": 128, "epochs": 100,
    }  # fmt: skip
    run: dict[str, Any] = {
        "out": f"{config.out.rstrip('/')}-smoke-test", "evaluate": None, "log": (),
    }  # fmt: skip
    artefacts = config.artefacts[:_MOST]
    if not hub.has_model(config.model):
        n_layers = (hub.model_shape(config.model) or (1 + max(s.layer for s in config.sites), 0))[0]
        artefacts = tuple(_moved(a, n_layers) for a in artefacts)
        run |= {"model": _BUNDLED, "model_dtype": "float32"}
        data |= {"text": _BUNDLED, "dataset": None, "store": None}
    return config.model_copy(
        update=run
        | {
            "data": config.data.model_copy(update=data),
            "artefacts": tuple(_small(a) for a in artefacts),
        }
    )


def _small(a: Artefact) -> Artefact:
    n = len(each(a.reads))
    d_sae = a.d_sae if a.start else min(a.d_sae, _WIDE * n)
    update: Mapping[str, Any] = {
        "d_sae": d_sae,
        "l0": a.l0 if a.start else min(a.l0, _SPARSE),
        "prefixes": tuple(p for p in a.prefixes if p < d_sae),
        "prefix_weights": None,
        "optimizer": a.optimizer.model_copy(update={"warm_up": 10}),
        "sparsity": a.sparsity.model_copy(update={"warm_up": 10}),
    }
    return a.model_copy(update=update)


def _moved(a: Artefact, n_layers: int) -> Artefact:
    """The artefact at the miniature's layers; one that goes on training goes on from a bundled."""
    if a.start is not None:
        entry = hub.locate(_START)
        return a.model_copy(
            update={
                "start": _START,
                "reads": entry.reads,
                "writes": entry.writes,
                "d_sae": entry.d_sae,
                "affine": entry.affine,
            }
        )
    reads, writes = _at(a.reads, n_layers), _at(a.writes, n_layers)
    return a.model_copy(update={"reads": reads, "writes": writes})


def _at(sites: Site | Sites, n_layers: int) -> Site | Sites:
    depth = (hub.model_shape(_BUNDLED) or (6, 0))[0]
    if isinstance(sites, Site):
        return Site(sites.layer * (depth - 1) // max(n_layers - 1, 1), sites.stream)
    return Sites(Site(layer, sites[0].stream) for layer in range(min(len(sites), depth)))
