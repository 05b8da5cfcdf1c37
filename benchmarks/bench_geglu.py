"""``geglu`` beside chunk, GELU and product, eager and compiled."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import geglu, reference

OP = "geglu"
SHAPES = LEVELS
BATCHES = (1, 2)


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    shape = (batch, level.frames, level.tokens, 8 * level.channels)  # four times the channels, twice
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    size = x.numel() * 2.0
    return Problem(
        tensors={"x": x},
        reference=lambda t, accumulate=None: reference.geglu(t["x"], accumulate),
        part=lambda t: {"x": t["x"][:, :2]},
        part_of=lambda _, x: x[:, :2],
        flops={"fwd": 0.0, "bwd": 0.0},
        bytes={"fwd": 1.5 * size, "bwd": 2.5 * size},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = ours("geglu", lambda t, backend: geglu(t["x"], backend=backend))
    run["eager"] = Implementation(_geglu)
    if batch == 2 and level in UNET.values():
        run["torch.compile"] = Implementation(lambda t: _compiled()(t), quick=False, compiles=True)
    return run


def _geglu(t: Tensors):
    a, b = t["x"].chunk(2, dim=-1)
    return a * F.gelu(b)


@cache
def _compiled():
    return torch.compile(_geglu, dynamic=False)
