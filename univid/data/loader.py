"""Endless batches, read ahead by worker processes, in an order that any number of ranks can go on from."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from univid.data.batch import Batch, Sample, collate
from univid.data.order import Order, Place

log = logging.getLogger("univid.data")

_TRIES = 16  # other clips that are tried in place of a broken one
_FEW = 10  # broken clips that are no rate yet


class Dataset(Protocol):
    """Samples by number. What has one bucket number has one size."""

    @property
    def buckets(self) -> NDArray[np.integer]: ...
    @property
    def names(self) -> list[bytes]:
        """By which the same data is known again."""
        ...

    def __len__(self) -> int: ...
    def read(self, index: int, generator: np.random.Generator) -> Sample:
        """What is random in it (where a clip is cut) comes from ``generator``.

        Raises:
            ValueError, OSError: this one cannot be read; the message names it.
        """


class Loader:
    """This rank's part of the global batches.

    A clip that cannot be read is left out, counted in ``skipped`` and named in the log. Its place goes to another clip of its bucket, drawn
    from the seed and the place alone, so neither the order nor the state knows of it.

    Args:
        batch_size: clips of this rank. seed: of the order and of where clips are cut. workers: processes that read, at most one a core; 0
            reads in this one.
        prefetch: batches that each of them is ahead. max_skipped: the largest part of this rank's clips that may be broken.
        pin_memory: whether batches lie in page-locked memory; by default where there is a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 4,
        prefetch: int = 2,
        max_skipped: float = 0.1,
        pin_memory: bool | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; at least 1 needed")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} of world_size {world_size}")
        if len(dataset) == 0:
            raise ValueError("dataset: has no samples")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.max_skipped = max_skipped
        self.skipped = 0
        workers = min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers)
        self._seen = 0
        self._named: set[str] = set()
        self.rates: set[float | None] = getattr(dataset, "rates", set())  # of a cache's clips, frames a second
        buckets = np.unique(dataset.buckets, return_inverse=True)[1]  # of which there may be two of one length
        names = hashlib.sha256(b"\0".join([*dataset.names, buckets.tobytes()])).hexdigest()[:16]
        self._order = Order(dataset.buckets, seed, names)
        self._iterator: Iterator[_Fetched] | None = None
        self._batches = DataLoader(
            _Fetch(dataset, self._order),
            sampler=_Sampler(self._order, batch_size, rank, world_size),
            batch_size=None,  # an item is a whole batch already
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_group,
            generator=torch.Generator(),  # the global one's state is the training's alone
        )

    def next(self) -> Batch:
        """This rank's part of the next global batch.

        Raises:
            ValueError: too many clips are broken. RuntimeError: a worker process died.
        """
        if self._iterator is None:
            self._iterator = iter(self._batches)
        fetched = next(self._iterator)
        self._seen += self.batch_size
        for reason in fetched.skipped:
            self._skip(reason)
        if fetched.batch is None:
            raise ValueError(f"data: none of {_TRIES} clips in a row could be read; the last is {fetched.skipped[-1]}")
        if self.skipped >= _FEW and self.skipped > self.max_skipped * self._seen:
            raise ValueError(
                f"data: {self.skipped} of {self._seen} clips could not be read, more than max_skipped={self.max_skipped:g} of them;"
                f" the last is {fetched.skipped[-1]}"
            )
        self._order.skip(self.batch_size * self.world_size)
        return fetched.batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the batches that :meth:`next` has returned: the same on all ranks, and good for any number of them."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place. Raises ValueError: it is of other data, or of another seed."""
        self._order.load_state_dict(state)
        self.close()

    def close(self) -> None:
        """End the worker processes; the next batch starts them again."""
        self._iterator = None

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        if reason not in self._named:
            self._named.add(reason)
            log.warning("data: left out %s", reason)


class _Sampler:
    """This rank's places of every batch from the loader's state on.

    It knows the order and not the loader: in a cycle of references the worker processes would end when the garbage is
    collected, by then without the queues through which they are told to.
    """

    def __init__(self, order: Order, batch_size: int, rank: int, world_size: int):
        self.order, self.count = order, batch_size * world_size
        self.part = slice(rank * batch_size, (rank + 1) * batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        order = copy.copy(self.order)
        order.taken = list(order.taken)  # runs ahead of the loader's
        while True:
            yield order.next(self.count)[self.part]


class _Fetched(NamedTuple):
    batch: Batch | None  # None: nothing could be read
    skipped: list[str]


class _Fetch(torch.utils.data.Dataset):
    """Reads the batch of a list of places, in a worker."""

    def __init__(self, dataset: Dataset, order: Order):
        self.dataset, self.seed = dataset, order.seed
        self.members, self.buckets = order.members, np.unique(dataset.buckets, return_inverse=True)[1]

    def __getitem__(self, places: list[Place]) -> _Fetched:
        skipped: list[str] = []
        samples = []
        for place in places:
            sample = self._read(place, skipped)
            if sample is None:
                return _Fetched(None, skipped)
            samples.append(sample)
        return _Fetched(collate(samples), skipped)

    def _read(self, place: Place, skipped: list[str]) -> Sample | None:
        generator = np.random.default_rng([self.seed, place.epoch, place.sample])
        index = place.sample
        for _ in range(_TRIES):
            try:
                return self.dataset.read(index, generator)
            except (ValueError, OSError) as error:
                skipped.append(" ".join(str(error).split()))
            index = int(generator.choice(self.members[self.buckets[place.sample]]))
        return None


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _leave_group(worker: int) -> None:
    """Ctrl-C, and the SIGTERM that torchrun sends to a rank's whole group, are for the process that trains, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not ignored, for it is how a worker is ended
        os.setpgrp()
