"""LayerNorm over rows (M, C), a few whole rows a program, each element read and written once.

With x̂ = (x − mean)·rstd and g = dy·weight: dx = rstd·(g − mean(g) − x̂·mean(g·x̂)). The backward takes the mean and the
variance from x anew, which it holds anyway. Its programs are a fixed number and go through the rows in turns: each leaves
the sums of dy and dy·x̂ over its rows, which are added in a fixed order (``group_norm_bwd.affine_gradients``).

Bound by memory: 2 numbers an element in the forward, 3 in the backward.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float32

from univid.kernels.calls import LayerNormCall
from univid.kernels.triton import launch
from univid.kernels.triton.group_norm import per_channel
from univid.kernels.triton.group_norm_bwd import affine_gradients
from univid.kernels.triton.launch import Config, Tuned, cdiv, next_power_of_2

_MAX_CHANNELS = 8192  # that registers hold


@triton.jit
def _normalised(x_ptr, m, c, mask, stride, eps, C: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of x̂, and their 1/deviation."""
    x = tl.load(x_ptr + tl.multiple_of(m * stride, ALIGN)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows", "tokens", "frames"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, offset_ptr, out_ptr,
    stride, stride_weight, stride_bias, stride_offset, rows, tokens, frames, eps,
    C: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    mask = (m < rows)[:, None] & (c < C)[None, :]
    x_hat, _ = _normalised(x_ptr, m, c, mask, stride, eps, C, ALIGN)
    weight = per_channel(weight_ptr, c, stride_weight, c < C)
    bias = per_channel(bias_ptr, c, stride_bias, c < C)
    out = x_hat * weight[None, :] + bias[None, :]
    if offset_ptr is not None:
        at = offset_ptr + (m // tokens % frames * stride_offset)[:, None] + c[None, :]
        out += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (m * C)[:, None] + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x_ptr, grad_ptr, weight_ptr, dx_ptr, sums_ptr, stride, stride_grad, stride_weight, rows, eps,
    C: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, COLUMNS)
    weight = per_channel(weight_ptr, c, stride_weight, c < C)
    grad_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_x_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (m < rows)[:, None] & (c < C)[None, :]
        x_hat, rstd = _normalised(x_ptr, m, c, mask, stride, eps, C, ALIGN)
        grad_at = grad_ptr + tl.multiple_of(m * stride_grad, ALIGN)[:, None] + c[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        if sums_ptr is not None:
            grad_sum += grad
            grad_x_sum += grad * x_hat
        if dx_ptr is not None:
            g = grad * weight[None, :]
            shift, slope = tl.sum(g, 1) / C, tl.sum(g * x_hat, 1) / C
            dx = rstd[:, None] * (g - shift[:, None] - x_hat * slope[:, None])
            tl.store(dx_ptr + (m * C)[:, None] + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        at = sums_ptr + tl.program_id(0) * 2 * C + c
        tl.store(at, tl.sum(grad_sum, 0), mask=c < C)
        tl.store(at + C, tl.sum(grad_x_sum, 0), mask=c < C)


# --- launches ---------------------------------------------------------------------------------------------------------


def _configs(*tiles: tuple[int, int]):
    """Of (numbers of a tile, warps)."""

    def configs(key: dict) -> list[Config]:
        columns = next_power_of_2(key["C"])
        rows = {(max(1, numbers // columns), warps): None for numbers, warps in tiles}
        return [Config({"ROWS": n}, num_warps=max(w, columns // 1024), num_stages=1) for n, w in rows]

    return configs


_FORWARD = Tuned(_forward, _configs((4096, 4), (2048, 4), (8192, 8), (1024, 1)))
_BACKWARD = Tuned(_backward, _configs((2048, 4), (4096, 8), (4096, 4), (1024, 2)))
_PROGRAMS = 1056  # of the backward, at most: eight for each multiprocessor of an H100


def unsupported(call: LayerNormCall) -> str | None:
    channels = call.x.shape[1]
    if channels > _MAX_CHANNELS:
        return f"C = {channels}: at most {_MAX_CHANNELS} needed"
    return launch.unsupported(call.x)


def forward(call: LayerNormCall) -> Tensor:
    x, offset = call.x, call.offset
    rows = len(x)
    out = x.new_empty(x.shape)
    frames, stride_offset = (1, 0) if offset is None else (len(offset), offset.stride(0))
    strides = (x.stride(0), call.weight.stride(0), call.bias.stride(0), stride_offset)
    _FORWARD(
        lambda constants: (cdiv(rows, constants["ROWS"]), 1, 1),
        *(x, call.weight, call.bias, offset, out, *strides, rows, call.tokens, frames, call.eps),
        **_constants(x, x.stride(0)),
    )
    return out


def backward(
    call: LayerNormCall, grad: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    x = call.x
    rows, channels = x.shape
    constants = _constants(x, x.stride(0), grad.stride(0))
    constants["key"] |= {"dx": dx is not None}
    sums = None
    if dweight is not None or dbias is not None:
        sums = x.new_empty((min(rows, _PROGRAMS), 2, channels), dtype=float32)
    _BACKWARD(
        lambda _: (min(rows, _PROGRAMS), 1, 1),
        *(x, grad, call.weight, dx, sums, x.stride(0), grad.stride(0), call.weight.stride(0), rows, call.eps),
        **constants,
    )
    if sums is not None:
        affine_gradients(sums, dweight, dbias)


def _constants(x: Tensor, *strides: int) -> dict[str, Any]:
    channels = x.shape[1]
    aligned = not any(stride % 8 for stride in (channels, *strides))
    sizes = {"C": channels, "COLUMNS": next_power_of_2(channels), "ALIGN": 8 if aligned else 1}
    return {"key": {"dtype": launch.DTYPES[x.dtype], "C": channels}, **sizes}
