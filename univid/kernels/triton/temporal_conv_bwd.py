"""The gradient of a temporal convolution's weight in Triton; that of x is ``temporal_conv.py``'s own kernel.

For each tap gradᵀ · shifted x, contracting over the rows at which both are inside, counted without gaps: it never meets a frame of
zeros. Tiles, their cut last wave and their ranking are those of ``temporal_conv.py``.
"""

import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.triton.launch import Launcher, Tuned
from univid.kernels.triton.rows import align_of, strides_of
from univid.kernels.triton.temporal_conv import (
    STRIP,
    Launches,
    Product,
    coarse,
    cut_launch,
    partial_at,
    piece_of,
    product_of,
    sum_partials,
    tile_configs,
)

# --- dweight: tiles of (C_out, C) for one tap after another -----------------------------------------------------------------------


@triton.jit
def _weight_tile(
    tile, C_IN: tl.constexpr, C_OUT: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(tap, first output channel, first channel) of a tile."""
    ROWS: tl.constexpr = (C_OUT + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (C_IN + WIDTH - 1) // WIDTH
    inside = tile % (ROWS * COLUMNS)
    return tile // (ROWS * COLUMNS), inside // COLUMNS * BLOCK_M, inside % COLUMNS * WIDTH


@triton.jit
def _clip_rows(
    start, strides, clip, frame, tokens, FLAT: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Offsets of ROWS rows (t, n) of a clip from the ``start``-th on, counted from a frame on."""
    at = clip.to(tl.int64) * strides[0] + frame.to(tl.int64) * strides[1]
    if FLAT:  # frames follow each other as rows do: no division in the loop
        at = at + start.to(tl.int64) * strides[2] + tl.arange(0, ROWS) * strides[2]
    else:
        row = start + tl.arange(0, ROWS)
        at = at + (row // tokens).to(tl.int64) * strides[1] + (row % tokens).to(tl.int64) * strides[2]
    return tl.multiple_of(at, ALIGN)


@triton.jit
def _emit_weight(acc, dweight_ptr, strides, tap, o, c, C_IN: tl.constexpr, C_OUT: tl.constexpr):
    at = dweight_ptr + tap * strides[2] + o[:, None] * strides[0] + c[None, :] * strides[1]
    tl.store(at, acc.to(dweight_ptr.dtype.element_ty), mask=(o < C_OUT)[:, None] & (c < C_IN)[None, :])


@triton.jit(do_not_specialize=["clips", "frames", "tokens", "whole", "pieces"])
def _contract(
    grad_ptr, x_ptr, dweight_ptr, partial_ptr,
    grad_strides, x_strides, dweight_strides, clips, frames, tokens, whole, pieces,
    TAPS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    SIZE: tl.constexpr = BLOCK_M * WIDTH
    tile, piece, pieces = piece_of(whole, pieces)
    tap, o_start, c_start = _weight_tile(tile, C_IN, C_OUT, BLOCK_M, WIDTH)
    o = o_start + tl.arange(0, BLOCK_M)
    c = c_start + tl.arange(0, BLOCK_N)

    # Frame t of grad meets frame t + shift of x: so many rows of a clip, from these frames on. A step stays inside a clip.
    shift = tap - TAPS // 2
    rows = tl.maximum(frames - tl.abs(shift), 0) * tokens
    grad_frame, x_frame = tl.maximum(-shift, 0), tl.maximum(shift, 0)
    clip_steps = tl.cdiv(rows, BLOCK_K)
    steps = clips * clip_steps
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EXTRA_N > 0:
        extra_c = c_start + BLOCK_N + tl.arange(0, EXTRA_N)
        extra = tl.zeros((BLOCK_M, EXTRA_N), tl.float32)
    for step in range(steps * piece // pieces, steps * (piece + 1) // pieces):
        clip = step // clip_steps
        start = step % clip_steps * BLOCK_K
        exists = (start + tl.arange(0, BLOCK_K) < rows)[:, None]
        grad_at = _clip_rows(start, grad_strides, clip, grad_frame, tokens, FLAT, ALIGN, BLOCK_K)[:, None]
        grad = tl.load(grad_ptr + grad_at + o[None, :], mask=exists & (o < C_OUT)[None, :], other=0.0)
        x_at = _clip_rows(start, x_strides, clip, x_frame, tokens, FLAT, ALIGN, BLOCK_K)[:, None]
        x = tl.load(x_ptr + x_at + c[None, :], mask=exists & (c < C_IN)[None, :], other=0.0)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision="ieee")
        if EXTRA_N > 0:
            x = tl.load(x_ptr + x_at + extra_c[None, :], mask=exists & (extra_c < C_IN)[None, :], other=0.0)
            extra = tl.dot(tl.trans(grad), x, extra, input_precision="ieee")

    if partial_ptr is None or pieces == 1:
        _emit_weight(acc, dweight_ptr, dweight_strides, tap, o, c, C_IN, C_OUT)
        if EXTRA_N > 0:
            _emit_weight(extra, dweight_ptr, dweight_strides, tap, o, extra_c, C_IN, C_OUT)
    else:
        index = tl.program_id(0) - whole
        tl.store(partial_at(partial_ptr, index, 0, 0, SIZE, BLOCK_M, BLOCK_N), acc)
        if EXTRA_N > 0:
            tl.store(partial_at(partial_ptr, index, 0, BLOCK_M * BLOCK_N, SIZE, BLOCK_M, EXTRA_N), extra)


@triton.jit(do_not_specialize=["whole", "pieces"])
def _finish_contract(
    partial_ptr, dweight_ptr, dweight_strides, whole, pieces,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    SIZE: tl.constexpr = BLOCK_M * WIDTH
    cut = tl.program_id(0) // (BLOCK_M // STRIP)
    inside = tl.program_id(0) % (BLOCK_M // STRIP) * STRIP
    tap, o_start, c_start = _weight_tile(whole + cut, C_IN, C_OUT, BLOCK_M, WIDTH)
    o = o_start + inside + tl.arange(0, STRIP)
    c = c_start + tl.arange(0, BLOCK_N)
    acc = sum_partials(partial_ptr, cut, pieces, inside, 0, SIZE, STRIP, BLOCK_N)
    _emit_weight(acc, dweight_ptr, dweight_strides, tap, o, c, C_IN, C_OUT)
    if EXTRA_N > 0:
        c = c_start + BLOCK_N + tl.arange(0, EXTRA_N)
        acc = sum_partials(partial_ptr, cut, pieces, inside, BLOCK_M * BLOCK_N, SIZE, STRIP, EXTRA_N)
        _emit_weight(acc, dweight_ptr, dweight_strides, tap, o, c, C_IN, C_OUT)


# --- launches ---------------------------------------------------------------------------------------------------------------------


def contraction(grad: Tensor, x: Tensor, dweight: Tensor) -> None:
    width, channels, taps = dweight.shape
    product = product_of(x, width, channels, taps, x.shape[0] * x.shape[1] * x.shape[2])
    key = product._replace(depth=coarse(product.depth))._asdict()
    _CONTRACT(lambda _: (), grad, x, dweight, key=key, product=product)


def _launch_contract(
    grad: Tensor, x: Tensor, dweight: Tensor,
    *, product: Product, BLOCK_K: int, num_warps: int, num_stages: int, **tile: int,
) -> None:  # fmt: skip
    clips, frames, tokens, channels = x.shape
    cut, partials, sums = cut_launch(product, x, tile | {"BLOCK_K": BLOCK_K})
    flat = all(tensor.stride(1) == tokens * tensor.stride(2) for tensor in (grad, x))
    tile |= {"C_IN": channels, "C_OUT": product.rows}
    sizes = (clips, frames, tokens, cut.whole, cut.pieces)
    args = (grad, x, dweight, partials, strides_of(grad), strides_of(x), dweight.stride(), *sizes)
    constants = tile | {"TAPS": product.layers, "FLAT": flat, "ALIGN": align_of(grad, x), "BLOCK_K": BLOCK_K}
    _CONTRACT_TILES(x.device, (cut.whole + cut.cut * cut.pieces,), args, constants, num_warps, num_stages)
    if partials is not None:
        pieces = (partials, dweight, dweight.stride(), cut.whole, cut.pieces)
        _FINISH_CONTRACT(x.device, (sums,), pieces, tile)


_CONTRACT_TILES, _FINISH_CONTRACT = Launcher(_contract), Launcher(_finish_contract)
_CONTRACT = Tuned(Launches(_contract, _launch_contract), tile_configs)
