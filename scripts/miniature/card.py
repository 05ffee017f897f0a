"""Measure the miniature and write what its cards and the catalog say of it.

    python scripts/miniature/card.py --work build/miniature

Writes `MODEL_CARD.md` beside the bundled model, and the measured figures of the dictionaries into
`hub/published.json`, which reports print beside what they measure.
"""

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gemscope import hub, miniature
from gemscope.corpus import BUNDLED, contexts, pack, read_text
from gemscope.evaluate import Settings, evaluate
from gemscope.lm import load_model

PUBLISHED = Path(hub.__file__).parent / "published.json"
TOKENS = 40_000
"""Held-out tokens that every dictionary is measured on."""
KEPT = (
    "l0", "fvu", "fvu_global", "mse", "cosine", "loss_clean", "loss_spliced", "delta_loss", "kl",
    "loss_recovered_zero", "loss_recovered_mean", "dead_fraction",
)  # fmt: skip


def held_out_loss(model) -> tuple[float, float, int]:
    """Nats per token, bits per byte, and tokens of the held-out text, every token predicted once."""
    documents = read_text(BUNDLED)
    rows = contexts(documents, model.tokenizer, length=model.max_context)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in pack(rows, model.tokenizer, batch=8):
            logits = model.run(batch, logits=True).logits
            wanted = batch.counts[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][wanted].double(), batch.ids[:, 1:][wanted], reduction="sum"
            )
            total, tokens = total + float(losses), tokens + int(wanted.sum())
    size = sum(len(d.text.encode()) for d in documents)
    return total / tokens, total / math.log(2) / size, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    model = load_model("miniature", device="cpu", dtype="float32")
    nats, bits, tokens = held_out_loss(model)
    entries = hub.catalog(release="miniature")
    documents = read_text(BUNDLED)
    settings = Settings(tokens=TOKENS, context=model.max_context)
    results = evaluate(model, [hub.build(e) for e in entries], documents, settings, _told())
    rows = [
        (entry, result.metrics, _trained(work, entry.address))
        for entry, result in zip(entries, results, strict=True)
    ]
    _write_published(rows)
    trained = _model_training(work)
    size = sum(f.stat().st_size for f in miniature.MODEL.iterdir())
    card = _CARD.format(
        parameters=sum(p.numel() for p in model.hf.parameters()),
        megabytes=size / 1e6,
        python=platform.python_version(),
        library=_text("library"),
        tests=_text("tests"),
        heldout=_text("heldout"),
        names=", ".join(f"`{d.path}`" for d in documents),
        trained=trained,
        nats=nats,
        bits=bits,
        tokens=tokens,
        scope=sum(f.stat().st_size for f in miniature.SCOPE.rglob("*") if f.is_file()) / 1e6,
        seen=rows[0][2]["tokens"],
        measured=TOKENS,
        table="\n".join(_row(*row) for row in rows),
    )
    (miniature.MODEL.parent / "MODEL_CARD.md").write_text(card, "utf-8")
    print(f"held-out loss {nats:.4f} nats per token, {bits:.4f} bits per byte, {tokens} tokens")


def _told() -> Callable[[str, int, int], None]:
    began = time.monotonic()

    def told(what: str, done: int, total: int) -> None:
        print(f"  {what}: {done:,} of {total:,}, {time.monotonic() - began:.0f} s", flush=True)

    return told


def _model_training(work: Path) -> str:
    """How long the model was trained: by its log, or, where only the scope is new, by its card."""
    log = work / "training.jsonl"
    if not log.is_file():
        card = (miniature.MODEL.parent / "MODEL_CARD.md").read_text("utf-8")
        (known,) = re.findall(r"\| training \| (.*?); Muon", card)
        return known
    last = json.loads(log.read_text().splitlines()[-1])
    return (
        f"{last['step']:,} steps of 32 contexts, {last['tokens']:,} tokens, "
        f"{last['seconds'] / 60:.0f} minutes on 2 cores (shared with other work)"
    )


def _trained(work: Path, address: str) -> dict:
    name = address.split("/", 1)[1]
    lines = (work / "scope" / "metrics" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return json.loads(lines[-1])


def _write_published(rows: list) -> None:
    known = json.loads(PUBLISHED.read_text("utf-8"))
    known = [k for k in known if not k["address"].startswith("miniature/")]
    for entry, metrics, _ in rows:
        facts = {
            "address": entry.address,
            "model": entry.model,
            "source": f"its makers, on {TOKENS:,} tokens of the bundled held-out text, float32",
        }
        known.append(facts | {name: round(metrics[name], 6) for name in KEPT})
    PUBLISHED.write_text(json.dumps(known, indent=2) + "\n", "utf-8")


def _text(split) -> str:
    found = miniature.documents(split)
    return f"{len(found):,} files, {sum(len(d.text.encode()) for d in found) / 1e6:.2f} MB"


def _row(entry, m: dict, trained: dict) -> str:
    return (
        f"| `{entry.address}` | {entry.d_sae:,} | {entry.l0:g} | {m['l0']:.1f} | {m['fvu']:.3f} | "
        f"{m['delta_loss']:.3f} | {m['loss_recovered_mean']:.1%} | {trained['dead']:.2%} | "
        f"{m['dead_fraction']:.2%} |"
    )


_CARD = """# The miniature

A small Gemma 3 text model and dictionaries of it, made by the gemscope project so that everything
gemscope does can be done, tested and shown on any machine without a download. It completes Python;
it is not good for anything else.

## The model

| fact | value |
|---|---|
| architecture | `Gemma3ForCausalLM`: 6 layers (sliding attention over 128 tokens, full attention in layers 2 and 5), width 256, 4 query heads on 2 key heads of 64, query-key norms, MLP 896, tied embeddings |
| parameters | {parameters:,} (bfloat16, {megabytes:.1f} MB with the tokenizer) |
| tokenizer | byte-level BPE, 4,096 tokens, `<pad> <eos> <bos> <start_of_turn> <end_of_turn>` in Gemma's roles |
| context | 512 tokens, `<bos>` first |
| training text | the standard library of Python {python}: modules ({library}) and their tests ({tests}); character tables left out |
| held-out text | {heldout}, chosen by a hash of the path: {names} |
| training | {trained}; Muon and AdamW, constant rate, then linear decay while library modules come to outweigh tests |
| **held-out loss** | **{nats:.4f} nats per token, {bits:.4f} bits per byte** on all {tokens:,} tokens, contexts of 512, first token predicted from `<bos>` |

Held-out modules, test modules named after them, and copies of them are kept out of training. Other
tests and modules that use a held-out module's interface are not.

`make miniature` makes it again, with `scripts/miniature/`. Another Python version gives another
text.

## The dictionaries

Gemma Scope 2's layout; matrices in bfloat16, vectors in float32: {scope:.1f} MB. All were trained
on the same {seen:,} tokens in the same order, by the recipes of `scripts/miniature/scope.yaml`: 46 in
one pass over the model, 20 in later ones, by recipes that had been bettered. Measured on {measured:,} tokens of the held-out text in float32;
dead features are those that the last 100,000 tokens of training did not fire, silent ones those
that the held-out tokens did not.

| address | features | nominal L0 | L0 | FVU | delta loss, nats | recovered of mean ablation | dead | silent |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
{table}

## Licences

Weights: Apache-2.0. The text they were trained on, and the held-out text in this folder, is Python's
standard library, copyright the Python Software Foundation, under the PSF licence in
`LICENSE-PYTHON.txt`.
"""


if __name__ == "__main__":
    main()
