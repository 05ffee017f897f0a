"""Training beside others: a step, many artefacts at once, and what comes out at equal tokens.

Peers run in an environment of their own, on the same activations or text, one after the other on
the same cores. A step's floor is the largest of three: the encoder product at the best speed this
machine multiplies at, parameters and moments read and written once, the input read once.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
THREADS = os.cpu_count() or 1
L0, BATCH = 70, 2_048
SIZES = ((1_152, 16_384), (2_304, 16_384), (2_304, 65_536))
PEERS = (
    ("saelens", "jumprelu"), ("saelens", "topk"), ("saelens", "topk_sparse"),
    ("dictionary_learning", "jumprelu"), ("dictionary_learning", "topk"), ("sparsify", "topk"),
)  # fmt: skip


def ours(*arguments: object) -> dict:
    """What this file prints when run with `arguments`, in a process of its own."""
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as the command sets it
    command = [sys.executable, str(HERE / "training.py"), *map(str, arguments)]
    return _told(command, environment)


def theirs(script: str, *arguments: object) -> dict:
    """What one of the peers' scripts prints."""
    if not PEER.is_file():
        raise SystemExit("no environment with the peers: make bench sets it up")
    command = [str(PEER), str(HERE / "peers" / script), *map(str, arguments)]
    return _told(command, dict(os.environ))


def _told(command: list[str], environment: dict) -> dict:
    environment["OMP_NUM_THREADS"] = str(THREADS)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300] if done.stderr else "killed"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def step() -> Iterator[dict]:
    """A training step beside the peers': JumpReLU with the published window, and TopK."""
    for d_in, d_sae in SIZES:
        mine = {kind: ours("step", kind, d_in, d_sae) for kind in ("jumprelu", "topk")}
        for kind, told in mine.items():
            yield {"command": _name("ours", kind, d_in, d_sae), "tokens": BATCH} | told
        for who, kind in PEERS:
            steps = 4 if d_sae < 2**16 else 2  # theirs take a minute each
            told = theirs("step.py", who, kind, d_in, d_sae, BATCH, L0, THREADS, steps)
            own = mine["topk" if "topk" in kind else "jumprelu"]
            if "seconds" in told:
                told["ratio_to_ours"] = told["seconds"] / own["seconds"]
                told["memory_ratio_to_ours"] = told["memory_bytes"] / own["memory_bytes"]
            yield {"command": _name(who, kind, d_in, d_sae), "tokens": BATCH} | told


def _name(who: str, kind: str, d_in: int, d_sae: int) -> str:
    return f"{who} {kind} step, {BATCH} tokens, {d_in} x {d_sae}, L0 {L0}"


def _step(kind: str, d_in: int, d_sae: int) -> dict:
    import torch

    sys.path.insert(0, str(HERE / "peers"))
    from memory import forget_peak, peak, resident

    steps = 8
    x = _data(d_in, steps)
    before = resident()
    learner = _learner(kind, x, d_sae, L0)
    forget_peak()  # what finding the level took
    with torch.no_grad():
        found = [_one(learner, batch) for batch in x.split(BATCH)]
    used = peak()
    floor = _floor(d_in, d_sae)
    seconds = statistics.median(t for t, _ in found[2:])
    return {
        "seconds": seconds,
        "l0": found[-1][1].l0,
        "memory_bytes": used - before,
        "max_memory_bytes": used,
        "sections": {n: s / steps for n, s in learner.clock.seconds.items()},
        "floor_seconds": max(floor.values()),
        "floor": floor,
        "ratio_to_floor": seconds / max(floor.values()),
    }


def _data(d_in: int, steps: int):
    """Activations for some steps, of unit mean squared norm."""
    import torch

    sys.path.insert(0, str(HERE / "peers"))
    from data import activations

    torch.set_num_threads(THREADS)
    x = activations(BATCH * steps, d_in, 0)
    return x.div_(x.square().sum(1).mean().sqrt())


def _learner(kind: str, x, d_sae: int, l0: float):
    """An artefact that fires `l0` times a token of `x`."""
    import torch
    from data import level, sample

    from gemscope.train._config import Artefact, Optimizer, Sparsity
    from gemscope.train._learner import Learner
    from gemscope.train._weights import Scales, drawn

    d_in = x.shape[1]
    penalty = "quadratic" if kind == "jumprelu" else "none"
    artefact = Artefact(
        name="x", reads="0.resid_post", writes="0.resid_post", d_sae=d_sae, l0=float(round(l0)),
        activation=kind, sparsity=Sparsity(penalty=penalty),
        optimizer=Optimizer(lr=1e-9),  # the L0 is to stay while it is timed
    )  # fmt: skip
    weights = drawn(
        d_in, d_in, [d_sae], sae=True, affine=False, centre=x.mean(0), threshold=0.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    weights.threshold[0].fill_(level(weights.pre_activations(0, sample(x)), l0))
    learner = Learner(artefact, weights, Scales((1.0,), (1.0,)), 10**9)
    learner.density = 0.0
    return learner


def _one(learner, batch) -> tuple:
    from gemscope.train._bank import encode

    began = time.perf_counter()
    with learner.clock("encode"):
        (member,) = learner.members()
        codes = encode(batch, member.w_enc, [member])
    measured = learner.learn([batch], batch, codes)
    return time.perf_counter() - began, measured


def _floor(d_in: int, d_sae: int) -> dict[str, float]:
    import torch

    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    a, b = torch.randn(BATCH, d_in).to(dtype), torch.randn(d_in, 4_096).to(dtype)
    product = _median(lambda: a @ b) * d_sae / 4_096
    c = torch.randn(2**25)
    d = torch.empty_like(c)
    bandwidth = 8 * c.numel() / _median(lambda: d.copy_(c))
    return {
        "encoder_product": product,
        "parameter_traffic": 40 * d_in * d_sae / bandwidth,
        "input": 4 * BATCH * d_in / bandwidth,
    }


def _median(run) -> float:
    found = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def switch() -> Iterator[dict]:
    """A step the dense way and the sparse way, by the share of entries that take part."""
    for d_in, d_sae in ((256, 2_048), (1_152, 4_096)):
        for share in (0.01, 0.03, 0.06, 0.12, 0.25):
            yield {
                "command": f"step, {BATCH} tokens, {d_in} x {d_sae}, share {share:g}",
                "tokens": BATCH,
            } | ours("switch", d_in, d_sae, share)


def _switch(d_in: int, d_sae: int, share: float) -> dict:
    import torch

    x, took = _data(d_in, 6), {}
    for way, density in (("dense", 1.0), ("sparse", 0.0)):
        learner = _learner("jumprelu", x, d_sae, share * d_sae)
        found = []
        with torch.no_grad():
            for batch in x.split(BATCH):
                learner.density = density
                found.append(_one(learner, batch)[0])
        took[way] = statistics.median(found[2:])
    return {"seconds": took["sparse"], "dense_seconds": took["dense"],
            "ratio_to_dense": took["sparse"] / took["dense"]}  # fmt: skip


def many(tokens: int = 100_000) -> Iterator[dict]:
    """Twelve artefacts of the miniature: six sites, two L0s. Seconds are those from the first
    token through the model to the last step; what is before and after them is `setup_seconds`.
    """
    mine = {kind: ours("many", kind, tokens) for kind in ("jumprelu", "topk")}
    texts = _texts(tokens)
    for kind in ("jumprelu", "topk", "topk_sparse"):
        own = mine["topk" if "topk" in kind else "jumprelu"]
        if kind in mine:
            yield {"command": f"ours, 12 artefacts, {kind}", "tokens": tokens} | own
        for lm in ("float32", "bfloat16") if kind == "jumprelu" else ("bfloat16",):
            told = theirs(
                "many.py", texts, tokens, "--kind", kind, "--lm", lm, "--context", 256,
                "--norm-batches", 1, "--threads", THREADS,
            )  # fmt: skip
            if "tokens_per_second" in told:
                told["ratio_to_ours"] = own["tokens_per_second"] / told["tokens_per_second"]
            yield {"command": f"saelens, 12 artefacts, {kind}, {lm}", "tokens": tokens} | told


def _texts(tokens: int) -> str:
    from gemscope import miniature

    file = HERE.parent / "build" / "benchmark-texts.jsonl"
    file.parent.mkdir(exist_ok=True)
    size, lines = 0, []
    for d in miniature.documents("library"):
        lines.append(json.dumps({"text": d.text}) + "\n")
        size += len(d.text)
        if size > 8 * tokens:
            break
    file.write_text("".join(lines), "utf-8")
    return str(file)


def _many(kind: str, tokens: int) -> dict:
    import shutil

    sys.path.insert(0, str(HERE / "peers"))
    from memory import peak, resident

    from gemscope.train import parse_config, train

    out = HERE.parent / "build" / "benchmark-many"
    shutil.rmtree(out, ignore_errors=True)
    before = resident()
    config = parse_config(
        {
            "model": "miniature", "model_dtype": "bfloat16", "out": str(out),
            "checkpoint_every": 10_000,
            "data": {"text": _texts(tokens), "tokens": tokens, "context": 256, "batch": BATCH,
                     "buffer": 32_768, "dtype": "bfloat16"},
            "recipe": {
                "activation": kind, "optimizer": {"lr": 1e-3, "warm_up": 10},
                "sparsity": {"penalty": "quadratic" if kind == "jumprelu" else "none",
                             "coefficient": 0.02, "warm_up": 10, "bandwidth": 0.01,
                             "threshold": None, "start_l0": 40, "frequency": 2e-3},
            },
            "artefacts": [{"reads": "{layer}.resid_post", "layer": [0, 1, 2, 3, 4, 5],
                           "d_sae": 2_048, "l0": [20, 40]}],
        },
        source="the benchmark",
    )  # fmt: skip
    began, last = time.perf_counter(), []
    train(config, report=last.append)
    whole, seconds = time.perf_counter() - began, last[-1].seconds
    done = config.steps * BATCH
    shutil.rmtree(out, ignore_errors=True)
    return {
        "seconds": seconds, "setup_seconds": whole - seconds, "tokens_per_second": done / seconds,
        "sections": dict(last[-1].sections), "max_memory_bytes": peak(), "memory_bytes": peak() - before,
    }  # fmt: skip


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "step":
        print(json.dumps(_step(rest[0], int(rest[1]), int(rest[2]))))
    elif what == "switch":
        print(json.dumps(_switch(int(rest[0]), int(rest[1]), float(rest[2]))))
    else:
        print(json.dumps(_many(rest[0], int(rest[1]))))
