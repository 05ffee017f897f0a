"""Train twelve dictionaries at once with SAELens's multi-SAE runner; prints one JSON object.

    python benchmarks/peers/many.py TEXTS TOKENS [--kind jumprelu|topk|topk_sparse] [--threads 1]
        [--lm float32|autocast|bfloat16]

The stream `resid_post` of the six layers of the bundled miniature model, two sparsities each. The
model runs as SAELens runs what TransformerLens does not know, `AutoModelForCausalLM` with hooks
on `model.layers.N`: one pass for all layers, which ends at the last of them. TEXTS is a jsonl
with a field `text`; it is tokenized and packed by SAELens's own function beforehand, as its
manual advises, and read again from its start where it is too short for TOKENS.

JumpReLU is its recipe for the loss around a target L0, TopK its defaults; Adam at 3e-4. Buffer,
mixing and prompts per pass are its defaults, without logging, evaluation or checkpoints. Seconds
are those of `run`: the mean norms (`--norm-batches`, which are in the seconds and not among the
tokens), the model, and training. `setup_seconds` is making the runner. The memory is the whole
process, without its imports in `memory_bytes`. `--lm bfloat16` hands the dictionaries activations
in bfloat16, `--lm autocast` (its `autocast_lm`) and float32 do not. `topk_sparse` is as in step.py.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

import datasets
import torch
from memory import forget_peak, peak, resident
from sae_lens import (
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformers import AutoConfig, AutoTokenizer

MODEL = Path(__file__).parents[2] / "src" / "gemscope" / "miniature" / "model"
SPARSITIES = (16, 32)


def packed(texts: Path, model: Path, context: int, tokens: int) -> datasets.Dataset:
    """Rows of `context` token ids that begin with BOS, documents apart by BOS."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token_id
    with texts.open() as lines:
        ids = (
            torch.tensor(tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids)
            for line in lines
        )
        rows = []
        for row in concat_and_batch_sequences(ids, context, bos, None, bos):
            rows.append(row.tolist())
            if len(rows) * context >= 2 * tokens:
                break
    return datasets.Dataset.from_dict({"input_ids": rows})


def artefact(kind: str, d_in: int, d_sae: int, l0: int) -> TrainingSAEConfig:
    common = {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "expected_average_only_in"}
    if kind == "jumprelu":
        return JumpReLUTrainingSAEConfig(
            **common,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=l0,
            l0_coefficient=5.0,
            jumprelu_bandwidth=0.01,
            jumprelu_init_threshold=0.01,
        )
    sparse = kind == "topk_sparse"
    return TopKTrainingSAEConfig(
        **common, k=l0, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse
    )


def measure(given: argparse.Namespace) -> dict:
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = AutoConfig.from_pretrained(given.model)
    rows = packed(given.texts, given.model, given.context, given.tokens)
    saes, hooks = {}, {}
    for layer in range(model.num_hidden_layers):
        for l0 in SPARSITIES:
            name = f"{layer}.resid_post_l0_{l0}"
            saes[name] = artefact(given.kind, model.hidden_size, given.d_sae, l0)
            hooks[name] = f"model.layers.{layer}"
    forget_peak()
    before = resident()
    began = time.perf_counter()
    config = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=hooks,
        model_name=str(given.model),
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "bfloat16" if given.lm == "bfloat16" else "float32"},
        autocast_lm=given.lm == "autocast",
        context_size=given.context,
        training_tokens=given.tokens,
        train_batch_size_tokens=given.batch,
        n_batches_for_norm_estimate=given.norm_batches,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    runner = MultiSAETrainingRunner(config, override_dataset=rows)
    ready = time.perf_counter()
    trained = runner.run()
    seconds = time.perf_counter() - ready
    # The trainer counts whole batches, up to the first that reaches the tokens asked for.
    tokens = -(-given.tokens // given.batch) * given.batch
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items()} | {
        "version": importlib.metadata.version("sae-lens"),
        "torch": torch.__version__,
        "dictionaries": len(trained),
        "rows": len(rows),
        "tokens": tokens,
        "setup_seconds": ready - began,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "measured_l0": {name: sae.cfg.metadata.l0 for name, sae in trained.items()},
        "memory_bytes": peak() - before,
        "max_memory_bytes": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--kind", default="jumprelu", choices=("jumprelu", "topk", "topk_sparse"))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--lm", default="float32", choices=("float32", "autocast", "bfloat16"))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--norm-batches", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        record = measure(given)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
