"""The loader: every sample once an epoch, in one order whatever the ranks, from any state; broken ones left out."""

import itertools
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from univid.data.batch import Batch, Sample, collate
from univid.data.loader import Loader
from univid.data.order import Order


class Numbers:
    """Sample i is number i; what is random of it is its fps."""

    def __init__(self, buckets, broken=()):
        self.buckets = np.asarray(buckets)
        self.broken = set(broken)
        self.names = [str(index).encode() for index in range(len(self.buckets))]

    def __len__(self):
        return len(self.buckets)

    def read(self, index, generator):
        if index in self.broken:
            raise ValueError(f"clip {index}: is\nbroken")
        size = 2 + int(self.buckets[index])
        frames = torch.full((1, size, size, 3), index, dtype=torch.uint8)
        return Sample(str(index), f"number {index}", float(generator.random()), frames)


def parts(dataset, batches, batch_size, ranks, state=None, **options):
    """The next global batches, as keys and what was drawn, from all ranks together, and the state after them."""
    loaders = [
        Loader(dataset, batch_size, rank=rank, world_size=ranks, **{"workers": 0, **options}) for rank in range(ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    rows = []
    for _ in range(batches):
        each = [loader.next() for loader in loaders]
        rows.append([pair for batch in each for pair in zip(batch.keys, batch.fps.tolist(), strict=True)])
    states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return rows, states[0]


def test_every_epoch_is_another_permutation():
    dataset = Numbers([0] * 10)
    rows, state = parts(dataset, 5, 6, 1)
    keys = [key for row in rows for key, _ in row]
    epochs = [keys[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(map(int, epoch)) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert (state["epoch"], state["index"]) == ([3], [0])
    assert rows == parts(dataset, 5, 6, 1)[0]
    assert rows != parts(dataset, 5, 6, 1, seed=1)[0]
    drawn = {key: {fps for row in rows for k, fps in row if k == key} for key in keys}
    assert all(len(each) == 3 for each in drawn.values())  # another part of the clip in every epoch


@pytest.mark.parametrize("ranks", list(itertools.permutations((1, 2, 4))))
def test_resume_on_other_numbers_of_ranks(ranks):
    dataset = Numbers([0] * 23, broken=[4, 11])
    expected, end = parts(dataset, 21, 4, 1)
    got, state = [], None
    for count in ranks:  # 28 samples each, whatever the ranks
        rows, state = parts(dataset, 7, 4 // count, count, state)
        got += rows
    assert got == expected
    assert state == end


def test_resume_with_another_global_batch():
    """Nothing is repeated or skipped where the batch grows or shrinks in the middle of an epoch, in any bucket."""
    dataset = Numbers([0] * 17 + [1] * 9 + [2] * 4)
    rows, state = parts(dataset, 3, 2, 1)
    for batch_size, ranks in ((1, 4), (3, 2), (1, 1)):
        more, state = parts(dataset, 5, batch_size, ranks, state)
        rows += more
    for bucket in range(3):
        members = {str(i) for i in np.flatnonzero(dataset.buckets == bucket)}
        keys = [key for row in rows for key, _ in row if key in members]
        for start in range(0, len(keys), len(members)):
            epoch = keys[start : start + len(members)]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) == len(members) or start + len(members) > len(keys)


def test_global_batches_are_of_one_bucket_in_proportion():
    dataset = Numbers(np.repeat([0, 1, 2], [60, 30, 10]))
    rows, _ = parts(dataset, 50, 1, 2)
    turns = [{int(dataset.buckets[int(key)]) for key, _ in row} for row in rows]
    assert all(len(turn) == 1 for turn in turns)
    assert Counter(turn.pop() for turn in turns) == {0: 30, 1: 15, 2: 5}
    frames = Loader(dataset, 4, workers=0).next().frames
    assert frames.shape == (4, 1, 2, 2, 3)


def test_order_skips_as_it_goes():
    order, ahead = (Order(np.repeat([3, 5], [8, 3]), 0) for _ in range(2))
    for count in (2, 4, 1, 7):
        order.next(count)
        ahead.skip(count)
        assert order.state_dict() == ahead.state_dict()


def test_workers_agree_and_the_state_is_of_what_was_handed_out():
    dataset = Numbers([0] * 9 + [1] * 5, broken=[2])
    expected, state = parts(dataset, 6, 2, 2)
    before = torch.random.get_rng_state()
    got, with_workers = parts(dataset, 6, 2, 2, workers=2)
    assert (got, with_workers) == (expected, state)
    assert torch.equal(torch.random.get_rng_state(), before)
    loader = Loader(dataset, 4, workers=2)
    batches = [loader.next() for _ in range(3)]
    state = loader.state_dict()
    after = loader.next().keys
    loader.next()
    loader.load_state_dict(state)  # the one that had read ahead
    assert loader.next().keys == after
    assert sum(map(len, batches)) == 12


def test_a_state_of_other_data_is_refused():
    state = Loader(Numbers([0] * 5), 1, workers=0).state_dict()
    with pytest.raises(ValueError, match=r"samples \[5\], here \[6\]"):
        Loader(Numbers([0] * 6), 1, workers=0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, here 1"):
        Loader(Numbers([0] * 5), 1, workers=0, seed=1).load_state_dict(state)
    other = Numbers([0] * 5)
    other.names[3] = b"another"
    with pytest.raises(ValueError, match=r"is of other data or settings: names \w{16}, here \w{16}$"):
        Loader(other, 1, workers=0).load_state_dict(state)
    sizes = Loader(Numbers([0, 1, 0, 1]), 1, workers=0).state_dict()
    with pytest.raises(ValueError, match=r"is of other data or settings: names \w{16}, here \w{16}$"):
        Loader(Numbers([1, 0, 1, 0]), 1, workers=0).load_state_dict(sizes)  # as by the same two in another order
    Loader(Numbers([2, 3, 2, 3]), 1, workers=0).load_state_dict(sizes)
    del state["names"]  # it does not say of which
    Loader(other, 1, workers=0).load_state_dict(state)


def test_broken_samples(caplog):
    whole, broken = Numbers([0] * 20 + [1] * 20), Numbers([0] * 20 + [1] * 20, broken=[3, 25])
    expected, end = parts(whole, 10, 4, 1)
    loader = Loader(broken, 4, workers=0)
    with caplog.at_level(logging.WARNING, "univid.data"):
        rows = [loader.next().keys for _ in range(10)]
    assert loader.state_dict() == end
    assert loader.skipped >= 2
    assert sorted(record.message for record in caplog.records) == [  # once each, though two epochs met them
        f"data: left out clip {key}: is broken" for key in (25, 3)
    ]
    for row, wanted in zip(rows, expected, strict=True):
        for key, (other, _) in zip(row, wanted, strict=True):
            if other in ("3", "25"):
                assert key not in ("3", "25")
                assert broken.buckets[int(key)] == broken.buckets[int(other)]
            else:
                assert key == other


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_stop(workers):
    loader = Loader(Numbers([0] * 40, broken=range(0, 40, 4)), 4, workers=workers)
    with pytest.raises(
        ValueError, match=r"data: 1\d of \d+ clips could not be read, more than max_skipped=0.1"
    ) as stop:
        for _ in range(100):
            loader.next()
    assert len(str(stop.value).splitlines()) == 1
    loader = Loader(Numbers([0] * 40, broken=range(40)), 4, workers=workers)
    with pytest.raises(ValueError, match=r"none of 16 clips in a row could be read; the last is clip \d+: is broken$"):
        loader.next()
    loader = Loader(Numbers([0] * 40, broken=range(0, 40, 4)), 4, workers=workers, max_skipped=0.5)
    for _ in range(30):
        loader.next()


def test_batch():
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(5, 3)
    batch = collate([Sample(str(i), "x", 8.0, latents=latents + i, text=text) for i in range(3)])
    assert batch.latents.shape == (3, 2, 4, 8, 8)
    assert (batch.fps.dtype, batch.fps.tolist()) == (torch.float32, [8.0] * 3)
    assert batch.frames is None and batch.image is None
    there = batch.to("meta")
    assert isinstance(there, Batch) and there.keys == batch.keys
    assert {x.device.type for x in (there.latents, there.text, there.fps)} == {"meta"}
    assert torch.equal(batch.to("cpu").latents, batch.latents)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank: got 2 of world_size 2"),
    ],
)
def test_bad_input(given, error):
    with pytest.raises(ValueError, match=error):
        Loader(Numbers([0]), **given)
    with pytest.raises(ValueError, match="no samples"):
        Loader(Numbers([]), 1)


@pytest.mark.gpu
def test_pinned():
    batch = Loader(Numbers([0] * 4), 2, workers=1).next()
    assert batch.frames.is_pinned()
    there = batch.to("cuda")
    torch.cuda.synchronize()
    assert torch.equal(there.frames.cpu(), batch.frames)


SIGNALLED = """
import os, signal
from tests.test_loader import Numbers
from univid.data.loader import Loader

signal.signal(signal.SIGTERM, lambda *_: print("told"))
loader, expected = (Loader(Numbers([0] * 64), 4, workers=workers) for workers in (2, 0))
for step in range(8):
    assert loader.next().keys == expected.next().keys
    if step == 1:
        os.killpg(0, signal.SIGTERM)
"""


def test_a_signal_to_the_group_leaves_the_workers_alone():
    """As torchrun sends SIGTERM: the process that trains takes batches until it has written its checkpoint, and ends them."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED],
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
