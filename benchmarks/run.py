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


THEMES = {"startup": startup, "demo": demo, "dictionary": dictionary}


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
