"""``concat`` beside torch.cat: what the last block of a level on the way up is given, as many channels of each."""

import torch

from benchmarks.harness import Implementation, Problem, ours
from benchmarks.levels import LEVELS, Level
from univid.ops import concat, reference

OP = "concat"
SHAPES = LEVELS
BATCHES = (1, 2)


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    shape = (batch, level.frames, level.tokens, level.channels)
    tensors = {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name in "xy"}
    size = 8.0 * tensors["x"].numel()  # both are read and written
    return Problem(
        tensors=tensors,
        reference=lambda t, accumulate=None: reference.concat(**t),
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": 0.0, "bwd": 0.0},
        bytes={"fwd": size, "bwd": size},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = ours("concat", lambda t, backend: concat(**t, backend=backend))
    run["eager"] = Implementation(lambda t: torch.cat([t["x"], t["y"]], dim=-1), directions=("fwd",))  # backward: views
    return run
