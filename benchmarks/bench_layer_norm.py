"""``layer_norm`` beside PyTorch's, eager and compiled."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import layer_norm, reference

OP = "layer_norm"
SHAPES = LEVELS
BATCHES = (1, 2)
EPS = 1e-5


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    make = lambda *s: torch.randn(*s, level.channels, device=device, dtype=torch.bfloat16)  # noqa: E731
    x = make(batch, level.frames, level.tokens)

    def formula(t: Tensors, accumulate=None):
        x, weight, bias = t["x"], t["weight"], t["bias"]
        return reference.layer_norm(x.flatten(0, 2), weight, bias, EPS, None, level.tokens, accumulate).view_as(x)

    size = x.numel() * 2.0
    return Problem(
        tensors={"x": x, "weight": make(), "bias": make()},
        reference=formula,
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": 0.0, "bwd": 0.0},
        bytes={"fwd": 2 * size, "bwd": 3 * size},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = ours("layer_norm", lambda t, backend: layer_norm(t["x"], t["weight"], t["bias"], EPS, backend=backend))
    run["eager"] = Implementation(_layer_norm)
    if batch == 2 and level in UNET.values():
        run["torch.compile"] = Implementation(lambda t: _compiled()(t), quick=False, compiles=True)
    return run


def _layer_norm(t: Tensors):
    return F.layer_norm(t["x"], t["weight"].shape, t["weight"], t["bias"], EPS)


@cache
def _compiled():
    return torch.compile(_layer_norm, dynamic=False)
