"""Sums over the rows of channels-last tensors: the gradient of a bias, of all clips or of each.

Two passes, each of tiles of rows x columns in float32: first chunks of rows, then what the chunks gave, in order, so that
sums are the same every time. Bound by memory: one read of the tensor. Few chunks, so that a program has steps enough to
keep its next tiles under way; the second pass takes a single step, and on Hopper its programs are there before the first
pass ends (programmatic dependent launch).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.triton.launch import Config, Tuned, cdiv, launches_early, next_power_of_2
from univid.kernels.triton.rows import align_of, rows_at, strides_of

_PROGRAMS = 396  # of the first pass: three for each processor of an H200
_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 4}


@triton.jit(do_not_specialize=["rows", "chunk", "chunks", "frames", "tokens"])
def _column_sums(
    in_ptr, out_ptr, in_strides, out_strides, rows, chunk, chunks, frames, tokens,
    C: tl.constexpr, ALIGN: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[g · chunks + i, c]: the sum over the i-th chunk of the g-th ``rows`` rows (b, t, n) of ``in``. EARLY: another
    launch may begin before this one ends ("lets"), or this one before the one that it reads from ("comes")."""
    COLUMNS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0) // COLUMNS
    c = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    first = index // chunks * rows
    end = first + tl.minimum((index % chunks + 1) * chunk, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EARLY == "comes":
        tl.extra.cuda.gdc_wait()  # until all of it is there
    for start in tl.range(first + index % chunks * chunk, end, BLOCK_M, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_M)
        if tokens is None:
            first_of_row = tl.multiple_of(row.to(tl.int64) * in_strides[2], ALIGN)
        else:
            first_of_row = rows_at(row, in_strides, frames, tokens, ALIGN)
        at = first_of_row[:, None] + c[None, :]
        acc += tl.load(in_ptr + at, mask=(row < end)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    if EARLY == "lets":
        tl.extra.cuda.gdc_launch_dependents()
    at = index * out_strides[0] + c * out_strides[1]
    tl.store(out_ptr + at, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=c < C)


def _configs(key: dict) -> list[Config]:
    tile = _TILE if key["rows"] is None else {"BLOCK_M": key["rows"], "BLOCK_N": 16, "STAGES": 1}
    return [Config(tile, num_warps=4, num_stages=1, launch_pdl=key["early"] == "comes")]


_COLUMN_SUMS = Tuned(_column_sums, _configs)


def sum_columns(x: Tensor, out: Tensor) -> None:
    """``out`` (C,) or (B, C), of any strides: the sums of x (B, T, N, C) over everything else."""
    clips, frames, tokens, channels = x.shape
    sums = clips if out.ndim == 2 else 1
    rows = clips * frames * tokens // sums
    programs = max(_PROGRAMS // (sums * cdiv(channels, _TILE["BLOCK_N"])), 1)
    tiles = cdiv(cdiv(rows, programs), _TILE["BLOCK_M"])
    chunk = tiles * _TILE["BLOCK_M"]
    chunks = cdiv(rows, chunk)
    partials = x.new_empty((1, sums, chunks, channels), dtype=torch.float32)
    early = launches_early(x.device)
    _sum(x, partials.view(-1, channels), rows, chunk, chunks, "lets" if early else "")
    _sum(partials, out.view(sums, channels), chunks, chunks, 1, "comes" if early else "")


def _sum(x: Tensor, out: Tensor, rows: int, chunk: int, chunks: int, early: str) -> None:
    channels = x.shape[-1]
    aligned = 8 if channels % 8 == 0 and align_of(x) == 8 else 1

    def grid(constants: dict) -> tuple[int, int, int]:
        return len(out) * cdiv(channels, constants["BLOCK_N"]), 1, 1

    sizes = (rows, chunk, chunks, *_sizes_of(x))
    # In the second pass a tile holds all rows of most sums.
    key = {"rows": min(max(next_power_of_2(rows), 32), 128) if chunks == 1 else None, "early": early}
    constants = {"C": channels, "ALIGN": aligned, "EARLY": early}
    _COLUMN_SUMS(grid, x, out, strides_of(x), out.stride(), *sizes, key=key, **constants)


def _sizes_of(x: Tensor) -> tuple[int, int] | tuple[None, None]:
    """Frames and tokens, or None where all rows follow each other, so that none is looked for by divisions."""
    clips, frames, tokens, _ = x.shape
    clip, frame, row = strides_of(x)
    if (frames > 1 and frame != tokens * row) or (clips > 1 and clip != frames * tokens * row):
        return frames, tokens
    return None, None
