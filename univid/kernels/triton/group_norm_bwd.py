"""The backward of GroupNorm with SiLU in Triton, on the slabs or the parts of ``group_norm.py``.

With z = x̂·weight + bias and dz its gradient: dx = rstd·(dz·weight − mean(dz·weight) − x̂·mean(dz·weight·x̂)).

**Slabs** of 16 KiB of x and as much of grad: one program a slab. **Parts**, x and grad being read twice:
1. every chunk of rows leaves, per channel, the sums of dz and dz·x̂, added up in registers as the forward's are;
2. a small kernel merges those per channel and group in a fixed order;
3. every part gets its dx, the last ones first: they are still in L2.
The weight's and the bias's gradients add step 2's channel sums over M.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import GroupNormSiluCall
from univid.kernels.triton import launch
from univid.kernels.triton.group_norm import (
    LOG2E,
    align_of,
    fitting_slab,
    gather,
    merge_configs,
    part_configs,
    part_grid,
    part_of,
    per_channel,
    slab_configs,
    slab_of,
    spread,
    strides_of,
    tile_at,
)
from univid.kernels.triton.launch import Config, Tuned, cdiv, next_power_of_2

_SLAB_BYTES = 16 << 10


@triton.jit
def _gradient(x, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
    """(x̂, the gradient of z) for tiles x and grad and values of their channels."""
    x_hat = (x.to(tl.float32) - mean[None, :]) * rstd[None, :]
    dz = grad.to(tl.float32)
    if SILU:
        z = x_hat * weight[None, :] + bias[None, :]
        gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
        dz *= gate * (1.0 + z * (1.0 - gate))
    return x_hat, dz


# --- slabs ------------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "num_groups"])
def _backward_slab(
    x_ptr, grad_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dx_ptr, sums_ptr,
    x_strides, grad_strides, dx_strides, stride_weight, stride_bias, rows, num_groups,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    m, _, n, c, has_c, mask, member = slab_of(num_groups, rows, WIDTH, GROUPS, COLUMNS, ROWS)
    x = tl.load(tile_at(x_ptr, m, n, c, x_strides, ALIGN), mask=mask, other=0.0)
    grad = tl.load(tile_at(grad_ptr, m, n, c, grad_strides, ALIGN), mask=mask, other=0.0)
    mean = tl.load(mean_ptr + m * num_groups + c // WIDTH, mask=has_c, other=0.0)
    rstd = tl.load(rstd_ptr + m * num_groups + c // WIDTH, mask=has_c, other=0.0)
    weight = per_channel(weight_ptr, c, stride_weight, has_c)
    bias = per_channel(bias_ptr, c, stride_bias, has_c)

    x_hat, dz = _gradient(x, grad, mean, rstd, weight, bias, SILU)  # dz = 0 where there is no x
    dz_sum, dz_x_sum = tl.sum(dz, 0), tl.sum(dz * x_hat, 0)
    if sums_ptr is not None:
        at = sums_ptr + m.to(tl.int64) * 2 * num_groups * WIDTH + c
        tl.store(at, dz_sum, mask=has_c)
        tl.store(at + num_groups * WIDTH, dz_x_sum, mask=has_c)
    if dx_ptr is not None:
        count = (rows * WIDTH).to(tl.float32)
        shift = spread(gather(dz_sum * weight, member, SLOTS) / count, member, SLOTS)
        slope = spread(gather(dz_x_sum * weight, member, SLOTS) / count, member, SLOTS)
        dx = rstd[None, :] * (dz * weight[None, :] - shift[None, :] - x_hat * slope[None, :])
        tl.store(tile_at(dx_ptr, m, n, c, dx_strides, ALIGN), dx.to(dx_ptr.dtype.element_ty), mask=mask)


# --- parts ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _affine(
    m, c, has_c, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, stride_weight, stride_bias,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean, rstd, weight and bias of channels."""
    group = m * (CHANNELS // WIDTH) + c // WIDTH
    mean = tl.load(mean_ptr + group, mask=has_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=has_c, other=0.0)
    weight = per_channel(weight_ptr, c, stride_weight, has_c)
    return mean, rstd, weight, per_channel(bias_ptr, c, stride_bias, has_c)


@triton.jit(do_not_specialize=["rows"])
def _gradient_sums(
    x_ptr, grad_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sums_ptr,
    x_strides, grad_strides, stride_weight, stride_bias, rows,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step 1 of the backward: (M, chunks, 2, C) sums of dz and of dz·x̂."""
    m, chunk, chunks, _, c, has_c, _ = part_of(tl.program_id(0), rows, CHANNELS, COLUMNS, ROWS)
    mean, rstd, weight, bias = _affine(
        m, c, has_c, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, stride_weight, stride_bias, WIDTH, CHANNELS
    )
    dz_sum = tl.zeros((STEP, COLUMNS), tl.float32)
    dz_x_sum = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in tl.static_range(0, ROWS, STEP):
        n = chunk * ROWS + step + tl.arange(0, STEP)
        mask = (n < rows)[:, None] & has_c[None, :]
        x = tl.load(tile_at(x_ptr, m, n, c, x_strides, ALIGN), mask=mask, other=0.0)
        grad = tl.load(tile_at(grad_ptr, m, n, c, grad_strides, ALIGN), mask=mask, other=0.0)
        x_hat, dz = _gradient(x, grad, mean, rstd, weight, bias, SILU)  # dz = 0 where there is no x
        dz_sum += dz
        dz_x_sum += dz * x_hat
    at = sums_ptr + (m.to(tl.int64) * chunks + chunk) * 2 * CHANNELS + c
    tl.store(at, tl.sum(dz_sum, 0), mask=has_c)
    tl.store(at + CHANNELS, tl.sum(dz_x_sum, 0), mask=has_c)


@triton.jit(do_not_specialize=["chunks", "num_groups", "count"])
def _merge_sums(
    parts_ptr, weight_ptr, sums_ptr, means_ptr, stride_weight, chunks, num_groups, count,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Step 2 of the backward, one group of one m a program: (M, 2, C) sums, and their weighted means per group (M, G, 2)."""
    m, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    channels = num_groups * WIDTH
    column = tl.arange(0, SLOTS)
    c = group * WIDTH + column
    parts_ptr += m.to(tl.int64) * chunks * 2 * channels
    dz = tl.zeros((CHUNKS, SLOTS), tl.float32)
    dz_x = tl.zeros((CHUNKS, SLOTS), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & (column < WIDTH)[None, :]
        at = parts_ptr + chunk.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        dz += tl.load(at, mask=mask, other=0.0)
        dz_x += tl.load(at + channels, mask=mask, other=0.0)
    dz_sum, dz_x_sum = tl.sum(dz, 0), tl.sum(dz_x, 0)
    at = sums_ptr + m.to(tl.int64) * 2 * channels + c
    tl.store(at, dz_sum, mask=column < WIDTH)
    tl.store(at + channels, dz_x_sum, mask=column < WIDTH)
    weight = per_channel(weight_ptr, c, stride_weight, column < WIDTH)
    tl.store(means_ptr + tl.program_id(0) * 2, tl.sum(dz_sum * weight) / count)
    tl.store(means_ptr + tl.program_id(0) * 2 + 1, tl.sum(dz_x_sum * weight) / count)


@triton.jit(do_not_specialize=["rows"])
def _input_gradient(
    x_ptr, grad_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, means_ptr, dx_ptr,
    x_strides, grad_strides, dx_strides, stride_weight, stride_bias, rows,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Step 3 of the backward."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    m, _, _, n, c, has_c, mask = part_of(part, rows, CHANNELS, COLUMNS, ROWS)
    x = tl.load(tile_at(x_ptr, m, n, c, x_strides, ALIGN), mask=mask, other=0.0)
    grad = tl.load(tile_at(grad_ptr, m, n, c, grad_strides, ALIGN), mask=mask, other=0.0)
    mean, rstd, weight, bias = _affine(
        m, c, has_c, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, stride_weight, stride_bias, WIDTH, CHANNELS
    )
    x_hat, dz = _gradient(x, grad, mean, rstd, weight, bias, SILU)
    means_at = means_ptr + (m * (CHANNELS // WIDTH) + c // WIDTH) * 2
    shift = tl.load(means_at, mask=has_c, other=0.0)
    slope = tl.load(means_at + 1, mask=has_c, other=0.0)
    dx = rstd[None, :] * (dz * weight[None, :] - shift[None, :] - x_hat * slope[None, :])
    tl.store(tile_at(dx_ptr, m, n, c, dx_strides, ALIGN), dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images"])
def affine_gradients(
    sums_ptr, dweight_ptr, dbias_ptr, stride_dweight, stride_dbias, images,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dweight and dbias: sums over m of the (M, 2, C) sums of dz and of dz·x̂."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, images, ROWS):
        m = start + tl.arange(0, ROWS)
        mask = (m < images)[:, None] & (c < CHANNELS)[None, :]
        at = sums_ptr + m.to(tl.int64)[:, None] * 2 * CHANNELS + c[None, :]
        if dbias_ptr is not None:
            dbias += tl.load(at, mask=mask, other=0.0)
        if dweight_ptr is not None:
            dweight += tl.load(at + CHANNELS, mask=mask, other=0.0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c * stride_dbias, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=c < CHANNELS)
    if dweight_ptr is not None:
        tl.store(
            dweight_ptr + c * stride_dweight, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=c < CHANNELS
        )


# --- launches ---------------------------------------------------------------------------------------------------------------------


_CHUNK = 128  # rows that one program adds up

_BACKWARD_SLAB = Tuned(_backward_slab, slab_configs)
_GRADIENT_SUMS = Tuned(_gradient_sums, part_configs((32, 64, 4), (64, 32, 4), (64, 64, 8), rows="STEP"))
_MERGE_SUMS = Tuned(_merge_sums, merge_configs)
_INPUT_GRADIENT = Tuned(_input_gradient, part_configs((16, 64, 2), (16, 128, 4), (64, 64, 4), (128, 32, 4)))
_AFFINE_GRADIENTS = Tuned(affine_gradients, lambda _: [Config({"COLUMNS": 32, "ROWS": 64}, num_warps=4, num_stages=1)])


def backward(
    call: GroupNormSiluCall,
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    x, num_groups = call.x, call.num_groups
    images, rows, channels = x.shape
    width = channels // num_groups
    key: dict[str, Any] = {"dtype": launch.DTYPES[x.dtype], "C": channels, "width": width}
    constants: dict[str, Any] = {"WIDTH": width, "SILU": call.silu, "ALIGN": align_of(x, grad, dx)}
    affine = (call.weight.stride(0), call.bias.stride(0))
    inputs = (x, grad, mean, rstd, call.weight, call.bias)
    strides: tuple[Any, ...] = (strides_of(x), strides_of(grad))
    slab = fitting_slab(call, _SLAB_BYTES)
    sums = None
    if slab is None or dweight is not None or dbias is not None:
        sums = x.new_empty((images, 2, channels), dtype=torch.float32)
    if slab is not None:
        grid = (images * cdiv(num_groups, slab.groups), 1, 1)
        strides = (*strides, strides_of(dx), *affine)
        key |= {"slab": slab, "asked": (dx is not None, sums is not None)}
        _BACKWARD_SLAB(lambda _: grid, *inputs, dx, sums, *strides, rows, num_groups, key=key, **constants)
    else:
        parts = part_grid(call)
        constants["CHANNELS"] = channels
        chunk_sums = x.new_empty((images, cdiv(rows, _CHUNK), 2, channels), dtype=torch.float32)
        means = x.new_empty((images, num_groups, 2), dtype=torch.float32)
        _GRADIENT_SUMS(parts, *inputs, chunk_sums, *strides, *affine, rows, key=key, ROWS=_CHUNK, **constants)
        _MERGE_SUMS(
            lambda _: (images * num_groups, 1, 1),
            *(chunk_sums, call.weight, sums, means, affine[0], chunk_sums.shape[1], num_groups, rows * width),
            key=key,
            WIDTH=width,
            SLOTS=next_power_of_2(width),
        )
        if dx is not None:
            strides = (*strides, strides_of(dx), *affine)
            _INPUT_GRADIENT(parts, *inputs, means, dx, *strides, rows, key=key, **constants)
    if dweight is not None or dbias is not None:
        ends = [0 if tensor is None else tensor.stride(0) for tensor in (dweight, dbias)]
        _AFFINE_GRADIENTS(
            lambda constants: (cdiv(channels, constants["COLUMNS"]), 1, 1),
            *(sums, dweight, dbias, *ends, images),
            key={},
            CHANNELS=channels,
        )
