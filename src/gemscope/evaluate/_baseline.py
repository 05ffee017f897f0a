"""A random dictionary of the same shape and sparsity, to see what a figure is worth."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import SAE, CrossLayer, Dictionary, JumpReLU, Layer, Origin

_LARGEST = 2**28
"""Parameters of a dictionary up to which a random one is made."""
_PRODUCTS = 2**24
"""Pre-activations that the threshold is measured on, at most."""


def random_dictionary(
    sae: Dictionary,
    sample: Float[Tensor, "n ..."],
    mean_read: Float[Tensor, "..."],
    mean_written: Float[Tensor, "..."],
    *,
    seed: int,
) -> Dictionary | None:
    """Random unit decoder rows, one threshold that gives the L0 of `sae` on `sample`.

    The encoder is the decoder's transpose where the widths agree; both biases centre the data, so
    that what is missing is only what training gives. None where it would be too large.
    """
    n_out = 1 if isinstance(sae, SAE) else len(sae.layers)
    if sae.d_sae * (sae.d_in + sae.d_out * n_out) > _LARGEST:
        return None
    generator = torch.Generator().manual_seed(seed)
    sample = sample[: max(1, _PRODUCTS // sae.d_sae)].float()
    origin = Origin(address="random", model=sae.origin.model)
    if isinstance(sae, SAE):
        draft = _layer(sae.d_in, sae.d_sae, 1, sae.d_out, 0, mean_read, mean_written, generator)
        made: Dictionary = SAE(
            w_enc=draft.w_enc,
            b_enc=draft.b_enc,
            w_dec=draft.w_dec[:, 0],
            b_dec=draft.b_dec,
            activation=JumpReLU(draft.threshold),
            reads=sae.reads,
            writes=sae.writes,
            origin=origin,
        )
    else:
        drafts = [
            _layer(
                sae.d_in, own.w_enc.shape[1], n_out, sae.d_out, place,
                mean_read[place], mean_written[place], generator,
            )
            for place, own in enumerate(sae.layers)
        ]  # fmt: skip
        made = CrossLayer(layers=tuple(drafts), reads=sae.reads, writes=sae.writes, origin=origin)
    return _with_l0(made, sample, sae.encode(sample).counts.float().mean().item())


def _layer(
    d_in: int,
    count: int,
    n_out: int,
    d_out: int,
    place: int,
    mean_read: Tensor,
    mean_written: Tensor,
    generator: torch.Generator,
) -> Layer:
    device = mean_read.device
    rows = F.normalize(torch.randn(count, n_out, d_out, generator=generator), dim=2).to(device)
    if d_in == d_out:
        w_enc = rows[:, place if n_out > 1 else 0].T.contiguous()
    else:
        w_enc = F.normalize(torch.randn(d_in, count, generator=generator), dim=0).to(device)
    return Layer(
        w_enc=w_enc,
        b_enc=-(mean_read.float() @ w_enc),
        threshold=torch.zeros(count, device=device),
        w_dec=rows,
        b_dec=mean_written.float(),
    )


def _with_l0(sae: Dictionary, sample: Tensor, l0: float) -> Dictionary:
    """`sae` with the one threshold that fires `l0` features per token of `sample`."""
    if isinstance(sae, SAE):
        pre = torch.addmm(sae.b_enc, sample, sae.w_enc).flatten()
    else:
        pre = torch.cat(
            [torch.addmm(x.b_enc, sample[:, i], x.w_enc) for i, x in enumerate(sae.layers)], 1
        ).flatten()
    firing = max(1, round(l0 * len(sample)))
    threshold = pre.topk(min(firing + 1, pre.numel())).values[-1].clamp_min(0)
    if isinstance(sae, SAE):
        return replace(sae, activation=JumpReLU(threshold.expand(sae.d_sae).contiguous()))
    return replace(
        sae,
        layers=tuple(
            replace(x, threshold=threshold.expand(x.w_enc.shape[1]).contiguous())
            for x in sae.layers
        ),
    )
