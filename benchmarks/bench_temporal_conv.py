"""``temporal_conv`` beside cuDNN's conv3d and a cuBLAS product of the same size."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Problem, Tensors, measure
from benchmarks.levels import LEVELS
from benchmarks.timing import eager_ms
from univid.ops import reference, temporal_conv

OP = "temporal_conv"


def problem(name: str, batch: int) -> Problem:
    level = LEVELS[name]
    channels, taps = level.channels, level.taps
    x = torch.randn(batch, level.frames, level.tokens, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, taps, channels, device="cuda", dtype=torch.bfloat16) * (channels * taps) ** -0.5
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
    tensors = {"x": x, "weight": weight.transpose(1, 2), "bias": bias}

    def formula(t: Tensors, accumulate=None):
        return reference.temporal_conv(t["x"], t["weight"], t["bias"], None, accumulate)

    flops = 2.0 * x.numel() * channels * taps
    size = x.numel() * 2.0
    return Problem(
        op=OP,
        level=name,
        batch=batch,
        tensors=tensors,
        reference=formula,
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": flops, "bwd": 2 * flops},
        bytes={"fwd": 2 * size, "bwd": 3 * size},
    )


def _conv3d(t: Tensors):
    x = t["x"].permute(0, 3, 1, 2)[..., None]  # (B, C, T, N, 1), channels_last_3d as it lies
    weight = t["weight"][..., None, None].contiguous(memory_format=torch.channels_last_3d)
    out = F.conv3d(x, weight, t["bias"], padding=(weight.shape[2] // 2, 0, 0))
    return out[..., 0].permute(0, 2, 3, 1)


def implementations() -> dict:
    run = {
        backend: lambda t, backend=backend: temporal_conv(t["x"], t["weight"], t["bias"], backend=backend)
        for backend in ("cuda", "triton", "torch", "reference")
    }
    run["cuDNN conv3d, channels_last_3d"] = _conv3d
    return run


def product(case: Problem) -> dict:
    """The cuBLAS product of the same size: the limit of an implicit GEMM."""
    x, weight = case.tensors["x"], case.tensors["weight"]
    channels, taps = weight.shape[1:]
    a = torch.randn(x.numel() // channels, channels * taps, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(channels * taps, channels, device="cuda", dtype=torch.bfloat16)
    ms = eager_ms(lambda: a @ b)
    row = {"op": OP, "level": case.level, "direction": "fwd", "batch": case.batch, "implementation": "cuBLAS product"}
    return row | {"ms": round(ms, 5), "eager_ms": round(ms, 5), "tflops": round(case.flops["fwd"] / ms / 1e9, 1)}


def rows(levels, batches, only=None) -> list[dict]:
    results = []
    for name in levels:
        for batch in batches:
            case = problem(name, batch)
            results.append(product(case))
            for implementation, function in implementations().items():
                if only is None or implementation in only:
                    results += measure(case, implementation, function)
    return results
