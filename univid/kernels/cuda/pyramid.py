"""Pyramid attention through ``csrc/pyramid_{fwd,bwd,bwd_dq}.cu`` (Hopper): a frame is a coordinate of the copies.

Not deterministic, the backward adds up dQ in float32 in no fixed order; deterministic, it takes a kernel more.
"""

import torch
from torch import Tensor

from univid.kernels.calls import PyramidCall
from univid.kernels.cuda import extension, unavailable
from univid.kernels.cuda.tensors import DTYPES, dtype_of, queue, readable, refused, view

_HEAD_DIM = 64
_MAX_ROWS = 2**31 - 1


def unsupported(call: PyramidCall) -> str | None:
    q = call.q
    if reason := unavailable(q.device, hopper=True):
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: bfloat16 or float16 needed"
    if q.shape[4] != _HEAD_DIM:
        return f"head dimension {q.shape[4]}: {_HEAD_DIM} needed"
    if q.shape[1] * q.shape[2] > _MAX_ROWS or call.k.shape[2] > _MAX_ROWS:
        return f"T·N = {q.shape[1] * q.shape[2]}, Nk = {call.k.shape[2]}: at most {_MAX_ROWS} needed"
    return refused({"q": q, "k": call.k, "v": call.v}, mapped=True)


def forward(call: PyramidCall) -> tuple[Tensor, Tensor]:
    q = call.q
    clips, frames, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty((clips, heads, frames, tokens), dtype=torch.float32, device=q.device)
    extension().pyramid_st_attn_forward(
        *_shape(call),
        *map(view, (q, call.k, call.v)),
        _table(call),
        _is_one_query(call, q),
        out.data_ptr(),
        logsumexp.data_ptr(),
        *queue(call.q),
    )
    return out, logsumexp


def backward(
    call: PyramidCall,
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    q, inverse = call.q, call.inverse
    grad = readable(grad, mapped=True)
    one_query = _is_one_query(call, q, grad, *([] if dq is None else [dq]))
    asked = tuple(x is not None for x in (dq, dk, dv))
    size = extension().pyramid_st_attn_workspace(*_shape(call), one_query, asked, call.deterministic, q.device.index)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    extension().pyramid_st_attn_backward(
        *_shape(call),
        *map(view, (q, call.k, call.v, grad, dq, dk, dv)),
        _table(call),
        (0, 0) if inverse is None else (inverse.data_ptr(), inverse.stride(0) if inverse.shape[0] > 1 else 0),
        call.table.shape[1] == 1,
        one_query,
        call.deterministic,
        out.data_ptr(),
        logsumexp.data_ptr(),
        workspace.data_ptr(),
        *queue(call.q),
    )


def _shape(call: PyramidCall) -> tuple:
    q, k = call.q, call.k
    sizes = (*q.shape, k.shape[1], k.shape[2], call.table.shape[2])
    return sizes, call.scale, dtype_of(q)


def _table(call: PyramidCall) -> tuple[int, ...]:
    table = call.table
    strides = (stride if size > 1 else 0 for size, stride in zip(table.shape[:2], table.stride(), strict=False))
    return (table.data_ptr(), *strides)


def _is_one_query(call: PyramidCall, *queries: Tensor) -> bool:
    """Whether T·N tokens can run as one long query: all frames share their row, and frames follow each other."""
    frames, tokens = call.q.shape[1:3]
    return call.table.shape[1] == 1 and (frames == 1 or all(x.stride(1) == tokens * x.stride(2) != 0 for x in queries))
