"""Which files a data set's paths mean: patterns, folders, and URLs, which are copied to the cache folder first."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import http.client
import importlib
import itertools
import logging
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import IO

from univid.data.folder import TABLES
from univid.data.shards import INDEX

log = logging.getLogger("univid.data")

_ENDINGS = (".tar", *TABLES)
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(paths: Sequence[str], cache: Path) -> list[Path]:
    """Tar shards, or one table, in the order of ``paths`` (a pattern's matches sorted).

    Raises:
        FileNotFoundError: nothing matches. ValueError: shards and tables, or several tables. OSError: a URL that cannot be copied.
    """
    found: list[Path] = []
    urls = [path for pattern in paths for path in braces(pattern) if "://" in path]
    with ThreadPoolExecutor(8) as pool:
        local = dict(zip(urls, pool.map(lambda url: fetch(url, cache), urls), strict=True))
    for pattern in paths:
        matches = [file for path in braces(pattern) for file in ([local[path]] if path in local else _local(path))]
        if not matches:
            raise FileNotFoundError(f"data: no shards match {pattern!r}")
        found += matches
    found = list(dict.fromkeys(found))
    tables = [path for path in found if path.suffix in TABLES]
    if tables and len(found) > 1:
        raise ValueError(f"data: got {len(found)} files with {tables[0]} among them; tar shards or one table needed")
    return found


def braces(pattern: str) -> list[str]:
    """``{000..012}`` counts, with leading zeros as in the first number; ``{a,b}`` lists."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    ends = braces(pattern[match.end() :])
    return [pattern[: match.start()] + middle + end for middle, end in itertools.product(choices, ends)]


def _local(path: str) -> list[Path]:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        children = sorted(Path(path).iterdir())
        shards = [child for child in children if child.suffix == ".tar"]
        tables = [child for child in children if child.suffix in TABLES]
        if shards and tables:
            log.warning("data: %s holds shards, which are read, and %s, which is not", path, tables[0].name)
        if not (shards or tables):
            raise FileNotFoundError(f"data: {path} holds no .tar and no .csv or .jsonl table; one needed")
        return shards or tables
    if glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        return [Path(match) for match in matches if not match.endswith(INDEX)]  # they lie beside their shards
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data: {path} does not exist")
    if Path(path).suffix not in _ENDINGS:
        raise ValueError(f"data: got {path}; tar shards (.tar), a .csv or .jsonl table, or a folder of them needed")
    return [Path(path)]


def fetch(url: str, cache: Path) -> Path:
    """The local copy of a URL, made if it is not there: streamed under another name, checked, renamed."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ValueError(f"data: got {url}, which is no URL: {error}") from None
    name = parts.path.rpartition("/")[2].encode()[-100:].decode(errors="ignore")  # a file's may have 255 bytes
    if Path(name).suffix not in _ENDINGS:  # it may stand in the query
        name += next((ending for ending in _ENDINGS if parts.query.endswith(ending)), "")
    target = cache / f"{sha256(url.encode()).hexdigest()[:16]}-{name}"
    try:
        if not target.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(target):
                if not target.is_file():  # another process may just have made it
                    _copy(url, target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(f"data: {url} could not be copied to {cache}: {reason}") from None
    return target


def _copy(url: str, target: Path) -> None:
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file, _stream(url) as (source, length):
            shutil.copyfileobj(source, file, 2**20)
            got = file.tell()
        if length is not None and got != length:
            raise OSError(f"it ended after {got} of {length} bytes")
        _check(Path(partial), target.suffix)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def _check(path: Path, ending: str) -> None:
    """Refuse what a server says in place of a file, as of a sign-in, which would be kept for good."""
    if ending in TABLES:
        with path.open("rb") as file:
            if file.read(64).lstrip().startswith(b"<"):
                raise OSError("the answer is a web page")
    elif not tarfile.is_tarfile(path):
        raise OSError("the answer is not a tar file")


@contextlib.contextmanager
def _stream(url: str) -> Iterator[tuple[IO[bytes], int | None]]:
    if url.startswith(("http://", "https://", "file://")):
        with urllib.request.urlopen(url, timeout=60) as response:
            length = response.headers.get("Content-Length")
            yield response, None if length is None else int(length)
        return
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError:
        raise OSError("fsspec, which reads such URLs, is not installed") from None
    try:
        with fsspec.open(url, "rb") as file:
            yield file, getattr(file, "size", None)
    except ImportError as error:  # of the protocol's own library
        raise OSError(str(error)) from None


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time: all ranks of a machine want the same files."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
