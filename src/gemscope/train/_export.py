"""Finished artefacts in published layouts, and unfinished ones as dictionaries to look at."""

from pathlib import Path

from gemscope import formats
from gemscope.hub import model_source
from gemscope.lm import LanguageModel
from gemscope.sae import SAE, Activation, CrossLayer, Dictionary, JumpReLU, Layer, Origin, TopK
from gemscope.sites import Site, Sites

from ._config import TrainConfig
from ._learner import Learner


def write_artefact(
    folder: Path, learner: Learner, config: TrainConfig, model: LanguageModel
) -> None:
    """Write what was learned: Gemma Scope 2's layout, or SAELens's for TopK.

    A `batch-topk` dictionary is written as a JumpReLU with the threshold that training measured,
    a `relu` one as a JumpReLU whose thresholds are 0.
    """
    a, name = learner.config, model.name or model_source(config.model)
    if a.activation == "topk":
        from gemscope.hub import save_sae

        made = dictionary_of(learner, name)
        assert isinstance(made, SAE)
        save_sae(made, folder, layout="saelens")
        return
    facts = formats.Config(
        hf_hook_point_in=formats.hook_of(a.reads, name),
        hf_hook_point_out=formats.hook_of(a.writes, name),
        width=a.d_sae,
        model_name=name,
        architecture="jump_relu",
        l0=a.l0,
        affine_connection=a.affine,
        type=a.kind,
    )
    formats.write_gemma_scope_2(folder, facts, learner.weights.folded(learner.scales))


def dictionary_of(learner: Learner, model: str) -> Dictionary:
    """The artefact as it stands."""
    a, parts = learner.config, learner.weights.folded(learner.scales)
    origin = Origin(address=a.name, model=model)
    if isinstance(a.reads, Sites) and isinstance(a.writes, Sites):
        layers = tuple(
            Layer(
                w_enc=p.w_enc,
                b_enc=p.b_enc,
                threshold=p.threshold,
                w_dec=p.w_dec,
                b_dec=p.b_dec,
                skip=p.skip,
            )
            for p in parts
            if p.threshold is not None
        )
        return CrossLayer(layers=layers, reads=a.reads, writes=a.writes, origin=origin)
    (p,) = parts
    assert p.threshold is not None
    assert isinstance(a.reads, Site)
    assert isinstance(a.writes, Site)
    activation: Activation = JumpReLU(p.threshold)
    if a.activation == "topk":
        activation = TopK(int(a.l0))
    return SAE(
        w_enc=p.w_enc, b_enc=p.b_enc, w_dec=p.w_dec, b_dec=p.b_dec, activation=activation,
        reads=a.reads, writes=a.writes, skip=p.skip, origin=origin,
    )  # fmt: skip
