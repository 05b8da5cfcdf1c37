"""Sums over the rows of channels-last tensors: the gradient of a bias, of all clips or of each.

Two passes, each of tiles of rows x columns in float32: first chunks of rows, about 256 in all, then what the chunks gave, in order,
so that sums are the same every time. Bound by memory: one read of the tensor, four tiles under way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.triton.launch import Config, Tuned, cdiv
from univid.kernels.triton.rows import align_of, rows_at, strides_of

_CHUNKS = 256  # programs of the first pass for each column of tiles: some waves of a large card
_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 4}
_NARROW = {"BLOCK_M": 64, "BLOCK_N": 16, "STAGES": 4}  # of few rows, as in the second pass: more programs


@triton.jit(do_not_specialize=["rows", "chunk", "chunks", "frames", "tokens"])
def _column_sums(
    in_ptr, out_ptr, in_strides, out_strides, rows, chunk, chunks, frames, tokens,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[g · chunks + i, c]: the sum over the i-th chunk of the g-th ``rows`` rows (b, t, n) of ``in``."""
    COLUMNS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0) // COLUMNS
    c = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    first = index // chunks * rows
    end = first + tl.minimum((index % chunks + 1) * chunk, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first + index % chunks * chunk, end, BLOCK_M, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_M)
        at = rows_at(row, in_strides, frames, tokens, ALIGN)[:, None] + c[None, :]
        acc += tl.load(in_ptr + at, mask=(row < end)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    at = index * out_strides[0] + c * out_strides[1]
    tl.store(out_ptr + at, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=c < C)


_COLUMN_SUMS = Tuned(_column_sums, lambda key: [Config(_NARROW if key["whole"] else _TILE, num_warps=4, num_stages=1)])


def sum_columns(x: Tensor, out: Tensor) -> None:
    """``out`` (C,) or (B, C), of any strides: the sums of x (B, T, N, C) over everything else."""
    clips, frames, tokens, channels = x.shape
    sums = clips if out.ndim == 2 else 1
    rows = clips * frames * tokens // sums
    chunk = max(_TILE["BLOCK_M"], cdiv(sums * rows, _CHUNKS))
    chunks = cdiv(rows, chunk)
    partials = x.new_empty((1, sums, chunks, channels), dtype=torch.float32)
    _sum(x, partials.view(-1, channels), rows, chunk, chunks)
    _sum(partials, out.view(sums, channels), chunks, chunks, 1)


def _sum(x: Tensor, out: Tensor, rows: int, chunk: int, chunks: int) -> None:
    _, frames, tokens, channels = x.shape
    aligned = 8 if channels % 8 == 0 and align_of(x) == 8 else 1

    def grid(constants: dict) -> tuple[int, int, int]:
        return len(out) * cdiv(channels, constants["BLOCK_N"]), 1, 1

    sizes = (rows, chunk, chunks, frames, tokens)
    key = {"whole": chunks == 1}
    _COLUMN_SUMS(grid, x, out, strides_of(x), out.stride(), *sizes, key=key, C=channels, ALIGN=aligned)
