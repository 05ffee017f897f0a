"""The activation store: written shuffled, whole or resumable, read back exactly."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemscope.activations import Position, Stopped, harvest, open_store
from gemscope.activations._checksum import Checksum, checksum
from gemscope.activations._forward import Forward
from gemscope.activations._records import decode, encode
from gemscope.corpus import contexts, read_text
from gemscope.errors import InputError
from gemscope.sites import Site

SITE, OTHER = Site.parse("1.resid_post"), Site.parse("0.mlp_in")
SITES = (SITE, OTHER)
TOKENS = 5_000


@pytest.fixture(scope="module")
def rows(miniature):
    return list(contexts(read_text("miniature")[:20], miniature.tokenizer, length=64))


def make(miniature, rows, to, **changes):
    options = {
        "tokens": TOKENS, "context": 512, "text": "miniature", "shard_mb": 1, "memory_mb": 16,
    } | changes  # fmt: skip
    return harvest(miniature, rows, options.pop("sites", SITES), str(to), **options)


@pytest.fixture(scope="module")
def store(miniature, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "float32"
    make(miniature, rows, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def known(miniature, rows):
    """The tokens of the store in the order of the text, from the same forward passes."""
    forward = Forward(miniature, SITES)
    read = [forward.read(b) for b in forward.packed(rows, 16, TOKENS)]
    return {site: torch.cat([r[site] for r in read]) for site in SITES}


def take(store, count, start=Position()):
    return list(islice(store.batches(start), count))


def shards(folder, site):
    files = sorted((folder / str(site)).iterdir())
    return torch.cat([load_file(file)["activations"] for file in files])


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def order_of(folder, known):
    """Of each token of the store, its place in the text."""
    place = {row.tobytes(): i for i, row in enumerate(known[SITE].numpy())}
    return np.array([place[row.tobytes()] for row in shards(folder, SITE).numpy()])


def test_every_token_is_there_once_and_the_same_at_every_site(store, known):
    order = order_of(store, known)
    assert len(set(order)) > 0.95 * TOKENS, "few tokens have the same activations"
    for site in SITES:
        assert torch.equal(shards(store, site), known[site][order])
    assert Counter(map(bytes, shards(store, SITE).numpy())) == Counter(
        map(bytes, known[SITE].numpy())
    )


def test_the_order_is_a_random_one(store, known):
    order = order_of(store, known).astype(float)
    n = len(order)
    # A step of any one length is taken about once at most; twenty times has a chance of 1e-18.
    assert Counter(np.diff(order)).most_common(1)[0][1] < 20
    # Of a random permutation, rank correlation has standard deviation n**-0.5, and a step from
    # token to token is n/3 long on average; of both, five standard deviations.
    for one, other in ((order, np.arange(n)), (order[1:], order[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / n**0.5
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 5 * 0.24 / n**0.5
    # Each tenth of the store has tokens of each tenth of the text, as many as chance has it.
    table = np.histogram2d(order, np.arange(n), bins=10)[0]
    assert abs(table - n / 100).max() < 5 * (n / 100) ** 0.5


def test_the_manifest_says_what_is_there(store, known):
    manifest = json.loads((store / "manifest.json").read_text())
    held = manifest["contents"]
    assert held["model"] == "gemscope/miniature"
    assert (held["tokens"], held["context"], held["dtype"]) == (TOKENS, 512, "float32")
    assert held["sites"] == {str(site): 256 for site in SITES}
    means = load_file(store / "statistics.safetensors")
    for site in SITES:
        x = known[site].double()
        said = manifest["statistics"][str(site)]
        assert said["count"] == TOKENS
        # Float64 sums of some thousand terms.
        assert said["mean_norm"] == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-12)
        assert said["mean_square"] == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)
        torch.testing.assert_close(means[str(site)], x.mean(0), rtol=1e-12, atol=1e-12)


def test_memory_and_buckets_do_not_change_a_byte(miniature, rows, store, tmp_path, monkeypatch):
    """Neither the memory given, nor how often buckets are divided, has a part in the order."""
    from gemscope.activations import _gather

    monkeypatch.setattr(_gather, "_MOST_BUCKETS", 2)
    make(miniature, rows, tmp_path / "one", dtype="float32", memory_mb=512)
    monkeypatch.setattr("gemscope.activations._harvest._LEAST_MEMORY", 1)
    divided = []
    divide = _gather.Gather._divide
    monkeypatch.setattr(
        _gather.Gather, "_divide", lambda self, place: divided.append(place) or divide(self, place)
    )
    make(miniature, rows, tmp_path / "two", dtype="float32", memory_mb=1)
    assert len(divided) >= 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(store)
    assert [f.name for f in tmp_path.iterdir()].count(".two.harvest") == 0


def test_a_seed_is_an_order(miniature, rows, store, tmp_path):
    make(miniature, rows, tmp_path / "other", dtype="float32", seed=1)
    ours, theirs = shards(store, SITE), shards(tmp_path / "other", SITE)
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours.sort(0).values, theirs.sort(0).values)


def test_bfloat16_is_the_float32_rounded(miniature, rows, store, tmp_path):
    make(miniature, rows, tmp_path / "made")
    for site in SITES:
        assert torch.equal(shards(tmp_path / "made", site), shards(store, site).bfloat16())


def test_int8_keeps_its_bound(miniature, rows, store, tmp_path):
    make(miniature, rows, tmp_path / "made", dtype="int8")
    exact = shards(store, SITE)
    raw = shards(tmp_path / "made", SITE)
    assert (raw.dtype, raw.shape) == (torch.int8, (TOKENS, 260))
    scale = raw[:, 256:].contiguous().view(torch.float32)
    byhand = raw[:, :256].float() * scale
    # Half a step, and the roundings of the quotient and of the product, in steps of up to 127.
    bound = exact.abs().amax(1, keepdim=True) / 254 * (1 + 254 * 2**-22)
    assert ((byhand - exact).abs() <= bound).all()
    assert ((byhand - exact).abs() > 0.9 * bound).any(), "the bound is not slack"
    (whole,) = take(open_store(str(tmp_path / "made"), sites=[SITE], batch=TOKENS, seed=0), 1)
    assert Counter(map(bytes, whole.values[SITE].numpy())) == Counter(map(bytes, byhand.numpy()))


def test_rows_of_any_numbers_survive():
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [3e38, 1.0], [-2.0, 2.0]])
    for dtype in ("float32", "bfloat16", "int8"):
        back = decode(encode(x, dtype), dtype, torch.float32)
        assert back.isfinite().all()
        assert ((back - x).abs() <= x.abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_a_checksum_sees_every_change(generator):
    data = torch.randint(0, 256, (100_003,), generator=generator, dtype=torch.uint8).numpy()
    whole = checksum(data)
    pieces = Checksum()
    for part in np.split(data, [1, 8_167, 8_168, 30_000, 99_000]):
        pieces.add(part)
    assert pieces.value() == whole
    for place in (0, 8_168, 50_000, 98_016, 100_002):
        changed = data.copy()
        changed[place] ^= 1
        assert checksum(changed) != whole
    swapped = data.copy()
    swapped[4_096:8_192], swapped[8_192:12_288] = data[8_192:12_288], data[4_096:8_192]
    assert checksum(swapped) != whole


_HARVEST = """
import sys
from gemscope.activations import harvest
from gemscope.corpus import contexts, read_text
from gemscope.lm import load_model
from gemscope.sites import Site

import gemscope.activations._harvest as h
h._LEAST_MEMORY = 1
model = load_model("miniature", device="cpu")
rows = list(contexts(read_text("miniature")[:20], model.tokenizer, length=64))
harvest(
    model, rows, [Site.parse("1.resid_post"), Site.parse("0.mlp_in")], sys.argv[1],
    tokens=5_000, context=512, text="miniature", dtype="float32", shard_mb=1, memory_mb=1,
    report=lambda *what: print(*what, flush=True),
)
"""


def killed_after(to, line):
    """Run a harvest of its own, and kill it when it has said `line`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", _HARVEST, str(to)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        for said in running.stdout:
            if said.startswith(line):
                running.send_signal(signal.SIGKILL)
                break
    assert running.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("line", ["harvesting 2", "shuffling 3"])
def test_killed_it_goes_on_to_the_same_bytes(miniature, rows, store, tmp_path, line):
    killed_after(tmp_path / "made", line)
    scratch = tmp_path / ".made.harvest"
    assert (scratch / "progress.json").is_file()
    with pytest.raises(InputError, match=r"no activation store at .*: it has no manifest.json"):
        open_store(str(tmp_path / "made"), batch=10, seed=0)
    for bucket in scratch.glob("*.records"):  # what was written after the last known state
        with bucket.open("ab") as file:
            file.write(b"half a record")
    make(miniature, rows, tmp_path / "made", dtype="float32")
    assert contents(tmp_path / "made") == contents(store)
    assert not scratch.exists()


@pytest.mark.parametrize("after", [2, 7])
def test_stopped_it_goes_on_to_the_same_bytes(miniature, rows, store, tmp_path, after):
    asked = []
    with pytest.raises(Stopped, match=r"what is written is kept: run the same command to go on"):
        make(
            miniature, rows, tmp_path / "made", dtype="float32",
            stopping=lambda: asked.append(1) or len(asked) > after,
        )  # fmt: skip
    make(miniature, rows, tmp_path / "made", dtype="float32", memory_mb=16 + after)
    assert contents(tmp_path / "made") == contents(store)


def test_something_else_does_not_go_on(miniature, rows, tmp_path):
    with pytest.raises(Stopped):
        make(miniature, rows, tmp_path / "made", stopping=lambda: True)
    with pytest.raises(InputError, match=r"unfinished harvest of something else: .*seed was 0, is"):
        make(miniature, rows, tmp_path / "made", seed=1)
    with pytest.raises(InputError, match=r"something else: text_hash was"):
        make(miniature, rows[1:], tmp_path / "made")


@pytest.mark.slow
def test_a_full_disk_leaves_what_goes_on(tmp_path, miniature, rows, store):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))"
    command = [sys.executable, "-c", f"{limited}\n{_HARVEST}", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError: the harvest, with its scratch folder" in done.stderr
    assert "cannot be written: File too large; make room, then: what is written" in done.stderr
    make(miniature, rows, tmp_path / "made", dtype="float32")
    assert contents(tmp_path / "made") == contents(store)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_store_may_be_behind_a_url(miniature, rows, store, tmp_path, protocol):
    import fsspec

    url = f"{protocol}://{tmp_path}/made"
    make(miniature, rows, url, dtype="float32", scratch=tmp_path / "scratch")
    fs, path = fsspec.url_to_fs(url)
    for name, data in contents(store).items():
        assert fs.cat_file(f"{path}/{name}") == data
    there, here = (take(open_store(str(u), batch=700, seed=5), 9) for u in (url, store))
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a.values[SITE], b.values[SITE])
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(InputError, match="is a finished store; choose another place"):
        make(miniature, rows, url)


_MEMORY = """
import resource, sys, torch
from gemscope.activations import harvest
from gemscope.corpus import contexts, read_text
from gemscope.lm import load_model
from gemscope.sites import Site

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

model = load_model("miniature", device="cpu")
rows = list(contexts(read_text("miniature"), model.tokenizer, length=256))
sites = [Site.parse(f"{layer}.mlp_hidden") for layer in range(3)]
most = [0]
def run(to, **options):
    harvest(model, rows, sites, to, context=256, text="", dtype="float32", shard_mb=16,
            report=lambda *_: most.append(now()), **options)
run(sys.argv[1] + "/first", tokens=32_768, memory_mb=16)  # the model's own memory
before = max(most)
most.clear()
run(sys.argv[1] + "/second", tokens=32_768, memory_mb=48)
print((max(most) - before) / 2**20)
"""


@pytest.mark.slow
def test_memory_is_what_was_given(tmp_path):
    command = [sys.executable, "-c", _MEMORY, str(tmp_path)]
    # What is held, and not what the allocator keeps of the model's own tensors for later.
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=returning)
    # 336 MiB of activations through 48, of which the first run has shown 16.
    assert float(done.stdout) <= 48 - 16
