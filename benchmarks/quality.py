"""L0 against FVU and delta loss on the miniature, beside others, at the same tokens and seeds.

Everybody trains on the same activations of one site in the same order, once through, and is looked
at by the same evaluation on held-out text. `python benchmarks/run.py --keep quality` writes the
records and `docs/pareto.png`.
"""

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
WORK = HERE.parent / "build" / "benchmark-quality"
SITE, WIDTH, BATCH, TOKENS = "3.resid_post", 1_024, 1_024, 600_000
L0S, SEEDS = (16, 32, 64), (0, 1, 2)
HELD_OUT = 20_000
PEERS = {
    # Tuned for this many steps, as ours are: of rates up to 1e-2 these ended best. A threshold of
    # theirs moves by the rate in a step, and their documented values for long runs do not bring
    # the L0 to its target in a short one.
    "saelens jumprelu": ["--lr", "5e-3", "--bandwidth", "0.5", "--init-threshold", "0.1"],
    "saelens topk": ["--lr", "5e-3"],
    "sparsify topk": ["--optimizer", "signum", "--lr", "1e-2"],
    "sparsify topk, adam": ["--optimizer", "adam", "--lr", "5e-3"],
}


def quality() -> Iterator[dict]:
    """The means over seeds of each trainer at each L0, with the range of the seeds. Seconds are
    those of training one dictionary; ours are trained together, and share them.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    store = WORK / "x.safetensors"
    if not store.is_file():
        _harvest(store)
    took: dict[tuple, float] = {}
    made = {**_ours(store, took), **_theirs(store, took)}
    points = _measured(made)
    records = []
    for who in dict.fromkeys(name for name, _, _ in points):
        for l0 in L0S:
            found = [m for (name, target, _), m in points.items() if (name, target) == (who, l0)]
            if not found:
                continue
            seconds = [s for (name, target, _), s in took.items() if (name, target) == (who, l0)]
            record = {
                "command": f"{who}, L0 {l0}", "tokens": TOKENS, "seeds": len(found),
                "seconds": statistics.mean(seconds),
            }  # fmt: skip
            for key in ("l0", "fvu", "delta_loss"):
                values = [m[key] for m in found]
                record |= {key: statistics.mean(values), f"{key}_range": [min(values), max(values)]}
            records.append(record)
    draw(records, HERE.parent / "docs" / "pareto.png")
    yield from records


def _harvest(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from gemscope.activations import ActivationStream
    from gemscope.corpus import contexts, read_text
    from gemscope.lm import load_model
    from gemscope.sites import Site

    model, site = load_model("miniature", dtype="bfloat16"), Site.parse(SITE)
    rows = list(contexts(read_text("python"), model.tokenizer, length=512))
    source = ActivationStream(model, rows, [site], batch=BATCH, buffer=131_072, seed=0)
    parts, count = [], 0
    for batch in source.batches():
        parts.append(batch.values[site].float())
        count += len(parts[-1])
        if count >= TOKENS:
            break
    save_file({"x": torch.cat(parts)[:TOKENS].contiguous()}, file)


class _Stored:
    """The file's rows in order."""

    def __init__(self, file: Path):
        from safetensors.torch import load_file

        from gemscope.sites import Site

        self.x = load_file(file)["x"]
        self.sites = (Site.parse(SITE),)
        self.tokens, self.batch, self.model_seconds = len(self.x), BATCH, 0.0

    def sample(self, tokens: int) -> Mapping:
        return {self.sites[0]: self.x[:tokens]}

    def batches(self, start=None, stopping: Callable[[], bool] = lambda: False) -> Iterator:
        from gemscope.activations import ActivationBatch, Position

        for place, batch in enumerate(self.x.split(BATCH)):
            yield ActivationBatch({self.sites[0]: batch}, Position(0, place + 1))


def _ours(file: Path, took: dict[tuple, float]) -> dict:
    import time

    from gemscope.train import Trainer, parse_config
    from gemscope.train._export import dictionary_of

    # Tuned for this many steps, as theirs are: momentum, a late decay, and a penalty that is weak
    # beside the window it acts through.
    common = {"optimizer": {"lr": 1.2e-2, "beta1": 0.9, "warm_up": 100, "decay": 0.2}}
    jump = {
        "penalty": "quadratic", "coefficient": 0.002, "warm_up": 50, "aim": 0.02,
        "bandwidth": 0.1, "threshold": None, "start_l0": 60,
    }  # fmt: skip
    config = parse_config(
        {
            "model": "miniature", "out": str(WORK / "run"),
            "data": {"text": "python", "tokens": TOKENS, "batch": BATCH, "context": 512,
                     "buffer": 131_072},
            "recipe": {"reads": SITE, "d_sae": WIDTH, "l0": list(L0S), "seed": list(SEEDS)},
            "artefacts": [
                common | {"sparsity": jump, "name": "jumprelu_{l0}_{seed}"},
                common | {"activation": "topk", "sparsity": {"penalty": "none"},
                          "auxk": {"features": 128, "dead_after": 50_000},
                          "name": "topk_{l0}_{seed}"},
            ],
        },
        source="the benchmark",
    )  # fmt: skip
    trainer = Trainer(config, _Stored(file))
    began, made = time.perf_counter(), {}
    trainer.train(WORK / "run")
    seconds = time.perf_counter() - began
    for x in trainer.learners:
        key = f"gemscope {x.config.activation}", int(x.config.l0), x.config.seed
        made[key] = dictionary_of(x, "gemscope/miniature")
        took[key] = seconds / len(trainer.learners)
    return made


def _theirs(file: Path, took: dict[tuple, float]) -> dict:
    from safetensors import safe_open

    from gemscope.sae import SAE, JumpReLU, TopK
    from gemscope.sites import Site

    site, made = Site.parse(SITE), {}
    for name, options in PEERS.items():
        who, kind = name.split(",")[0].split()
        for l0 in L0S:
            for seed in SEEDS:
                out = WORK / f"{name.replace(' ', '_').replace(',', '')}_{l0}_{seed}.safetensors"
                if not out.is_file():
                    command = [
                        str(PEER), str(HERE / "peers" / "quality.py"), who, kind, str(file),
                        str(out), "--d-sae", str(WIDTH), "--l0", str(l0), "--batch", str(BATCH),
                        "--tokens", str(TOKENS), "--seed", str(seed), "--threads",
                        str(os.cpu_count()), *options,
                    ]  # fmt: skip
                    subprocess.run(command, check=True, capture_output=True)
                with safe_open(out, "pt") as stored:
                    p = {n: stored.get_tensor(n).float() for n in list(stored.keys())}
                    told = stored.metadata()
                took[name, l0, seed] = float(told["seconds"])
                activation = TopK(int(told["k"])) if "k" in told else JumpReLU(p["threshold"])
                made[name, l0, seed] = SAE(
                    w_enc=p["w_enc"], b_enc=p["b_enc"], w_dec=p["w_dec"], b_dec=p["b_dec"],
                    activation=activation, reads=site, writes=site,
                )  # fmt: skip
    return made


def _measured(made: dict) -> dict:
    from gemscope.corpus import read_text
    from gemscope.evaluate import Settings, evaluate
    from gemscope.lm import load_model

    model = load_model("miniature", dtype="float32")
    settings = Settings(tokens=HELD_OUT, context=512)
    results = evaluate(model, list(made.values()), read_text("miniature"), settings)
    return {
        key: {n: result.metrics[n] for n in ("l0", "fvu", "delta_loss")}
        for key, result in zip(made, results, strict=True)
    }


def draw(records: list[dict], file: Path) -> None:
    """Both trade-offs, a curve for each trainer, bars from the least to the most of its seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    names = list(dict.fromkeys(r["command"].rpartition(", L0")[0] for r in records))
    for axis, key, label in (
        (axes[0], "fvu", "fraction of variance unexplained"),
        (axes[1], "delta_loss", "delta loss, nats per token"),
    ):
        for place, name in enumerate(names):
            own = [r for r in records if r["command"].rpartition(", L0")[0] == name]
            own.sort(key=lambda r: r["l0"])
            low = [r[key] - r[f"{key}_range"][0] for r in own]
            high = [r[f"{key}_range"][1] - r[key] for r in own]
            axis.errorbar(
                [r["l0"] for r in own], [r[key] for r in own], yerr=[low, high], capsize=3,
                marker="os^Dvx"[place % 6], linestyle="-" if "gemscope" in name else "--",
                color=f"C{place}", label=name,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks(L0S, [str(x) for x in L0S])
        axis.minorticks_off()
        axis.set_xlabel("L0, features per token")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Layer 3 residual stream of the miniature, {WIDTH:,} features, {TOKENS:,} tokens, "
        f"{len(SEEDS)} seeds: held-out text", fontsize=10,
    )  # fmt: skip
    figure.savefig(file, dpi=110)
    plt.close(figure)
