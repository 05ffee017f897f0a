"""The pictures of `docs/explorer.md`: pages of a running explorer, in few colours.

    python scripts/explorer/screenshots.py STORE [NAME ...]

STORE is a catalog store of the miniature with explanations and kept activations.
"""

import io
import sys
from pathlib import Path
from urllib.parse import quote

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from explorer import browser_page, served  # noqa: E402

OUT = ROOT / "docs" / "explorer"
LARGEST = 150_000
WIDE = "miniature/resid_post/layer_3_width_2k_l0_medium"
CODE = quote('def parse(path):\n    with open(path, "rb") as file:\n        return file.read()')
PAGES = {
    "microscope": (f"/?text={CODE}&sae={WIDE}", 1280, 860, False),
    "feature": (f"/feature/{WIDE}/1713", 1280, 1000, False),
    "search": ("/search?q=return", 1280, 760, False),
    "map": (f"/map/{WIDE}", 1280, 860, False),
    "compare": (f"/compare?sae={WIDE}&a=code%3Dcode&b=docstrings%3Ddocstrings", 1280, 860, False),
    "steer": (f"/steer?prompt={quote('def read(')}&feature={WIDE}/1713&strength=0.5xmax", 1280, 860,
              False),
    "graph": ("/graph/close?node=feature.2.190.6", 1280, 900, False),
    "scope": ("/scope", 1280, 1130, False),
    "scope-dark": ("/scope?release=gemma-scope-2b-pt-res&colour=l0", 1280, 760, True),
    "phone": (f"/feature/{WIDE}/1713", 390, 844, True),
}  # fmt: skip


def main(store: str, *names: str) -> None:
    OUT.mkdir(exist_ok=True)
    _trace(Path(store))
    with served(store) as address:
        for name in names or PAGES:
            path, width, height, dark = PAGES[name]
            with browser_page(width=width, height=height, dark=dark) as page:
                page.goto(address + path, wait_until="networkidle", timeout=180_000)
                if name == "steer":
                    page.locator("main button[type=submit], main button.main").first.click()
                for busy in (".making", ".htmx-request", "main [aria-busy=true]"):
                    page.wait_for_selector(busy, state="detached", timeout=180_000)
                page.wait_for_timeout(2_500)
                if page.wrongs or page.outside:
                    raise SystemExit(f"{name}: {page.wrongs} {page.outside}")
                written = save(page.screenshot(), OUT / f"{name}.png")
            print(f"{name}: {written:,} bytes")


def _trace(folder: Path) -> None:
    """The graph that is shown, in the store."""
    from gemscope import circuits
    from gemscope.features import Store
    from gemscope.lm import load_model

    file, model = folder / "graphs" / "close.safetensors", load_model("miniature")
    file.parent.mkdir(exist_ok=True)
    graph = circuits.trace(
        "class Reader:\n    def close", ["miniature/transcoder_all/*_big_affine"], model=model
    )
    graph = circuits.check(graph, model, 40)
    circuits.save_graph(circuits.labelled(graph, [Store.open(folder)]), file)


def save(png: bytes, file: Path) -> int:
    """Write a picture in as many colours as `LARGEST` allows; its bytes."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 128, 64, 32, 16):
        few = picture.quantize(colours, dither=Image.Dither.NONE)
        few.save(file, optimize=True)
        if file.stat().st_size < LARGEST:
            break
    return file.stat().st_size


if __name__ == "__main__":
    main(*sys.argv[1:])
