"""Measure every feature of a dictionary with sae-dashboard; prints one JSON object.

    python benchmarks/peers/dashboard.py SAE_FOLDER TOKENS.safetensors [--threads N] [--features N]

SAE_FOLDER is a dictionary in the layout of SAELens, TOKENS holds `tokens [rows, context]`, BOS
first. The bundled miniature runs through `transformers` behind the few attributes the library asks
of a model; the pass ends after the layer that is read, as its own wrapper asks. Settings are its
defaults: batches of 256 features (`--features`), each a pass of its own over the text; with
`--cache` the model's activations are kept on the disk after the first pass, its faster way.
Positions of BOS are left out of its statistics.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1"}

import torch
from memory import forget_peak, peak, resident
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).parents[2] / "src" / "gemscope" / "miniature" / "model"


class _EndedError(Exception):
    pass


class _Point:
    def __init__(self):
        self.ctx = {}


class Model(nn.Module):
    """The miniature as sae-dashboard sees a model: hook points by name, and an unembedding."""

    def __init__(self, layer: int):
        super().__init__()
        self.hf = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.layer, self.point = layer, f"blocks.{layer}.hook_resid_post"
        self.hook_dict = {self.point: _Point()}

    @property
    def W_U(self) -> torch.Tensor:  # noqa: N802
        """`[d_model, vocab]`."""
        return self.hf.get_output_embeddings().weight.T

    @property
    def W_out(self) -> torch.Tensor:  # noqa: N802
        """Asked for and not used: what is read is the residual stream."""
        return torch.stack([x.mlp.down_proj.weight.T for x in self.hf.model.layers])

    def run_with_hooks(self, tokens, stop_at_layer, fwd_hooks):
        """One pass that ends after the layer that is read."""

        def read(_module, _inputs, out):
            for name, hook in fwd_hooks:
                hook(out[0] if isinstance(out, tuple) else out, self.hook_dict[name])
            raise _EndedError

        handle = self.hf.model.layers[self.layer].register_forward_hook(read)
        try:
            self.hf.model(input_ids=tokens, use_cache=False)
        except _EndedError:
            pass
        finally:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sae", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--cache", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokens = load_file(given.tokens)["tokens"].long()
    sae, model = SAE.load_from_disk(given.sae), Model(given.layer)
    with tempfile.TemporaryDirectory() as cache:
        config = SaeVisConfig(
            hook_point=model.point, features=list(range(sae.cfg.d_sae)),
            minibatch_size_features=given.features, minibatch_size_tokens=64,
            ignore_tokens={model.tokenizer.bos_token_id},
            cache_dir=Path(cache) if given.cache else None,
        )  # fmt: skip
        before = resident()
        forget_peak()
        began = time.perf_counter()
        with torch.inference_mode():
            found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "seconds": seconds, "tokens": int((tokens != model.tokenizer.bos_token_id).sum()),
                "features": len(found.feature_data_dict), "memory_bytes": peak() - before,
            }
        ),
        file=sys.stdout,
    )  # fmt: skip


if __name__ == "__main__":
    main()
