"""``temporal_attn`` beside SDPA on rearranged copies and on strided views, FlashAttention-4, and a compiled
einsum."""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import reference, temporal_attn

OP = "temporal_attn"
SHAPES = LEVELS
BATCHES = (1, 2)

functorch_config.donated_buffer = False  # a compiled backward is timed on one forward, again and again


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    shape = (batch, level.frames, level.tokens, level.heads, level.dim)
    tensors = {n: torch.randn(shape, device=device, dtype=torch.bfloat16) for n in "qkv"}

    def formula(t: Tensors, accumulate=None):
        return reference.temporal_attn(t["q"], t["k"], t["v"], level.dim**-0.5, accumulate)[0]

    flops = 4.0 * batch * level.heads * level.tokens * level.frames**2 * level.dim
    size = tensors["q"].numel() * 2.0
    one = lambda x: x[-1:, :, :, -1:]  # noqa: E731 - one clip and head
    return Problem(
        tensors=tensors,
        reference=formula,
        part=lambda t: {n: one(x) for n, x in t.items()},
        part_of=lambda _, x: one(x),
        flops={"fwd": flops, "bwd": 2.5 * flops},
        bytes={"fwd": 4 * size, "bwd": 7 * size},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    run = ours("temporal", lambda t, backend: temporal_attn(t["q"], t["k"], t["v"], backend=backend))
    run["rearrange + SDPA mem-efficient"] = Implementation(_rearranged)
    # Its output stays as it lies, a list of clips: stacking them would be a copy.
    run["SDPA mem-efficient per clip, strided"] = Implementation(
        _strided, finish=lambda clips: torch.stack(clips).permute(0, 3, 1, 2, 4)
    )
    if peers.flash_attn_func:
        run["FlashAttention-4 per clip, strided"] = Implementation(
            lambda t: tuple(peers.ATTENTION["FlashAttention-4"](*clip) for clip in _by_clip(t)),
            finish=lambda clips: torch.stack(clips).transpose(1, 2),
            compiles=True,
        )
    if batch == 2 and level in UNET.values():
        run["compiled einsum"] = Implementation(
            lambda t: _compiled()(t["q"], t["k"], t["v"]), quick=False, compiles=True
        )
    return run


def _rearranged(t: Tensors):
    q, k, v = (rearrange(t[n], "b t n h d -> (b n) h t d") for n in "qkv")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # the fastest of SDPA's for so short sequences
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "(b n) h t d -> b t n h d", b=t["q"].shape[0]).contiguous()


def _by_clip(t: Tensors):
    """q, k and v of each clip, (N, T, H, D) as they lie."""
    return zip(*(t[n].transpose(1, 2) for n in "qkv"), strict=True)


def _strided(t: Tensors):
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return tuple(F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in clip)) for clip in _by_clip(t))


def _einsum(q, k, v):
    p = (torch.einsum("btnhd,bsnhd->bnhts", q, k).float() * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype)
    return torch.einsum("bnhts,bsnhd->btnhd", p, v)


@cache
def _compiled():
    return torch.compile(_einsum, dynamic=False)
