"""In which order training sees the samples, and where it is in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Place(NamedTuple):
    """A sample's turn: its number, and the epoch, on which depends what is drawn of it."""

    sample: int
    epoch: int


class Order:
    """Every bucket is an endless row: a seeded permutation of its samples for each epoch, one after the other.

    A global batch takes the next samples of one row. How far each row has been read, as (epoch, index), is the whole state, so any
    other batch size and number of ranks can go on from it. Buckets take turns in proportion to their samples: the next is the one
    that would be the furthest behind (Webster's method), which the same state decides alike everywhere.

    Args:
        buckets: ``(N,)`` integers, the bucket of every sample. seed: of the permutations. names: a hash of the samples'
            names and buckets.
    """

    def __init__(self, buckets: NDArray[np.integer], seed: int, names: str = ""):
        self.seed, self.names = seed, names
        self.members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        self.taken = [0] * len(self.members)
        self._permutations: dict[int, tuple[int, NDArray[np.integer]]] = {}

    def next(self, count: int) -> list[Place]:
        """The next ``count`` places."""
        bucket = self._turn(count)
        places: list[Place] = []
        while (need := count - len(places)) > 0:
            epoch, start = divmod(self.taken[bucket], len(self.members[bucket]))
            indices = self._permutation(bucket, epoch)[start : start + need]
            places += [Place(int(index), epoch) for index in indices]
            self.taken[bucket] += len(indices)
        return places

    def skip(self, count: int) -> None:
        """Go on as :meth:`next` does."""
        self.taken[self._turn(count)] += count

    def state_dict(self) -> dict[str, Any]:
        places = [divmod(taken, len(members)) for taken, members in zip(self.taken, self.members, strict=True)]
        return {
            "epoch": [epoch for epoch, _ in places],
            "index": [index for _, index in places],
            "samples": [len(members) for members in self.members],
            "seed": self.seed,
            "names": self.names,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the state is of other data, or of another seed."""
        ours = self.state_dict()
        for name in ("samples", "seed", "names"):
            if state.get(name, ours[name]) != ours[name]:  # a state without names is of any
                raise ValueError(
                    f"data: the position to go on from is of other data or settings: {name} {state[name]}, here {ours[name]}"
                )
        places = zip(state["epoch"], state["index"], self.members, strict=True)
        self.taken = [epoch * len(members) + index for epoch, index, members in places]

    def _turn(self, count: int) -> int:
        behind = [(taken + count / 2) / len(members) for taken, members in zip(self.taken, self.members, strict=True)]
        return behind.index(min(behind))

    def _permutation(self, bucket: int, epoch: int) -> NDArray[np.integer]:
        if self._permutations.get(bucket, (-1,))[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch, bucket])
            self._permutations[bucket] = epoch, generator.permutation(self.members[bucket])
        return self._permutations[bucket][1]
