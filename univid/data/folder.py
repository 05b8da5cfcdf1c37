"""A table of clips: a CSV or JSONL file with ``path`` and ``caption``, and the files that it names."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from univid.data.decode import PICTURES
from univid.data.shards import Listing, caption_of, json_object, numbers_of

TABLES = (".csv", ".jsonl")


class Folder:
    """Samples of a table; a path in it that is not absolute starts at the table's folder.

    Raises:
        ValueError: it is no table, lacks a column, or is empty.
    """

    def __init__(self, table: Path):
        self.table = table
        rows = _rows(table)
        if not rows:
            raise ValueError(f"data: {table} lists no clips")
        for column in ("path", "caption"):
            if not any(column in row for row in rows):
                raise ValueError(f"data: {table} has no column {column!r}; path and caption needed")
        self.paths = np.array([str(row.get("path") or "") for row in rows])
        self.captions = np.array([caption_of(row) for row in rows])
        numbers = [numbers_of(row) for row in rows]
        names = sorted({name for row in numbers for name in row})
        self.listing = Listing(
            # JSON may have half of a surrogate pair, which is no UTF-8.
            np.array([path.encode(errors="backslashreplace") for path in self.paths.tolist()], dtype=np.bytes_),
            np.array([path.rpartition(".")[2].lower() in PICTURES for path in self.paths.tolist()]),
            self.captions != "",
            {name: np.array([row.get(name, np.nan) for row in numbers]) for name in names},
        )

    def name(self, index: int) -> str:
        return str(self.table.parent / self.listing.keys[index].decode())

    def media(self, index: int) -> Path:
        return self.table.parent / str(self.paths[index])

    def beginning(self, index: int, length: int) -> tuple[int, bytes]:
        """The size of a clip's file, and its first bytes."""
        with self.media(index).open("rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(length)

    def caption(self, index: int) -> str:
        return str(self.captions[index])


def _rows(table: Path) -> list[dict[str, Any]]:
    try:
        if table.suffix == ".csv":
            with table.open(newline="", encoding="utf-8-sig") as file:
                return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
        with table.open(encoding="utf-8-sig") as file:  # splitlines() would end lines at a caption's U+2028 too
            lines = list(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {table} is not {table.suffix[1:].upper()}: {error}") from None
    return [json_object(line, f"{table}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _value(name: str, text: Any) -> Any:
    """A CSV's cell; numbers count as such, but for a clip that is named 7 or a caption 1984."""
    if name in ("path", "caption"):
        return text
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
