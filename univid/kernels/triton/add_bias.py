"""x + bias over rows of channels: tiles of rows x columns, each element read and written once. The bias's gradient is
``column_sums.py``'s. Bound by memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import AddBiasCall
from univid.kernels.triton import launch
from univid.kernels.triton.column_sums import sum_columns
from univid.kernels.triton.launch import Config, Tuned, cdiv
from univid.kernels.triton.rows import align_of, rows_at, strides_of


@triton.jit(do_not_specialize=["rows", "frames", "tokens"])
def _add_bias(
    x_ptr, bias_ptr, out_ptr, x_strides, stride_bias, rows, frames, tokens,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // PARTS * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (c < C)[None, :]
    at = rows_at(row, x_strides, frames, tokens, ALIGN)[:, None] + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = x + tl.load(bias_ptr + c * stride_bias, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + (row.to(tl.int64) * C)[:, None] + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def _configs(key: dict) -> list[Config]:
    """Columns that divide C where they can, 8 of them a thread (16 bytes in 16 bits)."""
    columns = next((size for size in (256, 128, 64) if key["C"] % size == 0), 256 if key["C"] > 128 else 64)
    tiles = ((4096 // columns, 4), (2048 // columns, 4), (8192 // columns, 8))
    return [Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=1) for rows, warps in tiles]


_ADD_BIAS = Tuned(_add_bias, _configs)


# --- the backend ------------------------------------------------------------------------------------------------------


def unsupported(call: AddBiasCall) -> str | None:
    return launch.unsupported(*call)


def forward(call: AddBiasCall) -> Tensor:
    x, bias = call
    clips, frames, tokens, channels = x.shape
    out = x.new_empty(x.shape)
    rows = clips * frames * tokens

    def grid(constants: dict) -> tuple[int, int, int]:
        return cdiv(rows, constants["ROWS"]) * cdiv(channels, constants["COLUMNS"]), 1, 1

    key = {"dtype": launch.DTYPES[x.dtype], "C": channels}
    sizes = (strides_of(x), bias.stride(0), rows, frames, tokens)
    _ADD_BIAS(grid, x, bias, out, *sizes, key=key, C=channels, ALIGN=align_of(x, out))
    return out


def backward(call: AddBiasCall, dbias: Tensor) -> None:
    sum_columns(call.x, dbias)
