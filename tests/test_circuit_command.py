"""`gemscope circuit`: configs, what it writes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from intervened import CLEAN, CLT, CROSSCODER, METRIC, OTHER, SAE, TRANSCODER

from gemscope import hub
from gemscope.circuits import (
    CircuitConfig,
    CircuitExample,
    circuit_report,
    parse_circuit_config,
    read_circuit_config,
    sparse_circuit,
)
from gemscope.errors import InputError
from gemscope.sae import BatchTopK, Origin

DOCS = Path(__file__).parents[1] / "docs"
PAIR = {"clean": CLEAN, "corrupted": OTHER}
PLAIN = {
    "task": "which <name> | is printed", "dictionaries": [SAE], "examples": [PAIR],
    "metric": METRIC, "sizes": [2, 20], "random_circuits": 2, "top_exact": 4, "max_nodes": 5,
    "node_threshold": 0.2, "edge_threshold": 1e-3,
}  # fmt: skip


@pytest.fixture
def config(file):
    """A config file; keys given as None are left out."""

    def make(**changes):
        raw = {k: v for k, v in (PLAIN | changes).items() if v is not None}
        return file(yaml.safe_dump(raw, sort_keys=False), "circuit.yaml")

    return make


def test_the_command_writes_what_it_finds(command, config, tmp_path):
    from matplotlib.image import imread

    out = tmp_path / "out" / "here"
    code, said, err = command("circuit", config(), "--out", out)
    assert code == 0, err
    assert "faithfulness" in said
    made = json.loads((out / "circuit.json").read_text("utf-8"))
    assert made["dictionaries"] == [SAE]
    assert [p["size"] for p in made["curves"]["points"]] == [0, 2, 5, 20, made["nodes_that_change"]]
    assert len(made["nodes"]) == 5 < made["nodes_above_threshold"]
    assert [n["id"] in said for n in made["nodes"]] == [True] * 5
    assert sum(n["exact"] is not None for n in made["nodes"]) == 4 == made["agreement"]["nodes"]
    sizes = [abs(n["effect"]["value"]) for n in made["nodes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 0.2
    ids = {n["id"] for n in made["nodes"]}
    for edge in made["edges"]:
        assert edge["source"] in ids
        assert edge["target"] in ids | {"metric"}
        assert abs(edge["weight"]) >= 1e-3
    # To the last dictionary's nodes the metric is next.
    into = {e["source"]: e["weight"] for e in made["edges"] if e["target"] == "metric"}
    for node in made["nodes"]:
        assert into[node["id"]] == pytest.approx(node["effect"]["value"], rel=1e-4)
    report = (out / "circuit.md").read_text("utf-8")
    assert "which &lt;name&gt; \\| is printed" in report
    assert "⏎" in report
    assert imread(out / "curves.png").shape[1] > 1000
    assert not list(out.glob("*.part*"))
    code, again, err = command("circuit", config(), "--out", out, "--json")
    assert code == 0, err
    assert json.loads(again) == made


def test_labels_come_from_a_store(miniature, tmp_path):
    from gemscope.features import Explanation, Store

    options = {"dictionaries": (SAE,), "examples": (CircuitExample(**PAIR),), "metric": METRIC,
               "random_circuits": 2, "top_exact": 1, "sizes": (1,), "max_nodes": 3,
               "aggregate": "positions"}  # fmt: skip
    plain = sparse_circuit(CircuitConfig(**options), model=miniature)
    feature = next(n.node.feature for n in plain.nodes if n.node.feature is not None)
    said = Explanation(dictionary=SAE, feature=feature, text="a loop's | variable", method="model",
                       author="me")  # fmt: skip
    Store.create(tmp_path / "store").add_explanations([said])
    found = sparse_circuit(
        CircuitConfig(**options, store=str(tmp_path / "store")), model=miniature
    )  # fmt: skip
    assert {n.node.feature: n.label for n in found.nodes}[feature] == said.text
    assert "a loop's \\| variable" in circuit_report(found)
    assert {n.label for n in plain.nodes} == {None}


def test_the_documented_config_is_one():
    found = read_circuit_config(DOCS / "circuit" / "closing-bracket.yaml")
    assert len(found.dictionaries) == 18
    assert (len(found.examples), len(found.held_out)) == (8, 4)
    assert not {one.clean for one in found.examples} & {one.clean for one in found.held_out}


def test_examples_are_found_beside_the_config(file, tmp_path):
    (tmp_path / "some").mkdir()
    lines = [json.dumps(PAIR), "", json.dumps(PAIR | {"answer": "item", "at": -2})]
    (tmp_path / "some" / "e.jsonl").write_text("\n".join(lines))
    raw = PLAIN | {"examples": "some/e.jsonl"}
    found = parse_circuit_config(raw, source="x", folder=tmp_path)
    assert [(one.answer, one.at) for one in found.examples] == [(None, None), ("item", -2)]
    assert found == read_circuit_config(file(yaml.safe_dump(raw), "c.yaml"))
    assert found.edge_threshold == 1e-3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dictionary": "x"}, "no key 'dictionary'; nearest: dictionaries"),
        ({"examples": [PAIR | {"corupted": "x"}]}, "examples 1: no key 'corupted'; nearest: corr"),
        ({"examples": []}, "examples is empty"),
        ({"examples": None}, "examples is missing"),
        ({"examples": "none.jsonl"}, "no examples at"),
        ({"examples": [{"clean": CLEAN}]}, "examples 1: no corrupted prompt"),
        ({"metric": None}, "examples 1: nothing is measured"),
        ({"examples": [PAIR | {"metric": METRIC, "answer": "a"}]}, "metric or answer, not both"),
        ({"examples": [PAIR | {"wrong": "a"}]}, "give answer too"),
        ({"ablation": "men"}, "ablation is 'men'"),
        ({"ablation": "mean"}, "mean is over a text"),
        ({"mean": "miniature"}, "mean is over a text"),
        ({"sizes": [0]}, "give 1 or more"),
        ({"steps": "ten"}, "steps is 'ten'"),
        ({"dictionaries": [SAE, SAE]}, "named twice"),
        ({"dictionaries": [TRANSCODER]}, "is a transcoder: .*gemscope trace"),
        ({"dictionaries": [CROSSCODER]}, "is a crosscoder: "),
        ({"dictionaries": [CLT]}, "is a clt: "),
        ({"dictionaries": [SAE, SAE.replace("small", "big")]}, "two accounts of 3.resid_post"),
        ({"dictionaries": ["miniature/nothing"]}, "no artefact at"),
        ({"examples": [PAIR | {"corrupted": f"{OTHER}(x"}]}, "examples 1: .* position by position"),
        ({"examples": [PAIR, {"clean": f"{CLEAN} x", "corrupted": f"{OTHER} y"}]},
         "examples 1 has 9 tokens and examples 2 has 10"),
        ({"examples": [PAIR | {"answer": "no such thing"}], "metric": None}, "is not one token"),
        ({"metric": "kl"}, "its slope is 0"),
        ({"metric": f"feature:{SAE}/1"}, "does not reach"),
        ({"metric": "logti:x"}, "no metric 'logti'"),
        ({"examples": [PAIR | {"at": 99}]}, "examples 1: .*outside the prompt"),
        ({"examples": [{"clean": CLEAN, "corrupted": CLEAN}]}, "nothing depends on these"),
        ({"model": "google/gemma-3-1b-pt"}, "gemma-3-1b-pt"),
        ({"store": "nowhere"}, "no catalog store"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_circuit_is_refused(refused, config, changes, match):
    refused("circuit", config(**changes), match=match)


def test_files_that_are_none_are_refused(refused, config, file, tmp_path):
    refused("circuit", tmp_path / "none.yaml", match="no config at")
    refused("circuit", file("a: [", "a.yaml"), match="is not YAML")
    refused("circuit", file("[]", "a.yaml"), match="holds no keys")
    refused("circuit", file(b"\xff\xfe", "a.yaml"), match="is not UTF-8 text")
    file('{"clean": 1}\n{', "e.jsonl")
    refused("circuit", config(examples="e.jsonl"), match="line 2 is not JSON")
    file("\n", "e.jsonl")
    refused("circuit", config(examples="e.jsonl"), match="holds no examples")
    file('["x"]', "e.jsonl")
    refused("circuit", config(examples="e.jsonl"), match="examples 1 is ")
    taken = file("x", "taken")
    refused("circuit", config(), "--out", taken, match="cannot be a circuit's folder")
    blocked = tmp_path / "blocked"
    (blocked / "circuit.json").mkdir(parents=True)
    refused("circuit", config(), "--out", blocked, match="blocked cannot be written")


def test_other_dictionaries_are_refused(miniature):
    sae = hub.load_sae(SAE)
    config = CircuitConfig(
        dictionaries=("x",), examples=(CircuitExample(**PAIR),), metric=METRIC
    )  # fmt: skip
    others = {
        "belongs to another/model, not to": replace(
            sae, origin=Origin(address="x", model="another/model")
        ),
        "among all tokens": replace(sae, activation=BatchTopK(8)),
        "is a SAE with a skip": replace(sae, skip=torch.zeros(256, 256)),
    }
    for match, other in others.items():
        with pytest.raises(InputError, match=match):
            sparse_circuit(config, model=miniature, load=lambda _, other=other: other)
    with pytest.raises(InputError, match="do not say whose they are"):
        sparse_circuit(config, load=lambda _: replace(sae, origin=Origin()))
