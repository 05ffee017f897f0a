"""Neuronpedia, delphi, SAEDashboard and Parquet files, read again by other means than ours."""

import gzip
import itertools
import json
import struct

import numpy as np
import pytest

from gemscope import exchange
from gemscope.errors import InputError
from gemscope.features import Activations, Explanation, Note, Store

FEATURES = (0, 3, 7, 40, 383)
FEATURE_KEYS = """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel
    vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices
    neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices
    correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
    correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values
    frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights
    logits_hist_data_bar_values decoder_weights_dist sourceSetName""".split()  # noqa: SIM905
ACTIVATION_KEYS = """id tokens index layer modelId maxValue maxValueTokenIndex minValue values
    creatorId dataSource dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues
    logitContributions binMin binMax binContains qualifyingTokenIndex zIndices zValues""".split()  # noqa: SIM905
EXPLANATION_KEYS = """id modelId layer index description authorId embedding triggeredById typeName
    explanationModelName notes createdAt""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def store(small_store):
    return Store.open(small_store)


@pytest.fixture(scope="module")
def neuronpedia(store, indexed, tmp_path_factory):
    """An export of a few features of one dictionary, with vectors."""
    to = tmp_path_factory.mktemp("np") / "made"
    exchange.export(
        store, indexed[:1], to, format="neuronpedia", options=exchange.Options(vectors=True),
        selection=exchange.Selection(features=FEATURES),
    )  # fmt: skip
    return to


def lines(file):
    opened = gzip.open if file.name.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def source(folder):
    (found,) = folder.glob("v1/*/*")
    return found


def test_neuronpedias_layout_and_fields(neuronpedia, indexed):
    folder = source(neuronpedia)
    assert folder.parent.name == "miniature"
    layer, _, name = folder.name.partition("-")
    assert layer == "2"
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert files == {
        "features/batch-0.jsonl.gz", "activations/batch-0.jsonl.gz", "model.jsonl",
        "release.jsonl", "source.jsonl", "sourceset.jsonl",
    }  # fmt: skip
    rows = lines(folder / "features" / "batch-0.jsonl.gz")
    assert [row["index"] for row in rows] == [str(f) for f in FEATURES]
    for row in rows:
        assert sorted(row) == sorted(FEATURE_KEYS)
        assert (row["modelId"], row["layer"], row["sourceSetName"]) == (
            "miniature", folder.name, name,
        )  # fmt: skip
    for row in lines(folder / "activations" / "batch-0.jsonl.gz"):
        assert sorted(row) == sorted(ACTIVATION_KEYS)
        assert row["layer"] == folder.name
    (about,) = lines(folder / "source.jsonl")
    assert (about["id"], about["setName"], about["hasDashboards"]) == (folder.name, name, True)
    assert about["inferenceHosts"] == []
    assert about["visibility"] == "PUBLIC"
    (kind,) = lines(folder / "sourceset.jsonl")
    assert (kind["defaultRange"], kind["defaultShowBreaks"]) == (1, True)
    assert about["hfFolderId"] == indexed[0]


def test_feature_rows_hold_what_the_store_measured(neuronpedia, store, indexed):
    mine = store.features(indexed[0]).to_pylist()
    vectors = store.vectors(indexed[0])
    for row in lines(source(neuronpedia) / "features" / "batch-0.jsonl.gz"):
        own = mine[int(row["index"])]
        assert row["frac_nonzero"] == own["density"]
        assert row["maxActApprox"] == own["max"]
        assert row["vectorDefaultSteerStrength"] == (own["max"] or 10)
        assert row["pos_str"] == [t["token"] for t in own["promoted"]]
        assert row["neg_values"] == [t["logit"] for t in own["suppressed"]]
        assert row["topkCosSimIndices"] == [n["feature"] for n in own["neighbours"]]
        assert row["correlated_features_indices"] == [p["feature"] for p in own["together"]]
        assert row["correlated_features_pearson"] == [p["phi"] for p in own["together"]]
        assert row["hasVector"] is True
        np.testing.assert_array_equal(np.float32(row["vector"]), vectors[own["feature"]])
        bars = dict(zip(row["freq_hist_data_bar_values"], row["freq_hist_data_bar_heights"],
                        strict=True))  # fmt: skip
        assert sum(bars.values()) == own["count"]
        back = {round(4 * np.log2(value)): count for value, count in bars.items()}
        first = own["histogram"]["first"]
        assert back == {first + b: c for b, c in enumerate(own["histogram"]["counts"])}
        heights = row["logits_hist_data_bar_heights"]
        assert len(heights) == len(row["logits_hist_data_bar_values"])


def test_activation_rows_hold_the_values_of_the_contexts(neuronpedia, store, indexed):
    kept, text = store.activations(indexed[0]), store.text(indexed[0])
    tokenizer = store.tokenizer(indexed[0])
    rows = lines(source(neuronpedia) / "activations" / "batch-0.jsonl.gz")
    assert {row["index"] for row in rows} == {str(f) for f in FEATURES}
    for row in rows:
        context, first = map(int, row["dataIndex"].split(":"))
        begin, end = text.offsets[context : context + 2]
        assert len(row["tokens"]) == len(row["values"]) == min(128, end - begin)
        places, values = kept.of(indexed[0], int(row["index"]))
        dense = np.zeros(len(text.ids), dtype=np.float32)
        dense[places] = values
        window = slice(begin + first, begin + first + len(row["values"]))
        np.testing.assert_array_equal(np.float32(row["values"]), dense[window])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"]
        assert row["dataSource"] == text.paths[text.document[context]]
        if "\ufffd" not in "".join(row["tokens"]):
            assert "".join(row["tokens"]) in tokenizer.decode(text.ids[begin:end])
        if row["binMin"] == -1:
            assert row["binContains"] == -1
            assert row["binMax"] == np.float32(values.max())
        else:
            assert row["binMin"] - 1e-6 <= row["maxValue"] <= row["binMax"] + 1e-6
            assert 0 < row["binContains"] <= 1
    top = [row["maxValue"] for row in rows if row["index"] == "3" and row["binMin"] == -1]
    assert top == sorted(top, reverse=True)
    assert len(top) == min(20, len(top))


def test_labels_are_rows_of_explanations(own_store, indexed, tmp_path):
    store = Store.open(own_store)
    store.add_notes([Note(dictionary=indexed[0], feature=3, text="x", author="anna")])
    store.add_explanations([Explanation(dictionary=indexed[0], feature=7, text="y",
                                        method="model", author="gemma")])  # fmt: skip
    to = tmp_path / "made"
    labelled = exchange.Selection(labelled=True)
    exchange.export(store, indexed[:1], to, format="neuronpedia", selection=labelled)
    human, machine = lines(source(to) / "explanations" / "batch-0.jsonl.gz")
    assert sorted(human) == sorted(machine) == sorted(EXPLANATION_KEYS)
    assert (human["index"], human["description"], human["authorId"]) == ("3", "x", "anna")
    assert (machine["index"], machine["description"]) == ("7", "y")
    assert machine["explanationModelName"] == "gemma"
    assert human["typeName"] is None
    assert len({human["id"], machine["id"]}) == 2


def test_an_edited_text_is_a_label_of_its_own(own_store, indexed, tmp_path):
    store = Store.open(own_store)
    store.add_notes([Note(dictionary=indexed[0], feature=3, text="x", author="anna")])
    to = tmp_path / "made"
    labelled = exchange.Selection(labelled=True)
    exchange.export(store, indexed[:1], to, format="neuronpedia", selection=labelled)
    (row,) = lines(source(to) / "explanations" / "batch-0.jsonl.gz")
    file = tmp_path / "edited.jsonl"
    name = {"modelId": "m", "layer": "2-x"}
    file.write_text(json.dumps(row | name | {"description": "edited"}) + "\n", "utf-8")
    exchange.import_labels(store, file, addresses=indexed[:1])
    assert [(e.text, e.method) for e in store.explanations()] == [("edited", "imported")]
    assert [n.text for n in store.notes()] == ["x"]


def test_a_published_export_brings_its_labels_and_a_comparison(own_store, indexed, tmp_path):
    store = Store.open(own_store)
    folder = tmp_path / "v1" / "gemma-2-2b" / "2-gemmascope-res-16k"
    rows = {
        "explanations": [
            {"id": "c1", "modelId": "gemma-2-2b", "layer": "2-gemmascope-res-16k", "index": "5",
             "description": "words about loops", "authorId": "u1", "embedding": [0.1] * 256,
             "typeName": "np_max-act-logits", "explanationModelName": "gemini-2.0-flash"},
            {"id": "c2", "modelId": "gemma-2-2b", "layer": "2-gemmascope-res-16k", "index": "6",
             "description": None},
        ],
        "features": [
            {"modelId": "gemma-2-2b", "layer": "2-gemmascope-res-16k", "index": str(f),
             "maxActApprox": 1.0, "frac_nonzero": density / 4, "pos_str": ["a"]}
            for f, density in enumerate(store.features(indexed[0])["density"].to_pylist()[:50])
        ],
    }  # fmt: skip
    for kind, some in rows.items():
        (folder / kind).mkdir(parents=True)
        with gzip.open(folder / kind / "batch-0.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in some)
    with pytest.raises(InputError, match=r"gemma-2-2b/2-gemmascope-res-16k.*index it first"):
        exchange.import_labels(store, tmp_path)
    done = exchange.import_labels(store, tmp_path, addresses=indexed[:1])
    assert (done.format, done.explanations, done.empty) == ("neuronpedia", 1, 1)
    (one,) = store.explanations(indexed[0], 5)
    assert (one.text, one.method, one.author) == (
        "words about loops", "imported", "gemini-2.0-flash",
    )  # fmt: skip
    assert one.detail["neuronpedia"]["typeName"] == "np_max-act-logits"
    (compared,) = done.compared
    assert compared.features == 50
    assert compared.rank_correlation == pytest.approx(1)
    assert compared.median_ratio == pytest.approx(1 / 4)


def read_safetensors(file):
    """The tensors of a file, by the published layout of safetensors alone."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    kinds = {"U16": "<u2", "U32": "<u4", "F16": "<f2", "I64": "<i8"}
    found = {}
    for name, one in header.items():
        if name != "__metadata__":
            first, last = (8 + length + n for n in one["data_offsets"])
            found[name] = np.frombuffer(raw[first:last], kinds[one["dtype"]]).reshape(one["shape"])
    return found


def read_as_delphi(folder):
    """Latent to its `(row, position, value)`s, as delphi's loader puts them together."""
    found, tokens, edges = {}, None, []
    for file in folder.glob("*.safetensors"):
        start, end = map(int, file.stem.split("_"))
        edges.append((start, end))
        data = read_safetensors(file)
        locations = data["locations"].astype(np.int64)
        locations[:, 2] += start
        tokens = data["tokens"]
        for (row, position, latent), value in zip(locations, data["activations"], strict=True):
            found.setdefault(int(latent), []).append((int(row), int(position), float(value)))
        assert data["activations"].dtype == np.float16
        assert data["locations"].dtype == np.uint16
    return found, tokens, sorted(edges)


@pytest.fixture(scope="module")
def delphi(store, indexed, tmp_path_factory):
    to = tmp_path_factory.mktemp("delphi") / "latents"
    exchange.export(store, indexed[:1], to, format="delphi")
    return to


def test_delphis_cache_reads_as_delphi_does(delphi, store, indexed):
    (module,) = delphi.iterdir()
    found, tokens, edges = read_as_delphi(module)
    borders = np.linspace(0, 384, 6).astype(int)
    assert edges == [(a, b - 1) for a, b in itertools.pairwise(borders)]
    kept, text = store.activations(indexed[0]), store.text(indexed[0])
    lengths = np.diff(text.offsets)
    assert tokens.shape == (len(lengths), lengths.max())
    for row, length in enumerate(lengths):
        begin = text.offsets[row]
        np.testing.assert_array_equal(tokens[row, :length], text.ids[begin : begin + length])
        assert len(set(tokens[row, length:].tolist())) <= 1
    for feature in range(384):
        places, values = kept.of(indexed[0], feature)
        rows = text.context_of(places)
        want = zip(rows, places - text.offsets[rows], values.astype(np.float16), strict=True)
        assert found.get(feature, []) == [(int(a), int(b), float(c)) for a, b, c in want]
    config = json.loads((module / "config.json").read_text("utf-8"))
    assert config["cache_ctx_len"] == tokens.shape[1]
    assert (config["n_splits"], config["model_name"]) == (5, "gemscope/miniature")
    for key in ("dataset_repo", "dataset_split", "dataset_name", "dataset_column", "batch_size",
                "n_tokens"):  # fmt: skip
        assert key in config


def test_delphis_cache_comes_back_as_activations(delphi, store, indexed, tmp_path):
    back = exchange.import_delphi(delphi, tmp_path / "kept")
    kept = store.activations(indexed[0])
    assert isinstance(back, Activations)
    assert back.text.key == kept.text.key
    assert back.addresses == indexed[:1] or back.addresses == [indexed[0]]
    mine, theirs = (one.entries(indexed[0], 0, 384) for one in (kept, back))
    np.testing.assert_array_equal(mine.offsets, theirs.offsets)
    np.testing.assert_array_equal(mine.places, theirs.places)
    np.testing.assert_array_equal(mine.values.astype(np.float16).astype(np.float32), theirs.values)
    with pytest.raises(InputError, match="exists"):
        exchange.import_delphi(delphi, tmp_path / "kept")


def strangers_cache(folder, tokens, locations, values, name="0_9"):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(
        {"tokens": tokens, "locations": locations, "activations": values},
        folder / f"{name}.safetensors",
    )
    return folder


def test_a_strangers_cache_is_read_with_its_first_token_not_counted(tmp_path):
    tokens = np.array([[2, 5, 6], [2, 7, 8]], dtype=np.int64)
    locations = np.array([[0, 1, 4], [1, 2, 4], [1, 1, 9]], dtype=np.uint32)
    folder = strangers_cache(
        tmp_path / "layers.3", tokens, locations, np.array([1.5, 2.0, 0.25], dtype=np.float16)
    )
    back = exchange.import_delphi(folder, tmp_path / "kept", "a/b")
    assert back.text.n_tokens == 4
    assert back.d_sae("a/b") == 10
    assert [x.tolist() for x in back.of("a/b", 4)] == [[1, 5], [1.5, 2.0]]
    assert [x.tolist() for x in back.of("a/b", 9)] == [[4], [0.25]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, x, v: (t, x + np.uint32(7), v), "features that are not 0 to 9"),
        (lambda t, x, v: (t, np.concatenate((x, x)), np.concatenate((v, v))), "two entries for"),
        (lambda t, x, v: (t, x[:2], v), "lacks locations"),
        (lambda t, x, v: (t, x, v * np.float16("nan")), "no numbers"),
        (lambda t, x, v: (t[0], x, v), "not rows of token ids"),
        (lambda t, x, v: (t[:1], x, v), "outside its 1 rows"),
    ],
)
def test_a_damaged_cache_is_refused(change, match, tmp_path):
    tokens = np.array([[2, 5, 6], [2, 7, 8]], dtype=np.int64)
    locations = np.array([[0, 1, 4], [1, 2, 4], [1, 1, 9]], dtype=np.uint32)
    made = change(tokens, locations, np.array([1.5, 2.0, 0.25], dtype=np.float16))
    folder = strangers_cache(tmp_path / "m", *made)
    with pytest.raises(InputError, match=match):
        exchange.import_delphi(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert exchange.validate(folder)[1]
    strangers_cache(folder, *made, name="11_12")
    with pytest.raises(InputError, match="missing or come twice"):
        exchange.read_delphi(folder)


def test_saedashboards_batches_are_compared(own_store, indexed, tmp_path):
    densities = Store.open(own_store).features(indexed[0])["density"].to_pylist()
    batch = {
        "model_id": "miniature", "layer": 2, "sae_set": "res", "sae_id_suffix": None,
        "features": [
            {"feature_index": f, "frac_nonzero": d, "n_prompts_total": 10, "dataset": "x",
             "activations": [{"bin_min": -1, "bin_max": 3.0, "bin_contains": -1,
                              "tokens": ["a", "b"], "values": [0.0, 3.0]}]}
            for f, d in enumerate(densities[:20])
        ],
    }  # fmt: skip
    file = tmp_path / "batch-0.json"
    file.write_text(json.dumps(batch))
    assert exchange.validate(file) == ("saedashboard", [])
    done = exchange.import_labels(Store.open(own_store), file, addresses=indexed[:1])
    assert done.compared[0].rank_correlation == pytest.approx(1)
    batch["features"][1]["feature_index"] = 0
    batch["features"][2]["frac_nonzero"] = 1.5
    file.write_text(json.dumps(batch))
    places = [str(p) for p in exchange.validate(file)[1]]
    assert places[0].startswith("features[1].feature_index: 0 is there twice")
    assert places[1].startswith("features[2].frac_nonzero: ")


def test_statistics_of_an_export_come_back_as_they_were(
    neuronpedia, store, own_store, indexed, tmp_path
):
    own = Store.open(own_store)
    done = exchange.import_labels(own, neuronpedia, statistics=True)
    rows = lines(source(neuronpedia) / "activations" / "batch-0.jsonl.gz")
    assert done.kept == {"features": len(FEATURES), "activations": len(rows)}
    mine = store.features(indexed[0]).to_pylist()
    kept = exchange.imported_features(own, indexed[0]).to_pylist()
    assert [row["feature"] for row in kept] == list(FEATURES)
    for row in kept:
        want = mine[row["feature"]]
        assert (row["density"], row["max"]) == (want["density"], want["max"])
        for name in ("promoted", "suppressed"):
            assert row[name] == [{"token": t["token"], "value": t["logit"]} for t in want[name]]
        assert row["together"] == [
            {"feature": p["feature"], "pearson": p["phi"]} for p in want["together"]
        ]
        assert row["neighbours"] == want["neighbours"]
        assert [b["height"] for b in row["histogram"]] == want["histogram"]["counts"]
        assert row["origin"].startswith("neuronpedia ")
    examples = exchange.imported_contexts(own, indexed[0], 3).to_pylist()
    for row, want in zip(examples, [r for r in rows if r["index"] == "3"], strict=True):
        assert (row["tokens"], row["values"]) == (want["tokens"], want["values"])
        bins = (want["binMin"], want["binMax"], want["binContains"])
        assert (row["low"], row["high"], row["share"]) == bins
    before = [exchange.imported_contexts(own, indexed[0]), own.features(indexed[0])]
    exchange.import_labels(own, neuronpedia, statistics=True)
    assert [exchange.imported_contexts(own, indexed[0]), own.features(indexed[0])] == before


def test_statistics_of_saedashboard_are_kept_apart(own_store, indexed, tmp_path, refused):
    own = Store.open(own_store)
    example = {"bin_min": -1, "bin_max": 3.0, "bin_contains": -1, "tokens": ["a", "b"],
               "values": [0.0, 3.0]}  # fmt: skip
    feature = {"feature_index": 5, "frac_nonzero": 0.25, "pos_str": ["x"], "pos_values": [1.5],
               "n_prompts_total": 7, "activations": [example, example]}  # fmt: skip
    batch = {"model_id": "m", "layer": 2, "sae_set": "res", "features": [feature]}
    file = tmp_path / "batch-0.json"
    file.write_text(json.dumps(batch))
    measured = own.features(indexed[0])
    done = exchange.import_labels(own, file, addresses=indexed[:1], statistics=True)
    assert done.kept == {"features": 1, "activations": 2}
    (kept,) = exchange.imported_features(own, indexed[0]).to_pylist()
    assert (kept["feature"], kept["density"]) == (5, 0.25)
    assert kept["promoted"] == [{"token": "x", "value": 1.5}]
    assert json.loads(kept["more"]) == {"n_prompts_total": 7}
    examples = exchange.imported_contexts(own, indexed[0], 5).to_pylist()
    assert [row["values"] for row in examples] == [[0.0, 3.0]] * 2
    assert exchange.imported_contexts(own, indexed[1]).num_rows == 0
    assert own.features(indexed[0]) == measured
    feature["feature_index"] = 384
    file.write_text(json.dumps(batch))
    asked = ("catalog", "import", own_store, file, "--as", indexed[0], "--statistics")
    refused(*asked, match="1 unknown feature: 384 of layer 2")
    example["values"] = [1.0]
    file.write_text(json.dumps(batch))
    refused(*asked, match="1 values of 2 tokens")
    assert exchange.imported_features(own, indexed[0]).num_rows == 1


def test_parquet_holds_the_rows_of_the_store(store, own_store, indexed, tmp_path):
    import pyarrow.parquet as pq

    mine = Store.open(own_store)
    mine.add_notes([Note(dictionary=indexed[0], feature=3, text="x", limitations=("a", "b"))])
    mine.add_explanations([Explanation(dictionary=indexed[0], feature=7, text="y",
                                       method="rule", author="r", detail={"k": [1]})])  # fmt: skip
    to = tmp_path / "made"
    exchange.export(
        mine, indexed, to, format="parquet", options=exchange.Options(vectors=True),
        selection=exchange.Selection(features=FEATURES),
    )  # fmt: skip
    table = pq.read_table(to / "features.parquet")
    want = [store.features(a).take(list(FEATURES)).to_pylist() for a in indexed]
    for row, own in zip(table.to_pylist(), want[0] + want[1], strict=True):
        assert row == {k: v for k, v in own.items() if k not in ("run", "words")}
    contexts = pq.read_table(to / "contexts.parquet").to_pylist()
    text = store.text(indexed[0])
    for row in contexts:
        length = text.offsets[row["context"] + 1] - text.offsets[row["context"]]
        assert len(row["tokens"]) == length
    vectors = pq.read_table(to / "vectors.parquet")
    np.testing.assert_array_equal(
        np.stack(vectors["vector"].to_numpy()),
        np.concatenate([store.vectors(a)[list(FEATURES)] for a in indexed]),
    )
    (note,) = pq.read_table(to / "notes.parquet").to_pylist()
    assert (note["text"], note["limitations"]) == ("x", ["a", "b"])
    assert exchange.validate(to) == ("parquet", [])
