"""Clips and images on disk as samples by number: tar shards, a table of files, or a cache that ``univid encode`` made."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from univid.data.batch import Sample
from univid.data.cache import Cached
from univid.data.decode import read_clip, read_still, size_of
from univid.data.files import check_fps
from univid.data.folder import TABLES, Folder
from univid.data.paths import expand
from univid.data.shards import Listing, Shards

log = logging.getLogger("univid.data")

CACHE = "~/.cache/univid/data"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read, and as what."""

    paths: tuple[str, ...]  # tar shards, a table, or a folder of them: paths, globs, {000..999}, URLs
    num_frames: int = 16  # T; 1: images, and single frames of clips
    sizes: tuple[tuple[int, int], ...] = ()  # (H, W): the aspect buckets, or the one size; a cache has its own
    fps: float | None = None  # frames are left out to come near to it; None: each file's own
    min_score: dict[str, float] = field(default_factory=dict)  # the least value by field of key.json, or table's column
    cache: str = CACHE  # where copies of URLs go, and indices of shards whose folder cannot be written

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths: got none; at least one needed")
        if self.num_frames < 1:
            raise ValueError(f"num_frames: got {self.num_frames}; at least 1 needed")
        if any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise ValueError(f"sizes: got {self.sizes}; pairs (height, width) of at least 1 needed")
        if self.fps is not None:
            check_fps(self.fps)


def open_dataset(config: DataConfig, fingerprint: dict[str, str] | None = None) -> Clips | Cached:
    """The data set of a configuration: frames, or from a cache latents and tokens.

    Args:
        fingerprint: of the model that is to read a cache (:func:`univid.data.cache.fingerprint`).

    Raises:
        ValueError, OSError: nothing matches, an empty shard, no captions, nothing that passes ``min_score``, or a cache that another VAE
            or text encoder made; one line each.
    """
    cache = Path(os.path.expanduser(config.cache))
    paths = expand(config.paths, cache)
    source = Folder(paths[0]) if paths[0].suffix in TABLES else Shards(paths, cache)
    keep = _captioned(source, _scored(source.listing, config.min_score))
    if isinstance(source, Shards) and any(source.headers):
        return Cached(source, keep, config.num_frames, config.sizes, fingerprint)
    if not config.sizes:
        raise ValueError("sizes: got none; a size (height, width), or several as aspect buckets, needed")
    if config.num_frames > 1:
        keep = keep[~source.listing.pictures[keep]]
        if not len(keep):
            raise ValueError(f"data: {paths[0]} holds pictures alone; num_frames={config.num_frames} needs clips")
    return Clips(source, keep, config.num_frames, config.sizes, config.fps)


class Clips:
    """Decoded frames.

    Args:
        keep: the source's samples that count. sizes: of several, each clip is in the one that is nearest to its own aspect.
    """

    def __init__(
        self,
        source: Shards | Folder,
        keep: NDArray[np.integer],
        num_frames: int,
        sizes: tuple[tuple[int, int], ...],
        fps: float | None,
    ):
        self.source, self.keep, self.num_frames, self.sizes, self.fps = source, keep, num_frames, sizes, fps
        self.buckets = np.zeros(len(keep), np.int64) if len(sizes) == 1 else self._nearest()

    @property
    def names(self) -> list[bytes]:
        shards = [path.name.encode() for path in self.source.paths] if isinstance(self.source, Shards) else []
        return [*shards, *self.source.listing.keys[self.keep].tolist()]

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: int) -> Sample:
        """The sample as its own number draws it."""
        return self.read(index, np.random.default_rng(index))

    def read(self, index: int, generator: np.random.Generator) -> Sample:
        """A sample, cut in time where ``generator`` says. Raises ValueError: it cannot be read; its name and why."""
        number, size = int(self.keep[index]), self.sizes[self.buckets[index]]
        try:
            media = self.source.media(number)
            if self.source.listing.pictures[number]:
                frames, fps = read_still(media, size), self.fps or 1.0
            else:
                frames, fps = read_clip(media, self.num_frames, size, self.fps, generator)
            caption = self.source.caption(number)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.source.name(number)}: {error}") from None
        return Sample(self.source.listing.keys[number].decode(), caption, fps, frames)

    def numbers(self, index: int) -> dict[str, float]:
        """The fields of its JSON, or columns of its table, that are numbers."""
        every = {name: float(column[self.keep[index]]) for name, column in self.source.listing.numbers.items()}
        return {name: value for name, value in every.items() if not np.isnan(value)}

    def _nearest(self) -> NDArray[np.int64]:
        """The bucket of each clip; where its size is not known, a frame of it is looked at."""
        absent = np.full(len(self.source.listing.keys), np.nan)
        height, width = (self.source.listing.numbers.get(name, absent)[self.keep] for name in ("height", "width"))
        aspect = height / width
        unknown = np.flatnonzero(~(np.isfinite(aspect) & (aspect > 0)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            aspect[unknown] = list(pool.map(self._aspect, unknown.tolist()))
        wanted = np.array([h / w for h, w in self.sizes])
        return np.abs(np.log(aspect)[:, None] - np.log(wanted)).argmin(1)

    def _aspect(self, index: int) -> float:
        number = int(self.keep[index])
        try:
            height, width = size_of(self.source.media(number), bool(self.source.listing.pictures[number]))
            return height / width
        except (ValueError, OSError):
            return 1.0  # it is broken, which shows when it is read


def _scored(listing: Listing, min_score: dict[str, float]) -> NDArray[np.integer]:
    """The samples that have at least the given scores."""
    passing = np.ones(len(listing.keys), bool)
    for name, least in min_score.items():
        if name not in listing.numbers:
            known = ", ".join(listing.numbers) or "none"
            raise ValueError(f"min_score: no sample has a number {name!r}; there are: {known}")
        passing &= np.nan_to_num(listing.numbers[name], nan=-np.inf) >= least
    if len(passing) and not passing.any():
        raise ValueError(f"min_score: none of {len(passing)} samples passes {min_score}")
    return np.flatnonzero(passing)


def _captioned(source: Shards | Folder, keep: NDArray[np.integer]) -> NDArray[np.integer]:
    """The samples that have a caption; the others are named, as broken clips are."""
    without = keep[~source.listing.captioned[keep]]
    if len(keep) and len(without) == len(keep):
        raise ValueError(
            f"data: captions are missing: {source.name(int(keep[0]))} has neither a text in key.txt"
            ' nor one as "caption" in key.json'
            if isinstance(source, Shards)
            else f"data: captions are missing: none of {len(keep)} rows of {source.table} has one"
        )
    if len(without):
        log.warning(
            "data: left out %d of %d clips without a caption; one is %s",
            len(without),
            len(keep),
            source.name(int(without[0])),
        )
    return keep[source.listing.captioned[keep]]
