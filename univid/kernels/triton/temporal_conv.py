"""Temporal convolution: implicit matrix products over K shifted frames.

* ``out``: rows (b, t, n) of x times the weight, contracting over (tap, channel). A tile of rows may span frames and clips; a row whose
  tap falls outside its clip is loaded as zeros, and taps that are outside for the whole tile are skipped. Bias and residual are added in
  the epilogue.
* ``dx``: the same kernel on ``grad``, the weight transposed and its taps flipped.
* ``dweight``: ``temporal_conv_bwd.py``; ``dbias``: ``column_sums.py``.

**Tiles.** BLOCK_M x (BLOCK_N + EXTRA_N) in float32 registers, two products a step where EXTRA_N > 0: so 320 channels are one tile of
256 + 64, or two of 128 + 32, without waste. Steps of BLOCK_K channels (or rows) come through a pipeline of 3 or 4 shared-memory stages.
In 16 bits with 8 warps: 128 x 320 holds 160 accumulators a thread and 56 KiB a stage; 128 x 256, 128 and 48; 128 x 160, 80 and 36.

**The last wave.** Tiles beyond a multiple of the card's processors would leave most of these idle for a whole tile. They are cut into
pieces along the contraction, whose float32 partial tiles a second kernel adds in order; their number follows from shapes, tile and
card, so that sums run in the same order every time. A roofline ranks the tiles, and the best few are measured.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import TemporalConvCall
from univid.kernels.triton import launch
from univid.kernels.triton.column_sums import sum_columns
from univid.kernels.triton.launch import Config, Launcher, Tuned, cdiv
from univid.kernels.triton.rows import align_of, rows_at, strides_of

_GROUP = tl.constexpr(8)  # tiles of rows that meet one tile of columns after another, sharing it in L2
STRIP = tl.constexpr(32)  # rows of a tile in pieces that one program adds up


# --- tiles: the first `whole` in one piece each, the others in `pieces` -----------------------------------------------------------


@triton.jit
def piece_of(whole, pieces):
    """This program's (tile, piece of it, pieces of it)."""
    program = tl.program_id(0)
    cut = tl.maximum(program - whole, 0)
    is_whole = program < whole
    tile = tl.where(is_whole, program, whole + cut // pieces)
    return tile, tl.where(is_whole, 0, cut % pieces), tl.where(is_whole, 1, pieces)


@triton.jit
def _grouped(tile, rows, columns):
    """(row, column) of a tile in a grid of tiles, walked column after column within groups of rows."""
    top = tile // (_GROUP * columns) * _GROUP
    height = tl.minimum(rows - top, _GROUP)
    inside = tile % (_GROUP * columns)
    return top + inside % height, inside // height


@triton.jit
def partial_at(ptr, index, row, START: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to rows of a block of the partial tile ``index``: a partial tile has SIZE numbers, its block those from START on."""
    inside = (row + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return ptr + index.to(tl.int64) * SIZE + START + inside


@triton.jit
def sum_partials(
    ptr, tile, pieces, row, START: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows of the sum of a tile's partial tiles, added in order."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for piece in range(pieces):
        acc += tl.load(partial_at(ptr, tile * pieces + piece, row, START, SIZE, ROWS, COLUMNS))
    return acc


# --- out and dx -------------------------------------------------------------------------------------------------------------------


@triton.jit
def _taps(row, rows, frames, tokens, taps, BLOCK_M: tl.constexpr):
    """The taps [low, high) that are inside the clip for some of a tile's rows."""
    first = row // tokens
    last = (tl.minimum(row + BLOCK_M, rows) - 1) // tokens
    one_clip = first // frames == last // frames
    low = tl.where(one_clip, tl.maximum(taps // 2 - last % frames, 0), 0)
    return low, tl.where(one_clip, tl.minimum(taps // 2 + frames - first % frames, taps), taps)


@triton.jit
def _weight(
    ptr, stride_o, c, o, C_IN: tl.constexpr, C_OUT: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr
):
    """A tile (c, o) of one tap of a weight whose C, or C_out if TRANSPOSED, is contiguous."""
    if TRANSPOSED:
        at = tl.multiple_of(c * stride_o, ALIGN)[:, None] + o[None, :]
    else:
        at = c[:, None] + tl.multiple_of(o * stride_o, ALIGN)[None, :]
    return tl.load(ptr + at, mask=(c < C_IN)[:, None] & (o < C_OUT)[None, :], other=0.0)


@triton.jit
def _emit(acc, row, o, epilogue, rows, frames, tokens, C_OUT: tl.constexpr, ALIGN: tl.constexpr):
    bias_ptr, residual_ptr, out_ptr, bias_strides, residual_strides, out_strides = epilogue
    mask = (row < rows)[:, None] & (o < C_OUT)[None, :]
    if bias_ptr is not None:
        stride_clip, stride = bias_strides
        if stride_clip is None:  # one for all clips
            acc += tl.load(bias_ptr + o * stride, mask=o < C_OUT, other=0.0).to(tl.float32)[None, :]
        else:
            at = (row // tokens // frames * stride_clip)[:, None] + (o * stride)[None, :]
            acc += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        at = rows_at(row, residual_strides, frames, tokens, ALIGN)[:, None] + o[None, :]
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = rows_at(row, out_strides, frames, tokens, ALIGN)[:, None] + o[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "frames", "tokens", "whole", "pieces"])
def _convolve(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr,
    x_strides, stride_o, stride_tap, bias_strides, residual_strides, out_strides, rows, frames, tokens, whole, pieces,
    TAPS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    SIZE: tl.constexpr = BLOCK_M * WIDTH
    C_STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    tile, piece, pieces = piece_of(whole, pieces)
    row_tile, column_tile = _grouped(tile, tl.cdiv(rows, BLOCK_M), (C_OUT + WIDTH - 1) // WIDTH)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o = column_tile * WIDTH + tl.arange(0, BLOCK_N)
    low, high = _taps(row_tile * BLOCK_M, rows, frames, tokens, TAPS, BLOCK_M)
    steps = (high - low) * C_STEPS

    # Rows past the last have a frame that no tap reaches.
    frame = tl.where(row < rows, row // tokens % frames, -TAPS)
    x_rows = rows_at(row, x_strides, frames, tokens, ALIGN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EXTRA_N > 0:
        extra_o = column_tile * WIDTH + BLOCK_N + tl.arange(0, EXTRA_N)
        extra = tl.zeros((BLOCK_M, EXTRA_N), tl.float32)
    for step in range(steps * piece // pieces, steps * (piece + 1) // pieces):
        tap = low + step // C_STEPS
        c = step % C_STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        shift = tap - TAPS // 2
        inside = (frame + shift >= 0) & (frame + shift < frames)
        x_at = tl.multiple_of(x_rows + shift.to(tl.int64) * x_strides[1], ALIGN)
        x = tl.load(x_ptr + x_at[:, None] + c[None, :], mask=inside[:, None] & (c < C_IN)[None, :], other=0.0)
        tap_ptr = weight_ptr + tl.multiple_of((TAPS - 1 - tap if TRANSPOSED else tap) * stride_tap, ALIGN)
        weight = _weight(tap_ptr, stride_o, c, o, C_IN, C_OUT, TRANSPOSED, ALIGN)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        if EXTRA_N > 0:
            weight = _weight(tap_ptr, stride_o, c, extra_o, C_IN, C_OUT, TRANSPOSED, ALIGN)
            extra = tl.dot(x, weight, extra, input_precision="ieee")

    epilogue = (bias_ptr, residual_ptr, out_ptr, bias_strides, residual_strides, out_strides)
    if partial_ptr is None or pieces == 1:
        _emit(acc, row, o, epilogue, rows, frames, tokens, C_OUT, ALIGN)
        if EXTRA_N > 0:
            _emit(extra, row, extra_o, epilogue, rows, frames, tokens, C_OUT, ALIGN)
    else:
        index = tl.program_id(0) - whole
        tl.store(partial_at(partial_ptr, index, 0, 0, SIZE, BLOCK_M, BLOCK_N), acc)
        if EXTRA_N > 0:
            tl.store(partial_at(partial_ptr, index, 0, BLOCK_M * BLOCK_N, SIZE, BLOCK_M, EXTRA_N), extra)


@triton.jit(do_not_specialize=["rows", "frames", "tokens", "whole", "pieces"])
def _finish_convolve(
    partial_ptr, bias_ptr, residual_ptr, out_ptr,
    bias_strides, residual_strides, out_strides, rows, frames, tokens, whole, pieces,
    C_OUT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    SIZE: tl.constexpr = BLOCK_M * WIDTH
    cut = tl.program_id(0) // (BLOCK_M // STRIP)
    inside = tl.program_id(0) % (BLOCK_M // STRIP) * STRIP
    row_tile, column_tile = _grouped(whole + cut, tl.cdiv(rows, BLOCK_M), (C_OUT + WIDTH - 1) // WIDTH)
    row = row_tile * BLOCK_M + inside + tl.arange(0, STRIP)
    o = column_tile * WIDTH + tl.arange(0, BLOCK_N)
    epilogue = (bias_ptr, residual_ptr, out_ptr, bias_strides, residual_strides, out_strides)
    acc = sum_partials(partial_ptr, cut, pieces, inside, 0, SIZE, STRIP, BLOCK_N)
    _emit(acc, row, o, epilogue, rows, frames, tokens, C_OUT, ALIGN)
    if EXTRA_N > 0:
        o = column_tile * WIDTH + BLOCK_N + tl.arange(0, EXTRA_N)
        acc = sum_partials(partial_ptr, cut, pieces, inside, BLOCK_M * BLOCK_N, SIZE, STRIP, EXTRA_N)
        _emit(acc, row, o, epilogue, rows, frames, tokens, C_OUT, ALIGN)


# --- plans: which tile, and how the last wave is cut ------------------------------------------------------------------------------


# The roofline that ranks tiles, per processor and microsecond on an H200: products 5.3 MFLOP, L2 to shared memory 55 KB, partial tiles
# written and read 23 KB; microseconds: filling the pipeline and storing the tile where no other program covers it, and a second launch.
_FLOPS, _L2_BYTES, _PARTIAL_BYTES, _ENDS, _LAUNCH = 5.3e6, 5.5e4, 2.3e4, 3.0, 4.0
_TILES = ((128, 256, 64), (128, 256, 0), (256, 128, 0), (128, 128, 32), (128, 128, 0), (128, 64, 0), (64, 64, 0))
_MAX_PIECES = 32


class Product(NamedTuple):
    """``layers`` products of (rows, depth) with (depth, columns), on a card."""

    dtype: str
    rows: int
    columns: int
    layers: int
    depth: int
    processors: int
    shared: int  # bytes of shared memory that a program may use

    def tiles(self, rows: int, columns: int) -> int:
        return self.layers * cdiv(self.rows, rows) * cdiv(self.columns, columns)


class Cut(NamedTuple):
    time: float  # by the roofline
    whole: int  # tiles in one piece
    cut: int  # the other tiles
    pieces: int  # of each of the other tiles


@lru_cache(maxsize=4096)
def _cut(product: Product, rows: int, columns: int, depth: int) -> Cut:
    """The fastest cut of the last wave for tiles of rows x columns and steps of ``depth``."""
    tiles, steps = product.tiles(rows, columns), cdiv(product.depth, depth)
    step = depth * max(2 * rows * columns / _FLOPS, 2 * (rows + columns) / _L2_BYTES)
    alone = 2 * _stages_bytes(rows, columns, depth, 3) > product.shared
    cuts = []
    for pieces in range(1, min(_MAX_PIECES, steps) + 1):
        cut = 0 if pieces == 1 else tiles % product.processors
        waves, last = divmod(tiles, product.processors) if cut else (cdiv(tiles, product.processors), 0)
        last_waves = cdiv(last * pieces, product.processors)
        time = (waves + last_waves / pieces) * steps * step + alone * (waves + last_waves) * _ENDS
        if cut:
            time += _LAUNCH + cut * pieces * rows * columns * 8 / product.processors / _PARTIAL_BYTES
        cuts.append(Cut(time, tiles - cut, cut, pieces))
    return min(cuts)


def tile_configs(key: dict) -> list[Config]:
    """The three best tiles by the roofline, each with two choices of warps and stages."""
    product = Product(**key)
    if product.dtype == "fp32":
        return [Config({"BLOCK_M": 64, "BLOCK_N": 64, "EXTRA_N": 0, "BLOCK_K": 32}, num_warps=4, num_stages=2)]
    fitting = [t for t in _TILES if _stages_bytes(t[0], t[1] + t[2], 64, 3) <= product.shared] or [_TILES[-1]]
    fitting.sort(key=lambda t: _cut(product, t[0], t[1] + t[2], 64).time)
    configs = []
    for rows, columns, extra in fitting[:3]:
        constants = {"BLOCK_M": rows, "BLOCK_N": columns, "EXTRA_N": extra, "BLOCK_K": 64}
        if rows * (columns + extra) > 128 * 160:
            choices = [(8, 3), (8, 4)] if _stages_bytes(rows, columns + extra, 64, 4) <= product.shared else [(8, 3)]
        else:  # two programs an SM: registers for 8 warps together
            choices = [(4, 3), (8, 3)]
        configs += [Config(constants, num_warps=warps, num_stages=stages) for warps, stages in choices]
    return configs


def _stages_bytes(rows: int, columns: int, depth: int, stages: int) -> int:
    return stages * (rows + columns) * depth * 2


@lru_cache(maxsize=64)
def _card(device: torch.device) -> tuple[int, int]:
    """The device's processors, and the bytes of shared memory that a program may use."""
    if device.type == "cpu":  # the interpreter: an H200
        return 132, 227 << 10
    card = torch.get_device_module(device).get_device_properties(device)
    return getattr(card, "multi_processor_count", 64), getattr(card, "shared_memory_per_block_optin", 64 << 10)


def coarse(size: int) -> int:
    """Up to the next number of four significant bits: a tuning pass for a sixteenth more or less of it would find the same."""
    low = max(size.bit_length() - 4, 0)
    return cdiv(size, 1 << low) << low


class Launches:
    """What ``Tuned`` measures in place of one kernel: a product's kernel and, where tiles are cut, the sum of their pieces."""

    def __init__(self, kernel: Any, launch: Callable[..., None]):
        self.kernel, self.launch, self.__name__ = kernel, launch, kernel.__name__

    @property
    def cache_key(self) -> str:
        return self.kernel.cache_key

    def __getitem__(self, grid: tuple[()]) -> Callable[..., None]:
        return self.launch


def cut_launch(product: Product, like: Tensor, constants: dict[str, int]) -> tuple[Cut, Tensor | None, int]:
    """How tiles are cut, room for the pieces, and how many programs add them up."""
    rows, width = constants["BLOCK_M"], constants["BLOCK_N"] + constants["EXTRA_N"]
    cut = _cut(product, rows, width, constants["BLOCK_K"])
    if cut.cut == 0:
        return cut, None, 0
    partials = like.new_empty((cut.cut * cut.pieces, rows * width), dtype=torch.float32)
    return cut, partials, cut.cut * rows // STRIP.value


# --- the backend ------------------------------------------------------------------------------------------------------------------


def unsupported(call: TemporalConvCall) -> str | None:
    return launch.unsupported(call.x, call.weight, call.bias, call.residual)


def forward(call: TemporalConvCall) -> Tensor:
    out = call.x.new_empty((*call.x.shape[:3], call.weight.shape[0]))
    _convolution(call.x, call.weight, call.bias, call.residual, out, transposed=False)
    return out


def backward(
    call: TemporalConvCall, grad: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    from univid.kernels.triton import temporal_conv_bwd  # here, because it builds on this file

    if dx is not None:
        _convolution(grad, call.weight, None, call.residual, dx, transposed=True)
    if dweight is not None:
        temporal_conv_bwd.contraction(grad, call.x, dweight)
    if dbias is not None:
        sum_columns(grad, dbias)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, transposed: bool
) -> None:
    if weight.stride(1) != 1:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    clips, frames, tokens, channels = x.shape
    product = product_of(x, clips * frames * tokens, out.shape[-1], 1, weight.shape[2] * channels)
    key = product._replace(rows=coarse(product.rows))._asdict()
    _CONVOLVE(lambda _: (), x, weight, bias, residual, out, key=key, product=product, transposed=transposed)


def _launch_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor,
    *, product: Product, transposed: bool, BLOCK_K: int, num_warps: int, num_stages: int, **tile: int,
) -> None:  # fmt: skip
    _, frames, tokens, channels = x.shape
    cut, partials, sums = cut_launch(product, x, tile | {"BLOCK_K": BLOCK_K})
    sizes = (product.rows, frames, tokens, cut.whole, cut.pieces)
    bias_strides = (None, 0) if bias is None else (None, *bias.stride())[-2:]
    epilogue = (bias_strides, strides_of(residual), strides_of(out))
    tile |= {"C_OUT": product.columns, "ALIGN": align_of(x, residual, out, weight.transpose(1, 2))}
    layout = (strides_of(x), weight.stride(0), weight.stride(2), *epilogue, *sizes)
    constants = tile | {"TAPS": weight.shape[2], "C_IN": channels, "TRANSPOSED": transposed, "BLOCK_K": BLOCK_K}
    programs = cut.whole + cut.cut * cut.pieces
    tensors = (x, weight, bias, residual, out, partials)
    _CONVOLVE_TILES(x.device, (programs,), (*tensors, *layout), constants, num_warps, num_stages)
    if partials is not None:
        _FINISH_CONVOLVE(x.device, (sums,), (partials, bias, residual, out, *epilogue, *sizes), tile)


_CONVOLVE_TILES, _FINISH_CONVOLVE = Launcher(_convolve), Launcher(_finish_convolve)
_CONVOLVE = Tuned(Launches(_convolve, _launch_convolve), tile_configs)


def product_of(x: Tensor, rows: int, columns: int, layers: int, depth: int) -> Product:
    return Product(launch.DTYPES[x.dtype], rows, columns, layers, depth, *_card(x.device))
