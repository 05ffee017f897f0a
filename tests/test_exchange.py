"""The JSON catalog: its keys, its round trips, how labels go into a store, how catalogs merge."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemscope import exchange
from gemscope.errors import InputError
from gemscope.features import Explanation, Note, Score, Store

KEYS = [
    "layer", "feature_index", "description", "activation_pattern", "related_features",
    "manual_interpretation",
]  # fmt: skip
LABELLED = exchange.Selection(labelled=True)
SOME = exchange.Selection(features=tuple(range(40)))
QUIET = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def labels(a, b):
    """Labels of every kind on a few features of two dictionaries."""
    scores = (
        Score(name="detection", value=0.875, low=0.75, high=0.95, null=0.5, n=40, failures=1,
              detail={"precision": 0.9}),
        Score(name="fuzzing", value=0.6, low=0.5, high=0.7),
    )  # fmt: skip
    said = {"created": "2026-01-02T03:04:05+00:00"}
    explanations = [
        Explanation(dictionary=a, feature=3, text="the keyword def", method="rule", author="rules",
                    scores=(replace(scores[1], name="rule", value=0.9),), **said),
        Explanation(dictionary=a, feature=3, text="函数 definitions \u2028 é", method="model",
                    author="m", scores=scores, detail={"raw": "...", "n": [1, 2.5, None]}, **said),
        Explanation(dictionary=a, feature=7, text=" a colon\nafter else ", method="imported",
                    author="x", **said),
        Explanation(dictionary=b, feature=0, text="<b>bold</b> \"quoted\" \\", method="model",
                    author="m", **said),
    ]  # fmt: skip
    notes = [
        Note(dictionary=a, feature=3, text="fires on def", author="anna", confidence=0.8,
             limitations=("not in comments", "rare"), **said),
        Note(dictionary=b, feature=5, text="unsure", author="", **said),
    ]  # fmt: skip
    return explanations, notes


@pytest.fixture(scope="session")
def labelled_store(small_store, indexed, tmp_path_factory):
    """`small_store` with labels. Read only."""
    import shutil

    folder = shutil.copytree(small_store, tmp_path_factory.mktemp("labelled") / "store")
    store, (explanations, notes) = Store.open(folder), labels(*indexed)
    store.add_explanations(explanations)
    store.add_notes(notes)
    return folder


def said(folder, address=None):
    """Everything said in a store, in any order."""
    store = Store.open(folder)
    both = [*store.explanations(address), *store.notes(address)]
    return sorted((json.dumps(one.json(), sort_keys=True) for one in both), key=str)


def export(folder, addresses, to, format="catalog", **kwargs):
    return exchange.export(Store.open(folder), addresses, to, format=format, **kwargs)


def bring(folder, path, **kwargs):
    return exchange.import_labels(Store.open(folder), path, **kwargs)


def written(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def entry(feature=3, layer=2, **more):
    """An entry of a catalog as scripts of the field write it."""
    return {
        "layer": layer, "feature_index": feature, "description": "loops over lists",
        "activation_pattern": {"threshold": 1.5, "max_activation": 9.0,
                               "typical_contexts": ["for x in xs:"]},
        "related_features": [{"layer": layer, "index": 9, "relationship": "sub-concept"}],
        "manual_interpretation": {"confidence": 0.7, "notes": "seen in 20 files",
                                  "known_limitations": ["not in comprehensions"]},
    } | more  # fmt: skip


def test_an_entry_has_the_keys_of_the_field_and_what_was_measured(
    labelled_store, indexed, tmp_path
):
    made = export(labelled_store, indexed[:1], tmp_path / "c.json")
    value = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert value["format"] == "gemscope-catalog"
    assert value["version"] == 1
    assert made.features == len(value["features"]) == 384
    assert made.lost
    store = Store.open(labelled_store)
    rows = store.features(indexed[0]).to_pylist()
    ids, offsets = store.text(indexed[0]).ids, store.text(indexed[0]).offsets
    tokenizer = store.tokenizer(indexed[0])
    for one, row in zip(value["features"], rows, strict=True):
        assert [key for key in one if key in KEYS] == KEYS
        assert (one["layer"], one["feature_index"]) == (2, row["feature"])
        pattern = one["activation_pattern"]
        assert list(pattern) == ["threshold", "max_activation", "typical_contexts"]
        assert pattern["threshold"] == row["threshold"]
        assert pattern["max_activation"] == row["max"]
        assert len(pattern["typical_contexts"]) == min(5, row["documents"])
        for related in one["related_features"]:
            assert list(related) == ["layer", "index", "relationship"]
            assert related["relationship"] in exchange.RELATIONSHIPS
        interpretation = list(one["manual_interpretation"])
        assert interpretation[:3] == ["confidence", "notes", "known_limitations"]
    peak = next(c for c in store.contexts(indexed[0], 3) if c["group"] == "top")
    whole = tokenizer.decode(ids[offsets[peak["context"]] : offsets[peak["context"] + 1]])
    assert value["features"][3]["activation_pattern"]["typical_contexts"][0] in whole


def test_related_features_follow_the_counts(labelled_store, indexed, tmp_path):
    export(labelled_store, indexed[:1], tmp_path / "c.json")
    value = json.loads((tmp_path / "c.json").read_text("utf-8"))["features"]
    kept = Store.open(labelled_store).activations(indexed[0])
    fires = [set(kept.of(indexed[0], f)[0].tolist()) for f in range(384)]
    told = [(f["feature_index"], r["index"], r["relationship"])
            for f in value for r in f["related_features"]]  # fmt: skip
    assert told
    for one, other, kind in told:
        both, a, b = fires[one] & fires[other], fires[one], fires[other]
        if kind == "higher-abstraction":
            assert len(both) >= 0.9 * len(a)
            assert len(both) <= 0.5 * len(b)
        if kind == "sub-concept":
            assert len(both) >= 0.9 * len(b)
            assert len(both) <= 0.5 * len(a)
        if kind == "fires together":
            assert both
    turned = {"higher-abstraction": "sub-concept", "sub-concept": "higher-abstraction"}
    listed = {(a, b): kind for a, b, kind in told}
    for (a, b), kind in listed.items():
        if (b, a) in listed and kind in turned:
            assert listed[b, a] == turned[kind]


def test_a_human_is_the_description_then_the_best_score(labelled_store, indexed, tmp_path):
    export(labelled_store, indexed, tmp_path / "c.json", selection=SOME)
    found = {
        (f["dictionary"], f["feature_index"]): f
        for f in json.loads((tmp_path / "c.json").read_text("utf-8"))["features"]
    }
    assert found[indexed[0], 3]["description"] == "fires on def"
    assert found[indexed[0], 3]["manual_interpretation"] == {
        "confidence": 0.8, "notes": "fires on def",
        "known_limitations": ["not in comments", "rare"], "author": "anna",
    }  # fmt: skip
    assert found[indexed[0], 7]["description"] == " a colon\nafter else "
    assert found[indexed[1], 5]["description"] == "unsure"


@pytest.mark.parametrize("format", ["catalog", "neuronpedia", "parquet"])
def test_labels_come_back_exactly_and_twice_changes_nothing(
    format, labelled_store, own_store, indexed, tmp_path
):
    to = tmp_path / ("c.json" if format == "catalog" else "made")
    export(labelled_store, indexed, to, format, selection=LABELLED)
    done = bring(own_store, to)
    assert (done.explanations, done.notes, done.already, done.format) == (4, 2, 0, format)
    assert said(own_store) == said(labelled_store)
    again = bring(own_store, to)
    assert (again.explanations, again.notes, again.already) == (0, 0, 6)
    assert said(own_store) == said(labelled_store)


def test_a_catalog_written_again_is_the_same(labelled_store, own_store, indexed, tmp_path):
    export(labelled_store, indexed, tmp_path / "a.json", selection=SOME)
    bring(own_store, tmp_path / "a.json")
    export(own_store, indexed, tmp_path / "b.json", selection=SOME)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_bare_list_has_no_other_keys_and_adds_nothing_to_its_store(
    labelled_store, indexed, tmp_path
):
    import shutil

    own = shutil.copytree(labelled_store, tmp_path / "own")
    to = tmp_path / "bare.json"
    export(own, indexed[:1], to, selection=SOME, options=exchange.Options(bare=True))
    value = json.loads(to.read_text("utf-8"))
    assert all(list(one) == KEYS for one in value)
    before = said(own)
    done = bring(own, to, addresses=indexed[:1])
    assert (done.explanations, done.notes) == (0, 0)
    assert said(own) == before


def test_a_strangers_catalog_comes_back_whole(own_store, indexed, tmp_path):
    theirs = [
        entry(3, tags=["loop"], source={"by": "script", "n": 2}),
        entry(4, manual_interpretation={"confidence": "high", "notes": "ok",
                                        "known_limitations": "none known", "date": "2024"}),
        entry(5, manual_interpretation=None, description="only a label"),
        {"layer": 2, "feature_index": 6, "description": ""},
    ]  # fmt: skip
    path = written(tmp_path / "theirs.json", {"features": theirs})
    done = bring(own_store, path, addresses=[indexed[0]], author="carl")
    assert (done.explanations, done.notes, done.empty) == (3, 2, 1)
    store = Store.open(own_store)
    assert {(e.method, e.author) for e in store.explanations()} == {("imported", "carl")}
    assert store.notes(indexed[0], 3)[0].confidence == 0.7
    assert store.notes(indexed[0], 3)[0].limitations == ("not in comprehensions",)
    to = tmp_path / "ours.json"
    export(own_store, indexed[:1], to, selection=LABELLED)
    value = json.loads(to.read_text("utf-8"))["features"]
    for mine, back in zip(theirs, value, strict=False):
        assert back["description"] == mine["description"]
        for key, want in (mine["manual_interpretation"] or {}).items():
            assert back["manual_interpretation"][key] == want
        assert mine["related_features"][0] in back["related_features"]
    assert value[0]["tags"] == ["loop"]
    assert value[0]["source"] == {"by": "script", "n": 2}
    assert bring(own_store, to).explanations == 0


def test_several_layers_of_one_list_go_to_their_dictionaries(own_store, indexed, tmp_path):
    path = written(tmp_path / "c.json", [entry(3, 2), entry(3, 3, description="other")])
    bring(own_store, path, addresses=indexed)
    store = Store.open(own_store)
    assert [e.text for e in store.explanations(indexed[0])] == ["loops over lists"]
    assert [e.text for e in store.explanations(indexed[1])] == ["other"]


def test_no_import_changes_what_a_human_wrote(labelled_store, indexed, tmp_path):
    import shutil

    own = shutil.copytree(labelled_store, tmp_path / "own")
    human = Store.open(own).notes()
    other = Note(dictionary=indexed[0], feature=3, text="other", author="anna", confidence=0.1)
    donor = shutil.copytree(own, tmp_path / "donor")
    Store.open(donor).add_notes([other])
    for kind in ("catalog", "neuronpedia", "parquet"):
        to = tmp_path / f"{kind}.json"
        export(donor, indexed, to, kind, selection=LABELLED)
        bring(own, to)
        after = Store.open(own).notes()
        assert [n for n in after if n in human] == human
    path = written(tmp_path / "anna.json", [entry(3)])
    bring(own, path, addresses=indexed[:1], author="anna")
    after = Store.open(own).notes()
    assert len(after) == len(human) + 2
    assert [n for n in after if n in human] == human


def test_a_label_that_is_there_gets_scores_and_never_loses_them(own_store, indexed, tmp_path):
    (_, scored, *_), _ = labels(*indexed)
    bare = replace(scored, scores=())
    store = Store.open(own_store)
    store.add_explanations([bare])
    plain, rich = tmp_path / "plain.json", tmp_path / "rich.json"
    export(own_store, indexed[:1], plain, selection=LABELLED)
    store.add_explanations([scored])
    export(own_store, indexed[:1], rich, selection=LABELLED)
    bring(own_store, plain)
    assert store.explanations()[0].scores == scored.scores
    store.add_explanations([bare])
    assert bring(own_store, rich).explanations == 1
    assert store.explanations()[0].scores == scored.scores


texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(
    lambda t: t.strip() and t.isprintable()
)
entries = st.builds(
    lambda f, d, n, c, k: entry(
        f, description=d, manual_interpretation={"confidence": c, "notes": n,
                                                 "known_limitations": k}),
    st.integers(0, 3), st.none() | texts, st.none() | texts,
    st.none() | st.floats(0, 1) | st.just("high"), st.none() | st.lists(texts, max_size=2),
)  # fmt: skip
catalogs = st.lists(entries, max_size=4, unique_by=lambda e: e["feature_index"])


def merged(folder, *values):
    files = [
        written(folder / f"{name}.json", value)
        for name, value in zip("abcdef", values, strict=False)
    ]
    to = folder / "merged.json"
    done = exchange.merge_catalogs(files, to, force=True)
    return json.loads(to.read_text("utf-8")), done


def kept_texts(value):
    """Every text that a catalog says of a feature, by feature."""
    found = {}
    for one in value:
        here = found.setdefault(one["feature_index"], set())
        human = one.get("manual_interpretation") or {}
        here |= {one.get("description"), human.get("notes")}
        here |= {e["text"] for e in one.get("explanations", [])}
        here |= {n["text"] for n in one.get("notes", [])}
    return {f: {t for t in here if t and t.strip()} for f, here in found.items()}


@QUIET
@given(catalogs, catalogs)
def test_merging_drops_no_text_and_twice_changes_nothing(tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("merge")
    value, _ = merged(folder, one, other)
    back = kept_texts(value["features"])
    for source in (one, other):
        for feature, want in kept_texts(source).items():
            assert want <= back[feature]
    assert [e["feature_index"] for e in value["features"]] == list(
        dict.fromkeys(e["feature_index"] for e in [*one, *other])
    )
    again, done = merged(folder, value, value)
    assert again["features"] == value["features"]
    third, _ = merged(folder, value, other)
    assert third["features"] == value["features"]
    assert exchange.validate(folder / "merged.json") == ("catalog", [])
    assert done.features == len(value["features"])


def test_a_human_wins_over_a_machine_in_either_order(tmp_path):
    human = [entry(1, description="loops")]
    machine = [entry(1, description="keyword for", manual_interpretation=None)]
    for pair in itertools.permutations([human, machine]):
        value, done = merged(tmp_path, *pair)
        (one,) = value["features"]
        assert one["description"] == "loops"
        assert one["manual_interpretation"]["notes"] == "seen in 20 files"
        assert "keyword for" in {e["text"] for e in one["explanations"]}
        (conflict,) = done.conflicts
        assert conflict.what == "a human's word wins over a description"
        assert {conflict.kept, conflict.other} == {"loops", "keyword for"}
        assert value["conflicts"][0]["other"] == conflict.other


def test_two_humans_are_both_kept_with_their_names(tmp_path, own_store, indexed):
    def human(name, text, confidence):
        return [entry(1, description="", manual_interpretation={
            "author": name, "notes": text, "confidence": confidence,
            "known_limitations": [f"says {name}"]})]  # fmt: skip

    value, done = merged(tmp_path, human("anna", "loops", 0.9), human("ben", "lists", 0.4))
    assert [c.what for c in done.conflicts] == ["two human interpretations, both kept"]
    (one,) = value["features"]
    assert one["manual_interpretation"] == {
        "notes": "anna: loops\n\nben: lists", "confidence": 0.4, "author": "anna, ben",
        "known_limitations": ["says anna", "says ben"],
    }  # fmt: skip
    bring(own_store, tmp_path / "merged.json", addresses=indexed[:1])
    assert {(n.author, n.text) for n in Store.open(own_store).notes()} == {
        ("anna", "loops"), ("ben", "lists"),
    }  # fmt: skip


def test_other_differences_are_told(tmp_path):
    pattern = {"threshold": 2.0, "max_activation": 12.0, "typical_contexts": ["while True:"]}
    _, done = merged(tmp_path, [entry(1, tag=1)], [entry(1, tag=2, activation_pattern=pattern)])
    assert sorted(c.what for c in done.conflicts) == ["tag differs", "threshold differs"]
    (one,) = json.loads((tmp_path / "merged.json").read_text("utf-8"))["features"]
    assert one["activation_pattern"] == {
        "threshold": 1.5, "max_activation": 12.0,
        "typical_contexts": ["for x in xs:", "while True:"],
    }  # fmt: skip
    assert not merged(tmp_path, [entry(1)], [entry(1)])[1].conflicts


def test_a_list_without_a_name_joins_the_one_dictionary_there_is(tmp_path):
    named = {"dictionary": "a/b", "features": [entry(1)]}
    value, done = merged(tmp_path, named, [entry(1, description="x"), entry(2)])
    assert {e["dictionary"] for e in value["features"]} == {"a/b"}
    assert "taken to be of a/b" in done.assumed[0]
    other = {"dictionary": "a/c", "features": [entry(1)]}
    with pytest.raises(InputError, match=r"does not say of which dictionary of layer 2"):
        merged(tmp_path, named, other, [entry(1)])


@pytest.mark.parametrize("feature", [3, 200])
def test_the_best_explanation_has_the_highest_score(feature, own_store, indexed, tmp_path):
    store = Store.open(own_store)
    for text, value in (("weak", 0.6), ("strong", 0.9), ("middling", 0.7)):
        score = (Score(name="detection", value=value, low=value, high=value),)
        said = {"method": "model", "author": text, "scores": score}
        store.add_explanations(
            [Explanation(dictionary=indexed[0], feature=feature, text=text, **said)]
        )
    to = tmp_path / "c.json"
    export(own_store, indexed[:1], to, selection=exchange.Selection(features=(feature,)))
    assert json.loads(to.read_text("utf-8"))["features"][0]["description"] == "strong"


@pytest.mark.slow
def test_layers_of_one_dictionary_are_sources_of_their_own(miniature, tmp_path):
    from gemscope import features, hub

    address = "miniature/clt/width_384_l0_medium_affine"
    known = hub.obtain(hub.locate(address))
    subject = features.Subject(
        address=address, sae=hub.build(known), digest=hub.digest(known), nominal_l0=known.l0
    )
    store = Store.create(tmp_path / "store")
    features.index(
        miniature, [subject], features.sources_of(tokens=1_500), store,
        features.Settings(tokens=1_500, context=128), model_name="miniature",
    )  # fmt: skip
    rows = store.features(address).to_pylist()
    feature = next(r["feature"] for r in rows if r["layer"] == 2 and r["count"] > 20)
    store.add_notes([Note(dictionary=address, feature=feature, text="here")])
    to = tmp_path / "np"
    export(tmp_path / "store", [address], to, "neuronpedia", selection=LABELLED)
    assert [folder.name[:2] for folder in to.glob("v1/*/*")] == ["2-"]
    before = said(tmp_path / "store")
    store.table("notes").delete("true")
    done = bring(tmp_path / "store", to, statistics=True)
    assert said(tmp_path / "store") == before
    assert done.compared[0].median_ratio == 1
    (kept,) = exchange.imported_features(store, address).to_pylist()
    assert kept["feature"] == feature
    assert {n["feature"] for n in kept["neighbours"]} <= {
        r["feature"] for r in rows if r["layer"] == 2
    }
