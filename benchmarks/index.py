"""What indexing costs, beside the model and beside sae-dashboard; what a search costs.

`python benchmarks/run.py --keep index` writes the records; a 26-layer catalog of 16k features each
is made up for `search`, in the store's own tables.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
ADDRESS = "miniature/resid_post/layer_3_width_2k_l0_medium"
TOKENS, LONG, PEERS = 200_000, 1_000_000, 40_000
LAYERS, FEATURES, WIDTH = 26, 16_384, 2_304


def index() -> Iterator[dict]:
    """The index of one dictionary: its share beside model and encoder, with rules on a million
    tokens, and beside sae-dashboard on the same contexts.
    """
    from gemscope import features, hub
    from gemscope.lm import load_model

    entry = hub.locate(ADDRESS)
    model, sae = load_model("miniature"), hub.build(entry)
    subject = features.Subject(
        address=ADDRESS, sae=sae, digest=hub.digest(entry), nominal_l0=entry.l0
    )
    sources = features.sources_of(tokens=LONG)
    _indexed(model, subject, sources, 2_000)  # what is prepared once
    seconds, text = _indexed(model, subject, sources, TOKENS)
    floor = _alone(model, sae, text)
    yield {
        "command": f"index {ADDRESS}, {TOKENS:,} tokens", "tokens": text.n_tokens,
        "features": sae.d_sae, "seconds": seconds, "model_and_encoder_seconds": floor,
        "cost_beside_model_and_encoder": (seconds - floor) / floor,
    }  # fmt: skip
    yield from _beside_dashboard(model, subject, sources)
    seconds, text = _indexed(model, subject, sources, LONG, rules=True)
    yield {
        "command": f"index and explain by rules {ADDRESS}, {LONG:,} tokens",
        "tokens": text.n_tokens, "features": sae.d_sae, "seconds": seconds,
    }  # fmt: skip


def _indexed(
    model: Any, subject: Any, sources: list, tokens: int, *, rules: bool = False
) -> tuple[float, Any]:
    from gemscope import explain, features

    with tempfile.TemporaryDirectory() as folder:
        store = features.Store.create(Path(folder) / "store")
        began = time.perf_counter()
        features.index(
            model, [subject], sources, store,
            features.Settings(tokens=tokens, keep_activations=rules), model_name="miniature",
        )  # fmt: skip
        text = store.text(subject.address)
        if rules:
            made = explain.explain_by_rules(
                text, store.activations(subject.address), subject.address,
                tokenizer=model.tokenizer,
            )  # fmt: skip
            store.add_explanations(list(made))
        return time.perf_counter() - began, text


def _alone(model: Any, sae: Any, text: Any) -> float:
    """Seconds of the model and the encoder on the contexts of `text`, batched as the index does."""
    import torch

    began, first = time.perf_counter(), 0
    rows = max(1, 8_192 // 256)
    with torch.no_grad():
        while first < text.n_contexts:
            stop = min(first + rows, text.n_contexts)
            batch = text.batch(first, stop, 0)
            x = model.run(batch, read=[sae.reads])[sae.reads]
            sae.encode(x[batch.counts].float())
            first = stop
    return time.perf_counter() - began


def _beside_dashboard(model: Any, subject: Any, sources: list) -> Iterator[dict]:
    """As it comes, a pass of the model for each 256 features, and with its cache of activations."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from gemscope import hub

    seconds, text = _indexed(model, subject, sources, PEERS)
    whole = np.flatnonzero(np.diff(text.offsets) == 256)
    rows = np.stack([text.ids[text.offsets[c] : text.offsets[c + 1]] for c in whole])
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        save_file({"tokens": torch.from_numpy(rows.astype(np.int64))}, tokens)
        hub.save_sae(subject.sae, Path(folder) / "sae", layout="saelens")
        for cache in ((), ("--cache",)):
            ran = subprocess.run(
                [str(PEER), str(HERE / "peers" / "dashboard.py"), f"{folder}/sae", str(tokens),
                 *cache, "--threads", str(os.cpu_count())],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            peer = json.loads(ran.stdout.strip().splitlines()[-1])
            ours, theirs = seconds / text.n_tokens, peer["seconds"] / peer["tokens"]
            how = "with its cache" if cache else "as it comes"
            yield {
                "command": f"index {ADDRESS}, {PEERS:,} tokens, beside sae-dashboard 0.8.0 {how}",
                "tokens": text.n_tokens, "seconds": seconds, "peer_tokens": peer["tokens"],
                "peer_seconds": peer["seconds"], "peer_memory_bytes": peer["memory_bytes"],
                "speedup_a_token": theirs / ours,
            }  # fmt: skip


def search() -> Iterator[dict]:
    """The median of each kind of search on a made-up catalog of 26 dictionaries of 16k features."""
    from gemscope import features
    from gemscope.features import Among

    folder = Path(tempfile.mkdtemp())
    try:
        began = time.perf_counter()
        store = _made_up(folder / "store")
        made = time.perf_counter() - began
        where = Among(where="density < 0.001 AND max > 20")
        address = store.dictionaries()[3]["address"]
        cases = {
            "words": lambda i: features.search(store, f"word{i * 37 % 5_000}"),
            "promoted token": lambda i: features.search_promotes(store, f"tok{i * 91 % 50_000}"),
            "direction": lambda i: features.search_like(store, address, i * 101),
            "direction, one dictionary": lambda i: features.search_like(
                store, address, i * 101, Among(addresses=(address,))
            ),
            "statistics": lambda _: features.search_where(store, where),
            "one feature's row": lambda i: store.feature(address, i * 101),
        }
        for name, run in cases.items():
            run(0)
            found, nearest = [], 0
            for i in range(1, 16):
                began = time.perf_counter()
                first = run(i)
                found.append(time.perf_counter() - began)
                # Made so that the nearest direction is the same feature's in the next layer.
                nearest += name == "direction" and first[0].feature == i * 101
            more = {"nearest_found": nearest / 15} if name == "direction" else {}
            yield {
                "command": f"search by {name}, {LAYERS} x {FEATURES:,} features of width {WIDTH:,}",
                "tokens": 0, "seconds": statistics.median(found), "slowest_seconds": max(found),
                "made_in_seconds": made, **more,
            }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made_up(folder: Path) -> Any:
    """A store with random figures and directions, filed as an index files them."""
    import numpy as np
    import pyarrow as pa

    from gemscope.features import Explanation, Store
    from gemscope.features import _tables as tables

    store, rng = Store.create(folder), np.random.default_rng(0)
    names = (f"vectors_{WIDTH}", "features", "contexts")
    store.table_of(names[0], tables.vector_schema(WIDTH))
    schema, directions = tables.FEATURES, np.zeros(0)
    for layer in range(LAYERS):
        address, run = f"made-up/layer_{layer}", f"run{layer}"
        keys = {"run": [run] * FEATURES, "dictionary": [address] * FEATURES,
                "feature": list(range(FEATURES))}  # fmt: skip
        tokens = rng.integers(0, 50_000, (FEATURES, 10))
        logits = -np.sort(-rng.standard_normal((FEATURES, 10)), axis=1)
        promoted = [
            [
                {"token": f" tok{t}", "id": int(t), "logit": float(v)}
                for t, v in zip(ts, vs, strict=True)
            ]
            for ts, vs in zip(tokens, logits, strict=True)
        ]
        columns: dict[str, Any] = {
            "count": rng.integers(0, 10**6, FEATURES), "layer": np.full(FEATURES, layer),
            "density": rng.lognormal(-7, 1.5, FEATURES), "max": rng.lognormal(3, 0.7, FEATURES),
            "promoted": promoted, "promotes": [[f"tok{t}" for t in ts] for ts in tokens],
            "words": [" ".join(f"tok{t}" for t in ts) for ts in tokens],
            "logit_mean": np.zeros(FEATURES), "logit_std": np.ones(FEATURES),
        }  # fmt: skip
        arrays = []
        for field in schema:
            given = keys.get(field.name, columns.get(field.name))
            arrays.append(
                pa.nulls(FEATURES, field.type) if given is None
                else pa.array(given, type=field.type)
            )  # fmt: skip
        store.table("features").add(pa.Table.from_arrays(arrays, schema=schema))
        # Directions go on from layer to layer, as those of residual streams do.
        noise = rng.standard_normal((FEATURES, WIDTH), dtype=np.float32)
        directions = noise if layer == 0 else 0.8 * directions + 0.6 * noise
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(directions.reshape(-1)), WIDTH)
        store.table(names[0]).add(
            pa.table({**keys, "vector": vectors}, tables.vector_schema(WIDTH))
        )
        words = rng.integers(0, 5_000, (FEATURES, 8))
        said = [
            Explanation(dictionary=address, feature=i, text=" ".join(f"word{w}" for w in ws),
                        method="rule", author="made up")
            for i, ws in enumerate(words)
        ]  # fmt: skip
        rows = [e.row() for e in said]
        store.table("explanations").add(pa.Table.from_pylist(rows, tables.EXPLANATIONS))
        facts = {"address": address, "d_sae": FEATURES, "d_out": WIDTH, "created": ""}
        store.commit(address, run, FEATURES, facts, names)
    store.refresh()
    return store
