"""Small training runs, for the tests of training."""

import json
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from gemscope import formats
from gemscope.activations import ActivationBatch, Position
from gemscope.corpus import read_text
from gemscope.sites import Site
from gemscope.train import Trainer, parse_config

RECIPE = {
    "optimizer": {"lr": 1e-3, "warm_up": 3, "decay": 0.5},
    "sparsity": {"coefficient": 0.01, "warm_up": 5, "bandwidth": 0.05, "threshold": None,
                 "start_l0": 16},
}  # fmt: skip
SAE = {"name": "sae", "reads": "2.resid_post", "d_sae": 64, "l0": 8}
KINDS = [
    SAE,
    {"name": "w{width}-s{seed}", "reads": "1.resid_post", "d_sae": [64, 128], "seed": [0, 1],
     "l0": 8, "sparsity": {"aim": 0.02, "frequency": 1e-3}},
    {"name": "topk", "reads": "1.resid_post", "d_sae": 192, "l0": 3, "activation": "topk",
     "auxk": {"features": 16, "dead_after": 128}},
    {"name": "batch-topk", "reads": "1.resid_post", "d_sae": 96, "l0": 6,
     "activation": "batch-topk", "optimizer": {"beta1": 0.9, "clip": 0.5}},
    {"name": "matryoshka", "reads": "1.resid_post", "d_sae": 96, "l0": 6, "prefixes": [24, 48]},
    {"name": "relu", "reads": "1.resid_post", "d_sae": 96, "l0": 6, "activation": "relu",
     "sparsity": {"penalty": "l1"}},
    {"name": "transcoder", "reads": "2.mlp_in", "writes": "2.mlp_out", "d_sae": 64, "l0": 8,
     "affine": True},
    {"name": "crosscoder", "reads": "1-2.resid_post", "d_sae": 128, "l0": 8,
     "sparsity": {"aim": 0.02}},
    {"name": "clt", "reads": "1-2.mlp_in", "writes": "1-2.mlp_out", "d_sae": 128, "l0": 8,
     "affine": True},
]  # fmt: skip
"""At least one artefact of every kind and activation."""


def config(out, *artefacts, **changes):
    """A run of 24 steps of `artefacts`, by default of `SAE`; `optimizer__lr` is a recipe's key."""
    text = Path(out).parent / "text.txt"
    if not text.exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(d.text for d in read_text("miniature"))[:14_000], "utf-8")
    raw = {
        "model": "miniature",
        "out": str(out),
        "checkpoint_every": 4,
        "data": {"text": str(text), "tokens": 24 * 128, "context": 64, "batch": 128,
                 "buffer": 1_024},
        "recipe": RECIPE,
        "artefacts": list(artefacts) or [SAE],
    }  # fmt: skip
    raw = json.loads(json.dumps(raw))
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw["recipe"] if sections and sections[0] in ("optimizer", "sparsity") else raw
        for section in sections:
            place = place[section]
        place[key] = value
    return parse_config(raw, source="the test")


class Held:
    """A source of given activations: every epoch all of them, in a new order."""

    model_seconds = 0.0

    def __init__(self, values, batch, seed=0):
        self.values, self.sites, self.batch, self.seed = values, tuple(values), batch, seed
        self.tokens = len(next(iter(values.values())))
        self.served = []

    def sample(self, tokens):
        return {site: value[:tokens] for site, value in self.values.items()}

    def batches(self, start=Position(), stopping=lambda: False):
        epoch, first = start.round, start.batch
        while True:
            g = torch.Generator().manual_seed(1_000 * self.seed + epoch)
            order = torch.randperm(self.tokens, generator=g).split(self.batch)[: self.per_epoch]
            for place in range(first, len(order)):
                if stopping():
                    return
                last = place + 1 == len(order)
                after = Position(epoch + 1, 0) if last else Position(epoch, place + 1)
                values = {site: value[order[place]] for site, value in self.values.items()}
                yield ActivationBatch(values, after)
            epoch, first = epoch + 1, 0

    @property
    def per_epoch(self):
        return self.tokens // self.batch


@cache
def planted(d=32, features=96, tokens=8_192, active=5.0, seed=0):
    """Activations at several sites made of the same rare features, a mean and some noise."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(features, generator=g) + 0.1
    share = share * (active / share.sum())
    f = (torch.rand(tokens, features, generator=g) < share).float()
    f = f * (0.5 + torch.rand(tokens, features, generator=g))
    values = {}
    for name in ("1.resid_post", "2.resid_post", "1.mlp_in", "2.mlp_in", "1.mlp_out", "2.mlp_out"):
        rows = F.normalize(torch.randn(features, d, generator=g), dim=1)
        noise = torch.randn(tokens, d, generator=g) * 0.02
        mean = torch.randn(d, generator=g) * 0.3
        # Of no particular size: what is trained on is normalised.
        values[Site.parse(name)] = (f @ rows + noise + mean) * (3.0 + len(values))
    return values


def trainer(chosen, **options):
    """A trainer on planted activations."""
    return Trainer(chosen, Held(planted(**options), chosen.data.batch, chosen.data.seed))


def advanced(run, steps):
    """What `steps` more steps of a trainer measured, a list over artefacts each."""
    batches = run.source.batches(run.position)
    return [run.advance(next(batches)) for _ in range(steps)]


def weights(artefact):
    """Tensors of an artefact's folder, by layer and name."""
    names = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold", "skip")
    parts = enumerate(formats.read(artefact))
    return {
        f"{i}.{n}": value
        for i, part in parts
        for n in names
        if (value := getattr(part, n)) is not None
    }


def equal(a, b):
    """Whether two runs ended with the same artefacts and metrics, to the last bit."""
    files = {f.relative_to(a) for f in a.rglob("*") if f.is_file()}
    told = {f for f in files if f.parts[0] == "metrics" or f.name == "params.safetensors"}
    told |= {f for f in files if f.name.startswith("params_layer") or f.name == "cfg.json"}
    told |= {f for f in files if f.name.endswith("weights.safetensors")}
    assert told
    return [str(f) for f in sorted(told) if (a / f).read_bytes() != (b / f).read_bytes()]
