"""Pyramid attention through ``csrc/pyramid_fwd.cu`` (Hopper): a reference is a coordinate of the copies of K and V."""

import torch
from torch import Tensor

from univid.kernels.calls import PyramidCall
from univid.kernels.cuda import extension, unavailable

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
_HEAD_DIM = 64
_UNIT = 16  # bytes: what addresses and strides of a tensor map are multiples of
_MAX_ROWS = 2**31 - 1


def unsupported(call: PyramidCall) -> str | None:
    q = call.q
    if reason := unavailable(q.device, hopper=True):
        return reason
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}: bfloat16 or float16 needed"
    if q.shape[4] != _HEAD_DIM:
        return f"head dimension {q.shape[4]}: {_HEAD_DIM} needed"
    if q.shape[1] * q.shape[2] > _MAX_ROWS or call.k.shape[2] > _MAX_ROWS:
        return f"T·N = {q.shape[1] * q.shape[2]}, Nk = {call.k.shape[2]}: at most {_MAX_ROWS} needed"
    for name, x in (("q", q), ("k", call.k), ("v", call.v)):
        if not _is_aligned(x):
            return f"{name}: its address and strides must be multiples of {_UNIT} bytes"
        if x.stride(2) == 0 and x.shape[2] > 1:
            return f"{name}: expanded along its tokens"
    return None


def forward(call: PyramidCall) -> tuple[Tensor, Tensor]:
    q, k, table = call.q, call.k, call.table
    clips, frames, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty((clips, heads, frames, tokens), dtype=torch.float32, device=q.device)
    strides = [stride if size > 1 else 0 for size, stride in zip(table.shape[:2], table.stride(), strict=False)]
    one_query = table.shape[1] == 1 and (frames == 1 or q.stride(1) == tokens * q.stride(2))
    extension().pyramid_st_attn_forward(
        (*q.shape, k.shape[1], k.shape[2], table.shape[2]),
        call.scale,
        getattr(extension().DType, _DTYPES[q.dtype]),
        *map(_view, (q, k, call.v)),
        (table.data_ptr(), *strides),
        one_query,
        out.data_ptr(),
        logsumexp.data_ptr(),
        q.device.index,
        torch.cuda.current_stream(q.device).cuda_stream,
    )
    return out, logsumexp


def _view(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:4])


def _is_aligned(x: Tensor) -> bool:
    units = _UNIT // x.element_size()
    strides = zip(x.shape[:-1], x.stride(), strict=False)
    return x.data_ptr() % _UNIT == 0 and all(stride % units == 0 or size == 1 for size, stride in strides)
