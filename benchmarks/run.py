"""Measure this machine, and print one record per benchmark.

    python benchmarks/run.py [--keep] [THEME ...]

With `--keep` the records are appended to `benchmarks/THEME_HARDWARE_DATE.jsonl`. Ratios are
against something measured in the same run, so that a slow machine does not make a slow result.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from circuits import circuits  # noqa: E402
from explorer import explorer  # noqa: E402
from gpu import gpu  # noqa: E402
from index import index, search  # noqa: E402
from quality import quality  # noqa: E402
from steering import steering  # noqa: E402
from store import store  # noqa: E402
from training import many, step, switch  # noqa: E402


def whole_process(*arguments: str) -> float:
    """Wall seconds of a Python process: the median of seven, after one to warm the disk cache."""
    found = []
    for _ in range(8):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def startup() -> Iterator[dict]:
    """What starting costs: beyond Python's own start for the import, in all for the commands."""
    bare = whole_process("-c", "pass")
    cases = {
        "python -c 'import gemscope' beyond python": ("-c", "import gemscope"),
        "gemscope --help": ("-m", "gemscope", "--help"),
        "gemscope list --json": ("-m", "gemscope", "list", "--json"),
        "gemscope list --kind clt": ("-m", "gemscope", "list", "--kind", "clt"),
    }
    for command, arguments in cases.items():
        seconds = whole_process(*arguments)
        seconds -= bare if "beyond" in command else 0.0
        yield {"command": command, "seconds": seconds, "tokens": 0, "python_seconds": bare}


def demo() -> Iterator[dict]:
    """`gemscope demo` as a whole process, with its peak memory."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-m", "gemscope", "demo", "--out", out]
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        seconds = time.perf_counter() - began
        (report,) = Path(out).glob("*/report.json")
        rows = json.loads(report.read_text())
    # Kilobytes on Linux, of the largest child so far.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    yield {
        "command": "gemscope demo",
        "seconds": seconds,
        "tokens": rows[0]["tokens"],
        "dictionaries": len(rows),
        "max_memory_bytes": peak,
    }


def dictionary() -> Iterator[dict]:
    """Encode and decode of a random dictionary, each beside the dense product it rests on."""
    import torch

    from gemscope.sae import SAE, JumpReLU
    from gemscope.sites import Site

    d, d_sae, tokens, l0 = 2_304, 16_384, 2_048, 70
    g = torch.Generator().manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=g), dim=1)
    x = torch.randn(tokens, d, generator=g)
    w_enc = w_dec.T.contiguous()
    threshold = (x[:256] @ w_enc).flatten().topk(256 * l0).values[-1].expand(d_sae).contiguous()
    site = Site.parse("0.resid_post")
    sae = SAE(
        w_enc=w_enc, b_enc=torch.zeros(d_sae), w_dec=w_dec, b_dec=torch.zeros(d),
        activation=JumpReLU(threshold), reads=site, writes=site,
    )  # fmt: skip
    features = sae.encode(x)
    dense = features.dense()
    for name, ours, floor in (
        ("encode", lambda: sae.encode(x), lambda: x @ w_enc),
        ("decode", lambda: sae.decode(features), lambda: dense @ w_dec),
    ):
        seconds, dense_seconds = _median(ours), _median(floor)
        yield {
            "command": f"{name} {tokens} tokens, {d} x {d_sae}, L0 {features.counts.float().mean():.0f}",
            "seconds": seconds,
            "tokens": tokens,
            "dense_product_seconds": dense_seconds,
            "ratio_to_dense_product": seconds / dense_seconds,
        }


def _median(run: Callable[[], object]) -> float:
    found = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


PEER = HERE.parent / ".venv-peer" / "bin" / "python"
_RELEASE = "gemma-scope-2b-pt-res"
_SIZES = {"layer_20/width_16k/average_l0_71": 16_384, "layer_12/width_65k/average_l0_72": 65_536}
_TOKENS = 2_048


def peer() -> Iterator[dict]:
    """Load, encode and decode beside SAELens 6.54.12, on the same files in the same cache.

    Both read one fabricated npz of Gemma Scope's shape through the hub's cache, offline; both
    answer in float32. SAELens runs in an environment of its own, which `make bench` sets up.
    """
    if not PEER.is_file():
        raise SystemExit("no environment with SAELens: make bench sets it up")
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        for name, d_sae in _SIZES.items():
            fabricate(Path(home), name, d_sae)
            yield _first_encode(name, d_sae, environment)
            yield from _encode_and_decode(name, d_sae, environment)


def fabricate(home: Path, name: str, d_sae: int) -> None:
    """A dictionary of random unit rows with an L0 of about 70 on normal inputs, in the cache."""
    import numpy as np

    d = 2_304
    rng = np.random.default_rng(0)
    w_dec = rng.standard_normal((d_sae, d), dtype=np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    # Products of a normal input with unit rows are normal: their upper tail has the wanted share.
    threshold = statistics.NormalDist().inv_cdf(1 - 70 / d_sae)
    repo = home / "hub" / f"models--google--{_RELEASE}"
    commit = "0" * 40
    folder = repo / "snapshots" / commit / name
    folder.mkdir(parents=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    np.savez(
        folder / "params.npz",
        W_enc=np.ascontiguousarray(w_dec.T), W_dec=w_dec, b_enc=np.zeros(d_sae, np.float32),
        b_dec=np.zeros(d, np.float32), threshold=np.full(d_sae, threshold, np.float32),
    )  # fmt: skip
    os.sync()  # or what is measured next is the writing of it to the disk


_OURS_FIRST = """
import sys
import torch
from gemscope.hub import load_sae
sae = load_sae(sys.argv[1])
x = torch.randn(1, sae.d_in, generator=torch.Generator().manual_seed(1))
print(sae.encode(x).counts.float().mean().item())
"""


def _first_encode(name: str, d_sae: int, environment: dict) -> dict:
    ours = [sys.executable, "-c", _OURS_FIRST, f"{_RELEASE}/{name}"]
    theirs = [str(PEER), str(HERE / "peer.py"), _RELEASE, name, "1", "--first"]
    seconds = {}
    for who, command in (("ours", ours), ("theirs", theirs)):
        found = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run(command, env=environment, capture_output=True, check=True)
            found.append(time.perf_counter() - began)
        seconds[who] = statistics.median(found[1:])
    return {
        "command": f"load and encode one token, 2304 x {d_sae}, whole process",
        "seconds": seconds["ours"],
        "tokens": 1,
        "saelens_seconds": seconds["theirs"],
        "ratio_to_saelens": seconds["theirs"] / seconds["ours"],
    }


def _encode_and_decode(name: str, d_sae: int, environment: dict) -> Iterator[dict]:
    command = [str(PEER), str(HERE / "peer.py"), _RELEASE, name, str(_TOKENS)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    script = f"""
import json, sys, time, torch
sys.path.insert(0, {str(HERE)!r})
from run import _median
from gemscope.hub import load_sae
sae = load_sae({f"{_RELEASE}/{name}"!r})
x = torch.randn({_TOKENS}, sae.d_in, generator=torch.Generator().manual_seed(1))
features = sae.encode(x)
print(json.dumps({{
    "encode": _median(lambda: sae.encode(x)), "decode": _median(lambda: sae.decode(features)),
    "l0": features.counts.float().mean().item(),
    "out": sae.decode(features).double().norm().item(),
}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True
    )
    ours = json.loads(done.stdout.strip().splitlines()[-1])
    assert abs(ours["l0"] - theirs["l0"]) < 0.01, "the two do not encode the same"
    assert abs(ours["out"] / theirs["out"] - 1) < 1e-5, "the two do not decode the same"
    for what in ("encode", "decode"):
        yield {
            "command": f"{what} {_TOKENS} tokens, 2304 x {d_sae}, L0 {ours['l0']:.0f}",
            "seconds": ours[what],
            "tokens": _TOKENS,
            "saelens_seconds": theirs[what],
            "ratio_to_saelens": theirs[what] / ours[what],
        }


def wide() -> Iterator[dict]:
    """A million features out of a file, encoded: time, and memory beyond the page cache.

    The file is the one that `tests/test_wide.py` makes: sparse on the disk, whole when read.
    """
    sys.path.insert(0, str(HERE.parent / "tests"))
    from test_wide import N_TOKENS, checked

    d_in, d_sae = 2_304, 1_048_576
    for dtype in ("BF16", "F32"):
        with tempfile.TemporaryDirectory() as folder:
            told = checked(Path(folder), d_in, d_sae, dtype, most=3e9)
        opened, encoded, decoded = told["took"]
        yield {
            "command": f"encode {N_TOKENS} tokens, {d_in} x {d_sae} {dtype}, mapped from a file",
            "seconds": encoded,
            "tokens": N_TOKENS,
            "open_seconds": opened,
            "decode_seconds": decoded,
            "anonymous_bytes": told["peak"],
            "anonymous_bytes_before": told["before"],
        }


THEMES = {
    "wide": wide, "startup": startup, "demo": demo, "dictionary": dictionary, "peer": peer,
    "index": index, "search": search, "step": step, "switch": switch, "many": many,
    "quality": quality, "steering": steering, "explorer": explorer, "store": store, "gpu": gpu,
    "circuits": circuits,
}  # fmt: skip


def hardware() -> str:
    """The processor and its core count, fit for a file name."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (m := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = m[1]
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "cpu"
    return f"{plain}-{os.cpu_count()}-cores"


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("themes", nargs="*", choices=[*THEMES, []], default=[])
    given = parser.parse_args()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    for theme in given.themes or THEMES:
        for measured in THEMES[theme]():
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            record = {
                "commit": commit(),
                "hardware": hardware(),
                "max_memory_bytes": peak,
            } | measured
            line = json.dumps(record)
            print(line, flush=True)
            if given.keep:
                with (HERE / f"{theme}_{hardware()}_{date}.jsonl").open("a") as out:
                    out.write(line + "\n")


if __name__ == "__main__":
    main()
