"""``pyramid_st_attn`` beside gathers, dense, paged and block-sparse attention."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, UNET, Level
from univid.ops import ReferenceFrames, pyramid_st_attn, reference

OP = "pyramid_st_attn"
SHAPES = LEVELS
BATCHES = (1, 2)
VARIANTS = {"table": ("per_frame", "random", "shared")}

# Backends of which deterministic=True is another path.
ANOTHER_PATH = ("cuda", "torch")


@cache
def table(kind: str, frames: int, refs: int) -> ReferenceFrames:
    """The reference frames: the pyramid's centre frames, seeded random ones for every frame, or one set for all."""
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(frames, generator=generator)[:refs].sort().values for _ in range(frames)]
        return ReferenceFrames.from_table(torch.stack(rows), frames)
    return ReferenceFrames.pyramid(frames, refs, own_frame=kind == "per_frame")


def problem(level: Level, batch: int, kind: str, device: str = "cuda") -> Problem:
    refs = table(kind, level.frames, level.refs).to(device)
    shape = (batch, level.frames, level.tokens, level.heads, level.dim)
    tensors = {n: torch.randn(shape, device=device, dtype=torch.bfloat16) for n in "qkv"}

    def formula(t: Tensors, accumulate=None):
        return reference.pyramid_st_attn(t["q"], t["k"], t["v"], refs.table, level.dim**-0.5, accumulate)[0]

    flops = 4.0 * batch * level.heads * level.frames * level.tokens * level.refs * level.tokens * level.dim
    size = tensors["q"].numel() * 2.0
    one = lambda x: x[-1:, :, :, -1:]  # noqa: E731 - one clip and head
    return Problem(
        tensors=tensors,
        reference=formula,
        part=lambda t: {n: one(x) for n, x in t.items()},
        part_of=lambda _, x: one(x),
        flops={"fwd": flops, "bwd": 2.5 * flops},
        bytes={"fwd": 4 * size, "bwd": 8 * size},
    )


def implementations(level: Level, batch: int, kind: str) -> dict[str, Implementation]:
    refs = table(kind, level.frames, level.refs)
    # What depends on neither the table nor, but for a factor, the batch is timed once.
    once = kind == "per_frame" and batch == 2

    def call(t: Tensors, backend: str, **options):
        return pyramid_st_attn(t["q"], t["k"], t["v"], refs.to(t["q"].device), backend=backend, **options)

    run = ours("pyramid", call)
    for backend in ANOTHER_PATH:
        run[backend] = run[backend]._replace(deterministic=False)
    if kind != "per_frame":
        run.pop("reference")
    if once:
        for backend in ANOTHER_PATH:
            run[f"{backend}, deterministic"] = run[backend]._replace(
                run=lambda t, backend=backend: call(t, backend, deterministic=True),
                directions=("bwd",),
                deterministic=True,
                quick=False,
            )
    for name, attend in peers.ATTENTION.items():
        best = name in ("SDPA cuDNN", "FlashAttention-4")
        if kind != "shared" and (best or once):
            run[f"index_select + {name}"] = Implementation(
                _gathered(refs, batch, attend), quick=best, compiles=name in peers.COMPILED
            )
        if refs.rows.shape[1] == 1 and (best or batch == 2):
            run[f"{name}, one long query"] = Implementation(
                _one_long_query(refs, attend), quick=best, compiles=name in peers.COMPILED
            )
    if kind != "shared" and batch == 2 and level in UNET.values():
        run["FlexAttention, block mask"] = _flex(refs, level)
    if kind != "shared" and peers.flash_attn_func:
        run["FlashAttention-4 paged, page = frame"] = _paged(refs, batch, level, level.tokens)
        if level.tokens % 128 == 0:
            run["FlashAttention-4 paged, 128 tokens"] = _paged(refs, batch, level, 128)
        run["FlashAttention-4 block-sparse, frames padded"] = _block_sparse(refs, level)
    return run


def _gathered(refs: ReferenceFrames, batch: int, attend: Callable) -> Callable:
    """Frames as batch, their keys gathered first."""

    @cache
    def chosen(device):
        return _frames(refs, batch).flatten().to(device)

    def run(t: Tensors):
        q = t["q"].flatten(0, 1)
        k, v = (t[n].flatten(0, 1).index_select(0, chosen(q.device)) for n in "kv")
        return attend(q, *(x.unflatten(0, (len(q), -1)).flatten(1, 2) for x in (k, v))).view(t["q"].shape)

    return run


def _one_long_query(refs: ReferenceFrames, attend: Callable) -> Callable:
    """Where all frames read the same ones."""
    dense = refs.table.shape[-1] == refs.num_key_frames

    @cache
    def chosen(device):
        return refs.table[0, 0].long().to(device)

    def run(t: Tensors):
        k, v = (t[n] if dense else t[n].index_select(1, chosen(t[n].device)) for n in "kv")
        return attend(*(x.flatten(1, 2) for x in (t["q"], k, v))).view(t["q"].shape)

    return run


def _flex(refs: ReferenceFrames, level: Level) -> Implementation:
    """Clips as batch."""
    attend = cache(lambda device: peers.flex(refs.to(device), level.tokens))

    def run(t: Tensors):
        return attend(t["q"].device)(*(t[n].flatten(1, 2) for n in "qkv")).reshape(t["q"].shape)

    return Implementation(run, quick=False, compiles=True)


def _paged(refs: ReferenceFrames, batch: int, level: Level, page: int) -> Implementation:
    """Frames as batch; a page holds a frame or 128 tokens of one. It has no backward."""

    @cache
    def attend(device):
        pages = level.tokens // page
        pages = (_frames(refs, batch)[..., None] * pages + torch.arange(pages)).flatten(1).int().to(device)
        return peers.paged(pages, pages.new_full((len(pages),), level.refs * level.tokens))

    def run(t: Tensors):
        k, v = (t[n].flatten(0, 2).unflatten(0, (-1, page)) for n in "kv")
        return attend(k.device)(t["q"].flatten(0, 1), k, v).view(t["q"].shape)

    return Implementation(run, directions=("fwd",), compiles=True)


def _block_sparse(refs: ReferenceFrames, level: Level) -> Implementation:
    """Clips as batch."""
    attend = cache(lambda device: peers.block_sparse(refs.to(device), level.tokens))
    more = -level.tokens % peers.BLOCK
    return Implementation(
        run=lambda t: attend(t["q"].device)(t["q"], t["k"], t["v"]),
        prepare=lambda t: {n: F.pad(x, (0, 0, 0, 0, 0, more)).flatten(1, 2) for n, x in t.items()},
        finish=lambda out: out.unflatten(1, (level.frames, -1))[:, :, : level.tokens],
        quick=False,
        compiles=True,
    )


def _frames(refs: ReferenceFrames, batch: int) -> torch.Tensor:
    """The table of a whole batch, whose frames are counted through: (batch · T, R)."""
    return (refs.table.long() + refs.num_key_frames * torch.arange(batch)[:, None, None]).flatten(0, 1)
