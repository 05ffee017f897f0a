"""What `sparsify.Trainer.fit` does to one sparse coder, without the language model around it.

Theirs takes its activations from a forward hook on a `transformers` model and cannot be given
stored ones. This is the body of that hook and of the step after it (sparsify 1.3.3, trainer.py)
for the loss `fvu`, one chunk and one process, with the defaults of their `TrainConfig`: the
optimizer `signum` (schedule-free sign descent, momentum 0.95) at 5e-3 / sqrt(d_sae / 2**14), no
auxiliary loss (`auxk_alpha` 0), no decay of k. `adam` is their other choice: 2e-4 by the same
rule, warmed up over 1000 steps and then decayed linearly to zero.
"""

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


class SparsifyTrainer:
    """One TopK coder in training on batches of activations."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        steps: int,
        lr: float | None = None,
        optimizer: str = "signum",
        seed: int = 0,
    ):
        torch.set_float32_matmul_precision("high")  # as fit does
        torch.manual_seed(seed)
        config = SparseCoderConfig(num_latents=d_sae, k=k)
        self.coder = SparseCoder(d_in, config, "cpu", dtype=torch.float32)
        scale = (d_sae / 2**14) ** 0.5
        self.schedule = None
        if optimizer == "signum":
            self.lr = lr or 5e-3 / scale
            base = SignSGD(self.coder.parameters(), lr=self.lr)
            self.optimizer = ScheduleFreeWrapper(base, momentum=0.95)
            self.optimizer.train()
        else:
            self.lr = lr or 2e-4 / scale
            self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=self.lr)
            self.schedule = get_linear_schedule_with_warmup(self.optimizer, 1000, steps)
        self.since_fired = torch.zeros(d_sae, dtype=torch.long)
        self.fired = torch.zeros(d_sae, dtype=torch.bool)
        self.fvu = float("nan")

    def update(self, step: int, x: Tensor) -> None:
        """Take one step on a batch."""
        coder = self.coder
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=None, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        self.fvu = float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self.since_fired += len(x)
        self.since_fired[self.fired] = 0
        self.fired.zero_()

    def finish(self) -> SparseCoder:
        """The coder as it would be saved: of schedule-free weights, their average."""
        if isinstance(self.optimizer, ScheduleFreeWrapper):
            self.optimizer.eval()
        return self.coder
