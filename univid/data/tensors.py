"""Safetensors and JSON files, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Size, Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
HALF_WEIGHTS = WEIGHTS.replace(".safetensors", ".fp16.safetensors")
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
# Of a CLIP: what compares texts with pictures. Tokens need none of it, so it is neither kept nor part of a fingerprint.
UNREAD = frozenset({"visual.proj", "text_projection", "text.text_projection", "logit_scale", "logit_bias"})
LEFT_OUT = UNREAD | {"attn_mask", "text.attn_mask"}  # of files: open_clip used to save the mask, which is made anew
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def clip_source(source: str | Path) -> tuple[str, Path]:
    """The name and the path of ``NAME:PATH``; no name where the whole, which may have a colon, is a path already."""
    name, _, path = str(source).rpartition(":")
    return ("", Path(source)) if Path(source).exists() else (name, Path(path))


def find_weights(folder: Path) -> Path:
    """The safetensors file of diffusers' folder, in full or in half precision."""
    for name in (WEIGHTS, HALF_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"path: {folder} has no {WEIGHTS} (pickles, such as .bin, are not read)")


def find_clip_weights(path: Path) -> Path:
    """A CLIP's safetensors file, or that of its folder, under one of the names in use."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    for name in CLIP_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"clip: {path} has no weights as safetensors, such as {CLIP_WEIGHTS[0]}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises FileNotFoundError, or ValueError where the file is truncated or no safetensors file."""
    check_safetensors(path)
    return load_file(path)


def of_today(name: str, x: Tensor) -> tuple[str, Tensor]:
    """An autoencoder's tensor as diffusers has it now.

    Stable Diffusion 2.1's own file has older names for its attention, and some have 1x1 convolutions in it.
    """
    parts = name.split(".")
    if "attentions" not in parts:
        return name, x
    return ".".join(_OLDER.get(part, part) for part in parts), x.flatten(1) if x.ndim == 4 else x


def reason(error: Exception) -> str:
    """The first line of what a library says; PyTorch goes on for many."""
    return str(error).partition("\n")[0]


def check_safetensors(path: Path) -> None:
    """See that a file is whole, from its header."""
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a whole safetensors file: {error}") from None


def check_keys(source: Path | str, expected: Mapping[str, Size], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, which lists the keys of a file that are missing, left over, of another shape, or no floating-point
    numbers."""
    there = {name: tensors[name] for name in expected.keys() & tensors.keys()}
    faults = {
        "misses": expected.keys() - tensors.keys(),
        "has left over": tensors.keys() - expected.keys(),
        "has other shapes:": {
            f"{name} {tuple(x.shape)} for {tuple(expected[name])}"
            for name, x in there.items()
            if x.shape != expected[name]
        },
        "has no floating-point numbers in": {
            f"{name} ({x.dtype})".replace("torch.", "") for name, x in there.items() if not x.is_floating_point()
        },
    }
    if any(faults.values()):
        said = " and ".join(f"{what} {_listed(names)}" for what, names in faults.items() if names)
        raise ValueError(f"path: {source} {said}")


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(sorted(names)[:20]) + more


def object_in(config: Mapping[str, Any], name: str, source: Path | str) -> dict[str, Any]:
    """What stands under ``name``, {} where nothing does. Raises ValueError where it is no object."""
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{source}: {name}: got {value!r}, needs an object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises FileNotFoundError, or ValueError where the file holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"path: {path} holds a {type(value).__name__}, needs an object")
    return value
