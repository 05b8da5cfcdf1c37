"""Rows (b, t, n) of channels-last tensors (B, T, N, C) of any strides: where they are."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rows_at(row, strides, frames, tokens, ALIGN: tl.constexpr):
    """Offsets of rows (b, t, n) of a tensor whose strides but the last are a tuple."""
    frame = row // tokens
    at = (frame // frames).to(tl.int64) * strides[0] + (frame % frames).to(tl.int64) * strides[1]
    return tl.multiple_of(at + (row % tokens).to(tl.int64) * strides[2], ALIGN)


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides but the last, which is 1."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def align_of(*tensors: Tensor | None) -> int:
    """8 where all strides but the last are multiples of 8 numbers (16 bytes in 16 bits), else 1."""
    strides = [stride for tensor in tensors if tensor is not None for stride in tensor.stride()[:-1]]
    return 1 if any(stride % 8 for stride in strides) else 8
