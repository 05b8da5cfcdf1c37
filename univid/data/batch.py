"""What a step of training is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Clips, or pictures as clips of one frame, with their captions: as pixels, or as what the frozen parts make of them."""

    keys: list[str]  # a clip's name, the same whenever it comes
    captions: list[str]
    fps: Tensor  # (B,)
    frames: Tensor | None = None  # uint8 (B, T, H, W, 3)
    latents: Tensor | None = None  # (B, T, z, h, w), scaled
    text: Tensor | None = None  # (B, L, width)
    image: Tensor | None = None  # (B, L_i, width): the image tower's tokens of the first frame, before the adapter

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: function(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **changed)
