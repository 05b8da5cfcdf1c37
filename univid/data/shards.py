"""Tar shards in video2dataset's layout, read at any place: ``key.mp4`` (``key.jpg``), ``key.txt`` and ``key.json``.

A shard's index (where each file lies, and the numbers in its JSON) is made once and kept beside the shard, or in the cache folder.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from univid.data.decode import PICTURES, VIDEOS

log = logging.getLogger("univid.data")

INDEX = ".index.npz"  # behind a shard's name: what it holds, kept beside it
HEADER = "univid.json"  # of a shard that `univid encode` wrote: what it is a cache of
_FILES = ("media", "txt", "json")
_KINDS = dict.fromkeys(PICTURES, "picture") | dict.fromkeys({*VIDEOS, "safetensors"}, "video")
_KINDS |= {"txt": "txt", "json": "json"}  # by a file's ending
_VERSION = 3


@dataclass(frozen=True)
class Listing:
    """What is known of all samples without reading them; arrays, so that millions fit and worker processes share them."""

    keys: NDArray[np.bytes_]  # (N,) UTF-8
    pictures: NDArray[np.bool_]  # (N,)
    captioned: NDArray[np.bool_]  # (N,)
    numbers: dict[str, NDArray[np.float64]]  # (N,) each; NaN where a sample lacks it


class Shards:
    """Samples of tar files. Raises ValueError, OSError: a shard that is empty, or no whole tar."""

    def __init__(self, paths: Sequence[Path], cache: Path):
        self.paths = list(paths)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda path: _index(path, cache), self.paths))
        names = sorted({name for part in parts for name in part["names"].tolist()})
        numbers = {name: [_column(part, name) for part in parts] for name in names}
        self.listing = Listing(
            np.concatenate([part["keys"] for part in parts]),
            np.concatenate([part["pictures"] for part in parts]),
            np.concatenate([part["captioned"] for part in parts]),
            {name: np.concatenate(columns) for name, columns in numbers.items()},
        )
        self.spans: NDArray[np.int64] = np.concatenate([part["spans"] for part in parts])  # (N, 3, 2): offset, size
        self.shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["keys"]) for part in parts])
        self.headers: list[dict[str, Any] | None] = [
            json_object(part["header"].tobytes(), f"{path}: {HEADER}") if part["header"].size else None
            for path, part in zip(self.paths, parts, strict=True)
        ]
        if dotted := sum(int(part["dotted"]) for part in parts):
            first = next(
                f"{path}/{part['example']}" for path, part in zip(self.paths, parts, strict=True) if part["dotted"]
            )
            log.warning("data: left out %d files whose key would have a dot, which ends it; one is %s", dotted, first)

    def name(self, index: int) -> str:
        return f"{self.paths[self.shard[index]]}/{self.listing.keys[index].decode()}"

    def media(self, index: int) -> bytes:
        return self._read(index, "media")

    def beginning(self, index: int, length: int) -> tuple[int, bytes]:
        """The size of a clip's file, and its first bytes."""
        size = int(self.spans[index, _FILES.index("media"), 1])
        return size, self._read(index, "media", length)

    def caption(self, index: int) -> str:
        if self.spans[index, _FILES.index("txt"), 1] >= 0:
            return self._read(index, "txt").decode().strip()
        return caption_of(self.json(index))

    def json(self, index: int) -> dict[str, Any]:
        return json.loads(self._read(index, "json"))

    def _read(self, index: int, file: str, length: int = sys.maxsize) -> bytes:
        offset, size = self.spans[index, _FILES.index(file)].tolist()
        size = min(size, length)
        with self.paths[self.shard[index]].open("rb", buffering=0) as shard:
            data = os.pread(shard.fileno(), size, offset)
        if len(data) != size:
            raise ValueError("its shard has become shorter than its index says")
        return data


def _index(path: Path, cache: Path) -> dict[str, NDArray[Any]]:
    """A shard's index: the one that is kept, if the shard has not changed since, or a new one."""
    status = path.stat()
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    places = (
        path.with_name(f"{path.name}{INDEX}"),
        cache / f"{sha256(str(path.resolve()).encode()).hexdigest()}.npz",
    )
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as kept:
                if np.array_equal(kept["stamp"], stamp):
                    return dict(kept)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # missing, or of no use
    made = {**_scan(path), "stamp": stamp}
    for place in places:
        try:
            _keep(place, made)
            break
        except OSError:  # a folder that cannot be written, or is full: the index serves without being kept
            continue
    return made


def _keep(place: Path, arrays: dict[str, NDArray[Any]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # its own keyword allow_pickle is not among them
        os.replace(partial, place)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _scan(path: Path) -> dict[str, NDArray[Any]]:
    """Go through a tar: a sample is what has one name up to its first dot, and a video or picture among its files.

    Of a video and a picture of one name the video counts.
    """
    samples: dict[str, dict[str, Any]] = {}
    header = b""
    dotted: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                member_name = member.name.encode(errors="backslashreplace").decode()  # it may be in any encoding
                if member_name == HEADER:
                    header = _contents(tar, member)
                    continue
                folder, name = os.path.split(member_name)
                stem, _, ending = name.partition(".")
                ending = ending.lower()
                if stem and "." in ending and ending.rpartition(".")[2] in PICTURES | VIDEOS:
                    dotted.append(member_name)
                sample, kind = samples.setdefault(os.path.join(folder, stem), {"numbers": {}}), _KINDS.get(ending)
                if kind in sample:
                    raise ValueError(f"data: {path}: {member_name} is the second {kind} of its key; one needed")
                if kind == "txt" and not _contents(tar, member).decode(errors="replace").strip():
                    continue  # without a text it is as if it were not there
                if kind is not None:
                    sample[kind] = member.offset_data, member.size
                if kind == "json":
                    values = json_object(_contents(tar, member), f"{path}: {member_name}")
                    sample["numbers"] = numbers_of(values)
                    sample["captioned"] = caption_of(values) != ""
    except tarfile.TarError as error:
        raise ValueError(f"data: {path} is not a whole tar file: {error}") from None
    samples = {key: sample for key, sample in samples.items() if "video" in sample or "picture" in sample}
    if not samples and not header:
        raise ValueError(f"data: {path} is an empty shard: it holds no video (key.mp4) and no picture (key.jpg)")
    found = list(samples.values())
    names = sorted({name for sample in found for name in sample["numbers"]})
    for sample in found:
        sample["media"] = sample.get("video") or sample["picture"]
    spans = [[sample.get(file, (-1, -1)) for file in _FILES] for sample in found]
    return {
        "keys": np.array([key.encode() for key in samples], dtype=np.bytes_),
        "pictures": np.array(["video" not in sample for sample in found], dtype=bool),
        "captioned": np.array([sample.get("captioned", False) or "txt" in sample for sample in found], dtype=bool),
        "spans": np.array(spans, dtype=np.int64).reshape(-1, 3, 2),
        "names": np.array(names, dtype=np.str_),
        "numbers": np.array([[sample["numbers"].get(name, np.nan) for sample in found] for name in names], dtype=float),
        "dotted": np.array(len(dotted)),
        "example": np.array(next(iter(dotted), "")),
        "header": np.frombuffer(header, dtype=np.uint8),
    }


def json_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Raises ValueError, which names it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or numbers and brackets beyond what Python reads
        raise ValueError(f"data: {name} is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"data: {name} is not a JSON object: it is a {type(value).__name__}")
    return value


def caption_of(values: dict[str, Any]) -> str:
    """The caption of a JSON object or a table's row, "" where there is none; one may be written as a number: 1984."""
    caption = values.get("caption")
    return str(caption).strip() if isinstance(caption, (str, int, float)) else ""


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """The fields that are numbers, of those that a float holds."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    }


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a file
    return file.read()


def _column(part: dict[str, NDArray[Any]], name: str) -> NDArray[np.float64]:
    names = part["names"].tolist()
    return part["numbers"][names.index(name)] if name in names else np.full(len(part["keys"]), np.nan)
