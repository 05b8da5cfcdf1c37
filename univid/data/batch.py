"""What training reads: one clip, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One clip (T = 1: an image): frames, or what the frozen encoders made of it."""

    key: str
    caption: str
    fps: float
    frames: Tensor | None = None  # uint8 (T, H, W, 3)
    latents: Tensor | None = None  # (T, z, h, w), scaled
    text: Tensor | None = None  # (L, width), the text tower's tokens
    image: Tensor | None = None  # (L_i, width), the image tower's tokens of the first frame, before the adapter


@dataclass
class Batch:
    """Clips of one size. What comes from a cache is float16, as it is stored."""

    keys: list[str]
    captions: list[str]
    fps: Tensor  # (B,) float32
    frames: Tensor | None = None  # uint8 (B, T, H, W, 3); T = 1 for images
    latents: Tensor | None = None  # (B, T, z, h, w), scaled
    text: Tensor | None = None  # (B, L, width), the text tower's tokens
    image: Tensor | None = None  # (B, L_i, width), the image tower's tokens of the first frame, before the adapter

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """On a device; from pinned memory to a GPU without waiting for the copy."""
        ahead = torch.device(device).type != "cpu"
        return self._each(lambda x: x.to(device, non_blocking=ahead))

    def pin_memory(self) -> Batch:
        return self._each(lambda x: x.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        made: dict[str, Any] = {
            f.name: function(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, **made)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size and kind, one after the other."""

    def stack(name: str) -> Tensor | None:
        return None if getattr(samples[0], name) is None else torch.stack([getattr(s, name) for s in samples])

    return Batch(
        [s.key for s in samples],
        [s.caption for s in samples],
        torch.tensor([s.fps for s in samples], dtype=torch.float32),
        **{name: stack(name) for name in ("frames", "latents", "text", "image")},
    )


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """On a device; from the CPU to a GPU without waiting for the copy."""
    ahead = x.device.type == "cpu" and torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if ahead else x.to(device)
