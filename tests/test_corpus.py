"""Text to tokens: nothing lost, nothing mixed, and exactly the tokens asked for counted."""

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemscope import miniature as bundled
from gemscope.corpus import Context, Document, Prefix, contexts, pack, read_dataset, read_text
from gemscope.errors import InputError

TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)\n" * 9,
    "<eos><pad>",  # special tokens alone, in the middle of everything
    "",
    "import os",
    "a<eos>b <bos>\n",
    "naïve ☃ 𝄞\r\n\t\0" * 5,
    "x",
)
LENGTHS = (2, 3, 16, 100, 1_000)
BATCHES = (1, 2, 3, 5, 1_000)


@pytest.fixture(scope="module")
def tokenizer(miniature):
    return miniature.tokenizer


def documents(texts=TEXTS):
    return [Document(f"text {i}", text) for i, text in enumerate(texts)]


def own_tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def counted(batches):
    """Every token that counts, as (document, place in it, token), in order."""
    out = []
    for batch in batches:
        for row, column in batch.counts.nonzero().tolist():
            place = int(batch.starts[row]) + column - 1
            out.append((int(batch.documents[row]), place, int(batch.ids[row, column])))
    return out


def expected(tokenizer, texts=TEXTS):
    special = set(tokenizer.all_special_ids)
    return [
        (number, place, token)
        for number, text in enumerate(texts)
        for place, token in enumerate(own_tokens(tokenizer, text))
        if token not in special
    ]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_context_begins_with_bos_and_fits(tokenizer, length):
    rows = list(contexts(documents(), tokenizer, length=length))
    assert all(row.ids[0] == tokenizer.bos_token_id for row in rows)
    assert all(2 <= len(row.ids) <= length for row in rows)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_contexts_of_a_document_hold_its_tokens_and_no_others(tokenizer, length):
    rows = list(contexts(documents(), tokenizer, length=length))
    assert [row.document for row in rows] == sorted(row.document for row in rows)
    for number, text in enumerate(TEXTS):
        held = []
        for row in rows:
            if row.document == number:
                assert row.start == len(held)
                held += row.ids[1:]
        assert held == own_tokens(tokenizer, text)


def test_a_text_shorter_than_a_context_is_one_context(tokenizer):
    rows = list(contexts(documents(), tokenizer, length=1_000))
    assert [row.document for row in rows] == [i for i, text in enumerate(TEXTS) if text]
    assert {row.start for row in rows} == {0}


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_a_context_without_room_after_bos_is_refused(tokenizer, length):
    with pytest.raises(InputError, match="has no room after BOS"):
        next(contexts(documents(), tokenizer, length=length))


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(InputError, match="'text 0' is not valid Unicode"):
        next(contexts(documents(["\ud800"]), tokenizer, length=8))


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_holds_its_contexts_and_padding(tokenizer, batch):
    rows = list(contexts(documents(), tokenizer, length=16))
    special = set(tokenizer.all_special_ids)
    left = iter(rows)
    batches = list(pack(rows, tokenizer, batch=batch))
    for made in batches:
        for ids, counts, document, start in zip(
            made.ids.tolist(),
            made.counts.tolist(),
            made.documents.tolist(),
            made.starts.tolist(),
            strict=True,
        ):
            row = next(left)
            padding = len(ids) - len(row.ids)
            assert ids == row.ids + [tokenizer.pad_token_id] * padding
            assert counts == [i not in special for i in row.ids] + [False] * padding
            assert (document, start) == (row.document, row.start)
    assert next(left, None) is None
    assert all(len(made.ids) == batch for made in batches[:-1])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_counts_does_not_hang_on_batches(tokenizer, batch, length):
    rows = contexts(documents(), tokenizer, length=length)
    assert counted(pack(rows, tokenizer, batch=batch)) == expected(tokenizer)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", [2, 16, 1_000])
def test_just_the_first_tokens_are_counted(tokenizer, batch, length):
    wanted = expected(tokenizer)
    for tokens in (1, 2, 14, 15, 16, 30, 31, len(wanted) - 1, len(wanted), len(wanted) + 50):
        rows = contexts(documents(), tokenizer, length=length)
        batches = list(pack(rows, tokenizer, batch=batch, tokens=tokens))
        assert counted(batches) == wanted[:tokens]
        assert sum(b.n_counted for b in batches) == min(tokens, len(wanted))


def test_packing_reads_no_further_than_it_must(tokenizer):
    def rows():
        for number in range(3):
            yield Context([tokenizer.bos_token_id, 100, 101], number, 0)
        raise AssertionError("a context was made that nobody wanted")

    assert sum(b.n_counted for b in pack(rows(), tokenizer, batch=1, tokens=5)) == 5


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.sampled_from(["<eos>", "word ", "<bos>", "é\n", "<pad><pad>"]), max_size=12).map(
        lambda parts: ["".join(parts[i : i + 3]) for i in range(0, len(parts), 3)]
    ),
    st.integers(2, 9),
    st.integers(1, 5),
    st.integers(1, 30),
)
def test_any_text_is_counted_token_by_token(tokenizer, texts, length, batch, tokens):
    rows = contexts(documents(texts), tokenizer, length=length)
    found = counted(pack(rows, tokenizer, batch=batch, tokens=tokens))
    assert found == expected(tokenizer, texts)[:tokens]


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("naïve ☃\n", "utf-8")
    assert read_text(str(tmp_path / "a.txt")) == [
        Document(str(tmp_path / "a.txt"), "naïve ☃\n"),
    ]


@pytest.fixture
def folder(tmp_path):
    """A folder of two texts, one of them deeper, lines of JSON, and files that are not text."""
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "b" / "deep" / "a.md").write_text("one")
    (tmp_path / "b" / "lines.jsonl").write_text('{"text": "two"}\n\n{"text": "2", "path": "p"}\n')
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\0")
    (tmp_path / "z.bin").write_bytes(b"\xff\xfe\xfd")
    return tmp_path


def test_of_a_folder_every_text_is_read_in_order(folder):
    assert read_text(str(folder)) == [
        Document(str(folder / "b" / "deep" / "a.md"), "one"),
        Document("lines.jsonl:1", "two"),
        Document("p", "2"),
        Document(str(folder / "c.txt"), "three"),
    ]


def test_a_pattern_chooses_files(folder):
    assert [d.text for d in read_text(f"{folder}/**/*.[mt]*")] == ["one", "three"]
    assert [d.text for d in read_text(f"{folder}/*.txt")] == ["three"]


def test_a_home_folder_is_written_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert [d.text for d in read_text("~/c.txt")] == ["three"]


def test_a_binary_file_by_name_is_refused(folder):
    with pytest.raises(InputError, match=r"z\.bin is not UTF-8 text"):
        read_text(str(folder / "z.bin"))


def test_a_folder_without_text_is_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="is empty; give one with words in it"):
        read_text(str(folder / "empty"))


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"Text": "x"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": ["x"]}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 50_000,
    ],
    ids=str,
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl line 3 is not a document"):
        read_text(str(file))
    with pytest.raises(InputError, match=r"a\.jsonl line 3 is not a document"):
        read_text(str(tmp_path))


def test_a_line_may_hold_separators_of_other_systems(tmp_path):
    text = "one\u2028two\x85three\r\nfour"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n")
    assert [d.text for d in read_text(str(tmp_path / "a.jsonl"))] == [text]


def test_the_bundled_text_is_read_by_its_name():
    rows = [json.loads(line) for line in bundled.HELD_OUT.read_text("utf-8").splitlines() if line]
    assert rows
    assert read_text("miniature") == [Document(row["path"], row["text"]) for row in rows]


def test_a_data_set_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'gemscope\[data\]'"):
        read_dataset("owner/name")


@pytest.fixture(scope="module")
def splits():
    return {name: bundled.documents(name) for name in ("library", "tests", "heldout")}


def test_the_splits_are_disjoint_in_path_and_text(splits):
    paths = [d.path for found in splits.values() for d in found]
    assert all(splits.values())
    assert len(paths) == len(set(paths))
    held_out = {d.text for d in splits["heldout"]}
    assert not held_out & {d.text for d in splits["library"] + splits["tests"]}


def test_no_test_module_of_a_held_out_module_is_trained_on(splits):
    stems = {d.path.rsplit("/")[-1].removesuffix(".py").strip("_") for d in splits["heldout"]}
    trained = {d.path.rsplit("/")[-1] for d in splits["tests"]}
    assert not trained & {f"test_{stem}.py" for stem in stems}


def test_the_library_is_what_the_miniature_was_trained_on(splits):
    assert read_text("python") == splits["library"] + splits["tests"]


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="another library gives another text")
def test_the_bundled_text_is_the_held_out_split(splits):
    assert read_text("miniature") == splits["heldout"]


class _Chat:
    """Whole words as tokens, with a chat's marks among them."""

    bos_token_id, pad_token_id, eos_token_id = 0, 1, None
    all_special_ids = (0, 1)
    words = ("<bos>", "<pad>", "<start_of_turn>", "user", "\n", "model", "hi", "yes")

    def __call__(self, text, add_special_tokens=False, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [self.words.index(w) for w in text.split(" ")]}


@pytest.mark.parametrize(
    ("every_turn", "counted"),
    [
        (
            False,
            ["hi", "<start_of_turn>", "model", "\n", "yes", "<start_of_turn>", "user", "\n", "hi"],
        ),
        (True, ["hi", "<start_of_turn>", "model", "\n", "yes", "hi"]),
    ],
)
@pytest.mark.parametrize("first", ["", "<bos> "])
def test_what_begins_a_users_turn_does_not_count(every_turn, counted, first):
    """Four positions with BOS for Gemma 3, every user's turn for Gemma 2."""
    turns = "<start_of_turn> user \n hi <start_of_turn> model \n yes <start_of_turn> user \n hi"
    chat = _Chat()
    rows = list(contexts([Document("a", first + turns), Document("b", "hi")], chat, length=64))
    assert rows[0].ids.count(0) == 1, "BOS once, whoever wrote it"
    prefix = Prefix((2, 3, 4), every_turn)
    (batch,) = pack(rows, chat, batch=2, prefix=prefix)
    ids = batch.ids[0][batch.counts[0]].tolist()
    assert [chat.words[i] for i in ids] == counted
    assert batch.counts[1].sum() == 1
    (plain,) = pack(rows, chat, batch=2)
    assert plain.counts[0].sum() == len(turns.split(" "))


def test_a_prefix_in_the_middle_is_no_beginning():
    rows = list(contexts([Document("a", "hi <start_of_turn> user \n yes")], _Chat(), length=64))
    (batch,) = pack(rows, _Chat(), batch=1, prefix=Prefix((2, 3, 4), False))
    assert batch.n_counted == 5
