"""Make the miniature from scratch: text, tokenizer, model, dictionaries, cards, catalog.

    python scripts/miniature/make.py --work build/miniature

Every step is skipped when its result is there and goes on where it was interrupted, so the command
can be stopped and run again. The result replaces the bundled one in `src/gemscope/miniature` as
soon as each part is finished, because the dictionaries are trained on the bundled model.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gemscope import formats, miniature
from gemscope.errors import InputError
from gemscope.train import read_config, train

HERE = Path(__file__).parent
SCOPE = HERE / "scope.yaml"
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


def write_held_out(file: Path) -> None:
    """The held-out modules, one document a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"path": d.path, "text": d.text}, ensure_ascii=False) + "\n"
        for d in miniature.documents("heldout")
    ]
    file.write_text("".join(lines), "utf-8")


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)  # noqa: S603


def install_model(built: Path) -> None:
    miniature.MODEL.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copy(built / name, miniature.MODEL / name)
        (miniature.MODEL / name).chmod(0o644)


def install_scope(run: Path, names: list[str]) -> None:
    """The artefacts with their matrices in bfloat16: half the size, and no figure moves visibly.

    Vectors stay float32: a rounded threshold flips features.
    """
    shutil.rmtree(miniature.SCOPE, ignore_errors=True)
    for name in names:
        parts = [replace(part, **_small(part)) for part in formats.read(run / name)]
        formats.write_gemma_scope_2(miniature.SCOPE / name, formats.read_config(run / name), parts)


def _small(part: formats.Part) -> dict[str, torch.Tensor]:
    return {
        n: value.to(torch.bfloat16)
        for n in ("w_enc", "w_dec", "skip")
        if (value := getattr(part, n)) is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    write_held_out(miniature.HELD_OUT)
    run("tokenizer.py", "--to", str(work / "model"))
    run("model.py", "--work", str(work))
    install_model(work / "model")
    config = read_config(SCOPE)
    out, names = Path(config.out), [a.name for a in config.artefacts]
    if not all((out / name).is_dir() for name in names):
        train(config, report=_told)
    install_scope(out, names)
    run("card.py", "--work", str(work))
    run("catalog.py", "--work", str(work))


def _told(p) -> None:
    if p.step % 50 == 0 or p.step == p.steps:
        left = p.seconds / p.step * (p.steps - p.step) / 60
        worst = max(p.standings, key=lambda s: s.dead)
        print(
            f"  step {p.step}/{p.steps}  mean FVU "
            f"{sum(s.fvu for s in p.standings) / len(p.standings):.4f}  most dead "
            f"{worst.dead:.2%} ({worst.name})  {p.tokens / max(p.seconds, 1e-9):,.0f} tokens/s  "
            f"{left:.1f} min left",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as mistake:
        sys.exit(f"make.py: {mistake}")
