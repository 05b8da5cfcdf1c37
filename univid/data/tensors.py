"""Safetensors and JSON files, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises FileNotFoundError, or ValueError where the file is truncated or no safetensors file."""
    check_safetensors(path)
    return load_file(path)


def check_safetensors(path: Path) -> None:
    """See that a file is whole, from its header."""
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a whole safetensors file: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises FileNotFoundError, or ValueError where the file holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"path: {path} holds a {type(value).__name__}, needs an object")
    return value
