"""One measurement with SAELens, in an environment of its own; prints one JSON object.

    python benchmarks/peer.py ADDRESS TOKENS [--first]

Run by `benchmarks/run.py` with HF_HOME pointing at a cache that it has filled. With `--first` it
loads, encodes one token and ends: what a whole process costs.
"""

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("release")
    parser.add_argument("name")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--first", action="store_true")
    given = parser.parse_args()
    import torch
    from sae_lens import SAE

    loaded = SAE.from_pretrained(given.release, given.name, device="cpu", dtype="float32")
    sae = loaded[0] if isinstance(loaded, tuple) else loaded
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(given.tokens, sae.cfg.d_in, generator=generator)
    with torch.no_grad():
        features = sae.encode(x)
        if given.first:
            print(json.dumps({"l0": (features > 0).sum(1).float().mean().item()}))
            return
        seconds = {
            "encode": _median(lambda: sae.encode(x)),
            "decode": _median(lambda: sae.decode(features)),
        }
    l0 = (features > 0).sum(1).float().mean().item()
    print(json.dumps(seconds | {"l0": l0, "out": sae.decode(features).double().norm().item()}))


def _median(run) -> float:
    found = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return sorted(found[1:])[2]


if __name__ == "__main__":
    main()
