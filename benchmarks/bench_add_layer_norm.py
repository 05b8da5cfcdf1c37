"""``add_layer_norm`` beside addition and LayerNorm, eager and compiled."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import add_layer_norm, reference

OP = "add_layer_norm"
SHAPES = LEVELS
BATCHES = (1, 2)
EPS = 1e-5


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    make = lambda *s: torch.randn(*s, level.channels, device=device, dtype=torch.bfloat16)  # noqa: E731
    x, branch = (make(batch, level.frames, level.tokens) for _ in range(2))

    def formula(t: Tensors, accumulate=None):
        return torch.stack(reference.add_layer_norm(**t, eps=EPS, offset=None, accumulate=accumulate))

    size = x.numel() * 2.0
    return Problem(
        tensors={"x": x, "weight": make(), "bias": make(), "branch": branch},
        reference=formula,
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": 0.0, "bwd": 0.0},
        bytes={"fwd": 4 * size, "bwd": 4 * size},  # the sum, both gradients of the outputs, one of the inputs
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = {
        name: implementation._replace(finish=torch.stack)
        for name, implementation in ours("add_layer_norm", lambda t, b: add_layer_norm(**t, eps=EPS, backend=b)).items()
    }
    run["eager"] = Implementation(_add_layer_norm, finish=torch.stack)
    if batch == 2 and level in UNET.values():
        compiled = lambda t: _compiled()(t)  # noqa: E731
        run["torch.compile"] = Implementation(compiled, finish=torch.stack, quick=False, compiles=True)
    return run


def _add_layer_norm(t: Tensors):
    total = t["x"] + t["branch"]
    # A view, on which y does not depend: the gradient that comes in for it is its own.
    return total.view_as(total), F.layer_norm(total, total.shape[-1:], t["weight"], t["bias"], EPS)


@cache
def _compiled():
    return torch.compile(_add_layer_norm, dynamic=False)
