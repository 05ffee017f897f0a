"""Writing SAELens' layout, so that SAELens loads the folder as one of its own."""

import json
from pathlib import Path
from typing import Any

from gemscope.errors import InputError
from gemscope.sites import Site, Stream, transformer_lens_hook

from ._facts import Part
from ._saelens import CONFIG, NAMES, PARAMETERS, SKIP, THRESHOLD, read
from ._writing import new_folder, write_tensors

_FORM = "6.0.0"
"""The version of SAELens that began to write configurations in this form."""


def write(folder: Path, part: Part, *, reads: Site, writes: Site, model: str | None) -> None:
    """Write `part` as a folder that SAELens loads; it appears whole or not at all.

    Weights keep their storage type; SAELens is told to compute in float32, as is done here.

    Raises:
        InputError: SAELens has no dictionary of this kind, or the folder exists or cannot be
            written.
    """
    config = _config(part, reads, writes, model)
    tensors = {name: getattr(part, name.lower()) for name in NAMES}
    if part.threshold is not None:
        tensors[THRESHOLD] = part.threshold.float()
    if part.skip is not None:
        tensors[SKIP] = part.skip.T
    with new_folder(folder, read) as made:
        write_tensors(made / PARAMETERS, tensors)
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _config(part: Part, reads: Site, writes: Site, model: str | None) -> dict[str, Any]:
    architecture = _architecture(part, transcoder=reads != writes)
    metadata: dict[str, Any] = {
        "sae_lens_version": _FORM,
        "model_name": model,
        "hook_name": transformer_lens_hook(reads),
        "hook_head_index": None,
        "prepend_bos": True,
    }
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": part.w_enc.shape[0],
        "d_sae": part.w_enc.shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if reads != writes:
        config["d_out"] = part.w_dec.shape[1]
        metadata["hook_name_out"] = transformer_lens_hook(writes)
    elif reads.stream is Stream.ATTN_HEADS:
        # Its own models keep the heads on an axis of their own; this joins them.
        config["reshape_activations"] = "hook_z"
    if part.k is not None:
        config |= {"k": part.k, "rescale_acts_by_decoder_norm": False}
    return config


def _architecture(part: Part, *, transcoder: bool) -> str:
    if part.w_dec.ndim != 2:
        raise InputError(
            "SAELens has no dictionaries of several layers: write the gemma-scope-2 layout"
        )
    if transcoder and part.k is not None:
        raise InputError("SAELens has no TopK transcoders: only ReLU and JumpReLU ones")
    if not transcoder and part.skip is not None:
        raise InputError(
            "SAELens has no autoencoders with a skip connection: only transcoders, which write "
            "another site than they read"
        )
    if transcoder:
        jump = "jumprelu_" if part.threshold is not None else ""
        return f"{jump}{'skip_' if part.skip is not None else ''}transcoder"
    if part.k is not None:
        return "topk"
    return "standard" if part.threshold is None else "jumprelu"
