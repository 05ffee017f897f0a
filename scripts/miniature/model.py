"""The model of the miniature: a small Gemma 3, trained from scratch, resumably.

    python scripts/miniature/model.py --work build/miniature

The forward pass is written out here because it trains about twice as fast as the general one on a
processor (products in bf16, sums and norms in float32, sliding attention computed in blocks); at
the end the weights are loaded into `transformers.Gemma3ForCausalLM` and must give the same logits.

Muon for the matrices of the blocks, AdamW for the embedding and the gains; a constant learning
rate, then a linear decay to zero, during which the share of library modules (what the model is
evaluated on) over test modules rises.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from gemscope.miniature import documents

VOCABULARY, D_MODEL, D_HEAD, HEADS, KEY_HEADS, D_MLP, LAYERS = 4_096, 256, 64, 4, 2, 896, 6
WINDOW, CONTEXT, FULL_EVERY = 128, 512, 3
ROPE_FULL, ROPE_SLIDING = 1_000_000.0, 10_000.0
PAD, EOS, BOS = 0, 1, 2

BATCH = 32  # contexts
STEPS = 1_600
WARM_UP, DECAY_FROM = 60, 800
MUON_LR, ADAM_LR, WEIGHT_DECAY = 5e-3, 2e-3, 0.1
LIBRARY_SHARE, LIBRARY_SHARE_END = 0.4, 0.8
SEED = 0


def configuration() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=D_HEAD,
        query_pre_attn_scalar=D_HEAD,
        max_position_embeddings=CONTEXT,
        sliding_window=WINDOW,
        layer_types=[
            "full_attention" if _is_full(layer) else "sliding_attention" for layer in range(LAYERS)
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": ROPE_FULL},
            "sliding_attention": {"rope_type": "default", "rope_theta": ROPE_SLIDING},
        },
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        tie_word_embeddings=True,
    )


def _is_full(layer: int) -> bool:
    return layer % FULL_EVERY == FULL_EVERY - 1


# ---------------------------------------------------------------- the model


def initial_parameters(generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters under the names that `Gemma3ForCausalLM` gives them."""
    shapes = {
        "self_attn.q_proj": (HEADS * D_HEAD, D_MODEL),
        "self_attn.k_proj": (KEY_HEADS * D_HEAD, D_MODEL),
        "self_attn.v_proj": (KEY_HEADS * D_HEAD, D_MODEL),
        "self_attn.o_proj": (D_MODEL, HEADS * D_HEAD),
        "mlp.gate_proj": (D_MLP, D_MODEL),
        "mlp.up_proj": (D_MLP, D_MODEL),
        "mlp.down_proj": (D_MODEL, D_MLP),
    }
    # What a block adds starts small enough that the stream does not outgrow the embedding.
    gains = {
        "input_layernorm": 0.0,
        "pre_feedforward_layernorm": 0.0,
        "post_attention_layernorm": 1 / math.sqrt(2 * LAYERS) - 1,
        "post_feedforward_layernorm": 1 / math.sqrt(2 * LAYERS) - 1,
    }
    out = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, D_MODEL, generator=generator) * 0.02
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, shape in shapes.items():
            scale = 1 / math.sqrt(shape[1])
            out[f"{at}{name}.weight"] = torch.randn(*shape, generator=generator) * scale
        for name, value in gains.items():
            out[f"{at}{name}.weight"] = torch.full((D_MODEL,), value)
        for name in ("q_norm", "k_norm"):
            out[f"{at}self_attn.{name}.weight"] = torch.zeros(D_HEAD)
    out["model.norm.weight"] = torch.zeros(D_MODEL)
    return out


@dataclass
class Tables:
    """What attention needs besides weights: rotations and masks, for one context length."""

    rotate: dict[bool, tuple[Tensor, Tensor]]
    causal: Tensor
    sliding: Tensor

    @classmethod
    def of(cls, length: int, dtype: torch.dtype) -> "Tables":
        position = torch.arange(length)[:, None, None].float()
        rotate = {}
        for full, base in ((True, ROPE_FULL), (False, ROPE_SLIDING)):
            angle = position * base ** (-torch.arange(0, D_HEAD, 2) / D_HEAD)
            rotate[full] = (angle.cos().to(dtype), angle.sin().to(dtype))
        query = torch.arange(WINDOW)[:, None]
        key = torch.arange(2 * WINDOW)[None] - WINDOW
        inside = (key <= query) & (query - key < WINDOW)
        blocks = torch.stack([inside & (key >= 0)] + [inside] * (length // WINDOW - 1))
        return cls(
            rotate,
            _additive(torch.ones(length, length, dtype=torch.bool).tril()),
            _additive(blocks),
        )


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def logits(p: dict[str, Tensor], ids: Tensor, tables: Tables, dtype: torch.dtype) -> Tensor:
    """Logits `[batch, seq, vocab]` of `ids [batch, seq]`; products in `dtype`, the rest float32."""
    x = F.embedding(ids, p["model.embed_tokens.weight"]) * math.sqrt(D_MODEL)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        h = _norm(x, p[at + "input_layernorm.weight"]).to(dtype)
        y = _attention(p, at + "self_attn.", h, _is_full(layer), tables, dtype)
        x = x + _norm(y.float(), p[at + "post_attention_layernorm.weight"])
        h = _norm(x, p[at + "pre_feedforward_layernorm.weight"]).to(dtype)
        gate, up = F.linear(
            h,
            torch.cat((p[at + "mlp.gate_proj.weight"], p[at + "mlp.up_proj.weight"])).to(dtype),
        ).chunk(2, -1)
        hidden = F.gelu(gate, approximate="tanh") * up
        y = F.linear(hidden, p[at + "mlp.down_proj.weight"].to(dtype))
        x = x + _norm(y.float(), p[at + "post_feedforward_layernorm.weight"])
    h = _norm(x, p["model.norm.weight"]).to(dtype)
    return F.linear(h, p["model.embed_tokens.weight"].to(dtype))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), (1 + weight).to(x.dtype), 1e-6)


def _attention(p, at: str, h: Tensor, full: bool, tables: Tables, dtype: torch.dtype) -> Tensor:
    batch, length, _ = h.shape
    weight = torch.cat([p[f"{at}{n}_proj.weight"] for n in "qkv"]).to(dtype)
    q, k, v = (
        F.linear(h, weight)
        .view(batch, length, HEADS + 2 * KEY_HEADS, D_HEAD)
        .split((HEADS, KEY_HEADS, KEY_HEADS), 2)
    )
    q = _rotate(_norm(q, p[at + "q_norm.weight"]), *tables.rotate[full]).transpose(1, 2)
    k = _rotate(_norm(k, p[at + "k_norm.weight"]), *tables.rotate[full]).transpose(1, 2)
    k = k.repeat_interleave(HEADS // KEY_HEADS, 1)
    v = v.transpose(1, 2).repeat_interleave(HEADS // KEY_HEADS, 1)
    if full:
        y = _attend(q, k, v, tables.causal)
    else:
        y = _attend(_blocks(q), _with_previous(k), _with_previous(v), tables.sliding)
    y = y.reshape(batch, HEADS, length, D_HEAD).transpose(1, 2)
    return F.linear(y.reshape(batch, length, HEADS * D_HEAD), p[at + "o_proj.weight"].to(dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(D_HEAD) + mask
    return torch.softmax(scores, -1).to(v.dtype) @ v


def _blocks(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], -1, WINDOW, D_HEAD)


def _with_previous(x: Tensor) -> Tensor:
    x = _blocks(x)
    return torch.cat((torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, :-1]), 2), x), 3)


# ---------------------------------------------------------------- the data


class Pool:
    """Contexts of one split: every document in windows, shuffled anew each epoch.

    A window is `<bos>` and what follows it in one document. Windows start at a random phase each
    epoch, so that no token is always first; the last window of a document is moved back to be
    full. The state is two integers.
    """

    def __init__(self, encoded: list[Tensor], seed: int):
        self.encoded = [e for e in encoded if len(e) >= 64]
        self.seed = seed
        self.epoch, self.cursor = 0, 0
        self.windows = self._shuffled()

    def _shuffled(self) -> list[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000 + self.epoch)
        length, windows = CONTEXT, []
        for index, e in enumerate(self.encoded):
            phase = int(torch.randint(0, length, (), generator=generator)) if self.epoch else 0
            starts = {0, *range(phase, max(len(e) - length // 2, 1), length)}
            windows += [(index, max(0, min(s, len(e) - length))) for s in sorted(starts)]
        order = torch.randperm(len(windows), generator=generator).tolist()
        return [windows[i] for i in order]

    def take(self, count: int) -> list[Tensor]:
        out = []
        while len(out) < count:
            if self.cursor == len(self.windows):
                self.epoch, self.cursor = self.epoch + 1, 0
                self.windows = self._shuffled()
            index, start = self.windows[self.cursor]
            out.append(self.encoded[index][start : start + CONTEXT])
            self.cursor += 1
        return out

    def state(self) -> tuple[int, int]:
        return self.epoch, self.cursor

    def restore(self, state: tuple[int, int]) -> None:
        self.epoch, self.cursor = state
        self.windows = self._shuffled()


def batch_of(windows: list[Tensor]) -> Tensor:
    """`[batch, CONTEXT + 1]`: `<bos>`, the window, padding."""
    out = torch.full((len(windows), CONTEXT + 1), PAD)
    out[:, 0] = BOS
    for row, window in zip(out, windows, strict=True):
        row[1 : 1 + len(window)] = window
    return out


def encode(tokenizer, split) -> list[Tensor]:
    texts = [d.text for d in documents(split)]
    encodings = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return [torch.tensor([*ids, EOS]) for ids in encodings]


# ---------------------------------------------------------------- training


def optimizers(p: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    matrices = [v for n, v in p.items() if v.ndim == 2 and "embed" not in n]
    embedding = [p["model.embed_tokens.weight"]]
    gains = [v for v in p.values() if v.ndim == 1]
    muon = torch.optim.Muon(
        matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [
            {"params": embedding, "weight_decay": WEIGHT_DECAY},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=ADAM_LR,
        betas=(0.9, 0.95),
    )
    return [muon, adam]


def rate(step: int) -> float:
    """Share of the full learning rate at `step`."""
    if step < DECAY_FROM:
        return min(1.0, (step + 1) / WARM_UP)
    return (STEPS - step) / (STEPS - DECAY_FROM)


def library_share(step: int) -> float:
    past = max(0.0, (step - DECAY_FROM) / (STEPS - DECAY_FROM))
    return LIBRARY_SHARE + (LIBRARY_SHARE_END - LIBRARY_SHARE) * past


def loss_of(p: dict[str, Tensor], ids: Tensor, tables: Tables) -> Tensor:
    out = logits(p, ids[:, :-1], tables, torch.bfloat16)
    return F.cross_entropy(out.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)


def train(work: Path, tokenizer) -> dict[str, Tensor]:
    p = initial_parameters(torch.Generator().manual_seed(SEED))
    for value in p.values():
        value.requires_grad_()
    steppers = optimizers(p)
    pools = {s: Pool(encode(tokenizer, s), i) for i, s in enumerate(("library", "tests"))}
    tables = Tables.of(CONTEXT, torch.bfloat16)
    start, seconds = restore(work / "training.pt", p, steppers, pools)
    compiled = torch.compile(loss_of)
    began = time.monotonic()
    for step in range(start, STEPS):
        count = round(BATCH * library_share(step))
        windows = pools["library"].take(count) + pools["tests"].take(BATCH - count)
        loss = compiled(p, batch_of(windows), tables)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        for stepper, full in zip(steppers, (MUON_LR, ADAM_LR), strict=True):
            for group in stepper.param_groups:
                group["lr"] = full * rate(step)
            stepper.step()
            stepper.zero_grad()
        if step % 20 == 19:
            spent = time.monotonic() - began
            line = {
                "step": step + 1,
                "loss": round(loss.item(), 4),
                "tokens": (step + 1) * BATCH * CONTEXT,
                "seconds": round(seconds + spent, 1),
            }
            with (work / "training.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            left = (STEPS - step - 1) * spent / (step + 1 - start)
            print(f"{line}  {left / 60:.0f} min left", flush=True)
        if step % 100 == 99:
            save(
                work / "training.pt",
                p,
                steppers,
                pools,
                step + 1,
                seconds + time.monotonic() - began,
            )
    return {name: value.detach() for name, value in p.items()}


def save(path: Path, p, steppers, pools, step: int, seconds: float) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "step": step,
            "seconds": seconds,
            "parameters": {n: v.detach() for n, v in p.items()},
            "optimizers": [s.state_dict() for s in steppers],
            "pools": {n: pool.state() for n, pool in pools.items()},
        },
        part,
    )
    os.replace(part, path)


def restore(path: Path, p, steppers, pools) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, value in p.items():
            value.copy_(state["parameters"][name])
    for stepper, saved in zip(steppers, state["optimizers"], strict=True):
        stepper.load_state_dict(saved)
    for name, pool in pools.items():
        pool.restore(state["pools"][name])
    print(f"going on from step {state['step']}", flush=True)
    return state["step"], state["seconds"]


# ---------------------------------------------------------------- the result


def export(p: dict[str, Tensor], folder: Path, heldout: list[Tensor]) -> None:
    """Write the ordinary Hugging Face layout in bf16, after checking it against transformers."""
    model = Gemma3ForCausalLM(configuration()).eval()
    missing, unexpected = model.load_state_dict(p, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    ids = torch.cat((torch.tensor([BOS]), heldout[0]))[None, :CONTEXT]
    with torch.no_grad():
        theirs = model(ids).logits
        ours = logits(p, ids, Tables.of(CONTEXT, torch.float32), torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    model.bfloat16().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    folder = work / "model"
    if (folder / "model.safetensors").is_file():
        print(f"{folder}/model.safetensors is there already")
        return
    torch.set_float32_matmul_precision("high")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    p = train(work, tokenizer)
    export(p, folder, encode(tokenizer, "heldout"))
    print(f"wrote {folder}/model.safetensors")


if __name__ == "__main__":
    main()
