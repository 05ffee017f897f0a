"""A small training run, for the tests of training."""

import json

from gemscope import formats
from gemscope.train import parse_config

CONFIG = {
    "model": "miniature",
    "reads": "2.resid_post",
    "writes": "2.resid_post",
    "d_sae": 64,
    "out": "",
    "checkpoint_every": 4,
    "data": {"text": "miniature", "tokens": 12_288, "context": 64, "batch": 512, "bucket": 2_048},
    "optimizer": {"lr": 1e-3, "warm_up": 3, "decay": 0.5},
    "sparsity": {
        "l0": 8,
        "coefficient": 0.01,
        "warm_up": 5,
        "bandwidth": 0.05,
        "threshold": None,
        "start_l0": 16,
    },
}


def config(out, **changes):
    raw = json.loads(json.dumps(CONFIG)) | {"out": str(out)}
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw
        for section in sections:
            place = place[section]
        place[key] = value
    return parse_config(raw, source="the test")


def weights(artefact):
    (part,) = formats.read(artefact)
    names = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold", "skip")
    return {n: value for n in names if (value := getattr(part, n)) is not None}
