"""How much there is to compute, and how fast this device could."""

from __future__ import annotations

import functools
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


def forward_flops(config: UNetConfig, sample: Conditioned) -> int:
    """The forward's FLOPs of one clip, by PyTorch's counter."""
    image = None if sample.image is None else tuple(sample.image.shape[1:])
    return _forward_flops(config, tuple(sample.latents.shape[1:]), tuple(sample.text.shape[1:]), image)


@functools.cache
def _forward_flops(config: UNetConfig, *shapes: tuple[int, ...] | None) -> int:
    with torch.device("meta"):
        model = Denoiser(config).eval()
        x, text, image = (None if shape is None else torch.empty(1, *shape) for shape in shapes)
        t = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, text, image)
    return counter.get_total_flops()


def datasheet_rate(device: torch.device) -> float | None:
    """FLOP/s, or None for a device that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in DATASHEET.items() if part in name), None)


@functools.cache
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
