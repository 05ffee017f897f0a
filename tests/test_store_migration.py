"""A store of layout 1 is moved forward, with all that is in it, whatever comes between."""

import json
import subprocess
import sys

import pytest

from gemscope import features
from gemscope.errors import InputError
from gemscope.features import Note, Store, _migrate, begin_output_scores, write_output_scores
from gemscope.features._tables import FEATURES, TABLES, VERSION


def made_old(folder):
    """The store as the first layout had it: without output scores."""
    table = Store.open(folder).table("features")
    table.drop_columns(["output_score"])
    (folder / "store.json").write_text('{"version": 1}')
    return folder


@pytest.fixture
def old(own_store, indexed):
    Store.open(own_store).add_notes([Note(dictionary=indexed[0], feature=3, text="kept")])
    return made_old(own_store)


def version(folder):
    return json.loads((folder / "store.json").read_text())["version"]


def contents(store):
    """Every row of every table, and the files beside them."""
    names = [*TABLES, *store.vector_tables()]
    rows = {n: store.table(n).to_arrow().to_pylist() for n in names}
    files = {
        f.relative_to(store.folder): f.read_bytes()
        for part in ("texts", "activations")
        for f in sorted((store.folder / part).rglob("*"))
        if f.is_file()
    }
    return rows, files


def test_every_version_has_its_step():
    assert sorted(_migrate.STEPS) == list(range(1, VERSION))


def test_all_else_is_as_it_was(old, small_store, indexed):
    before = contents(Store(old))
    store = Store.open(old)
    assert version(old) == VERSION
    rows, files = contents(store)
    assert {row.pop("output_score") for row in rows["features"]} == {None}
    assert (rows, files) == before
    # Nothing tells it from a store of today.
    assert store.table("features").schema == FEATURES
    assert store.notes(indexed[0], 3)[0].text == "kept"
    fresh = Store.open(small_store)
    assert store.features(indexed[1]).equals(fresh.features(indexed[1]))
    for query in ("self", "return"):
        found, wanted = (features.search(s, query) for s in (store, fresh))
        assert [f.feature for f in found] == [f.feature for f in wanted]
    moved = store.table("features").version
    Store.open(old)
    assert Store.open(old).table("features").version == moved, "it is done once"


def test_reading_verbs_move_it_too(old, indexed, command):
    code, out, _ = command("feature", old, f"{indexed[0]}/3", "--json")
    assert code == 0
    assert json.loads(out)["output_score"] is None
    assert version(old) == VERSION


def test_who_reads_it_meanwhile_goes_on(old, indexed):
    reader = Store(old)
    before = reader.feature(indexed[0], 3)
    Store.open(old)
    after = reader.feature(indexed[0], 3)
    assert after.pop("output_score") is None
    assert after == before


def test_rows_of_an_older_gemscope_that_still_writes(old, indexed):
    writer = Store(old)
    rows = writer.features(indexed[0]).slice(0, 5)
    Store.open(old)
    writer.table("features").add(rows)
    found = Store.open(old).features(indexed[0])
    assert len(found) == 384 + 5
    assert found["output_score"].null_count == 384 + 5


def test_several_processes_open_it_at_once(old):
    script = f"from gemscope.features import Store; print(len(Store.open({str(old)!r}).figures()))"
    opening = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [p.communicate(timeout=120)[0] for p in opening] == ["2\n"] * 4
    assert Store.open(old).table("features").schema == FEATURES


def test_a_step_that_was_interrupted_is_done_again(old, indexed, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_migrate, "write_whole", crash)
        with pytest.raises(KeyboardInterrupt):
            Store.open(old)
    assert version(old) == 1
    assert "output_score" in Store(old).table("features").schema.names
    assert len(Store.open(old).features(indexed[0])) == 384
    assert version(old) == VERSION


def test_a_store_that_cannot_be_written_is_told(old, refused, monkeypatch, indexed):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(_migrate, "WeakFileLock", denied)
        refused("feature", old, f"{indexed[0]}/3",
                match=r"older layout, .* cannot be written .*denied.*copy it")  # fmt: skip
    assert version(old) == 1
    with monkeypatch.context() as patched:
        patched.setattr(_migrate, "write_whole", denied)
        refused("search", old, "self", match="cannot be written")
    assert len(Store.open(old).dictionaries()) == 2


def test_damage_and_strange_versions_are_told(old, refused):
    for said in ('{"version": true}', '{"version": 0}', '{"version": "1"}', '{"other": 1}', "[]"):
        (old / "store.json").write_text(said)
        refused("search", old, "self", match="no catalog store")
    (old / "store.json").write_text('{"version": 1}')
    (old / "features.lance").rename(old / "elsewhere")
    refused("search", old, "self", match="table features .* missing or damaged")


def test_a_beginning_that_an_older_gemscope_left_is_finished(tmp_path):
    import lancedb
    import pyarrow as pa

    folder = tmp_path / "store"
    before = pa.schema([f for f in FEATURES if f.name != "output_score"])
    lancedb.connect(str(folder)).create_table("features", schema=before)
    assert Store.create(folder).table("features").schema == FEATURES
    assert version(folder) == VERSION


def test_writing_scores_touches_the_rows_of_one_run_alone(own_store, indexed):
    store = Store.open(own_store)
    run = store.dictionary(indexed[0])["run"]
    other = store.features(indexed[1])
    before = store.features(indexed[0]).drop_columns(["output_score"])
    write_output_scores(store, indexed[0], run, [7, 3, 9], [0.25, -0.5, float("nan")])
    write_output_scores(store, indexed[0], run, [], [])
    write_output_scores(store, indexed[0], "a run that is over", [8], [0.9])
    rows = store.features(indexed[0])
    scores = rows["output_score"].to_pylist()
    assert (scores[3], scores[7], scores[8], scores[9]) == (-0.5, 0.25, None, None)
    assert rows.drop_columns(["output_score"]).equals(before)
    assert store.features(indexed[1]).equals(other)
    store.refresh()
    among = features.Among(where="output_score > 0.1")
    assert [(f.address, f.feature) for f in features.search_where(store, among)] == [
        (indexed[0], 7)
    ]


def test_scores_of_one_column_are_of_one_kind(own_store, indexed):
    store = Store.open(own_store)
    known = store.dictionary(indexed[0])
    fires = (store.features(indexed[0], ["max"])["max"].to_numpy() > 0).sum()
    left = begin_output_scores(store, indexed[0], {"strength": 10.0, "prompts": ("a",)})
    assert len(left) == fires
    write_output_scores(store, indexed[0], known["run"], left[:5], [0.5] * 5)
    again = begin_output_scores(store, indexed[0], {"strength": 10.0, "prompts": ["a"]})
    assert again == left[5:]
    with pytest.raises(InputError, match=r"measured with other strength; .* --force"):
        begin_output_scores(store, indexed[0], {"strength": 5.0, "prompts": ["a"]})
    anew = begin_output_scores(store, indexed[0], {"strength": 5.0, "prompts": ["a"]}, again=True)
    assert anew == left
    assert store.features(indexed[0])["output_score"].null_count == 384
    told = store.dictionary(indexed[0])
    assert told.pop("output_scores") == {"strength": 5.0, "prompts": ["a"]}
    assert told == known
    assert "output_scores" not in store.dictionary(indexed[1])


def test_a_condition_on_scores_that_nobody_measured(small_store, refused):
    refused("search", small_store, "--where", "output_score > 0.1",
            match="no output score .* measured yet; gemscope output-score")  # fmt: skip
    store = Store.open(small_store)
    assert len(features.search_where(store, features.Among(where="output_score IS NULL"))) == 20
