"""``temporal_attn`` beside SDPA on rearranged copies and on strided views, and a compiled einsum."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Problem, Tensors, measure
from benchmarks.levels import LEVELS
from univid.ops import reference, temporal_attn

OP = "temporal_attn"

functorch_config.donated_buffer = False  # a compiled backward is timed on one forward, again and again


def problem(name: str, batch: int) -> Problem:
    level = LEVELS[name]
    shape = (batch, level.frames, level.tokens, level.heads, level.dim)
    tensors = {n: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for n in "qkv"}

    def formula(t: Tensors, accumulate=None):
        return reference.temporal_attn(t["q"], t["k"], t["v"], level.dim**-0.5, accumulate)[0]

    flops = 4.0 * batch * level.heads * level.tokens * level.frames**2 * level.dim
    size = tensors["q"].numel() * 2.0
    one = lambda x: x[:1, :, :, :1]  # noqa: E731 - one clip and head
    return Problem(
        op=OP,
        level=name,
        batch=batch,
        tensors=tensors,
        reference=formula,
        part=lambda t: {n: one(x) for n, x in t.items()},
        part_of=lambda _, x: one(x),
        flops={"fwd": flops, "bwd": 2.5 * flops},
        bytes={"fwd": 4 * size, "bwd": 7 * size},
    )


def _rearranged(t: Tensors):
    q, k, v = (rearrange(t[n], "b t n h d -> (b n) h t d") for n in "qkv")
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "(b n) h t d -> b t n h d", b=t["q"].shape[0]).contiguous()


def _strided(t: Tensors):
    by_clip = zip(*(t[n].permute(0, 2, 3, 1, 4) for n in "qkv"), strict=True)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        clips = [F.scaled_dot_product_attention(q, k, v) for q, k, v in by_clip]
    return torch.stack(clips).permute(0, 3, 1, 2, 4)


@torch.compile
def _einsum(q, k, v):
    p = (torch.einsum("btnhd,bsnhd->bnhts", q, k).float() * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype)
    return torch.einsum("bnhts,bsnhd->btnhd", p, v)


def implementations() -> dict:
    run = {
        backend: lambda t, backend=backend: temporal_attn(t["q"], t["k"], t["v"], backend=backend)
        for backend in ("cuda", "triton", "torch", "reference")
    }
    run["rearrange + SDPA"] = _rearranged
    run["SDPA mem-efficient per clip, strided"] = _strided
    run["compiled einsum"] = lambda t: _einsum(t["q"], t["k"], t["v"])
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
