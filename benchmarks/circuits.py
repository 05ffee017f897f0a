"""Attribution graphs beside circuit-tracer's: same model, transcoders, prompts and thresholds.

`python benchmarks/run.py --keep circuits` writes the records. Each of the two has a process of its
own for every prompt, with the model and the transcoders loaded; they make the graph in turns, one
idle while the other works. Seconds are from token ids to the pruned graph with its scores, the
median of the turns; memory is the peak of the whole process, with what it had before.

circuit-tracer makes as many rows at once as it is told to. It is given the fastest of `BATCHES`
that fits in memory, on this model; the seconds of each are in the record.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-circuits" / "bin" / "python"
LENGTHS = (16, 32, 64)
BATCHES = (16, 64, 256)
TURNS, ENOUGH = 3, 60.0
"""Turns, or fewer where they have taken this many seconds."""
ASKED = {"max_features": 7_500, "nodes": 0.8, "edges": 0.98}
MODELS: dict[str, dict[str, Any]] = {
    "6 layers of 256, transcoders of 1,024": {
        "layers": 6, "d": 256, "heads": 4, "features": 1_024, "l0": 20.0,
    },
    "12 layers of 512, transcoders of 4,096": {
        "layers": 12, "d": 512, "heads": 8, "features": 4_096, "l0": 30.0, "seed": 1,
        "most": 32,
    },
}  # fmt: skip


def circuits() -> Iterator[dict]:
    """Random Gemma 2 models with random transcoders, and the miniature, which is a Gemma 3."""
    if not PEER.is_file():
        raise SystemExit("no environment with circuit-tracer: make bench sets it up")
    texts = _texts()
    with tempfile.TemporaryDirectory() as place:
        for name, sizes in MODELS.items():
            folder = Path(place) / "random"
            _make(folder, {k: v for k, v in sizes.items() if k != "most"}, texts[max(LENGTHS)])
            yield from _compared(f"random Gemma 2, {name}", folder, texts, sizes.get("most", 64))
            shutil.rmtree(folder)
        folder = Path(place) / "miniature"
        _link(folder)
        yield from _compared("the miniature, transcoders of 192", folder, texts, 64)


def _texts() -> dict[int, str]:
    """Beginnings of a held-out text with this many tokens, BOS included."""
    from gemscope.corpus import read_text
    from gemscope.lm import load_model

    model, text = load_model("miniature"), next(iter(read_text("miniature"))).text
    found: dict[int, str] = {}
    for stop in range(1, len(text)):
        count = model.tokens(text[:stop]).ids.shape[1] if text[:stop].strip() else 0
        if count in LENGTHS:
            found[count] = text[:stop]
        if count > max(LENGTHS):
            return found
    raise AssertionError("the text is too short")


def _make(folder: Path, sizes: dict[str, Any], text: str) -> None:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from peers.circuit_artefacts import make

    make(folder, window=4_096, text=text, **sizes)


def _link(folder: Path) -> None:
    from gemscope.miniature import MODEL

    folder.mkdir()
    (folder / "model").symlink_to(MODEL)
    scope = MODEL.parent / "scope" / "transcoder_all"
    for layer in range(6):
        (folder / f"layer_{layer}").symlink_to(scope / f"layer_{layer}_width_192_l0_small")


def _compared(name: str, folder: Path, texts: dict[int, str], most: int) -> Iterator[dict]:
    batches = _batches(folder, texts[LENGTHS[0]])
    best = min(batches, key=lambda batch: batches[batch])
    for length in (n for n in LENGTHS if n <= most):
        prompt = {"prompt": texts[length], "ids": _ids(texts[length]), "batch": best, **ASKED}
        with _Worker(sys.executable, HERE / "circuits.py", folder) as ours, _theirs(folder) as them:
            _turn(ours, them, {**prompt, "max_features": 64}, 0)  # warms up
            turns, began = [], time.perf_counter()
            while len(turns) < TURNS and time.perf_counter() - began < ENOUGH:
                turns.append(_turn(ours, them, prompt, len(turns)))
        a, b = ([turn[who] for turn in turns] for who in (0, 1))
        seconds, theirs = (statistics.median(t["seconds"] for t in x) for x in (a, b))
        ratios = [y["seconds"] / x["seconds"] for x, y in zip(a, b, strict=True)]
        counts = ("active", "features", "targets", "nodes", "edges", "scores")
        assert a[0]["active"] == b[0]["active"], "the two do not encode the same"
        if a[0]["active"] <= ASKED["max_features"] and "miniature" not in name:
            apart = [abs(x - y) for x, y in zip(a[0]["scores"], b[0]["scores"], strict=True)]
            assert max(apart) < 1e-4, "the two do not make the same graph"
        memory, peer_memory = (max(t["max_memory_bytes"] for t in x) for x in (a, b))
        before, peer_before = (x[0]["resident_before_bytes"] for x in (a, b))
        yield {
            "command": f"graph of {length} tokens, {a[0]['active']} features: {name}",
            "seconds": seconds, "tokens": length, "max_memory_bytes": memory,
            "circuit_tracer_seconds": theirs,
            "circuit_tracer_attribution_seconds": statistics.median(
                t["attribution_seconds"] for t in b
            ),
            "ratio_to_circuit_tracer": theirs / seconds,
            "lowest_ratio": min(ratios), "highest_ratio": max(ratios),
            "circuit_tracer_max_memory_bytes": peer_memory,
            "memory_beyond_loaded_bytes": memory - before,
            "circuit_tracer_memory_beyond_loaded_bytes": peer_memory - peer_before,
            "circuit_tracer_batch": best,
            "circuit_tracer_seconds_by_batch": {str(n): s for n, s in batches.items()},
            **{what: a[0][what] for what in counts},
            **{f"circuit_tracer_{what}": b[0][what] for what in counts},
            "turns": len(turns), "versions": them.told["versions"], "backend": them.told["backend"],
        }  # fmt: skip


def _turn(ours: "_Worker", theirs: "_Worker", prompt: dict, number: int) -> tuple[dict, dict]:
    """Each goes first in half of the turns."""
    found = {}
    for worker in (ours, theirs) if number % 2 else (theirs, ours):
        found[worker] = worker.ask(prompt)
    return found[ours], found[theirs]


def _batches(folder: Path, text: str) -> dict[int, float]:
    """circuit-tracer's seconds on one prompt with each number of rows that fits in memory."""
    found: dict[int, float] = {}
    with _theirs(folder) as worker:
        prompt = {"ids": _ids(text), **ASKED}
        worker.ask({**prompt, "max_features": 1, "batch": BATCHES[0]})
        grown = 0.0
        for batch in BATCHES:
            # Of the longest prompt, whose patterns are its length squared.
            if grown * batch * (max(LENGTHS) / LENGTHS[0]) ** 2 > 0.7 * _available():
                break
            told = worker.ask({**prompt, "batch": batch})
            found[batch] = told["seconds"]
            grown = (told["max_memory_bytes"] - told["resident_before_bytes"]) / batch
    return found


def _available() -> int:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _ids(text: str) -> list[int]:
    from gemscope.lm import load_model

    return load_model("miniature").tokens(text).ids[0].tolist()


def _theirs(folder: Path) -> "_Worker":
    return _Worker(PEER, HERE / "peers" / "circuits.py", folder)


class _Worker:
    """A process that answers lines with lines."""

    def __init__(self, *command: str | Path):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.told = self._answer()

    def ask(self, what: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._process.args} ended with {self._process.wait()}"
        return json.loads(line)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    """Ours, by the same lines as `peers/circuits.py`."""
    sys.path.insert(0, str(HERE / "peers"))
    from memory import forget_peak, peak, resident

    from gemscope.circuits import CONSTANTS, trace
    from gemscope.hub import load_sae
    from gemscope.lm import load_model

    folder = Path(sys.argv[1])
    layers = sorted(folder.glob("layer_*"), key=lambda path: int(path.name[6:]))
    name = "miniature" if (folder / "model").is_symlink() else str(folder / "model")
    model, loaded = load_model(name), {str(path): load_sae(str(path)) for path in layers}
    print(json.dumps({"versions": {}, "backend": "gemscope"}), flush=True)
    for line in sys.stdin:
        asked, counts, traced = json.loads(line), [], []
        forget_peak()
        before, began = resident(), time.perf_counter()
        graph = trace(
            asked["prompt"], list(loaded), model=model, load=loaded.__getitem__,
            node_threshold=asked["nodes"], edge_threshold=asked["edges"],
            max_features=asked["max_features"], planned=counts.append,
            progress=lambda _what, done, _total, to=traced: to.append(done),
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert list(graph.token_ids) == asked["ids"]
        # The other one has no nodes for constants.
        shared = ~graph.kinds(*CONSTANTS)
        told = {
            "seconds": seconds, "max_memory_bytes": peak(), "resident_before_bytes": before,
            "active": counts[0].features, "features": traced[-1],
            "targets": len(graph.targets), "nodes": int(shared.sum()),
            "edges": int(shared[graph.edges.source.long()].sum()),
            "scores": [graph.scores.replacement, graph.scores.completeness],
        }  # fmt: skip
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
