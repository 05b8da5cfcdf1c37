"""GEGLU over rows (M, 2C): a · b · Φ(b) of their halves, each element read and written once.

Tiles are rows x columns of one half, and of the same columns of the other. With Φ the normal distribution's and φ its density:
da = g·b·Φ(b) and db = g·a·(Φ(b) + b·φ(b)). Bound by memory: 3 numbers an output in the forward, 5 in the backward.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import GegluCall
from univid.kernels.triton import launch
from univid.kernels.triton.launch import Config, Tuned, cdiv

_SQRT_HALF = tl.constexpr(0.5**0.5)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1/sqrt(2 pi)
_HALF_LOG2E = tl.constexpr(0.7213475204444817)


@triton.jit
def _halves(x_ptr, stride, rows, C, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows, columns and mask, and where its tile of a begins."""
    parts = tl.cdiv(C, COLUMNS)
    m = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    mask = (m < rows)[:, None] & (c < C)[None, :]
    return m, c, mask, x_ptr + tl.multiple_of(m * stride, ALIGN)[:, None] + c[None, :]


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, out_ptr, stride, rows, C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    m, c, mask, a_ptr = _halves(x_ptr, stride, rows, C, ALIGN, ROWS, COLUMNS)
    a = tl.load(a_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_ptr + C, mask=mask, other=0.0).to(tl.float32)
    out = a * (b * (0.5 + 0.5 * tl.erf(b * _SQRT_HALF)))
    tl.store(out_ptr + (m * C)[:, None] + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x_ptr, grad_ptr, dx_ptr, stride, stride_grad, rows,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m, c, mask, a_ptr = _halves(x_ptr, stride, rows, C, ALIGN, ROWS, COLUMNS)
    grad_ptr += tl.multiple_of(m * stride_grad, ALIGN)[:, None] + c[None, :]
    a = tl.load(a_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_ptr + C, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(b * _SQRT_HALF)
    da = grad * (b * below)
    db = grad * (a * (below + b * (_DENSITY * tl.exp2(b * b * -_HALF_LOG2E))))
    dx_ptr += (m * 2 * C)[:, None] + c[None, :]
    tl.store(dx_ptr, da.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + C, db.to(dx_ptr.dtype.element_ty), mask=mask)


def _configs(key: dict) -> list[Config]:
    """Columns that divide C where they can, 8 of them a thread (16 bytes in 16 bits)."""
    columns = next((size for size in (512, 256, 128) if key["C"] % size == 0), 256 if key["C"] > 128 else 64)
    tiles = ((2048 // columns, 4), (4096 // columns, 8), (1024 // columns, 2))
    return [Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=1) for rows, warps in tiles]


_FORWARD = Tuned(_forward, _configs)
_BACKWARD = Tuned(_backward, _configs)


# --- the backend ------------------------------------------------------------------------------------------------------


def unsupported(call: GegluCall) -> str | None:
    return launch.unsupported(call.x)


def forward(call: GegluCall) -> Tensor:
    out = call.x.new_empty((len(call.x), call.x.shape[1] // 2))
    strides = (call.x.stride(0),)
    _FORWARD(_parts(out), call.x, out, *strides, len(out), **_constants(out, *strides))
    return out


def backward(call: GegluCall, grad: Tensor, dx: Tensor) -> None:
    strides = (call.x.stride(0), grad.stride(0))
    _BACKWARD(_parts(grad), call.x, grad, dx, *strides, len(grad), **_constants(grad, *strides))


def _parts(out: Tensor) -> Callable[[dict], tuple[int, int, int]]:
    rows, channels = out.shape
    return lambda constants: (cdiv(rows, constants["ROWS"]) * cdiv(channels, constants["COLUMNS"]), 1, 1)


def _constants(out: Tensor, *strides: int) -> dict:
    channels = out.shape[1]
    aligned = not any(stride % 8 for stride in (channels, *strides))
    return {"key": {"dtype": launch.DTYPES[out.dtype], "C": channels}, "C": channels, "ALIGN": 8 if aligned else 1}
