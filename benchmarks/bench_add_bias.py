"""``add_bias`` beside addition, eager and compiled."""

from functools import cache

import torch

from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import add_bias, reference

OP = "add_bias"
SHAPES = LEVELS
BATCHES = (1, 2)


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    make = lambda *s: torch.randn(*s, device=device, dtype=torch.bfloat16)  # noqa: E731
    tensors = {"x": make(batch, level.frames, level.tokens, level.channels), "bias": make(level.channels)}
    size = tensors["x"].numel() * 2.0
    return Problem(
        tensors=tensors,
        reference=lambda t, accumulate=None: reference.add_bias(t["x"], t["bias"], accumulate),
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": 0.0, "bwd": 0.0},
        bytes={"fwd": 2 * size, "bwd": size},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = ours("add_bias", lambda t, backend: add_bias(**t, backend=backend))
    run["eager"] = Implementation(_add_bias)
    if batch == 2 and level in UNET.values():
        run["torch.compile"] = Implementation(lambda t: _compiled()(t), quick=False, compiles=True)
    return run


def _add_bias(t: Tensors):
    return t["x"] + t["bias"]


@cache
def _compiled():
    return torch.compile(_add_bias, dynamic=False)
