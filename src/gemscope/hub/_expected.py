"""What the files of a catalog entry are expected to hold, before they are here."""

import math

from gemscope.sites import Sites

from ._entry import Entry


def expected_shapes(entry: Entry) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors; of a multi-layer model, those of one layer."""
    n_layers = len(entry.reads) if isinstance(entry.reads, Sites) else 1
    d_sae = entry.d_sae // n_layers
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc": (entry.d_in, d_sae),
        "b_enc": (d_sae,),
        "w_dec": (d_sae, entry.d_out) if n_layers == 1 else (d_sae, n_layers, entry.d_out),
        "b_dec": (entry.d_out,),
        "threshold": (d_sae,),
    }
    if entry.affine:
        shapes["affine_skip_connection"] = (entry.d_in, entry.d_out)
    return shapes


def expected_bytes(entry: Entry) -> int:
    """Bytes of the parameter files, their headers aside."""
    n_layers = len(entry.reads) if isinstance(entry.reads, Sites) else 1
    item = 2 if entry.dtype in ("bfloat16", "float16") else 4
    return n_layers * item * sum(math.prod(shape) for shape in expected_shapes(entry).values())
