"""``group_norm_silu`` beside GroupNorm and SiLU, eager and compiled."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Problem, Tensors, measure
from benchmarks.levels import LEVELS
from univid.ops import group_norm_silu, reference

OP = "group_norm_silu"
GROUPS, EPS = 32, 1e-5


def problem(name: str, batch: int) -> Problem:
    level = LEVELS[name]
    x = torch.randn(batch * level.frames, level.tokens, level.channels, device="cuda", dtype=torch.bfloat16)
    weight, bias = (torch.randn(level.channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def formula(t: Tensors, accumulate=None):
        return reference.group_norm_silu(t["x"], GROUPS, t["weight"], t["bias"], EPS, True, accumulate)[0]

    size = x.numel() * 2.0
    return Problem(
        op=OP,
        level=name,
        batch=batch,
        tensors={"x": x, "weight": weight, "bias": bias},
        reference=formula,
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": 0.0, "bwd": 0.0},
        bytes={"fwd": 2 * size, "bwd": 3 * size},
    )


def _eager(t: Tensors):
    # (M, C, N) channels-last, as a U-Net's activations lie
    return F.silu(F.group_norm(t["x"].transpose(1, 2)[..., None], GROUPS, t["weight"], t["bias"], EPS))[
        ..., 0
    ].transpose(1, 2)


def implementations() -> dict:
    run = {
        backend: lambda t, backend=backend: group_norm_silu(
            t["x"], GROUPS, t["weight"], t["bias"], EPS, backend=backend
        )
        for backend in ("cuda", "triton", "torch", "reference")
    }
    run["eager"] = _eager
    run["torch.compile"] = torch.compile(_eager)
    return run


def rows(levels, batches, only=None) -> list[dict]:
    results = []
    for name in levels:
        for batch in batches:
            case = problem(name, batch)
            for implementation, function in implementations().items():
                if only is None or implementation in only:
                    results += measure(case, implementation, function)
    return results
