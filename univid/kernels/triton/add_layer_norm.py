"""A sum and its LayerNorm over rows (M, C): each row is read once and stays in registers.

Forward: ROWS whole rows a program, padded to a power of two; the variance is that of the centred row.
Backward, with x̂ = (x - mean)·rstd and g = grad·weight: dx = rstd·(g - mean(g) - x̂·mean(g·x̂)) + grad_total. The statistics are
computed anew from the row, which is read anyway. For the weight's and the bias's gradients a program goes through a run of rows
and adds up grad·x̂ and grad per channel, in registers; a second kernel adds up the programs' sums in a fixed order.
Bound by memory: 4 numbers an element in the forward with a branch, 2 without; 4 in the backward, 3 without grad_total.
Measured 2026-11-24 on one H200 (B = 2, T = 24, bfloat16; N/C = 2880/320, 720/640, 180/1280), GB/s: forward with a branch
4023, 3929, 3623; backward with grad_total 2422, 2380, 1966.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import AddLayerNormCall
from univid.kernels.triton import launch
from univid.kernels.triton.group_norm import per_channel
from univid.kernels.triton.group_norm_bwd import affine_gradients
from univid.kernels.triton.launch import Config, Tuned, cdiv, next_power_of_2

_MAX_CHANNELS = 8192  # a row in the registers of 16 warps
_MAX_PROGRAMS = 1056  # of the backward, 8 for each processor of an H200; each leaves 2·C sums
_RUN = 16  # rows of a backward's program, so that its sums are few beside what it reads; less where that is no wave
_WAVE = 264  # programs


@triton.jit
def _row_at(ptr, m, c, stride, ALIGN: tl.constexpr):
    return ptr + tl.multiple_of(m * stride, ALIGN)[:, None] + c[None, :]


@triton.jit
def _normalize(x, mask, eps, C: tl.constexpr):
    """(x̂, rstd) of the rows."""
    centred = tl.where(mask, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows", "tokens", "frames"])
def _forward(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, offset_ptr, total_ptr, y_ptr,
    stride, stride_branch, stride_weight, stride_bias, stride_offset, rows, tokens, frames, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    has_c = c < C
    mask = (m < rows)[:, None] & has_c[None, :]
    x = tl.load(_row_at(x_ptr, m, c, stride, ALIGN), mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        x += tl.load(_row_at(branch_ptr, m, c, stride_branch, ALIGN), mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(_row_at(total_ptr, m, c, C, ALIGN), total, mask=mask)
        x = total.to(tl.float32)
    x_hat, _ = _normalize(x, mask, eps, C)
    weight = per_channel(weight_ptr, c, stride_weight, has_c)
    y = x_hat * weight[None, :] + per_channel(bias_ptr, c, stride_bias, has_c)[None, :]
    if offset_ptr is not None:
        frame = m // tokens % frames
        y += tl.load(_row_at(offset_ptr, frame, c, stride_offset, ALIGN), mask=mask, other=0.0).to(tl.float32)
    tl.store(_row_at(y_ptr, m, c, C, ALIGN), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "run"])
def _backward(
    x_ptr, grad_ptr, grad_total_ptr, weight_ptr, dx_ptr, sums_ptr,
    stride, stride_grad, stride_grad_total, stride_weight, rows, run, eps,
    C: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(first + run, rows)
    c = tl.arange(0, COLUMNS)
    has_c = c < C
    weight = per_channel(weight_ptr, c, stride_weight, has_c)
    grad_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_x_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, run, ROWS, num_stages=STAGES):  # later rows are on their way
        m = first + start + tl.arange(0, ROWS)
        mask = (m < end)[:, None] & has_c[None, :]
        x = tl.load(_row_at(x_ptr, m, c, stride, ALIGN), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(_row_at(grad_ptr, m, c, stride_grad, ALIGN), mask=mask, other=0.0).to(tl.float32)
        dx = tl.zeros((ROWS, COLUMNS), tl.float32)
        if dx_ptr is not None and grad_total_ptr is not None:  # on its way while the statistics are made
            at = _row_at(grad_total_ptr, m, c, stride_grad_total, ALIGN)
            dx = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x_hat, rstd = _normalize(x, mask, eps, C)
        if sums_ptr is not None:
            grad_sum += grad
            grad_x_sum += grad * x_hat
        if dx_ptr is not None:
            g = grad * weight[None, :]
            shift, slope = tl.sum(g, 1) / C, tl.sum(g * x_hat, 1) / C
            dx += rstd[:, None] * (g - shift[:, None] - x_hat * slope[:, None])
            tl.store(_row_at(dx_ptr, m, c, C, ALIGN), dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        at = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + c
        tl.store(at, tl.sum(grad_sum, 0), mask=has_c)
        tl.store(at + C, tl.sum(grad_x_sum, 0), mask=has_c)


def _columns(channels: int) -> int:
    return max(next_power_of_2(channels), 32)


def _configs(key: dict, order: tuple[tuple[int, int], ...], **constants: int) -> list[Config]:
    """Tiles that hold at least a row, by ``order``: warps, and numbers a thread."""
    columns = _columns(key["C"])
    tiles = [(warps, 32 * warps * numbers // columns) for warps, numbers in order]
    tiles = [(warps, rows) for warps, rows in tiles if rows] or [(16, 1)]
    return [Config({"COLUMNS": columns, "ROWS": rows} | constants, warps, num_stages=1) for warps, rows in tiles]


_FORWARD = Tuned(_forward, lambda key: _configs(key, ((4, 16), (8, 16), (2, 16), (4, 32))))
_BACKWARD = Tuned(
    _backward,
    lambda key: [c for stages in (3, 2) for c in _configs(key, ((2, 16), (2, 32), (4, 32)), STAGES=stages)],
)
_AFFINE_GRADIENTS = Tuned(affine_gradients, lambda _: [Config({"COLUMNS": 8, "ROWS": 256}, num_warps=8, num_stages=1)])


# --- the backend ------------------------------------------------------------------------------------------------------


def unsupported(call: AddLayerNormCall) -> str | None:
    if call.x.shape[-1] > _MAX_CHANNELS:
        return f"C = {call.x.shape[-1]}: at most {_MAX_CHANNELS} needed"
    return launch.unsupported(call.x, call.branch, call.weight, call.bias, call.offset)


def forward(call: AddLayerNormCall) -> tuple[Tensor | None, Tensor]:
    _, frames, tokens, channels = call.x.shape
    x, branch, offset = _rows(call.x), _rows(call.branch), _rows(call.offset)
    y = call.x.new_empty(call.x.shape)
    total = None if branch is None else torch.empty_like(y)
    strides = [_stride(tensor) for tensor in (x, branch, offset)]
    key = {"dtype": launch.DTYPES[x.dtype], "C": channels, "branch": branch is not None, "offset": offset is not None}
    _FORWARD(
        lambda constants: (cdiv(len(x), constants["ROWS"]), 1, 1),
        *(x, branch, call.weight, call.bias, offset, total, y),
        *(strides[0], strides[1], call.weight.stride(0), call.bias.stride(0), strides[2]),
        *(len(x), tokens, frames, call.eps),
        key=key,
        **_constants(channels, *strides),
    )
    return total, y


def backward(
    call: AddLayerNormCall,
    grad: Tensor,
    grad_total: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    x, grad, grad_total = _rows(call.x), _rows(grad), _rows(grad_total)
    channels = x.shape[1]
    run = max(cdiv(len(x), _MAX_PROGRAMS), min(_RUN, cdiv(len(x), _WAVE)), 4096 // _columns(channels))
    programs = cdiv(len(x), run)
    affine = dweight is not None or dbias is not None
    sums = x.new_empty((programs, 2, channels), dtype=torch.float32) if affine else None
    strides = [_stride(tensor) for tensor in (x, grad, grad_total)]
    given = (dx is not None, affine, grad_total is not None)
    _BACKWARD(
        lambda _: (programs, 1, 1),
        *(x, grad, grad_total, call.weight, dx, sums, *strides, call.weight.stride(0), len(x), run, call.eps),
        key={"dtype": launch.DTYPES[x.dtype], "C": channels, "given": given},
        **_constants(channels, *strides),
    )
    if sums is not None:
        ends = [0 if tensor is None else tensor.stride(0) for tensor in (dweight, dbias)]
        _AFFINE_GRADIENTS(
            lambda constants: (cdiv(channels, constants["COLUMNS"]), 1, 1),
            *(sums, dweight, dbias, *ends, programs),
            key={},
            CHANNELS=channels,
        )


def _rows(tensor: Any) -> Any:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])  # a view, except of few layouts


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _constants(channels: int, *strides: int) -> dict:
    return {"C": channels, "ALIGN": 1 if any(stride % 8 for stride in (channels, *strides)) else 8}
