"""What SAELens computes from a folder of fabricated artefacts, as JSON.

    .venv-peer/bin/python tests/peers/saelens_reference.py FOLDER OUT

Run in an environment of its own by `tests/test_saelens.py`, which makes FOLDER: a cache of the hub
in `hub`, tiny Gemma models, and inputs as `.npy`. SAELens's own loaders, classes and attaching code
run unchanged, but for two things that stand in for a network and for published sizes: what the hub
would answer to a request for a part of a file is read from the cache, and the widths that SAELens
takes from the names of Gemma Scope's models are those of the fabricated weights. Every connection
is refused.
"""

import json
import os
import socket
import sys
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

GEMMA_SCOPE_2 = "google/gemma-scope-2-1b-pt"
RESIDUAL = ("gemma-scope-2-1b-pt-res", "layer_13_width_16k_l0_medium")
TRANSCODER = ("gemma-scope-2-1b-pt-transcoders-all", "layer_1_width_16k_l0_small_affine")
DICTIONARIES = {
    "gemma-scope residual": ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    "gemma-scope mlp": ("gemma-scope-2b-pt-mlp", "layer_0/width_16k/average_l0_119"),
    "gemma-scope embedding": ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
    "gemma-scope-2 residual": RESIDUAL,
    "gemma-scope-2 mlp": ("gemma-scope-2-1b-pt-mlp", "layer_13_width_16k_l0_medium"),
    "gemma-scope-2 transcoder": TRANSCODER,
    "llama-scope unit rows": ("llama_scope_lxr_8x", "l15r_8x"),
    "llama-scope": ("llama_scope_lxr_8x", "l16r_8x"),
}
CROSS_LAYER = "clt/width_262k_l0_medium_affine/params_layer_{}"
CROSSCODER = "crosscoder/layer_7_13_17_22_width_65k_l0_medium"
MODELS = ("gemma-2", "gemma-3")


def main(folder: Path, out: Path) -> None:
    os.environ |= {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        os.environ.pop(name, None)
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        del os.environ[name]
    asked = refuse_connections()
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    d_in, d_sae = (int(n) for n in np.load(folder / "sizes.npy"))
    with published_sizes(d_in=d_in, d_sae=d_sae):
        record = {
            "versions": {name: version(name) for name in ("sae-lens", "transformer-lens")},
            "from the cache": from_the_cache(asked),
        }
        with hub_answers(folder):
            x = torch.from_numpy(np.load(folder / "x.npy"))
            record |= {name: applied(loaded(*at), x) for name, at in DICTIONARIES.items()}
            record["cross-layer"] = cross_layer(torch.from_numpy(np.load(folder / "layers.npy")))
            record["refused"] = refused(folder)
            ids = torch.from_numpy(np.load(folder / "ids.npy"))
            record |= {f"attached to {name}": attached(folder / name, ids) for name in MODELS}
    lines = [f"{json.dumps(name)}: {json.dumps(rounded(value))}" for name, value in record.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def refuse_connections() -> list[str]:
    """Refuse every connection from here on; the hosts that were asked for."""
    asked: list[str] = []

    def refuse(host, *_args, **_kwargs):
        asked.append(str(host))
        raise socket.gaierror(socket.EAI_NONAME, "no network here")

    socket.getaddrinfo = refuse
    socket.socket.connect = lambda _self, address: refuse(address[0])
    return asked


@contextmanager
def published_sizes(**sizes: int):
    """The widths of the weights, where SAELens takes those of a published model."""
    from sae_lens.saes import sae

    ours = sae.get_config_overrides

    def overrides(release, sae_id):
        more = sizes if release.startswith("gemma-scope-2b") else {}
        return {**ours(release, sae_id), **more}

    sae.get_config_overrides = overrides
    yield
    sae.get_config_overrides = ours


@contextmanager
def hub_answers(folder: Path):
    """Requests for a part of a file are answered from the cache."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    class Answer:
        def __init__(self, content):
            self.content = content

    def answer(url, headers, **_more):
        owner, name, _, _, *path = url.removeprefix("https://huggingface.co/").split("/")
        (snapshot,) = (folder / "hub" / f"models--{owner}--{name}" / "snapshots").iterdir()
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        content = snapshot.joinpath(*path).read_bytes()
        return Answer(content[int(first) : int(last) + 1])

    asks, loaders._get_with_rate_limit_retry = loaders._get_with_rate_limit_retry, answer
    yield
    loaders._get_with_rate_limit_retry = asks


def loaded(release: str, sae_id: str, **options):
    from sae_lens import SAE

    return SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32", **options)


def applied(sae, x) -> dict:
    """Features as `[token, feature, value]`, what is decoded from them, and all of `forward`."""
    features = sae.encode(x)
    places = features.nonzero().tolist()
    return {
        "class": type(sae).__name__,
        "features": [[*place, features[tuple(place)].item()] for place in places],
        "decoded": sae.decode(features).tolist(),
        "forward": sae(x).tolist() if hasattr(sae, "W_skip") else "as decoded",
    }


def cross_layer(x) -> list[dict]:
    """Each layer's file of a cross-layer transcoder, `x [n_tokens, n_layers, d_in]`."""
    from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader

    return [
        applied(
            loaded(
                GEMMA_SCOPE_2, CROSS_LAYER.format(layer), converter=gemma_3_sae_huggingface_loader
            ),
            x[:, layer],
        )
        for layer in range(x.shape[1])
    ]


def refused(folder: Path) -> dict:
    """What is said of artefacts that are not loaded."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def said(load) -> list[str]:
        try:
            load()
        except Exception as error:
            # The name of a file is the same everywhere, its folder is not.
            name = getattr(error, "filename", None)
            return [type(error).__name__, Path(name).name if name else str(error)]
        return ["loaded", ""]

    gemma_3 = loaders.gemma_3_sae_huggingface_loader
    (snapshot,) = (folder / "hub/models--google--gemma-scope-2-1b-pt/snapshots").iterdir()
    (older,) = (folder / "hub/models--google--gemma-scope-2b-pt-res/snapshots").iterdir()
    places = {
        "gemma-scope": older / DICTIONARIES["gemma-scope residual"][1],
        "gemma-scope-2": snapshot / "resid_post" / RESIDUAL[1],
    }
    readers = [r for name, r in vars(loaders).items() if name.endswith("_disk_loader")]
    return {
        "crosscoder": said(lambda: loaded(GEMMA_SCOPE_2, CROSSCODER, converter=gemma_3)),
        "folders": {
            name: {
                reader.__name__: said(
                    lambda r=reader, p=place: SAE.load_from_disk(p, device="cpu", converter=r)
                )
                for reader in readers
            }
            for name, place in places.items()
        },
    }


def from_the_cache(asked: list[str]) -> dict:
    """What loading from a full cache, offline, asks of the network, and how it ends."""
    out = {}
    for name in ("gemma-scope residual", "gemma-scope-2 residual"):
        asked.clear()
        try:
            loaded(*DICTIONARIES[name])
            end = "loaded"
        except Exception as error:
            end = type(error).__name__
        out[name] = {"end": end, "asked": sorted(set(asked))}
    return out


def attached(model_folder: Path, ids) -> dict:
    """What an attached transcoder reads and writes, under the hook name that its loader gives.

    TransformerLens runs that hook on request only. `by hand` is the same transcoder with the name
    of the tensor that it was trained on.
    """
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = SAETransformerBridge.boot_transformers(str(model_folder), device="cpu")
    sae = loaded(*TRANSCODER)
    names = sae.cfg.metadata
    out = {name: names[name] for name in ("hook_name", "hook_name_out", "hf_hook_name")}

    def keep(seen, name, _module, _inputs, value):
        seen[name] = value[0].tolist()

    runs = {"by default": (False, names.hook_name), "on request": (True, names.hook_name),
            "by hand": (False, "blocks.1.mlp.hook_in")}  # fmt: skip
    for run, (flag, hook) in runs.items():
        names.hook_name = hook
        model.set_use_hook_mlp_in(flag)
        seen: dict[str, list] = {}
        model.add_sae(sae)
        wrapper = model._acts_to_saes[hook]
        points = {"reads": sae.hook_sae_input, "writes": wrapper.hook_sae_output}
        handles = [
            point.register_forward_hook(partial(keep, seen, n)) for n, point in points.items()
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        model.reset_saes()
        out[run] = seen
    return out


def rounded(value):
    """`value` with numbers in nine digits, which tell any two of float32 apart."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
