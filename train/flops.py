"""How much there is to compute, and how fast this device could."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.data import Conditioned
from train.sharding import Denoiser
from univid.model import UNetConfig

# Dense bfloat16 FLOP/s of the datasheets, by a part of the device's name.
DATASHEET = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Flops:
    """The forward's FLOPs of a clip, counted once for every kind of step on the meta device."""

    def __init__(self, config: UNetConfig):
        with torch.device("meta"):
            self.model = Denoiser(config)
        self._counted: dict[tuple, int] = {}

    def forward(self, sample: Conditioned, task: str) -> int:
        """Of one clip."""
        text, image = sample.text, sample.image
        key = (task, sample.latents.shape[1:], text.shape[1:], None if image is None else image.shape[1:])
        if key not in self._counted:
            x, text_, image_ = (
                None if y is None else y[:1].to("meta", torch.float32) for y in (sample.latents, text, image)
            )
            refs = self.model.unet.eval().reference_frames(x.shape[1], "meta") if x is not None else None
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                self.model(x, torch.zeros(1, dtype=torch.long, device="meta"), text_, image_, refs=refs)
            self._counted[key] = counter.get_total_flops()
        return self._counted[key]


def datasheet_rate(device: torch.device) -> float | None:
    """FLOP/s, or None for a device that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in DATASHEET.items() if part in name), None)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices here and now."""
    size, repeats = (8192, 20) if device.type == "cuda" else (512, 4)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run(count: int) -> float:
        before = time.perf_counter()
        for _ in range(count):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - before

    run(2)
    return repeats * 2 * size**3 / run(repeats)
