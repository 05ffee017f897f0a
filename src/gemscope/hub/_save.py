"""From a dictionary to a folder, in the layout that is wanted."""

from pathlib import Path
from typing import TYPE_CHECKING

from gemscope import formats
from gemscope.errors import InputError
from gemscope.sites import Site

if TYPE_CHECKING:
    from gemscope.sae import Dictionary

LAYOUTS = ("gemma-scope", "gemma-scope-2", "saelens")
"""Layouts that can be written."""


def save_sae(sae: "Dictionary", folder: str | Path, *, layout: str = "gemma-scope-2") -> Path:
    """Write `sae` as a folder in one of `LAYOUTS`; it appears whole or not at all.

    What a layout cannot hold (a skip connection, several layers, a `TopK` activation) is refused.
    """
    folder, parts = Path(folder).expanduser(), _parts(sae)
    if layout == "gemma-scope-2":
        formats.write_gemma_scope_2(folder, _config(sae), parts)
        return folder
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r} to write: there are {', '.join(LAYOUTS)}")
    if not (isinstance(sae.reads, Site) and isinstance(sae.writes, Site)):
        raise InputError(
            f"the {layout} layout holds dictionaries of one layer, not a {sae.kind}; "
            "write gemma-scope-2"
        )
    if layout == "gemma-scope":
        formats.write_gemma_scope(folder, parts[0])
    else:
        formats.write_saelens(
            folder, parts[0], reads=sae.reads, writes=sae.writes, model=sae.origin.model
        )
    return folder


def _config(sae: "Dictionary") -> formats.Config:
    if sae.origin.model is None:
        raise InputError("the dictionary does not say which model it belongs to; give it a model")
    return formats.Config(
        hf_hook_point_in=formats.hook_of(sae.reads, sae.origin.model),
        hf_hook_point_out=formats.hook_of(sae.writes, sae.origin.model),
        width=sae.d_sae,
        model_name=sae.origin.model,
        architecture="jump_relu",
        # The layout has no word for an unknown one; one feature is the least a token can have.
        l0=sae.origin.l0 or 1.0,
        affine_connection=_parts(sae)[0].skip is not None,
        type=sae.kind,
    )


def _parts(sae: "Dictionary") -> list[formats.Part]:
    from gemscope.sae import SAE, JumpReLU, ReLU, TopK

    if isinstance(sae, SAE):
        threshold, k = None, None
        match sae.activation:
            case JumpReLU(value):
                threshold = value
            case TopK(count):
                k = count
            case ReLU():
                pass
            case _:
                raise InputError("a BatchTopK dictionary is saved with its measured threshold")
        return [
            formats.Part(
                w_enc=sae.w_enc, b_enc=sae.b_enc, w_dec=sae.w_dec, b_dec=sae.b_dec,
                threshold=threshold, k=k, skip=sae.skip,
            )
        ]  # fmt: skip
    return [
        formats.Part(
            w_enc=x.w_enc, b_enc=x.b_enc, w_dec=x.w_dec, b_dec=x.b_dec,
            threshold=x.threshold, skip=x.skip,
        )
        for x in sae.layers
    ]  # fmt: skip
