"""GroupNorm over channels-last (M, N, C), per M and group of C / G neighbouring channels, with SiLU fused.

Tiles are rows x channels as they lie in memory: a group's width, mostly no power of two (320 / 32 = 10), never shapes a load. Sums over
rows are taken per channel; a group's follow from its channels'. The backward (``group_norm_bwd.py``) is made of the same parts.

**Slabs that fit on chip** (all N rows of a few groups, in runs of at least 64 bytes; 32 KiB, so that two or three share an SM, and at
most 40% of it padding): one program a slab, one read and one write. A one-hot matrix sums channels to groups.

**Other slabs** in parts of rows x 32 to 128 channels, whatever groups those meet. x is read twice:
1. every chunk of rows leaves, per channel, its first number m and the sums of x − m and (x − m)²: added up in registers, step by step,
   for a reduction over threads costs more than the loads of its tile;
2. a small kernel merges those per group in a fixed order, the first numbers first, so that nothing cancels (Chan, Golub and LeVeque 1983);
3. every part is normalised, the last ones first: they are still in L2.
Parts are many and independent, so that other programs hide a program's loads.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import GroupNormSiluCall
from univid.kernels.triton import launch
from univid.kernels.triton.launch import Config, Tuned, cdiv, next_power_of_2

_SLAB_BYTES = 32 << 10
LOG2E = tl.constexpr(1.4426950408889634)


# --- tiles ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_at(ptr, m, n, c, strides, ALIGN: tl.constexpr):
    """Pointers to the tile n x c of m, in a tensor whose strides but the last are a tuple."""
    row = m.to(tl.int64) * strides[0] + n.to(tl.int64) * strides[1]
    return ptr + tl.multiple_of(row, ALIGN)[:, None] + c[None, :]


@triton.jit
def per_channel(ptr, c, stride, mask):
    return tl.load(ptr + c * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _activate(z, SILU: tl.constexpr):
    return z / (1.0 + tl.exp2(z * -LOG2E)) if SILU else z


# --- slabs: all rows of GROUPS groups ---------------------------------------------------------------------------------------------


@triton.jit
def slab_of(num_groups, rows, WIDTH: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """This program's (m, first group), rows, channels, which channels and numbers exist, and which group a channel is of."""
    slabs = tl.cdiv(num_groups, GROUPS)
    m = tl.program_id(0) // slabs
    group = tl.program_id(0) % slabs * GROUPS
    column = tl.arange(0, COLUMNS)
    has_c = (column < GROUPS * WIDTH) & (group + column // WIDTH < num_groups)
    n = tl.arange(0, ROWS)
    return m, group, n, group * WIDTH + column, has_c, (n < rows)[:, None] & has_c[None, :], column // WIDTH


@triton.jit
def gather(values, member, GROUPS: tl.constexpr):
    """The sum of each group's channels."""
    one_hot = member[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(one_hot, values[:, None], 0.0), 0)


@triton.jit
def spread(values, member, GROUPS: tl.constexpr):
    """Each channel's group's value."""
    one_hot = member[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(one_hot, values[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["rows", "num_groups"])
def _forward_slab(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_strides, out_strides, stride_weight, stride_bias, rows, num_groups, eps,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    m, first, n, c, has_c, mask, member = slab_of(num_groups, rows, WIDTH, GROUPS, COLUMNS, ROWS)
    x = tl.load(tile_at(x_ptr, m, n, c, x_strides, ALIGN), mask=mask, other=0.0).to(tl.float32)
    count = (rows * WIDTH).to(tl.float32)
    mean = gather(tl.sum(x, 0), member, SLOTS) / count
    centred = tl.where(mask, x - spread(mean, member, SLOTS)[None, :], 0.0)
    drift = gather(tl.sum(centred, 0), member, SLOTS) / count  # what the sum of large numbers lost
    variance = gather(tl.sum(centred * centred, 0), member, SLOTS) / count - drift * drift
    mean += drift
    rstd = tl.rsqrt(variance + eps)
    group = first + tl.arange(0, SLOTS)
    has_group = (group < num_groups) & (tl.arange(0, SLOTS) < GROUPS)
    tl.store(mean_ptr + m * num_groups + group, mean, mask=has_group)
    tl.store(rstd_ptr + m * num_groups + group, rstd, mask=has_group)

    scale = spread(rstd, member, SLOTS) * per_channel(weight_ptr, c, stride_weight, has_c)
    bias = per_channel(bias_ptr, c, stride_bias, has_c)
    out = (x - spread(mean, member, SLOTS)[None, :]) * scale[None, :] + bias[None, :]
    tl.store(
        tile_at(out_ptr, m, n, c, out_strides, ALIGN), _activate(out, SILU).to(out_ptr.dtype.element_ty), mask=mask
    )


# --- parts: ROWS rows x COLUMNS channels of one m ---------------------------------------------------------------------------------


@triton.jit
def part_of(part, rows, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """(m, chunk of rows, chunks), the part's rows and channels, and which channels and numbers exist."""
    BLOCKS: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    chunks = tl.cdiv(rows, ROWS)
    c = part % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    chunk = part // BLOCKS % chunks
    n = chunk * ROWS + tl.arange(0, ROWS)
    return part // BLOCKS // chunks, chunk, chunks, n, c, c < CHANNELS, (n < rows)[:, None] & (c < CHANNELS)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _moments(
    x_ptr, moments_ptr, x_strides, rows,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step 1 of the forward: (M, chunks, 3, C) first numbers m and sums of x - m and (x - m)²."""
    m, chunk, chunks, _, c, has_c, _ = part_of(tl.program_id(0), rows, CHANNELS, COLUMNS, ROWS)
    first = chunk * ROWS
    base = tl.load(x_ptr + m.to(tl.int64) * x_strides[0] + first.to(tl.int64) * x_strides[1] + c, mask=has_c, other=0.0)
    base = base.to(tl.float32)
    sums = tl.zeros((STEP, COLUMNS), tl.float32)
    squares = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in tl.static_range(0, ROWS, STEP):
        n = first + step + tl.arange(0, STEP)
        mask = (n < rows)[:, None] & has_c[None, :]
        x = tl.load(tile_at(x_ptr, m, n, c, x_strides, ALIGN), mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, x - base[None, :], 0.0)
        sums += off
        squares += off * off
    at = moments_ptr + (m.to(tl.int64) * chunks + chunk) * 3 * CHANNELS + c
    tl.store(at, base, mask=has_c)
    tl.store(at + CHANNELS, tl.sum(sums, 0), mask=has_c)
    tl.store(at + 2 * CHANNELS, tl.sum(squares, 0), mask=has_c)


@triton.jit
def _chunks(
    start, rows, num_groups, WIDTH: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """A group's channels in CHUNKS chunks from ``start`` on: offsets of the first number, the chunks' rows, which exist."""
    chunk, column = start + tl.arange(0, CHUNKS), tl.arange(0, SLOTS)
    at = chunk.to(tl.int64)[:, None] * 3 * num_groups * WIDTH + column[None, :]
    weight = tl.minimum(rows - chunk * ROWS, ROWS).to(tl.float32)[:, None]
    return at, weight, (chunk * ROWS < rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit(do_not_specialize=["rows", "num_groups"])
def _merge_moments(
    moments_ptr, mean_ptr, rstd_ptr, rows, num_groups, eps,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Step 2 of the forward, one group of one m a program."""
    chunks = tl.cdiv(rows, ROWS)
    m, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    channels = num_groups * WIDTH
    moments_ptr += m.to(tl.int64) * chunks * 3 * channels + group * WIDTH
    count = (rows * WIDTH).to(tl.float32)
    base = tl.load(moments_ptr)  # near the mean: sums of differences from it lose nothing
    drift = tl.zeros((CHUNKS, SLOTS), tl.float32)
    for start in range(0, chunks, CHUNKS):
        at, weight, mask = _chunks(start, rows, num_groups, WIDTH, SLOTS, CHUNKS, ROWS)
        drift += weight * tl.where(mask, tl.load(moments_ptr + at, mask=mask, other=0.0) - base, 0.0)
        drift += tl.load(moments_ptr + at + channels, mask=mask, other=0.0)
    mean = base + tl.sum(drift) / count
    squares = tl.zeros((CHUNKS, SLOTS), tl.float32)
    for start in range(0, chunks, CHUNKS):
        at, weight, mask = _chunks(start, rows, num_groups, WIDTH, SLOTS, CHUNKS, ROWS)
        off = tl.where(mask, tl.load(moments_ptr + at, mask=mask, other=0.0) - mean, 0.0)
        squares += off * (2.0 * tl.load(moments_ptr + at + channels, mask=mask, other=0.0) + weight * off)
        squares += tl.load(moments_ptr + at + 2 * channels, mask=mask, other=0.0)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), tl.rsqrt(tl.sum(squares) / count + eps))


@triton.jit(do_not_specialize=["rows"])
def _normalize(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, out_ptr,
    x_strides, out_strides, stride_weight, stride_bias, rows,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Step 3 of the forward."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    m, _, _, n, c, has_c, mask = part_of(part, rows, CHANNELS, COLUMNS, ROWS)
    x = tl.load(tile_at(x_ptr, m, n, c, x_strides, ALIGN), mask=mask, other=0.0).to(tl.float32)
    group = m * (CHANNELS // WIDTH) + c // WIDTH
    mean = tl.load(mean_ptr + group, mask=has_c, other=0.0)
    scale = tl.load(rstd_ptr + group, mask=has_c, other=0.0) * per_channel(weight_ptr, c, stride_weight, has_c)
    bias = per_channel(bias_ptr, c, stride_bias, has_c)
    out = _activate((x - mean[None, :]) * scale[None, :] + bias[None, :], SILU)
    tl.store(tile_at(out_ptr, m, n, c, out_strides, ALIGN), out.to(out_ptr.dtype.element_ty), mask=mask)


# --- launches ---------------------------------------------------------------------------------------------------------------------


class Slab(NamedTuple):
    """A slab's groups, those and its rows and channels padded to powers of two, and its warps."""

    groups: int
    slots: int
    columns: int
    rows: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"GROUPS": self.groups, "SLOTS": self.slots, "COLUMNS": self.columns, "ROWS": self.rows}


def fitting_slab(call: GroupNormSiluCall, max_bytes: int) -> Slab | None:
    """The slab in aligned runs of up to 512 bytes that pads the least, if one fits in ``max_bytes``."""
    _, tokens, channels = call.x.shape
    return _best_slab(tokens, channels, call.num_groups, call.x.element_size(), max_bytes)


@cache
def _best_slab(tokens: int, channels: int, num_groups: int, itemsize: int, max_bytes: int) -> Slab | None:
    width = channels // num_groups
    rows = next_power_of_2(tokens)
    best = None
    for groups in range(1, num_groups + 1):
        run, columns = groups * width, next_power_of_2(groups * width)
        if rows * columns * itemsize > max_bytes or run * itemsize > 512:
            break
        if (run * itemsize < 64 and groups < num_groups) or tokens * run < 0.6 * rows * columns:
            continue
        merit = (run * itemsize % 16 == 0, run / columns, -groups)
        if best is None or merit > best[0]:
            best = merit, groups, columns
    if best is None:
        return None
    _, groups, columns = best
    warps = min(max(rows * columns * itemsize // 2048, 1), 16)
    return Slab(groups, next_power_of_2(groups), columns, rows, warps)


def slab_configs(key: dict) -> list[Config]:
    slab = key["slab"]
    warps = [slab.warps] + [w for w in (slab.warps // 2, slab.warps * 2) if 1 <= w <= 16]
    return [Config(slab.constants, num_warps=w, num_stages=1) for w in warps]


_CHUNK = 256  # rows that one program adds up


def part_configs(*tiles: tuple[int, int, int], rows: str = "ROWS") -> Callable[[dict], list[Config]]:
    """Configurations of (rows, channels, warps), without those that are mostly padding where channels are few."""

    def configs(key: dict) -> list[Config]:
        fit = [tile for tile in tiles if tile[1] <= 64 or key["C"] > 64]
        return [Config({rows: r, "COLUMNS": columns}, num_warps=warps, num_stages=1) for r, columns, warps in fit]

    return configs


def merge_configs(key: dict) -> list[Config]:
    return [Config({"CHUNKS": 32}, num_warps=4 if key["width"] > 32 else 1, num_stages=1)]


_FORWARD_SLAB = Tuned(_forward_slab, slab_configs)
_MOMENTS = Tuned(_moments, part_configs((32, 64, 2), (64, 64, 4), (16, 64, 2), rows="STEP"))
_MERGE_MOMENTS = Tuned(_merge_moments, merge_configs)
_NORMALIZE = Tuned(_normalize, part_configs((64, 64, 2), (32, 128, 8), (128, 64, 8), (32, 64, 4)))


# --- the backend ------------------------------------------------------------------------------------------------------------------


def unsupported(call: GroupNormSiluCall) -> str | None:
    return launch.unsupported(call.x, call.weight, call.bias)


def forward(call: GroupNormSiluCall) -> tuple[Tensor, Tensor, Tensor]:
    x, num_groups = call.x, call.num_groups
    images, rows, channels = x.shape
    out = x.new_empty(x.shape)
    mean, rstd = (x.new_empty((images, num_groups), dtype=torch.float32) for _ in range(2))
    width = channels // num_groups
    key: dict[str, Any] = {"dtype": launch.DTYPES[x.dtype], "C": channels, "width": width}
    constants: dict[str, Any] = {"WIDTH": width, "SILU": call.silu, "ALIGN": align_of(x, out)}
    affine = (call.weight.stride(0), call.bias.stride(0))
    ends = (strides_of(x), strides_of(out), *affine, rows)
    slab = fitting_slab(call, _SLAB_BYTES)
    if slab is not None:
        grid = (images * cdiv(num_groups, slab.groups), 1, 1)
        tensors = (x, call.weight, call.bias, out, mean, rstd)
        _FORWARD_SLAB(lambda _: grid, *tensors, *ends, num_groups, call.eps, key=key | {"slab": slab}, **constants)
        return out, mean, rstd

    moments = x.new_empty((images, cdiv(rows, _CHUNK), 3, channels), dtype=torch.float32)
    parts = part_grid(call)
    _MOMENTS(parts, x, moments, strides_of(x), rows, key=key, CHANNELS=channels, ROWS=_CHUNK, ALIGN=constants["ALIGN"])
    _MERGE_MOMENTS(
        lambda _: (images * num_groups, 1, 1),
        *(moments, mean, rstd, rows, num_groups, call.eps),
        key=key,
        WIDTH=width,
        SLOTS=next_power_of_2(width),
        ROWS=_CHUNK,
    )
    _NORMALIZE(parts, x, mean, rstd, call.weight, call.bias, out, *ends, key=key, CHANNELS=channels, **constants)
    return out, mean, rstd


def backward(
    call: GroupNormSiluCall,
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    from univid.kernels.triton import group_norm_bwd  # here, because it builds on this file

    group_norm_bwd.backward(call, grad, mean, rstd, dx, dweight, dbias)


def part_grid(call: GroupNormSiluCall) -> Callable[[dict], tuple[int, int, int]]:
    images, rows, channels = call.x.shape
    return lambda constants: (images * cdiv(rows, constants["ROWS"]) * cdiv(channels, constants["COLUMNS"]), 1, 1)


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides but the last, which is 1."""
    return (0, 0) if tensor is None else tensor.stride()[:2]


def align_of(*tensors: Tensor | None) -> int:
    """8 where all rows begin at multiples of 8 numbers (16 bytes in 16 bits), else 1."""
    return 1 if any(stride % 8 for tensor in tensors for stride in strides_of(tensor)) else 8
