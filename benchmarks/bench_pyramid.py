"""``pyramid_st_attn`` beside gathers and dense attention."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Problem, Tensors, measure
from benchmarks.levels import LEVELS, Level
from univid.ops import ReferenceFrames, pyramid_st_attn, reference

OP = "pyramid_st_attn"
TABLES = ("per_frame", "shared", "random")


def table(kind: str, level: Level) -> ReferenceFrames:
    """The reference frames: the pyramid's centre frames, seeded random ones for every frame, or one set for all."""
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randperm(level.frames, generator=generator)[: level.refs].sort().values for _ in range(level.frames)
        ]
        return ReferenceFrames.from_table(torch.stack(rows), level.frames)
    return ReferenceFrames.pyramid(level.frames, level.refs, own_frame=kind == "per_frame")


def problem(name: str, batch: int, kind: str) -> tuple[Problem, ReferenceFrames]:
    level = LEVELS[name]
    refs = table(kind, level).to("cuda")
    shape = (batch, level.frames, level.tokens, level.heads, level.dim)
    tensors = {n: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for n in "qkv"}

    def formula(t: Tensors, accumulate=None):
        return reference.pyramid_st_attn(t["q"], t["k"], t["v"], refs.table, level.dim**-0.5, accumulate)[0]

    flops = 4.0 * batch * level.heads * level.frames * level.tokens * level.refs * level.tokens * level.dim
    size = tensors["q"].numel() * 2.0
    one = lambda x: x[:1, :, :, :1]  # noqa: E731 - one clip and head
    return (
        Problem(
            op=OP,
            level=name,
            batch=batch,
            tensors=tensors,
            reference=formula,
            part=lambda t: {n: one(x) for n, x in t.items()},
            part_of=lambda _, x: one(x),
            flops={"fwd": flops, "bwd": 2.5 * flops},
            bytes={"fwd": 4 * size, "bwd": 8 * size},
            fields={"table": kind},
        ),
        refs,
    )


def implementations(name: str, batch: int, refs: ReferenceFrames) -> dict:
    level = LEVELS[name]

    def gathered(backend: SDPBackend):
        chosen = (refs.table.long() + level.frames * torch.arange(batch, device="cuda")[:, None, None]).flatten()

        def run(t: Tensors):
            q = t["q"].flatten(0, 1).transpose(1, 2)
            k, v = (
                t[n]
                .flatten(0, 1)
                .index_select(0, chosen)
                .view(batch * level.frames, -1, level.heads, level.dim)
                .transpose(1, 2)
                for n in "kv"
            )
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(t["q"].shape)

        return run

    def one_long_query(backend: SDPBackend):
        chosen = refs.table[0, 0].long()

        def run(t: Tensors):
            q = t["q"].flatten(1, 2).transpose(1, 2)
            k, v = (t[n].index_select(1, chosen).flatten(1, 2).transpose(1, 2) for n in "kv")
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(t["q"].shape)

        return run

    run = {
        backend: lambda t, backend=backend: pyramid_st_attn(t["q"], t["k"], t["v"], refs, backend=backend)
        for backend in ("cuda", "triton", "torch", "reference")
    }
    run["index_select + SDPA cuDNN"] = gathered(SDPBackend.CUDNN_ATTENTION)
    run["index_select + SDPA flash"] = gathered(SDPBackend.FLASH_ATTENTION)
    if refs.rows.shape[1] == 1:
        run["SDPA cuDNN, one long query"] = one_long_query(SDPBackend.CUDNN_ATTENTION)
    return run


def rows(levels, batches, kinds=TABLES, only=None) -> list[dict]:
    results = []
    for name in levels:
        for batch in batches:
            for kind in kinds:
                case, refs = problem(name, batch, kind)
                for implementation, function in implementations(name, batch, refs).items():
                    if only is None or implementation in only:
                        results += measure(case, implementation, function, deterministic=implementation == "triton")
    return results
