"""Make the miniature from scratch: text, tokenizer, model, dictionaries, cards.

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
CONFIGS = HERE.parents[1] / "configs" / "miniature"
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


def install_dictionary(artefact: Path, name: str) -> None:
    """The artefact with its matrices in bfloat16: half the size, and no figure moves visibly.

    Vectors stay float32: a rounded threshold flips features.
    """
    (part,) = formats.read(artefact)
    folder = miniature.SCOPE / name
    shutil.rmtree(folder, ignore_errors=True)
    small = {
        n: value.to(torch.bfloat16)
        for n in ("w_enc", "w_dec", "skip")
        if (value := getattr(part, n)) is not None
    }
    formats.write_gemma_scope_2(folder, formats.read_config(artefact), [replace(part, **small)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    write_held_out(miniature.HELD_OUT)
    run("tokenizer.py", "--to", str(work / "model"))
    run("model.py", "--work", str(work))
    install_model(work / "model")
    for file in sorted(CONFIGS.glob("*.yaml")):
        config = read_config(file)
        out = Path(config.out)
        name = f"{out.parent.name}/{out.name}"
        if not (out / "artefact").is_dir():
            print(f"training {name}", flush=True)
            train(config, report=_told)
        install_dictionary(out / "artefact", name)
    run("card.py", "--work", str(work))


def _told(p) -> None:
    if p.step % 100 == 0 or p.step == p.steps:
        left = p.seconds / p.step * (p.steps - p.step) / 60
        print(
            f"  step {p.step}/{p.steps}  FVU {p.fvu:.4f}  L0 {p.l0:.1f}  dead {p.dead:.2%}  "
            f"{p.tokens / max(p.seconds, 1e-9):,.0f} tokens/s  {left:.1f} min left",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as mistake:
        sys.exit(f"make.py: {mistake}")
