"""The stream: every token once an epoch, well mixed, in bounded memory, resumable."""

import itertools
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch

from gemscope.activations import ActivationStream, Position, Source
from gemscope.activations._blocks import PARTS, Blocks
from gemscope.activations._cutting import Cutting
from gemscope.activations._forward import Forward
from gemscope.corpus import Context, contexts, read_text
from gemscope.errors import InputError
from gemscope.sites import Site

SITE, OTHER = Site.parse("1.resid_post"), Site.parse("0.mlp_in")


@pytest.fixture(scope="module")
def rows(miniature):
    # From several documents, none of which begins like another.
    documents = read_text("miniature")[:12]
    return list(contexts(documents, miniature.tokenizer, length=64))[:80:2]


def stream(miniature, rows, sites=(SITE,), **changes):
    options = {"batch": 128, "buffer": 640, "seed": 3, "harvest": 8} | changes
    return ActivationStream(miniature, rows, sites, **options)


def take(source, count, start=Position()):
    return list(islice(source.batches(start), count))


@pytest.fixture(scope="module")
def known(miniature, rows):
    """The activations of the tokens of each row that count, each row alone."""
    forward = Forward(miniature, (SITE,))
    return [forward.read(b)[SITE] for b in forward.packed(rows, 1)]


def counted(values):
    return Counter(row.tobytes() for row in values.numpy())


def test_it_is_a_source(miniature, rows, known):
    made = stream(miniature, rows)
    assert isinstance(made, Source)
    assert made.tokens == sum(map(len, known))
    assert made.model_seconds == 0.0
    take(made, 1)
    assert made.model_seconds > 0.0


def test_every_token_is_served_once_an_epoch(miniature, rows, known):
    made = stream(miniature, rows, harvest=1)  # a row alone gives the same numbers everywhere
    every = counted(torch.cat(known))
    assert len(every) > 0.95 * made.tokens
    epochs = 2
    # By then the last block of the last of these epochs has been served to its last part.
    rounds = epochs * made.blocks.per_epoch + PARTS - 1
    batches = made.blocks.before(rounds) // made.batch
    served = counted(torch.cat([b.values[SITE] for b in take(made, batches + 1)]))
    assert served.keys() == every.keys()
    for value, count in every.items():
        assert epochs * count <= served[value] <= (epochs + 1) * count
    begun = sum(served.values()) - epochs * made.tokens
    assert begun < 2 * made.capacity, "tokens of the next epoch wait for those of this one"


@pytest.mark.parametrize("per_epoch", [1, 2, 7, 40])
def test_blocks_and_rounds_add_up(per_epoch, generator):
    counts = torch.randint(1, 50, (90,), generator=generator)
    blocks = Blocks(counts, per_epoch, seed=1)
    seen, served, held_most = Counter(), 0, 0
    for round_ in range(3 * per_epoch + PARTS):
        assert blocks.before(round_) == served
        parts = [blocks.part(round_ - k, k) for k in range(PARTS) if round_ >= k]
        for k, part in enumerate(parts):
            seen.update((round_ - k, int(place)) for place in part)
        count = sum(map(len, parts))
        assert sorted(blocks.mixed(round_).tolist()) == list(range(count))
        if count > 400:  # any quarter of the round has as good as a quarter of each part
            quarter, ends = blocks.mixed(round_)[: count // 4], [len(part) for part in parts]
            for length, of_part in zip(ends, _split(quarter, ends), strict=True):
                # Five standard deviations of a sample without replacement.
                assert abs(of_part - length / 4) < 5 * (length * 3 / 16) ** 0.5
        held_most = max(held_most, blocks.ahead(round_ + 1) - served)
        served += count
    assert set(seen.values()) == {1}
    for block in range(3 * per_epoch):
        assert sum(b == block for b, _ in seen) == blocks.size(block)
    for epoch in range(3):
        rows = [r for place in range(per_epoch) for r in blocks.rows(epoch * per_epoch + place)]
        assert sorted(rows) == list(range(90))
    assert held_most <= 2.5 * blocks.tokens / per_epoch + 50 + PARTS


def _split(places, lengths):
    """How many of `places` are in each of the runs of `lengths`."""
    edges = torch.tensor([0, *lengths]).cumsum(0)
    return [int(((a <= places) & (places < b)).sum()) for a, b in itertools.pairwise(edges)]


def test_positions_name_places_of_the_row():
    sizes = [3, 0, 40, 7, 1, 1, 1, 90, 12]
    before = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    cutting = Cutting(10, lambda r: before[r] if r < len(before) else before[-1] + 10 * (r - 9))
    position = Position()
    for number in range(18):
        assert cutting.start(position)[0] == number
        first = cutting.start(position)[1]
        assert cutting.before(first) <= number * 10 < cutting.before(first + 1)
        last = (number + 1) * 10
        ends = next(r for r in range(30) if cutting.before(r) < last <= cutting.before(r + 1))
        position = cutting.after(number, ends)


def test_going_on_gives_the_same_batches(miniature, rows):
    made = stream(miniature, rows)
    batches = take(made, 24)
    for place in (0, 3, 9, 10, 16, 22):
        other = stream(miniature, rows)  # another process has nothing but the position
        before = batches[place]
        for again, expected in zip(
            take(other, 1, before.after), batches[place + 1 :], strict=False
        ):
            assert torch.equal(again.values[SITE], expected.values[SITE])
            assert again.after == expected.after


def test_going_on_reads_only_the_last_blocks(miniature, rows):
    made = stream(miniature, rows)
    after = take(made, 18)[-1].after
    once = max(made.blocks.size(b) for b in range(after.round + 2))
    read, forward = [], made._forward.read
    made._forward.read = lambda batch: read.append(batch.n_counted) or forward(batch)
    take(made, 1, after)
    # The blocks of the round, of the one before it, whose rest comes first, and of the one behind.
    assert sum(read) <= (PARTS + 2) * once


def test_a_seed_is_an_order(miniature, rows):
    first, again, other = (take(stream(miniature, rows, seed=s), 5) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.values[SITE], b.values[SITE])
    assert not torch.equal(first[0].values[SITE], other[0].values[SITE])


def test_no_two_batches_share_memory(miniature, rows):
    batches = []
    for batch in islice(stream(miniature, rows).batches(), 20):
        batches.append((batch, batch.values[SITE].clone()))
    for batch, copy in batches:
        assert torch.equal(batch.values[SITE], copy)


def test_sites_do_not_change_each_other(miniature, rows):
    together = take(stream(miniature, rows, (SITE, OTHER)), 6)
    for site in (SITE, OTHER):
        alone = take(stream(miniature, rows, (site,)), 6)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a.values[site], b.values[site])
    # The same tokens: a linear map from one site to the other fits them, and no other pairing.
    x, y = (torch.cat([b.values[s] for b in together]).double() for s in (OTHER, SITE))
    fit = torch.linalg.lstsq(x, y).solution
    wrong = torch.linalg.lstsq(x.roll(1, 0), y).solution
    error = (x @ fit - y).square().sum()
    assert error < 0.5 * (x.roll(1, 0) @ wrong - y).square().sum()


def test_the_type_is_kept_and_rounds_once(miniature, rows):
    wide = take(stream(miniature, rows), 4)
    narrow = take(stream(miniature, rows, dtype=torch.bfloat16), 4)
    for a, b in zip(wide, narrow, strict=True):
        assert (a.values[SITE].dtype, b.values[SITE].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(a.values[SITE].bfloat16(), b.values[SITE])


def test_special_tokens_are_never_served(miniature, rows):
    bos, eos = miniature.tokenizer.bos_token_id, miniature.tokenizer.eos_token_id
    ended = [Context([*row.ids, eos], row.document, row.start) for row in rows]
    made = stream(miniature, ended, harvest=1)
    assert made.tokens == sum(t not in (bos, eos) for row in ended for t in row.ids)
    special = set()
    for row in ended:
        (batch,) = made._forward.packed([row], 1)
        values = miniature.run(batch, read=[SITE])[SITE]
        special |= {value.numpy().tobytes() for value in values[~batch.counts]}
    assert len(special) == len(ended) + 1, "one BOS, the same everywhere, and an EOS in each row"
    served = torch.cat([b.values[SITE] for b in take(made, made.tokens // made.batch)])
    assert not special & counted(served).keys()


def test_neighbours_are_unrelated(miniature, rows, known):
    """Lag-one correlation of what is served, against text order, within what chance allows."""
    made = stream(miniature, rows, buffer=2_048)

    def correlation(x):
        x = (x - x.mean(0)) / x.std(0)
        return float((x[1:] * x[:-1]).mean())

    served = torch.cat([b.values[SITE] for b in take(made, made.tokens // made.batch)])
    # A mean over n pairs of d products; the directions of activations, about ten that matter, are
    # what is independent of the d. Five standard deviations.
    tolerance = 5 / (len(served) * 10) ** 0.5
    assert correlation(torch.cat(known)) > 2 * tolerance
    assert abs(correlation(served)) < tolerance


def test_a_batch_mixes_many_contexts(miniature, rows, known):
    """Round after round, a batch has tokens of nearly every context of the blocks it mixes."""
    of = {value.numpy().tobytes(): i for i, values in enumerate(known) for value in values}
    made = stream(miniature, rows, harvest=1)
    for batch in take(made, 14)[6:]:
        contexts_seen = {of[value.numpy().tobytes()] for value in batch.values[SITE]}
        # A round has four parts, of blocks of about three contexts each.
        assert len(contexts_seen) >= 8


def test_the_sample_is_of_the_beginning(miniature, rows, known):
    made = stream(miniature, rows, harvest=1)
    sample = made.sample(1_000)[SITE]
    assert sample.shape == (1_000, 256)
    assert sample.dtype == torch.float32
    assert torch.equal(sample, made.sample(1_000)[SITE])
    every = counted(torch.cat(known))
    assert all(count <= every[value] for value, count in counted(sample).items())
    all_of_it = made.sample(10**9)[SITE]
    assert counted(all_of_it) == every
    assert stream(miniature, rows, dtype=torch.bfloat16).sample(10)[SITE].dtype == torch.float32


def test_it_ends_when_asked_between_forward_passes(miniature, rows):
    made = stream(miniature, rows, harvest=1)
    asked = []

    def stopping():
        asked.append(made.model_seconds)
        return len(asked) > 3

    assert list(made.batches(stopping=stopping)) == []
    assert len(asked) == 4
    assert len(set(asked)) == 4, "a forward pass between any two"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch": 4_096, "buffer": 9_000}, r"the text has \d+ tokens that count, less than one b"),
        ({"buffer": 255}, "a buffer of 255 tokens mixes nothing into batches of 128; take 256 or"),
        ({"batch": 8, "buffer": 100}, "no room for contexts of 63 tokens beside a batch of 8; tak"),
    ],
)
def test_what_does_not_fit_is_refused(miniature, rows, changes, told):
    with pytest.raises(InputError, match=told):
        stream(miniature, rows, **changes)


_MEMORY = """
import resource, sys
from itertools import islice
import torch
from gemscope.activations import ActivationStream
from gemscope.corpus import contexts, read_text
from gemscope.lm import load_model
from gemscope.sites import Site

def now():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

model = load_model("miniature", device="cpu")
sites = [Site.parse(f"{layer}.mlp_hidden") for layer in range(4)]
rows = list(contexts(read_text("miniature"), model.tokenizer, length=64))[:400]
options = dict(batch=256, seed=0, harvest=8)
small = ActivationStream(model, rows, sites, buffer=1_024, **options)
for _ in islice(small.batches(), 3):
    pass
before = now()
large = ActivationStream(model, rows, sites, buffer=int(sys.argv[1]), **options)
most = 0
for _ in islice(large.batches(), int(sys.argv[2])):
    most = max(most, now() - before)
print(most / (large.capacity * 4 * 896 * 4), large.capacity)
"""


@pytest.mark.slow
def test_memory_is_the_buffer_once():
    script = [sys.executable, "-c", _MEMORY, "16384", "120"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    share, capacity = map(float, done.stdout.split())
    assert 0.9 * 16_384 < capacity <= 16_384
    assert 0.7 < share <= 1.2
