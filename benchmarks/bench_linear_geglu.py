"""``linear_geglu`` beside cuBLAS's linear layer with GEGLU behind it, ours, eager and compiled. Forward: with gradients it is
its parts."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation, Problem, Tensors
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import linear_geglu, reference

OP = "linear_geglu"
SHAPES = LEVELS
BATCHES = (1, 2)


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    rows, columns = (batch, level.frames, level.tokens), 4 * level.channels

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, device=device, dtype=torch.bfloat16)

    tensors = {
        "x": randn(*rows, level.channels),
        "weight": randn(2 * columns, level.channels, scale=level.channels**-0.5),
        "bias": randn(2 * columns),
    }
    written = batch * level.frames * level.tokens * columns
    return Problem(
        tensors=tensors,
        reference=lambda t, accumulate=None: reference.linear_geglu(**t, accumulate=accumulate),
        part=lambda t: t | {"x": t["x"][:, :2]},
        part_of=lambda name, x: x[:, :2] if name in ("x", "out") else x,
        flops={"fwd": 4.0 * written * level.channels},
        bytes={"fwd": 2.0 * (written + sum(x.numel() for x in tensors.values()))},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = {
        backend: Implementation(
            lambda t, backend=backend: linear_geglu(**t, backend=backend),
            ("fwd",),
            backend=backend,
            quick=backend != "reference",
            compiles=backend == "triton",
        )
        for backend in ("cuda", "triton", "torch", "reference")
    }
    run["eager"] = Implementation(_linear_geglu, ("fwd",))
    if batch == 2 and level in UNET.values():
        run["torch.compile"] = Implementation(lambda t: _compiled()(t), ("fwd",), quick=False, compiles=True)
    return run


def _linear_geglu(t: Tensors):
    a, b = F.linear(t["x"], t["weight"], t["bias"]).chunk(2, dim=-1)
    return a * F.gelu(b)


@cache
def _compiled():
    return torch.compile(_linear_geglu, dynamic=False)
