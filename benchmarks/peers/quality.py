"""Train a peer's dictionary on stored activations and save it in a neutral form; prints one JSON.

    python benchmarks/peers/quality.py WHO KIND ACTIVATIONS.safetensors OUT.safetensors
        --d-sae N --l0 N [--batch N] [--lr X] [--seed N] [--tokens N] [--threads N]

The tensor `x [n, d]` is read in order in whole batches, from its start again where `--tokens` is
more. OUT has `w_enc [d_in, d_sae]`, `b_enc`, `w_dec [d_sae, d_out]`, `b_dec`, for a JumpReLU
`threshold`, and the metadata `activation` (`jumprelu` or `topk`), `seconds` and `k`, in units of the stored
activations: f = act(x @ w_enc + b_enc), xhat = f @ w_dec + b_dec. A JumpReLU keeps what is over
its threshold, a TopK the k largest of a row that are over zero. It is compared with the peer's own
forward in float64: all but one token in a hundred, where a feature on its threshold may fall
either way, have to agree to 1e-4.

What is not an argument is what the peers recommend:

- `saelens jumprelu` (docs/training_saes.md of SAELens): activations scaled to a mean norm of
  sqrt(d) (`expected_average_only_in`), from at most 1000 batches; Adam, rate 3e-4, constant and
  then decayed to zero over the last fifth. `--mode` is the recipe: `quadratic`, the only one that
  is given a target L0 (coefficient 5, bandwidth and first threshold 0.01, no warm-up); `tanh`,
  Anthropic's, the one they find easier (coefficient 5, bandwidth 2, first threshold 0.1, loss on
  pre-activations 3e-6, coefficient warmed up over the whole run); `step` (coefficient 5, bandwidth
  and first threshold 0.01; ideally two billion tokens, they say). In the last two the L0 follows
  from `--coefficient` and `--l0` is not used. They advise a larger bandwidth or first threshold
  where the L0 does not come down: `--bandwidth`, `--init-threshold`. Under Adam a threshold moves
  by no more than about the rate in a step, so a run whose rate times steps is under one or so of
  the scaled units does not come to its target, whatever the coefficient.
- `saelens topk`: TopKTrainingSAEConfig's defaults (auxiliary loss 1, decoder norms divided out),
  the same scale, rate and decay. Its text names no scale for TopK; its other runs have this one.
- `sparsify topk`: see `sparsify_trainer.py`; activations as they are. `--optimizer adam` is the
  other choice; `--lr` overrides the rule by width.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import peak
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKED = 512
RECIPES = {
    "quadratic": {
        "l0_coefficient": 5.0,
        "jumprelu_bandwidth": 0.01,
        "jumprelu_init_threshold": 0.01,
    },
    "step": {"l0_coefficient": 5.0, "jumprelu_bandwidth": 0.01, "jumprelu_init_threshold": 0.01},
    "tanh": {
        "l0_coefficient": 5.0,
        "jumprelu_bandwidth": 2.0,
        "jumprelu_init_threshold": 0.1,
        "pre_act_loss_coefficient": 3e-6,
    },
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Activations in a file, read a batch at a time."""

    path: Path
    batch: int

    def shape(self) -> tuple[int, int]:
        """Rows and width of what is stored."""
        with safe_open(self.path, "pt") as file:
            n, d = file.get_slice("x").get_shape()
        return n, d

    def batches(self, steps: int) -> Iterator[Tensor]:
        """One batch for each step, in order, round and round."""
        a_pass = self.shape()[0] // self.batch
        if a_pass == 0:
            raise SystemExit(f"{self.path} has not one batch of {self.batch} rows")
        with safe_open(self.path, "pt") as file:
            x = file.get_slice("x")
            for step in range(steps):
                start = step % a_pass * self.batch
                yield x[start : start + self.batch]


def saelens(given: argparse.Namespace, x: Stored, d_in: int, steps: int) -> tuple:
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        LoggingConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common = {
        "d_in": d_in,
        "d_sae": given.d_sae,
        "normalize_activations": "expected_average_only_in",
    }
    if given.kind == "jumprelu":
        asked = {
            "l0_coefficient": given.coefficient,
            "jumprelu_bandwidth": given.bandwidth,
            "jumprelu_init_threshold": given.init_threshold,
            "target_l0": given.l0 if given.mode == "quadratic" else None,
            "l0_warm_up_steps": steps if given.mode == "tanh" else None,
        }
        recipe = RECIPES[given.mode] | {k: v for k, v in asked.items() if v is not None}
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**common, jumprelu_sparsity_loss_mode=given.mode, **recipe)
        )
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=int(given.l0)))
    details = sae.cfg.get_training_architecture_details()
    lr = given.lr or 3e-4
    config = SAETrainerConfig(
        total_training_samples=steps * given.batch,
        train_batch_size_samples=given.batch,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=steps // 5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, x.batches(steps))
    # fit would take these batches from those to train on.
    count = min(config.n_batches_for_norm_estimate, steps)
    trainer.activation_scaler.estimate_scaling_factor(d_in, x.batches(count), count)
    trainer.fit()

    with torch.no_grad():
        b_enc = sae.b_enc - sae.cfg.apply_b_dec_to_input * (sae.b_dec.double() @ sae.W_enc.double())
        parts = {"w_enc": sae.W_enc, "b_enc": b_enc, "w_dec": sae.W_dec, "b_dec": sae.b_dec}
        if given.kind == "jumprelu":
            sae.threshold.clamp_(min=0)  # as each forward of its training does
            parts["threshold"] = sae.threshold
        elif sae.cfg.rescale_acts_by_decoder_norm:
            norm = sae.W_dec.double().norm(dim=1)
            parts["w_enc"] = sae.W_enc * norm
            parts["b_enc"] = b_enc * norm
            parts["w_dec"] = sae.W_dec / norm[:, None]
    return sae, parts, details | {"lr": lr}


def sparsify(given: argparse.Namespace, x: Stored, d_in: int, steps: int) -> tuple:
    from sparsify_trainer import SparsifyTrainer

    trainer = SparsifyTrainer(
        d_in, given.d_sae, int(given.l0),
        steps=steps, lr=given.lr, optimizer=given.optimizer, seed=given.seed,
    )  # fmt: skip
    for step, batch in enumerate(x.batches(steps)):
        trainer.update(step, batch)
    coder = trainer.finish()
    with torch.no_grad():
        w_enc = coder.encoder.weight.T
        b_enc = coder.encoder.bias - coder.b_dec.double() @ w_enc.double()
    parts = {"w_enc": w_enc, "b_enc": b_enc, "w_dec": coder.W_dec, "b_dec": coder.b_dec}
    return coder, parts, {"lr": trainer.lr, "optimizer": given.optimizer}


def compare(peer: nn.Module, parts: dict[str, Tensor], k: int | None, x: Tensor) -> dict:
    """How far the neutral form is from the peer on some tokens, and how good it is there."""
    peer, x = peer.to(torch.float64), x.double()
    with torch.no_grad():
        theirs = peer(x)
        theirs = theirs if isinstance(theirs, Tensor) else theirs.sae_out
        parts = {name: part.double() for name, part in parts.items()}
        pre = x @ parts["w_enc"] + parts["b_enc"]
        if k is None:
            f = pre * (pre > parts["threshold"])
        else:
            top = pre.topk(k, dim=1)
            f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        ours = f @ parts["w_dec"] + parts["b_dec"]
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    if (share := (apart > 1e-4).double().mean().item()) > 0.01:
        raise AssertionError(f"{share:.1%} of tokens differ from the peer's own by over 1e-4")
    return {
        "apart_median": apart.median().item(),
        "apart_max": apart.max().item(),
        "measured_l0": (f > 0).sum(1).double().mean().item(),
        "fvu": ((ours - x).square().sum() / (x - x.mean(0)).square().sum()).item(),
    }


PEERS = {
    "saelens": (saelens, "sae-lens", ("jumprelu", "topk")),
    "sparsify": (sparsify, "eai-sparsify", ("topk",)),
}


def measure(given: argparse.Namespace) -> dict:
    train, package, kinds = PEERS[given.who]
    if given.kind not in kinds:
        raise SystemExit(f"{given.who} has no {given.kind} here; it has {', '.join(kinds)}")
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    x = Stored(given.activations, given.batch)
    n, d_in = x.shape()
    steps = (given.tokens or n) // given.batch
    began = time.perf_counter()
    peer, parts, options = train(given, x, d_in, steps)
    seconds = time.perf_counter() - began
    parts = {name: part.detach().float().contiguous() for name, part in parts.items()}
    k = int(given.l0) if given.kind == "topk" else None
    tokens = next(x.batches(1))[:CHECKED]
    compared = compare(peer, parts, k, tokens)
    metadata = {"activation": given.kind, "seconds": f"{seconds:.1f}"}
    metadata |= {} if k is None else {"k": str(k)}
    save_file(parts, given.out, metadata)
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items()} | {
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
        "options": options,
        "steps": steps,
        "tokens": steps * given.batch,
        "seconds": seconds,
        "max_memory_bytes": peak(),
    } | compared  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=PEERS)
    parser.add_argument("kind")
    parser.add_argument("activations", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--l0", type=float, required=True)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, help="3e-4 for saelens, by width for sparsify")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, help="all that are stored, once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=RECIPES, default="quadratic")
    parser.add_argument("--coefficient", type=float)
    parser.add_argument("--bandwidth", type=float)
    parser.add_argument("--init-threshold", type=float)
    parser.add_argument("--optimizer", choices=("signum", "adam"), default="signum")
    given = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        record = measure(given)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
