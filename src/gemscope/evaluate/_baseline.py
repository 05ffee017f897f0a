"""A random dictionary of the same shape and sparsity, to see what a figure is worth."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gemscope.sae import SAE, JumpReLU, Origin


def random_dictionary(
    sae: SAE,
    sample: Float[Tensor, "n d_in"],
    mean_read: Float[Tensor, " d_in"],
    mean_written: Float[Tensor, " d_out"],
    *,
    seed: int,
) -> SAE:
    """Random unit decoder rows, one threshold that gives the L0 of `sae` on `sample`.

    The encoder is the decoder's transpose where the widths agree; both biases centre the data, so
    that what is missing is only what training gives.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(sae.d_sae, sae.d_out, generator=generator), dim=1)
    if sae.d_in == sae.d_out:
        w_enc = rows.T.contiguous()
    else:
        w_enc = F.normalize(torch.randn(sae.d_in, sae.d_sae, generator=generator), dim=0)
    rows, w_enc = rows.to(sample.device), w_enc.to(sample.device)
    b_enc = -(mean_read.float() @ w_enc)
    l0 = sae.encode(sample).counts.float().mean().item()
    pre = torch.addmm(b_enc, sample.float(), w_enc).flatten()
    firing = max(1, round(l0 * len(sample)))
    threshold = pre.topk(min(firing + 1, pre.numel())).values[-1].clamp_min(0)
    return SAE(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=rows,
        b_dec=mean_written.float(),
        activation=JumpReLU(threshold.expand(sae.d_sae).contiguous()),
        reads=sae.reads,
        writes=sae.writes,
        origin=Origin(address="random", model=sae.origin.model),
    )
