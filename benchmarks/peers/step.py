"""Time one training step of a peer on activations in memory; prints one JSON object.

    python benchmarks/peers/step.py WHO KIND D_IN D_SAE BATCH L0 THREADS [STEPS]

WHO KIND is one of `saelens jumprelu`, `saelens topk`, `saelens topk_sparse`, `dictionary_learning
jumprelu`, `dictionary_learning topk`, `sparsify topk`. Each takes the step that its own training
loop takes, in float32, with its default options; `topk_sparse` is SAELens's TopK with its options
`use_sparse_activations` on and `rescale_acts_by_decoder_norm` off. The activations are scaled as each recommends. JumpReLU thresholds start
at one level that gives the L0 asked for, and a learning rate that warms up over many steps leaves
it there while it is timed. No feature is dead yet, so that no auxiliary loss is in the time.

Seconds are the median of STEPS (8) steps after two to warm up. `memory_bytes` is the peak less
what was in memory, data included, before the trainer was made; `max_memory_bytes` is the peak.
"""

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from data import activations, level, sample
from memory import forget_peak, peak, resident
from torch import Tensor

WARM_UP = 2
LONG = 30_000  # Steps that the schedules are laid out for.
SMALL = 256


@dataclass(frozen=True, slots=True)
class Peer:
    """A trainer of someone else's: a step on a batch, and the features of a batch."""

    update: Callable[[int, Tensor], object]
    encode: Callable[[Tensor], Tensor]
    options: dict


def saelens(kind: str, x: Tensor, d_sae: int, batch: int, l0: int) -> Peer:
    """SAETrainer.step, as fit calls it, with the scale of `expected_average_only_in`."""
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        LoggingConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_in = x.shape[1]
    common = {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "expected_average_only_in"}
    scale = d_in**0.5 / x[:batch].norm(dim=1).mean().item()
    if kind == "jumprelu":
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common))
        with torch.no_grad():
            sae.threshold.fill_(level(sample(x) * scale @ sae.W_enc, l0))
    else:
        sparse = kind == "topk_sparse"
        # With both options, which is its default for the second, backward fails on a CPU.
        common |= {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=l0))
    config = SAETrainerConfig(
        total_training_samples=LONG * batch,
        train_batch_size_samples=batch,
        lr_end=3e-5,
        lr_warm_up_steps=10_000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = scale

    def update(_: int, batch: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    options = sae.cfg.get_training_architecture_details() | {"lr": config.lr}
    return Peer(update, lambda x: sae.encode(x * scale).to_dense(), options)


def dictionary_learning(kind: str, x: Tensor, d_sae: int, batch: int, l0: int) -> Peer:
    """`update` of its trainer, on activations of unit mean square norm, as trainSAE gives them."""
    # Only its buffer of activations needs nnsight, which wants another version of torch.
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object
    sys.modules.setdefault("nnsight", stub)
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    scale = 1 / x[:batch].square().sum(1).mean().sqrt().item()
    common = {
        "steps": LONG, "activation_dim": x.shape[1], "dict_size": d_sae,
        "layer": 0, "lm_name": "none", "device": "cpu",
    }  # fmt: skip
    if kind == "jumprelu":
        trainer = JumpReluTrainer(**common, target_l0=float(l0))
        with torch.no_grad():
            trainer.ae.threshold.fill_(level(sample(x) * scale @ trainer.ae.W_enc, l0))
    else:
        trainer = TopKTrainer(**common, k=l0)
    return Peer(
        lambda step, batch: trainer.update(step, batch * scale),
        lambda x: trainer.ae.encode(x * scale),
        {"lr": trainer.lr},
    )


def sparsify(kind: str, x: Tensor, d_sae: int, batch: int, l0: int) -> Peer:
    """The body of its loop, on activations as they are."""
    from sparsify_trainer import SparsifyTrainer

    trainer = SparsifyTrainer(x.shape[1], d_sae, l0, steps=LONG)
    options = {"lr": trainer.lr, "optimizer": "signum"}
    return Peer(trainer.update, lambda x: trainer.coder.encode(x).top_acts, options)


PEERS = {
    "saelens": (saelens, "sae-lens", ("jumprelu", "topk", "topk_sparse")),
    "dictionary_learning": (dictionary_learning, "dictionary-learning", ("jumprelu", "topk")),
    "sparsify": (sparsify, "eai-sparsify", ("topk",)),
}


def measure(given: argparse.Namespace) -> dict:
    make, package, kinds = PEERS[given.who]
    if given.kind not in kinds:
        raise SystemExit(f"{given.who} has no {given.kind} here; it has {', '.join(kinds)}")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    batches = given.steps + WARM_UP
    x = activations(given.batch * batches, given.d_in)
    # Importing is not what is measured: make a small one first.
    make(given.kind, x[: min(SMALL, given.batch), :16], 64, SMALL, 1)
    before = resident()
    peer = make(given.kind, x, given.d_sae, given.batch, given.l0)
    forget_peak()  # what finding the level took
    seconds, l0 = [], []
    for step, batch in enumerate(x.split(given.batch)):
        with torch.no_grad():
            l0.append((peer.encode(sample(batch)) > 0).sum(1).float().mean().item())
        began = time.perf_counter()
        peer.update(step, batch)
        seconds.append(time.perf_counter() - began)
    return vars(given) | {
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
        "options": peer.options,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "seconds_each": [round(s, 4) for s in seconds],
        "measured_l0": statistics.mean(l0[WARM_UP:]),
        "memory_bytes": peak() - before,
        "max_memory_bytes": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=PEERS)
    parser.add_argument("kind")
    for name in ("d_in", "d_sae", "batch", "l0", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("steps", type=int, nargs="?", default=8)
    given = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Some of them print.
        record = measure(given)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
