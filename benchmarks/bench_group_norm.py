"""``group_norm_silu`` beside GroupNorm and SiLU, eager and compiled."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import group_norm_silu, reference

OP = "group_norm_silu"
SHAPES = LEVELS
BATCHES = (1, 2)
GROUPS, EPS = 32, 1e-5


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    make = lambda *s: torch.randn(*s, level.channels, device=device, dtype=torch.bfloat16)  # noqa: E731
    x = make(batch * level.frames, level.tokens)

    def formula(t: Tensors, accumulate=None):
        return reference.group_norm_silu(t["x"], GROUPS, t["weight"], t["bias"], EPS, True, accumulate)[0]

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
    def call(t: Tensors, backend: str):
        return group_norm_silu(t["x"], GROUPS, t["weight"], t["bias"], EPS, backend=backend)

    run = ours("group_norm", call)
    run["eager"] = Implementation(_group_norm)
    if batch == 2 and level in UNET.values():
        run["torch.compile"] = Implementation(lambda t: _compiled()(t), quick=False, compiles=True)
    return run


def _group_norm(t: Tensors):
    # (M, C, N, 1) in channels_last, as a U-Net's activations lie
    x = t["x"][:, :, None].permute(0, 3, 1, 2)
    return F.silu(F.group_norm(x, GROUPS, t["weight"], t["bias"], EPS))[..., 0].transpose(1, 2)


@cache
def _compiled():
    return torch.compile(_group_norm, dynamic=False)
