"""Reading an activation store: every token once an epoch, exactly resumable, damage told."""

import json
import shutil
import threading
from collections import Counter
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from gemscope.activations import ActivationBatch, Position, Source, harvest, open_store
from gemscope.activations._serving import Serving
from gemscope.corpus import contexts, read_text
from gemscope.errors import InputError
from gemscope.sites import Site

SITE, OTHER = Site.parse("1.resid_post"), Site.parse("0.mlp_in")
TOKENS = 5_000  # five shards of float32, the last of them short


@pytest.fixture(scope="module")
def store(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    rows = list(contexts(read_text("miniature")[:20], miniature.tokenizer, length=64))
    harvest(
        miniature, rows, (SITE, OTHER), str(folder),
        tokens=TOKENS, context=64, text="", dtype="float32", shard_mb=1, memory_mb=16,
    )  # fmt: skip
    return folder


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "copy")


def opened(folder, **changes):
    return open_store(str(folder), **({"batch": 300, "seed": 2} | changes))


def take(store, count, start=Position()):
    return list(islice(store.batches(start), count))


def stored(folder, site=SITE):
    files = sorted((folder / str(site)).iterdir())
    return torch.cat([load_file(file)["activations"] for file in files])


def counted(values):
    return Counter(row.tobytes() for row in values.numpy())


@pytest.mark.parametrize("batch", [37, 300, 4_999, TOKENS])
def test_every_token_is_served_once_an_epoch(store, batch):
    made = opened(store, batch=batch)
    assert isinstance(made, Source)
    assert (made.tokens, made.batch, made.sites) == (TOKENS, batch, (SITE, OTHER))
    epochs = 3
    every = counted(stored(store))
    batches = take(made, -(-epochs * TOKENS // batch))
    served = torch.cat([b.values[SITE] for b in batches])
    for epoch in range(epochs):
        # Batches stand across the end of an epoch, and no token is left out there.
        assert counted(served[epoch * TOKENS : (epoch + 1) * TOKENS]) == every


def test_sites_are_of_the_same_tokens(store):
    place = {row.tobytes(): i for i, row in enumerate(stored(store).numpy())}
    others = stored(store, OTHER)
    for batch in take(opened(store), 40):
        of = [place[row.tobytes()] for row in batch.values[SITE].numpy()]
        same = (batch.values[OTHER] == others[of]).all(1)
        assert same.float().mean() > 0.95, "but for tokens with the same activations at one site"


def test_each_epoch_has_batches_of_its_own(store):
    made = opened(store, batch=500)
    first, second = (take(made, 20)[k : k + 10] for k in (0, 10))
    for a in first:
        for b in second:
            common = counted(a.values[SITE]) & counted(b.values[SITE])
            assert common.total() < 500
    other = take(opened(store, batch=500, seed=3), 1)[0]
    assert not torch.equal(other.values[SITE], first[0].values[SITE])


def test_later_epochs_make_batches_up_anew(store):
    held = opened(store).manifest.contents.model_copy(update={"chunk": 128})
    serving = Serving(held, batch=300, seed=0)
    orders = []
    for epoch in range(2):
        begin = epoch * TOKENS
        pieces = list(serving.pieces(begin, begin + TOKENS, epoch * held.shards))
        assert sum(p.last - p.first for p in pieces) == TOKENS
        assert len({(p.shard, p.chunk) for p in pieces}) == len(pieces)
        orders.append([p.chunk for p in pieces if p.shard == 0])
    stored, anew = orders
    assert stored == sorted(anew) != anew


@pytest.mark.parametrize("batch", [130, 300, 2_600])
def test_going_on_gives_the_same_batches(store, batch):
    batches = take(opened(store, batch=batch), 3 * TOKENS // batch)
    for place in range(0, len(batches) - 1, max(1, len(batches) // 10)):
        (again,) = take(opened(store, batch=batch), 1, batches[place].after)
        assert again.after == batches[place + 1].after
        for site in (SITE, OTHER):
            assert torch.equal(again.values[site], batches[place + 1].values[site])


def test_batches_stay_as_they_are(store):
    """Memory is used again only when nobody holds it: also not through a view or another type."""
    kept = []
    for batch in islice(opened(store).batches(), 60):
        view = batch.values[SITE][10:20, ::2]
        kept.append((view, view.clone()))
        del batch
    for view, before in kept:
        assert torch.equal(view, before)


def test_several_readers_of_one_store(store):
    made = opened(store)
    expected = take(made, 30)
    for ours, other in zip(made.batches(), made.batches(), strict=True):
        wanted = expected.pop(0)
        assert torch.equal(ours.values[SITE], wanted.values[SITE])
        assert torch.equal(other.values[SITE], wanted.values[SITE])
        if not expected:
            break


def test_types(store):
    (exact,) = take(opened(store), 1)
    (narrow,) = take(opened(store, dtype=torch.bfloat16), 1)
    assert isinstance(narrow, ActivationBatch)
    assert torch.equal(narrow.values[SITE], exact.values[SITE].bfloat16())
    sample = opened(store, dtype=torch.bfloat16).sample(700)
    assert sample[SITE].dtype == torch.float32
    assert torch.equal(sample[SITE][:300], exact.values[SITE])
    assert len(opened(store).sample(10**9)[OTHER]) == TOKENS


def test_what_is_known_of_the_whole(store):
    made = opened(store)
    assert made.model_seconds == 0.0
    torch.testing.assert_close(
        made.means()[SITE], stored(store).double().mean(0), rtol=1e-12, atol=1e-12
    )
    assert made.manifest.contents.shards == 5


def test_it_ends_when_asked_and_leaves_nothing_running(store):
    before = threading.active_count()
    asked = []
    served = list(opened(store).batches(stopping=lambda: asked.append(1) or len(asked) > 5))
    assert 1 <= len(served) <= 5
    reading = opened(store).batches()
    next(reading)
    assert threading.active_count() == before + 1
    reading.close()
    assert threading.active_count() == before


def test_mismatches_are_told(store):
    assert opened(store, model_name="miniature", sites=[OTHER]).sites == (OTHER,)
    with pytest.raises(InputError, match=r"holds activations of gemscope/miniature, not of gpt2; "):
        opened(store, model_name="gpt2")
    with pytest.raises(InputError, match=r"holds 1.resid_post, 0.mlp_in, not 2.resid_post; ask fo"):
        opened(store, sites=[SITE, Site.parse("2.resid_post")])
    with pytest.raises(
        InputError, match=r"a batch is 5001 tokens, and the store .* holds 5000; ta"
    ):
        opened(store, batch=TOKENS + 1)
    with pytest.raises(
        InputError, match=r"no activation store at nowhere: it has no manifest.json"
    ):
        opened("nowhere")
    with pytest.raises(
        InputError, match=r"x9://store cannot be opened: .*; give a folder, or a UR"
    ):
        opened("x9://store")


def manifest_of(copy, **changes):
    file = copy / "manifest.json"
    held = json.loads(file.read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = held
        for section in sections:
            place = place[section]
        place[key] = value
    file.write_text(json.dumps(held))


def test_a_newer_format_is_told(copy):
    manifest_of(copy, format=2, contents="whatever there will be")
    with pytest.raises(
        InputError, match=r"is of format 2, and this gemscope reads formats up to 1"
    ):
        opened(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"contents__tokens": -1}, {"contents__tokens": 10**15}, {"contents__tokens": "5000"},
        {"contents__sites": {}}, {"contents__sites": {"../../etc": 256}}, {"contents__chunk": 7},
        {"contents__dtype": "float8"}, {"checksums": []}, {"format": 0}, {"format": None},
        {"contents__more": 1}, {"statistics": {}}, {"contents__sites": {"1.resid_post": 2**30}},
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_told(copy, changes):
    manifest_of(copy, **changes)
    with pytest.raises(InputError, match=r"the manifest of the activation store .* cannot be read"):
        opened(copy)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_manifest_of_nonsense_is_told(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"the manifest of the activation store .* cannot be read"):
        opened(copy)


def test_a_larger_store_than_its_files_is_told_before_anything_is_allocated(copy):
    manifest_of(copy, contents__sites={"1.resid_post": 2**23, "0.mlp_in": 256})
    with pytest.raises(
        InputError, match=r"missing or damaged in the store .*: 1.resid_post/000000"
    ):
        opened(copy)


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_files_that_do_not_fit_are_named(copy, damage):
    file = copy / str(OTHER) / "000002.safetensors"
    match damage:
        case "missing":
            file.unlink()
        case "short":
            file.write_bytes(file.read_bytes()[:-1])
        case "long":
            file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"missing or damaged in .*copy: 0.mlp_in/000002.safetens"):
        opened(copy)
    opened(copy, sites=[SITE])  # the other site is whole
    with pytest.warns(UserWarning, match=r"0.mlp_in/000002.safetensors; batches with tokens of th"):
        made = opened(copy, skip_corrupt=True)
    left_out(copy, made, shard=2)


@pytest.mark.parametrize("place", [3, 100, 300_000, -1])
def test_damaged_bytes_are_named(copy, place):
    """In the header, in the checksums, in the numbers, in the last of them."""
    file = copy / str(SITE) / "000001.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)
    made = opened(copy)
    with pytest.raises(InputError, match=r"missing or damaged in .*copy: 1.resid_post/000001.safe"):
        take(made, 40)
    made = opened(copy, skip_corrupt=True)
    with pytest.warns(UserWarning, match=r"1.resid_post/000001.safetensors; batches with") as told:
        left_out(copy, made, shard=1)
    assert len(told) == 1, "it is said once"


def left_out(copy, made, shard):
    """Two epochs without the tokens of one shard, and resumable around them."""
    size = made.manifest.contents.shard
    whole = stored(copy, OTHER if shard == 1 else SITE)
    site = OTHER if shard == 1 else SITE
    bad = counted(whole[shard * size : (shard + 1) * size])
    good = counted(whole) - bad
    # A shard stands between two others, of which some tokens are in batches with its own.
    batches = take(made, (2 * (TOKENS - size)) // made.batch - 4)
    served = Counter()
    for batch in batches:
        served += counted(batch.values[site])
    assert not (bad.keys() - good.keys()) & served.keys()
    assert served.total() == len(batches) * made.batch
    for place in range(0, len(batches) - 1, 5):
        (again,) = take(made, 1, batches[place].after)
        assert torch.equal(again.values[site], batches[place + 1].values[site])


def test_a_store_with_nothing_left_is_told(copy):
    for file in (copy / str(SITE)).iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="and 2 more"):
        made = opened(copy, skip_corrupt=True)
    with pytest.raises(InputError, match="has no intact tokens left to read"):
        take(made, 1)
    with pytest.raises(InputError, match="has no intact tokens left to read"):
        made.sample(10)
