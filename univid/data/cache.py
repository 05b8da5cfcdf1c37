"""What ``univid encode`` keeps of clips, read back: latents and tokens, as safetensors in tar shards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from univid.data.batch import Sample
from univid.data.shards import HEADER, Shards
from univid.data.tensors import (
    LEFT_OUT,
    check_safetensors,
    clip_source,
    find_clip_weights,
    find_weights,
    of_today,
    read_json,
)

_NAMES = {"vae": "VAE", "clip": "text encoder"}


def fingerprint(vae: str | Path, clip: str | Path) -> dict[str, str]:
    """Of the frozen encoders, from the tensors in their safetensors files: how a cache knows its model again.

    It is of the values as they are loaded, by whatever names and in whatever precision they are kept.

    Args:
        vae: diffusers' folder; its scaling factor counts too, as latents are kept scaled. clip: what
            :func:`univid.data.clip.load_clip` takes.
    """
    scaling = read_json(Path(vae) / "config.json").get("scaling_factor", 0.18215)  # as diffusers defaults to
    weights = find_clip_weights(clip_source(clip)[1])
    return {"vae": _hash(find_weights(Path(vae)), f"{scaling}"), "clip": _hash(weights, "")}


def _hash(path: Path, more: str) -> str:
    digest = hashlib.sha256(more.encode())
    check_safetensors(path)
    with safe_open(path, "pt") as file:
        names = {of_today(name, torch.empty(0))[0]: name for name in set(file.keys()) - LEFT_OUT}
        for name in sorted(names):
            x = of_today(name, file.get_tensor(names[name]))[1].float()
            half = x.half()
            x = half if torch.equal(half.float(), x) else x  # the same bytes, whichever of the two holds them on disk
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class Cached:
    """Latents and tokens of clips, the first ``num_frames`` of each; float16 as kept.

    Raises:
        ValueError: the cache has fewer frames or other sizes than asked for, or another VAE or text encoder made it.
    """

    def __init__(
        self,
        source: Shards,
        keep: NDArray[np.integer],
        num_frames: int,
        sizes: tuple[tuple[int, int], ...],
        expected: dict[str, str] | None,
    ):
        self.source, self.keep, self.num_frames = source, keep, num_frames
        first = source.headers[0]
        for path, header in zip(source.paths, source.headers, strict=True):
            if header is None or first is None:
                raise ValueError(
                    f"data: {path} and others: some are caches of `univid encode`, some hold clips; one kind needed"
                )
            if missing := [name for name in (*_NAMES, "num_frames") if name not in header]:
                raise ValueError(f"data: {path}: {HEADER} has no {missing[0]}, as a cache of `univid encode` has")
            for name, called in _NAMES.items():
                wanted = (expected or first)[name]
                if header[name] != wanted:
                    raise ValueError(
                        f"data: {path} is a cache made with another VAE or text encoder (fingerprint): its {called} is {header[name]},"
                        f" {'the model has' if expected else 'that of other shards'} {wanted}"
                    )
            if header["num_frames"] < num_frames:
                raise ValueError(f"num_frames: got {num_frames}; {path} has {header['num_frames']} of each clip")
        self.rates: set[Any] = {(header or {}).get("fps") for header in source.headers}  # None: each clip's own
        self.random = first is not None and first["vae"] == "random"  # of no model: to measure speed
        if not len(keep):
            raise ValueError(f"data: {source.paths[0]} and others: the cache holds no clips")
        shape = np.stack([source.listing.numbers[name][keep] for name in ("height", "width")], 1).astype(int)
        self.sizes, buckets = np.unique(shape, axis=0, return_inverse=True)
        self.buckets: NDArray[np.int64] = buckets.reshape(-1)
        if sizes and not {tuple(size) for size in self.sizes.tolist()} <= {tuple(size) for size in sizes}:
            raise ValueError(f"sizes: got {sizes}; {source.paths[0]} has {self.sizes.tolist()}")

    @property
    def names(self) -> list[bytes]:
        """Of its samples, and of the clips that they were made of."""
        clips = [str((header or {}).get("keys")).encode() for header in self.source.headers]
        shards = [path.name.encode() for path in self.source.paths]
        return [*shards, *self.source.listing.keys[self.keep].tolist(), *clips]

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: int) -> Sample:
        number = int(self.keep[index])
        try:
            about = self.source.json(number)
            tensors = load(self.source.media(number))
            return Sample(
                about["key"],
                about["caption"],
                about["fps"],
                None,
                tensors["latents"][: self.num_frames],
                tensors["text"],
                tensors["image"],
            )
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(f"{self.source.name(number)}: {error}") from None

    def read(self, index: int, generator: np.random.Generator) -> Sample:
        """What was drawn was drawn when the cache was made."""
        return self[index]
