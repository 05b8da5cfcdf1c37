"""Channels of two tensors side by side, and apart: a copy of rows of one stride into rows of another, in tiles of rows x columns."""

import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import ConcatCall
from univid.kernels.triton import launch
from univid.kernels.triton.launch import Config, Tuned, cdiv
from univid.kernels.triton.rows import align_of, rows_at, strides_of


@triton.jit(do_not_specialize=["rows", "frames", "tokens"])
def _copy(
    in_ptr, out_ptr, in_strides, out_strides, rows, frames, tokens,
    C: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // PARTS * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (c < C)[None, :]
    tile = tl.load(in_ptr + rows_at(row, in_strides, frames, tokens, ALIGN)[:, None] + c[None, :], mask=mask)
    tl.store(out_ptr + rows_at(row, out_strides, frames, tokens, ALIGN)[:, None] + c[None, :], tile, mask=mask)


def _configs(key: dict) -> list[Config]:
    """Columns that divide C where they can, 8 of them a thread (16 bytes in 16 bits)."""
    columns = next((size for size in (256, 128, 64) if key["C"] % size == 0), 256 if key["C"] > 128 else 64)
    tiles = ((4096 // columns, 4), (2048 // columns, 4), (8192 // columns, 8))
    return [Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=1) for rows, warps in tiles]


_COPY = Tuned(_copy, _configs)


def copy(x: Tensor, out: Tensor) -> None:
    """``out`` = x, both (B, T, N, C), of any strides but for contiguous channels."""
    clips, frames, tokens, channels = x.shape
    rows = clips * frames * tokens

    def grid(constants: dict) -> tuple[int, int, int]:
        return cdiv(rows, constants["ROWS"]) * cdiv(channels, constants["COLUMNS"]), 1, 1

    key = {"dtype": launch.DTYPES[x.dtype], "C": channels}
    sizes = (strides_of(x), strides_of(out), rows, frames, tokens)
    _COPY(grid, x, out, *sizes, key=key, C=channels, ALIGN=align_of(x, out))


# --- the backend ------------------------------------------------------------------------------------------------------


def unsupported(call: ConcatCall) -> str | None:
    return launch.unsupported(*call)


def forward(call: ConcatCall) -> Tensor:
    x, y = call
    out = x.new_empty((*x.shape[:3], x.shape[3] + y.shape[3]))
    copy(x, out[..., : x.shape[3]])
    copy(y, out[..., x.shape[3] :])
    return out


def backward(call: ConcatCall, dx: Tensor | None, dy: Tensor | None) -> None:
    for part, gradient in zip(call, (dx, dy), strict=True):
        if gradient is not None:
            copy(part, gradient)
