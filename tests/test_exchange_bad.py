"""Bad files are refused in one sentence, with nothing written; targets are whole or as before."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from gemscope import exchange
from gemscope.errors import InputError
from gemscope.exchange import _files
from gemscope.features import Explanation, Note, Store

ROW = {"modelId": "m", "layer": "2-x", "index": "3", "description": "d"}
GOOD = {"layer": 2, "feature_index": 3, "description": "d"}


def counted(folder):
    store = Store.open(folder)
    return len(store.explanations()) + len(store.notes())


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([GOOD | {"layer": "2"}], "[0].layer: input should be a valid integer"),
        ([GOOD | {"layer": True}], "[0].layer: input should be a valid integer"),
        ([GOOD, GOOD | {"feature_index": -1}], "[1].feature_index: input should be greater"),
        ([GOOD | {"feature_index": 10**30}], "[0].feature_index: input should be less"),
        ([GOOD | {"feature_index": 1.0}], "[0].feature_index: input should be a valid integer"),
        ([{"layer": 2}], "[0].feature_index: field required"),
        ([GOOD, 5], "[1]: a feature is an object"),
        ([GOOD, GOOD], "[1].feature_index: layer 2 feature 3 is there twice, first as [0]"),
        ([GOOD | {"description": 5}], "[0].description: input should be a valid string"),
        (
            [GOOD | {"manual_interpretation": {"confidence": 1.5}}],
            "[0].manual_interpretation.confidence",
        ),
        (
            {"features": [GOOD | {"related_features": [{"layer": 2, "index": 4}]}]},
            "features[0].related_features[0].relationship: field required",
        ),
        (
            [GOOD | {"activation_pattern": {"threshold": "big"}}],
            "[0].activation_pattern.threshold: input should be a valid number",
        ),
    ],
)
def test_a_catalogs_problems_have_their_places(content, problem, file, command, own_store, indexed):
    path = file(json.dumps(content), "c.json")
    code, out, err = command("catalog", "validate", path)
    assert (code, err) == (2, "")
    assert out.startswith(problem)
    code, out, _ = command("catalog", "validate", path, "--json")
    found = json.loads(out)["problems"]
    assert (code, f"{found[0]['place']}: {found[0]['problem']}"[: len(problem)]) == (2, problem)
    code, out, err = command("catalog", "import", own_store, path, "--as", indexed[0])
    assert (code, out) == (2, "")
    assert problem in err
    assert err.count("\n") == 1
    assert counted(own_store) == 0


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        ("{", "not valid JSON: line 1"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"layer": 2, "layer": 3}]', "has the key 'layer' twice"),
        ('[{"layer": NaN}]', "NaN is no JSON number"),
        ('[{"layer": -Infinity}]', "-Infinity is no JSON number"),
        ('[{"x": 1e999}]', "1e999 is too large a number"),
        (f'[{{"x": {"9" * 5000}}}]', "is not valid JSON"),
        (b'[{"description": "\xff"}]', "byte 18 is not UTF-8"),
        ('{"format": "gemscope-catalog", "version": 2, "features": []}', "has version 2"),
        ('{"format": "gemscope-catalog", "features": []}', "has version None"),
        ('{"features": {}}', "is no catalog"),
        ("5", "is no catalog"),
        (gzip.compress(b"[]" + b" " * 100, mtime=0)[:-12], "cut short|cannot be unpacked"),
    ],
)
def test_what_is_no_catalog_is_told(content, match, file, refused, own_store, command):
    path = file(content, "c.json")
    refused("catalog", "import", own_store, path, match=match)
    assert counted(own_store) == 0
    code, out, _ = command("catalog", "validate", path, "--format", "catalog")
    assert code == 2
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([ROW, ROW | {"index": "three"}], "line 2, index"),
        ([ROW, ROW | {"index": -1}], "line 2, index"),
        ([ROW, ROW | {"index": "9999999999"}], "line 2: index 9999999999 is beyond"),
        ([ROW, {"modelId": "m", "layer": "2-x", "index": "1"}], "line 2, description"),
        ([ROW, ROW | {"layer": ""}], "line 2, layer"),
        ([ROW, 5], "line 2, "),
    ],
)
def test_rows_of_neuronpedia_have_their_places(rows, place, file, command, own_store, indexed):
    path = file(jsonl(*rows), "x.jsonl")
    code, out, _ = command("catalog", "validate", path)
    assert code == 2
    assert out.startswith(place)
    code, out, err = command("catalog", "import", own_store, path, "--as", indexed[0])
    assert (code, out) == (2, "")
    assert place in err
    assert counted(own_store) == 0


def test_unknown_features_are_named_and_nothing_is_written(
    file, refused, command, own_store, indexed
):
    rows = [GOOD | {"feature_index": f} for f in (1, *range(384, 391))]
    path = file(json.dumps(rows), "c.json")
    refused(
        "catalog", "import", own_store, path, "--as", indexed[0],
        match=r"7 unknown features: 384 of layer 2 \(\[1\]\), .*388.*, \.\.\.; .* has 0 to 383",
    )  # fmt: skip
    assert counted(own_store) == 0
    code, out, _ = command(
        "catalog", "import", own_store, path, "--as", indexed[0], "--skip-unknown", "--json"
    )
    assert code == 0
    done = json.loads(out)
    assert (done["explanations"], done["skipped"]) == (1, 7)
    refused("catalog", "import", own_store, path, "--as", indexed[1], match="8 unknown features")


def test_the_dictionary_must_be_known(file, refused, own_store, indexed):
    path = file(json.dumps([GOOD]), "c.json")
    refused("catalog", "import", own_store, path, match="does not say which dictionary.* --as")
    named = file(json.dumps({"dictionary": "a/b", "features": [GOOD]}), "d.json")
    refused("catalog", "import", own_store, named, match="is of a/b, .* index it first")
    refused("catalog", "import", own_store, path, "--as", "x/y", match="x/y is not indexed")
    both = file(json.dumps([GOOD | {"dictionary": "a"}, GOOD | {"dictionary": "b"}]), "e.json")
    refused("catalog", "import", own_store, both, "--as", indexed[0], match="of 2 dictionaries")
    refused("catalog", "import", own_store, path.parent / "none", match="does not exist")
    refused("catalog", "import", own_store, path, "--format", "csv", match="no format 'csv'")


def test_stores_that_cannot_be_read_are_told(file, refused, small_store, tmp_path, indexed):
    path = file(json.dumps([GOOD]), "c.json")
    refused("catalog", "import", tmp_path / "none", path, match="no catalog store")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "store.json").write_text('{"version": 99}')
    refused("catalog", "import", newer, path, match="version 99.*update gemscope")
    refused("catalog", "export", newer, "x", "--to", tmp_path / "y", match="version 99")
    half = tmp_path / "half"
    half.mkdir()
    (half / "store.json").write_text('{"version": 1}')
    refused("catalog", "export", half, "x", "--to", tmp_path / "y", match="missing or damaged")
    assert not (tmp_path / "y").exists()


def test_exports_that_cannot_be_made_are_told(refused, small_store, indexed, tmp_path):
    to = tmp_path / "out"

    def told(*arguments, match):
        refused("catalog", "export", small_store, *arguments, match=match)
        assert not to.exists()

    told("a/b", "--to", to, match="a/b is not indexed")
    told(indexed[0], "--to", to, "--format", "csv", match="no format 'csv' to write")
    told(indexed[0], "--to", to, "--features", "1,x", match="no features '1,x'")
    told(indexed[0], "--to", to, "--features", "384", match="no feature 384")
    told(indexed[0], "--to", to, "--features", "0-99999999", match="too many features")
    told(indexed[0], "--to", to, "--min-density", "2", match="no feature of .* is left")
    told(indexed[0], "--to", to, "--labelled", match="no feature of .* is left")
    told(indexed[0], "--to", to, "--window", "-1", match="a window of -1 tokens")
    told(indexed[0], "--to", to, "--splits", "0", match="0 splits cannot be written")


def test_delphi_needs_kept_activations(refused, own_store, indexed, tmp_path):
    import shutil

    shutil.rmtree(own_store / "activations")
    asked = ("catalog", "export", own_store, indexed[0], "--format", "delphi", "--to")
    refused(*asked, tmp_path / "out", match="were not kept; .* --keep-activations")
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_needs_force(refused, command, small_store, indexed, tmp_path):
    few = ("--features", "3", "--to")
    for kind, to in (("catalog", tmp_path / "c.json"), ("neuronpedia", tmp_path / "np"),
                     ("delphi", tmp_path / "de"), ("parquet", tmp_path / "pq")):  # fmt: skip
        asked = ("catalog", "export", small_store, indexed[0], "--format", kind, *few, to)
        assert command(*asked)[0] == 0
        refused(*asked, match="exists; choose another --to, or give --force")
        assert command(*asked, "--force")[0] == 0
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    asked = ("catalog", "export", small_store, indexed[0], "--format", "parquet", *few, mine)
    refused(*asked, "--force", match="not a folder that an export wrote")
    assert (mine / "thesis.tex").read_text() == "years"


def test_a_bomb_is_refused_before_the_memory_is_full(monkeypatch, file, refused, own_store):
    monkeypatch.setattr(_files, "LARGEST_FILE", 2**22)
    monkeypatch.setattr(_files, "LARGEST_DOCUMENT", 2**22)
    monkeypatch.setattr(_files, "LONGEST_LINE", 2**21)
    nothing = gzip.compress(b"\n" * 2**26)
    assert len(nothing) < 2**17
    refused(
        "catalog", "import", own_store, file(nothing, "a.jsonl.gz"), match="more than 4,194,304"
    )
    spaces = gzip.compress(b"[" + b" " * 2**26)
    refused("catalog", "import", own_store, file(spaces, "a.json"), match="more than 4,194,304")
    long = gzip.compress(b'{"description": "' + b"x" * (2**22 - 2**20))
    refused("catalog", "import", own_store, file(long, "b.jsonl.gz"), match="line 1 .*is longer")
    two = gzip.compress(jsonl(ROW).encode()) + gzip.compress(jsonl(ROW).encode())
    assert exchange.validate(file(two, "two.jsonl.gz"))[1] == []


def test_control_characters_and_halves_do_not_come_in(file, own_store, indexed):
    text = "a\x1b[31mred\x00 \ud83d\u202eb\nc\td"
    path = file(json.dumps([GOOD | {"description": text}]), "c.json")
    store = Store.open(own_store)
    exchange.import_labels(store, path, addresses=indexed[:1], author="x\x07y")
    (one,) = store.explanations()
    assert one.text == "a[31mred \ufffdb\nc\td"
    assert one.author == "xy"


def test_what_json_cannot_say_is_null(own_store, indexed, tmp_path):
    from gemscope.features import Score

    store = Store.open(own_store)
    nan = Score(name="x", value=float("nan"), low=float("nan"), high=0.5)
    store.add_explanations([Explanation(dictionary=indexed[0], feature=1, text="t", method="rule",
                                        author="a", scores=(nan,))])  # fmt: skip
    store.add_notes([Note(dictionary=indexed[0], feature=1, text="n")])
    labelled = exchange.Selection(labelled=True)
    for kind in ("catalog", "neuronpedia", "parquet"):
        exchange.export(store, indexed[:1], tmp_path / kind, format=kind, selection=labelled)
        assert exchange.validate(tmp_path / kind, format=kind) == (kind, [])
    raw = (tmp_path / "catalog").read_text("utf-8")
    assert "NaN" not in raw
    (one,) = json.loads(raw)["features"][0]["explanations"]
    assert (one["scores"][0]["value"], one["scores"][0]["high"]) == (None, 0.5)


def test_parquet_that_is_none_is_told(file, refused, own_store, indexed):
    import pyarrow as pa
    import pyarrow.parquet as pq

    refused("catalog", "import", own_store, file(b"PAR1 and no more", "x.parquet"),
            match="cannot be read as Parquet")  # fmt: skip
    path = file(b"", "y.parquet")
    pq.write_table(pa.table({"feature": [1]}), path)
    refused("catalog", "import", own_store, path, match="has no column dictionary")
    rows = {"dictionary": [indexed[0]] * 3, "feature": [1, -2, 3], "text": ["a", "b", "c"],
            "detail": ["{}", "{}", "{"]}  # fmt: skip
    pq.write_table(pa.table(rows), path)
    assert [p.place for p in exchange.validate(path)[1]] == ["y.parquet, row 1", "y.parquet, row 2"]


KILLED = """
import sys, time
from pathlib import Path
from gemscope.exchange import _files
with _files.{opened}(Path(sys.argv[1]), force=True) as made:
    made.{write}
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("opened", "write"),
    [("new_file", "write(b'half')"), ("new_folder", "joinpath('half').write_text('half')")],
)
def test_killed_in_the_middle_the_previous_is_there(opened, write, tmp_path):
    to = tmp_path / "there"
    inside = to / _files.MARK if opened == "new_folder" else to
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("before")
    code = KILLED.format(opened=opened, write=write)
    process = subprocess.Popen([sys.executable, "-c", code, str(to)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert inside.read_text() == "before"


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    to = tmp_path / "there"
    to.write_text("before")

    def half(opened):
        with opened as made:
            made.write(b"half") if hasattr(made, "write") else (made / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half(_files.new_file(to, force=True))
    assert to.read_text() == "before"
    with pytest.raises(RuntimeError):
        half(_files.new_folder(tmp_path / "new"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    with pytest.raises(InputError, match="cannot be written"), _files.new_file(to / "x"):
        pass
