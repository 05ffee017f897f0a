"""The catalog store: what survives kills, who sees what, what is refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from gemscope import features, hub
from gemscope.errors import InputError
from gemscope.features import Explanation, Note, Score, Store

ADDRESS = "miniature/resid_post_all/layer_1_width_384_l0_small"
SCRIPT = """
import os, signal, sys
from gemscope import features, hub
from gemscope.features import _collect, _index
from gemscope.lm import load_model
_collect._MOST_PLACES, _collect._BATCH_TOKENS, _index._BLOCK = 1024, 512, 128
to, what, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
entry = hub.locate(sys.argv[4])
subject = features.Subject(address=entry.address, sae=hub.build(entry), digest=hub.digest(entry),
                           nominal_l0=entry.l0)
def progress(doing, done, total):
    if doing == what and done >= after:
        os.kill(os.getpid(), getattr(signal, sys.argv[5]))
try:
    features.index(load_model("miniature"), [subject], features.sources_of(tokens=5000),
                   features.Store.create(to), features.Settings(tokens=5000, keep_activations=True),
                   model_name="miniature", progress=progress)
except features.Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(128 + stopped.signal)
"""


def run(to, what="nothing", after=0, how="SIGKILL"):
    command = [sys.executable, "-c", SCRIPT, to, what, after, ADDRESS, how]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def contents(folder):
    store = Store.open(folder)
    rows = store.features(ADDRESS).drop_columns(["run"]).to_pylist()
    return rows, store.contexts(ADDRESS), store.vectors(ADDRESS).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "after", "how"),
    [("indexing", 2_000, "SIGKILL"), ("measuring features", 200, "SIGKILL"),
     ("indexing", 3_500, "SIGTERM"), ("measuring features", 100, "SIGINT")],
)  # fmt: skip
def test_an_index_that_was_ended_goes_on_to_the_same_result(whole, tmp_path, what, after, how):
    folder = tmp_path / "store"
    ended = run(folder, what, after, how)
    number = getattr(signal, how)
    assert ended.returncode == (-number if how == "SIGKILL" else 128 + number), ended.stderr
    if how != "SIGKILL":
        assert "run the command again, and it goes on" in ended.stderr
    assert Store.open(folder).dictionaries() == []
    assert list((folder / "activations").glob("*/00000*.safetensors"))
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == whole


def reindex(store, miniature, **settings):
    entry = hub.locate("miniature/mlp_out_all/layer_1_width_128_l0_small")
    subject = features.Subject(
        address=entry.address, sae=hub.build(entry), digest=hub.digest(entry), nominal_l0=entry.l0
    )
    chosen = {"tokens": 3_000} | settings
    features.index(
        miniature, [subject], features.sources_of(tokens=3_000), store,
        features.Settings(**chosen), model_name="miniature",
    )  # fmt: skip
    return entry.address


def test_a_crash_before_the_commit_leaves_what_was_there(own_store, miniature, monkeypatch):
    store = Store.open(own_store)
    address = reindex(store, miniature)
    before = store.features(address).to_pylist()

    def crash(*_):
        raise KeyboardInterrupt

    reader = Store.open(own_store)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            reindex(store, miniature, seed=1)
    assert reader.features(address).to_pylist() == before
    assert Store.open(own_store).features(address).to_pylist() == before
    reindex(store, miniature, seed=1)
    after = Store.open(own_store).features(address)
    assert len(after) == len(before)
    assert after.to_pylist() != before
    # Nothing of the run before is left behind.
    runs = set(store.table("features").search().select(["run"]).to_arrow()["run"].to_pylist())
    assert runs == {d["run"] for d in store.dictionaries()}


def test_indexing_the_same_again_does_nothing(own_store, miniature, monkeypatch):
    store = Store.open(own_store)
    reindex(store, miniature)
    monkeypatch.setattr(features._index, "collect", None)
    reindex(store, miniature)


def test_activations_are_kept_only_if_asked(own_store, miniature):
    store = Store.open(own_store)
    address = reindex(store, miniature)
    assert store.activations(address) is None
    reindex(store, miniature, keep_activations=True)
    kept = store.activations(address)
    table = store.features(address, ["count"])["count"].to_numpy()
    assert np.diff(kept.entries(address, 0, 128).offsets).tolist() == table.tolist()


def test_newer_and_half_written_stores_are_refused(own_store, refused, tmp_path):
    refused("feature", tmp_path / "none", "a/1", match="no catalog store at .*; gemscope index")
    (own_store / "store.json").write_text(json.dumps({"version": 99}))
    refused("search", own_store, "self", match="version 99 .* up to 2; update gemscope")
    (own_store / "store.json").write_text("{")
    refused("search", own_store, "self", match="not JSON")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    refused("index", ADDRESS, "--to", tmp_path / "full", "--tokens", "100", match="something else")
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_a_missing_table_and_damaged_activations_are_told(own_store, indexed):
    store = Store.open(own_store)
    kept = store.activations(indexed[0])
    shard = next(kept.folder.glob("0*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match="missing or damaged"):
        kept.of(indexed[0], 3)
    (kept.folder / "index.json").unlink()
    with pytest.raises(InputError, match="half-written: run the command"):
        features.Activations.open(kept.folder)
    os.rename(own_store / "contexts.lance", own_store / "elsewhere")
    with pytest.raises(InputError, match=r"contexts .* missing or damaged"):
        Store.open(own_store).contexts(indexed[0], 3)


def explanation(address, feature=3, text="a word", value=0.8, **more):
    scores = (Score(name="rule", value=value, low=0.7, high=0.9, null=0.5, n=10),)
    return Explanation(dictionary=address, feature=feature, text=text, method="rule",
                       author="test", scores=scores, **more)  # fmt: skip


def test_explanations_round_trip_and_the_same_one_is_kept_once(own_store, indexed):
    store = Store.open(own_store)
    first = explanation(indexed[0], detail={"rule": ["token", "self"]})
    store.add_explanations([first, explanation(indexed[0], text="another", value=0.9)])
    store.add_explanations([explanation(indexed[0], value=0.6)])
    found = store.explanations(indexed[0], 3)
    assert [(e.text, e.score) for e in found] == [("another", 0.9), ("a word", 0.6)]
    store.add_explanations([first])
    assert first in Store.open(own_store).explanations()


def test_notes_are_never_changed_and_come_before_explanations(own_store, indexed):
    store = Store.open(own_store)
    note = Note(dictionary=indexed[0], feature=3, text="it's mine", author="me", confidence=0.9)
    store.add_notes([note])
    store.add_explanations([explanation(indexed[0], value=1.0)])
    again = Note(dictionary=indexed[0], feature=3, text="it's mine", author="me", confidence=0.9,
                 created="2001-01-01T00:00:00+00:00", detail={"other": 1})  # fmt: skip
    store.add_notes([again])
    assert store.notes(indexed[0], 3) == [note]
    assert features.described(store, [(indexed[0], 3)])[indexed[0], 3][0] == "it's mine"


def test_an_index_again_touches_neither_notes_nor_explanations(own_store, miniature):
    store = Store.open(own_store)
    address = reindex(store, miniature)
    note = Note(dictionary=address, feature=3, text="mine", author="me")
    store.add_notes([note])
    store.add_explanations([explanation(address)])
    reindex(store, miniature, seed=5)
    assert store.notes(address) == [note]
    assert len(store.explanations(address)) == 1


def test_verify_agrees_and_finds_what_was_changed(own_store, indexed, command):
    code, out, _ = command("verify", own_store, indexed[0], "--json", "--contexts", 4)
    (found,) = json.loads(out)
    assert code == 0
    assert found["disagree"] == []
    assert found["compared"] > 100_000
    store = Store.open(own_store)
    store.table("features").update(where="feature = 5", values={"max": 0.01, "threshold": 9.0})
    code, out, _ = command("verify", own_store, indexed[0], "--json", "--contexts", 30)
    told = " ".join(json.loads(out)[0]["disagree"])
    assert code == 1
    assert "threshold: stored 9" in told
    assert "feature 5: stored max 0.01" in told


def test_multi_layer_and_attention_dictionaries_are_indexed(own_store, miniature):
    store = Store.open(own_store)
    names = ("clt/width_384_l0_medium_affine", "attn_out_all/layer_2_width_128_l0_small",
             "transcoder_all/layer_4_width_192_l0_small_affine")  # fmt: skip
    subjects = []
    for name in names:
        entry = hub.locate(f"miniature/{name}")
        sae, digest = hub.build(entry), hub.digest(entry)
        subjects.append(
            features.Subject(address=entry.address, sae=sae, digest=digest, nominal_l0=entry.l0)
        )
    found = features.index(
        miniature, subjects, features.sources_of(tokens=2_000), store,
        features.Settings(tokens=2_000), model_name="miniature",
    )  # fmt: skip
    assert [d["d_sae"] for d in found] == [384, 128, 192]
    clt = store.features(f"miniature/{names[0]}", ["layer", "promoted"]).to_pylist()
    assert sorted({row["layer"] for row in clt}) == [0, 1, 2, 3, 4, 5]
    for name in names:
        assert store.feature(f"miniature/{name}", 7)["promoted"]
    assert store.vectors(f"miniature/{names[0]}").shape == (384, 256)
