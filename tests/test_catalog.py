"""The published suites: all of them there, each with the facts that follow from its name."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gemscope.hub import Entry, Remote
from gemscope.hub._suites import FEATURES, canonical_address, model_shape, nominal_l0, parse, suites
from gemscope.sites import Sites, each, parse_sites

SAES = {
    "gemma-scope-2b-pt-res": 316, "gemma-scope-2b-pt-mlp": 260, "gemma-scope-2b-pt-att": 260,
    "gemma-scope-9b-pt-res": 536, "gemma-scope-9b-pt-mlp": 492, "gemma-scope-9b-pt-att": 492,
    "gemma-scope-9b-it-res": 30, "gemma-scope-27b-pt-res": 18,
    "gemma-scope-2-270m-pt": 340, "gemma-scope-2-270m-it": 340,
    "gemma-scope-2-1b-pt": 448, "gemma-scope-2-1b-it": 448,
    "gemma-scope-2-4b-pt": 532, "gemma-scope-2-4b-it": 532,
    "gemma-scope-2-12b-pt": 700, "gemma-scope-2-12b-it": 700,
    "gemma-scope-2-27b-pt": 300, "gemma-scope-2-27b-it": 868,
    "llama-scope": 192, "llama-scope-r1-distill": 96,
}  # fmt: skip
TRANSCODERS = {
    "gemma-scope-2b-pt-transcoders": 78,
    "gemma-scope-2-270m-pt": 146, "gemma-scope-2-270m-it": 216,
    "gemma-scope-2-1b-pt": 280, "gemma-scope-2-1b-it": 280,
    "gemma-scope-2-4b-pt": 344, "gemma-scope-2-4b-it": 344,
    "gemma-scope-2-12b-pt": 456, "gemma-scope-2-12b-it": 456,
    "gemma-scope-2-27b-pt": 491, "gemma-scope-2-27b-it": 563,
    "llama-scope": 64,
}  # fmt: skip
# Of gemma-scope-2b-pt-res, width 16k: the L0 of each layer's folders, the canonical one starred.
RESIDUAL_16K = """
13 25 46 *105 226|10 20 40 *102 250|13 24 53 *141 142 304|14 28 *59 142 315|17 31 60 *124 125 281
18 34 *68 143 309|19 36 *70 144 301|20 36 *69 137 285|20 37 *71 142 301|21 37 *73 151 340
21 39 *77 166 395|22 41 *80 168 393|22 41 *82 176 445|23 43 83 *84 173 403|23 43 83 *84 173 388
23 41 *78 150 308|23 42 *78 154 335|23 42 *77 150 304|23 40 *74 138 280|23 40 *73 137 279
22 38 *71 139 294|22 38 *70 139 301|21 38 *72 147 349|21 38 74 *75 157 404|20 38 *73 158 457
16 28 55 *116 285
"""
# Address, from "gemma-scope-" on; sites read and written; what is read of a token; features.
SITES_AND_WIDTHS = """
9b-pt-att/layer_27/width_16k/average_l0_136 27.attn_heads = 4096 16384
9b-pt-mlp/layer_41/width_131k/average_l0_99 41.mlp_out = 3584 131072
2b-pt-res/embedding/width_4k/average_l0_44 0.embed = 2304 4096
2b-pt-transcoders/layer_7/width_16k/average_l0_70 7.mlp_in_unscaled 7.mlp_out 2304 16384
2-27b-it/attn_out_all/layer_61_width_262k_l0_big 61.attn_heads = 4096 262144
2-27b-it/mlp_out/layer_53_width_16k_l0_small 53.mlp_out = 5376 16384
2-4b-it/transcoder_all/layer_0_width_262k_l0_small_affine 0.mlp_in 0.mlp_out 2560 262144
2-12b-pt/resid_post/layer_24_width_1m_l0_medium 24.resid_post = 3840 1048576
2-1b-pt/crosscoder/layer_7_13_17_22_width_262k_l0_medium 7,13,17,22.resid_post = 1152 262144
2-12b-it/crosscoder/layer_12_24_31_41_width_1m_l0_big 12,24,31,41.resid_post = 3840 1048576
2-270m-it/clt/width_524k_l0_medium 0-17.mlp_in 0-17.mlp_out 640 524160
llama-scope/L0A-32x 0.attn_out = 4096 131072
llama-scope/L31M-8x 31.mlp_out = 4096 32768
llama-scope/L15TC-32x 15.mlp_in_unscaled 15.mlp_out 4096 131072
llama-scope-r1-distill/0-Slimpajama-800M-OpenR1-Math-220k/L15R 15.resid_post = 4096 32768
"""
NOMINAL_L0 = """
1b-pt/resid_post_all/layer_0_width_16k_l0_small 10
1b-pt/resid_post_all/layer_4_width_16k_l0_small 14
1b-pt/resid_post_all/layer_25_width_16k_l0_small 20
4b-pt/transcoder_all/layer_10_width_16k_l0_big 112
1b-pt/resid_post/layer_7_width_16k_l0_big 132
1b-pt/resid_post/layer_7_width_16k_l0_medium 54
270m-pt/resid_post/layer_5_width_16k_l0_small 18
"""


@pytest.fixture(scope="module")
def everything():
    return {e.address: e for suite in suites() for e in suite.entries()}


@pytest.fixture(scope="module")
def make():
    """The script that made the catalog."""
    file = Path(__file__).parents[1] / "scripts" / "catalog" / "make.py"
    spec = importlib.util.spec_from_file_location("catalog_make", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folders(everything, prefix):
    return [a.removeprefix(prefix + "/") for a in everything if a.startswith(prefix + "/")]


def test_every_suite_is_whole(everything):
    found = Counter((e.release, e.kind) for e in everything.values())
    gemma_3 = [s.name for s in suites() if s.layout == "gemma-scope-2"]
    assert len(gemma_3) == 10
    assert found == (
        {(name, "sae"): n for name, n in SAES.items()}
        | {(name, "transcoder"): n for name, n in TRANSCODERS.items()}
        | {(name, "crosscoder"): 8 for name in gemma_3}
        | {(name, "clt"): 8 for name in gemma_3 if "-270m-" in name or "-1b-" in name}
    )
    # Addresses are keys here: as many as entries, none is there twice.
    assert len(everything) == sum(len(s.entries()) for s in suites()) == 11_730


def test_no_two_are_the_same_files_or_have_the_same_dashboards(everything):
    remotes = {(e.remote.repo, e.remote.folder) for e in everything.values()}
    assert len(remotes) == len(everything)
    dashboards = [e.neuronpedia for e in everything.values() if e.neuronpedia]
    assert len(set(dashboards)) == len(dashboards) == 1_166


def test_what_holds_of_every_entry(everything):
    for suite in suites():
        shape = suite.shape
        assert model_shape(suite.model) == (shape.n_layers, shape.d_model)
        for e in suite.entries():
            sites = (*each(e.reads), *each(e.writes))
            assert max(s.layer for s in sites) < shape.n_layers
            many = e.kind in ("crosscoder", "clt")
            assert isinstance(e.reads, Sites) == isinstance(e.writes, Sites) == many
            assert (e.reads == e.writes) == (e.kind in ("sae", "crosscoder"))
            for site, d in ((sites[0], e.d_in), (sites[-1], e.d_out)):
                assert d == (shape.d_heads if site.stream == "attn_heads" else shape.d_model)
            assert parse_sites(str(e.reads)) == e.reads
            assert e.affine == ("_affine" in e.address)
            assert e.model == suite.model
            assert e.remote.repo in suite.repos
            assert e.path is None
            assert (e.l0 is None) == (e.layout == "llama-scope-r1-distill")
            assert e.l0 is None or isinstance(e.l0, float)


def spelled_out(address, sites, folder, **facts):
    reads, _, writes = sites.partition(" ")
    remote = Remote(facts.pop("repo"), folder, facts.pop("files"), facts.pop("optional", ()))
    return Entry(
        address=address, reads=parse_sites(reads), writes=parse_sites(writes or reads),
        d_in=facts["d_out"], remote=remote, **facts,
    )  # fmt: skip


@pytest.mark.parametrize(
    "known",
    [
        spelled_out(
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "20.resid_post",
            "layer_20/width_16k/average_l0_71", repo="google/gemma-scope-2b-pt-res",
            files=("params.npz",), kind="sae", d_out=2304, d_sae=16_384, l0=71.0, affine=False,
            dtype="float32", model="google/gemma-2-2b", licence="CC-BY-4.0", layout="gemma-scope",
            canonical=True, neuronpedia="gemma-2-2b/20-gemmascope-res-16k",
        ),
        spelled_out(
            "gemma-scope-2-1b-pt/resid_post/layer_22_width_65k_l0_medium", "22.resid_post",
            "resid_post/layer_22_width_65k_l0_medium", repo="google/gemma-scope-2-1b-pt",
            files=("params.safetensors",), optional=("config.json",), kind="sae", d_out=1152,
            d_sae=65_536, l0=60.0, affine=False, dtype="float32", model="google/gemma-3-1b-pt",
            licence="CC-BY-4.0", layout="gemma-scope-2", canonical=False,
            neuronpedia="gemma-3-1b/22-gemmascope-2-res-65k",
        ),
        spelled_out(
            "gemma-scope-2-1b-pt/clt/width_262k_l0_big_affine", "0-25.mlp_in 0-25.mlp_out",
            "clt/width_262k_l0_big_affine", repo="google/gemma-scope-2-1b-pt",
            files=tuple(f"params_layer_{i}.safetensors" for i in range(26)),
            optional=("config.json",), kind="clt", d_out=1152, d_sae=26 * 10_080, l0=150.0,
            affine=True, dtype="float32", model="google/gemma-3-1b-pt", licence="CC-BY-4.0",
            layout="gemma-scope-2", canonical=False, neuronpedia=None,
        ),
        spelled_out(
            "llama-scope/L15R-8x", "15.resid_post", "Llama3_1-8B-Base-L15R-8x",
            repo="fnlp/Llama3_1-8B-Base-LXR-8x",
            files=("hyperparams.json", "checkpoints/final.safetensors"), kind="sae", d_out=4096,
            d_sae=32_768, l0=50.0, affine=False, dtype="bfloat16", canonical=False, licence=None,
            model="meta-llama/Llama-3.1-8B", layout="llama-scope",
            neuronpedia="llama3.1-8b/15-llamascope-res-32k",
        ),
    ],
    ids=lambda e: e.address,
)  # fmt: skip
def test_every_field(everything, known):
    assert everything[known.address] == known


@pytest.mark.parametrize("known", SITES_AND_WIDTHS.strip().splitlines())
def test_sites_and_widths(everything, known):
    address, reads, writes, *numbers = known.split()
    e = everything[address if address.startswith("llama") else f"gemma-scope-{address}"]
    assert (str(e.reads), str(e.writes)) == (reads, reads if writes == "=" else writes)
    assert [str(n) for n in (e.d_in, e.d_sae)] == numbers
    assert e.d_in == e.d_out


def test_names_of_models():
    models = {s.name: s.model for s in suites()}
    assert models["gemma-scope-9b-it-res"] == "google/gemma-2-9b-it"
    assert models["gemma-scope-27b-pt-res"] == "google/gemma-2-27b"
    # The base model of this size alone is named without "-pt".
    assert models["gemma-scope-2-270m-pt"] == "google/gemma-3-270m"
    assert models["gemma-scope-2-270m-it"] == "google/gemma-3-270m-it"
    assert models["gemma-scope-2-12b-pt"] == "google/gemma-3-12b-pt"
    assert models["llama-scope-r1-distill"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert model_shape("google/gemma-2-2b") == (26, 2304)
    assert model_shape("gpt2") is None


def test_the_canonical_one_is_nearest_to_100(everything):
    for layer, values in enumerate(RESIDUAL_16K.strip().replace("\n", "|").split("|")):
        stem = f"gemma-scope-2b-pt-res/layer_{layer}/width_16k"
        there = [e for e in everything.values() if e.address.startswith(stem + "/")]
        marked = [f"*{e.l0:g}" if e.canonical else f"{e.l0:g}" for e in there]
        assert " ".join(marked) == values
        (starred,) = [v[1:] for v in values.split() if v[0] == "*"]
        assert canonical_address(f"{stem}/canonical") == f"{stem}/average_l0_{starred}"
    assert sum(e.canonical for e in everything.values()) == 431


def test_odd_canonical_ones(everything):
    found = [
        canonical_address(f"gemma-scope-9b-pt-{stem}/canonical")
        for stem in ("res/layer_20/width_524k", "att/layer_23/width_131k", "att/layer_27/width_16k")
    ]
    # Of two as near, the published choice is once the smaller and once the larger.
    assert [everything[address].l0 for address in found] == [48, 66, 136]
    assert not any("__" in everything[address].neuronpedia for address in found)


def test_what_has_no_canonical_one():
    for address in (
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        "gemma-scope-2b-pt-res/layer_99/width_16k/canonical",
        "gemma-scope-2b-pt-res/embedding/width_4k/canonical",
        "gemma-scope-2b-pt-transcoders/layer_7/width_16k/canonical",
        "gemma-scope-2-1b-pt/resid_post/canonical",
        "gemma-scope-2b-pt-res/canonical",
        "nothing/layer_20/width_16k/canonical",
        "canonical",
        "",
    ):
        assert canonical_address(address) is None


def test_dashboards(everything):
    of = {address: e.neuronpedia for address, e in everything.items()}
    residual = "gemma-scope-2b-pt-res/layer_5/width_1m/average_l0_"
    assert of[residual + "63"] == "gemma-2-2b/5-gemmascope-res-1m__l0-63"
    assert of[residual + "114"] == "gemma-2-2b/5-gemmascope-res-1m"
    assert of["gemma-scope-9b-pt-res/layer_2/width_16k/average_l0_8"] is None
    assert of["gemma-scope-2b-pt-res/layer_12/width_131k/average_l0_129"] is None
    transcoder = "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_"
    assert of[transcoder + "70"] == "gemma-2-2b/7-gemmascope-transcoder-16k"
    assert of[transcoder + "130"] is of[transcoder + "245"] is None
    fourth = "gemma-scope-2-4b-it/transcoder_all/layer_{}_width_16k_l0_small_affine"
    shown = [layer for layer in range(34) if of[fourth.format(layer)]]
    assert shown == [0, 1, 2, 3, 4, 6, 7, 9, 10, 12]
    assert of["gemma-scope-2-1b-pt/resid_post/layer_7_width_262k_l0_medium_seed_1"] is None
    mix = "llama-scope-r1-distill/400M-Slimpajama-400M-OpenR1-Math-220k/L3R"
    assert of[mix] == "deepseek-r1-distill-llama-8b/3-llamascope-slimpj-openr1-res-32k"


def test_nominal_l0(everything):
    for known in NOMINAL_L0.strip().splitlines():
        address, l0 = known.split()
        assert everything[f"gemma-scope-2-{address}"].l0 == float(l0)
    # The same name at the same layer means another L0 in the folder of every layer.
    same = "layer_13_width_16k_l0_big"
    assert everything[f"gemma-scope-2-1b-pt/resid_post_all/{same}"].l0 == 120
    assert everything[f"gemma-scope-2-1b-pt/resid_post/{same}"].l0 == 150


def test_nominal_l0_rises_over_the_first_third():
    for n_layers in (18, 26, 34, 48, 62):
        found = [nominal_l0("big", i, n_layers, every_layer=True) for i in range(n_layers)]
        assert found == sorted(found)
        assert found[0] == 60
        assert set(found[-(-n_layers // 3) :]) == {120}


def test_holes_and_extras(everything):
    parts = {a.split("/")[1] for a in everything if a.startswith("gemma-scope-2-27b-pt/")}
    assert parts == {"resid_post", "resid_post_all", "transcoder_all", "crosscoder"}
    assert folders(everything, "gemma-scope-2-270m-pt/transcoder") == [
        "layer_9_width_16k_l0_small_affine", "layer_15_width_262k_l0_big_affine",
    ]  # fmt: skip
    for which in ("pt", "it"):
        stem = f"gemma-scope-2-27b-{which}/transcoder_all/layer_"
        for missing in ("4_width_16k_l0_small", "43_width_16k_l0_big", "5_width_16k_l0_small"):
            assert stem + missing not in everything
            assert f"{stem}{missing}_affine" in everything
    wide = [a for a in everything if "/mlp_out/" in a and "_1m_" in a]
    assert len(wide) == 24
    assert {a.split("/")[0] for a in wide} == {"gemma-scope-2-1b-pt", "gemma-scope-2-1b-it"}
    seeds = [a for a in everything if "seed" in a]
    assert len(seeds) == 40
    assert all("/resid_post/" in a and a.endswith("_262k_l0_medium_seed_1") for a in seeds)


def test_what_is_there_by_rule_only():
    ruled = {address for suite in suites() for address in suite.by_rule()}
    kinds = Counter(e.kind for s in suites() for e in s.entries() if e.address in ruled)
    assert kinds == {"crosscoder": 80, "clt": 32, "transcoder": 64}


def test_a_suite_is_listed_in_order(everything):
    residual = [e for e in everything.values() if e.release == "gemma-scope-9b-it-res"]
    assert [(e.reads.layer, e.d_sae) for e in residual[::5]] == [
        (layer, FEATURES[width]) for layer in (9, 20, 31) for width in ("16k", "131k")
    ]
    names = folders(everything, "gemma-scope-2-1b-pt/resid_post")
    assert [n.removeprefix("layer_7_width_262k_l0_") for n in names[6:10]] == [
        "small", "medium", "medium_seed_1", "big",
    ]  # fmt: skip
    assert names[-1] == "layer_22_width_1m_l0_big"


def test_expanding_everything_is_fast():
    program = (
        "from gemscope.hub._suites import suites as s; print(sum(len(x.entries()) for x in s()))"
    )
    # The child's own time, which other work on the machine does not lengthen.
    before = os.times()
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        assert done.stdout.strip() == b"11730"
    after = os.times()
    spent = after.children_user + after.children_system
    assert (spent - before.children_user - before.children_system) / 3 < 0.4


def release(repo, model, *saes):
    return {"repo_id": f"google/{repo}", "model": model, "saes": list(saes)}


REGISTRY = {
    "gemma-scope-9b-it-res": release(
        "gemma-scope-9b-it-res", "gemma-2-9b",
        {"path": "layer_9/width_16k/average_l0_14", "l0": 14},
        {"path": "layer_9/width_16k/average_l0_88", "l0": 88},
        {"path": "embedding/width_4k/average_l0_7"},
    ),
    "gemma-scope-9b-it-res-canonical": release(
        "gemma-scope-9b-it-res", "gemma-2-9b-it",
        {"path": "layer_9/width_16k/average_l0_88", "neuronpedia": "x/9-gemmascope-res-16k"},
    ),
    "gemma-scope-2-1b-pt-res": release(
        "gemma-scope-2-1b-pt", "google/gemma-3-1b-pt",
        {"path": "resid_post/layer_7_width_16k_l0_small", "l0": 18},
        {"path": "resid_post/layer_22_width_16k_l0_small", "l0": 20},
        {"path": "resid_post/layer_22_width_65k_l0_medium", "l0": 60},
    ),
    "gpt2-small-res-jb": release("z", "gpt2-small", {"path": "z"}),
}  # fmt: skip


def made(make, registry):
    return parse(make.written(make.catalog(make.artefacts(registry))))


def test_the_script_compacts_and_corrects(make):
    first, second = made(make, REGISTRY)
    assert [*make.check((first, second), REGISTRY).values()] == [6, 16, 0]
    assert first.model == "google/gemma-2-9b-it"
    assert [(e.address.split("/", 1)[1], e.canonical) for e in first.entries()] == [
        ("layer_9/width_16k/average_l0_14", False),
        ("layer_9/width_16k/average_l0_88", True),
        ("embedding/width_4k/average_l0_7", False),
    ]
    assert [g.layers for g in second.groups if g.part == "resid_post"] == ["7,22", "22"]
    assert "crosscoder/layer_7_22_width_65k_l0_big" in {e.remote.folder for e in second.entries()}


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("gemma-scope-9b-it-res", 1, {"l0": 87}),
        ("gemma-scope-9b-it-res-canonical", 0, {"path": "layer_9/width_16k/average_l0_14"}),
        ("gemma-scope-9b-it-res-canonical", 0, {"neuronpedia": "x/8-gemmascope-res-16k"}),
        ("gemma-scope-2-1b-pt-res", 0, {"l0": 19}),
        ("gemma-scope-2-1b-pt-res", 2, {"path": "resid_post/layer_22_width_64k_l0_medium"}),
    ],
)  # fmt: skip
def test_the_script_stops_at_what_contradicts_its_rules(make, name, place, change):
    saes = [*REGISTRY[name]["saes"]]
    saes[place] = saes[place] | change
    registry = REGISTRY | {name: REGISTRY[name] | {"saes": saes}}
    with pytest.raises((AssertionError, KeyError)):
        make.check(made(make, registry), registry)


def test_the_script_finds_products(make):
    grid = [
        make.Place(layer, width, label, "", "")
        for layer in (0, 1, 2, 5)
        for width in ("16k", "262k")
        for label in ("small", "big")
    ]
    (whole,) = make.products(grid)
    assert whole == ((0, 1, 2, 5), ("16k", "262k"), ("small", "big"), ("",), "")
    assert make.spans(whole.layer) == "0-2,5"
