"""Temporal attention through ``csrc/temporal_{fwd,bwd}.cu``: a warp takes all T frames of one (b, n, h)."""

import torch
from torch import Tensor

from univid.kernels.calls import TemporalCall
from univid.kernels.cuda import extension, unavailable
from univid.kernels.cuda.tensors import DTYPES, dtype_of, queue, readable, refused, view

_MAX_FRAMES = 64
_MAX_HEAD_DIM = 128


def unsupported(call: TemporalCall) -> str | None:
    q = call.q
    frames, head_dim = q.shape[1], q.shape[4]
    if reason := unavailable(q.device):
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: bfloat16 or float16 needed"
    if frames > _MAX_FRAMES:
        return f"T = {frames}: at most {_MAX_FRAMES} needed"
    if head_dim % 8 != 0 or head_dim > _MAX_HEAD_DIM:
        return f"head dimension {head_dim}: a multiple of 8, at most {_MAX_HEAD_DIM}, needed"
    return refused({"q": q, "k": call.k, "v": call.v})


def forward(call: TemporalCall) -> tuple[Tensor, Tensor]:
    clips, frames, tokens, heads, _ = call.q.shape
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    logsumexp = torch.empty((clips, heads, frames, tokens), dtype=torch.float32, device=call.q.device)
    inputs = map(view, (call.q, call.k, call.v, out))
    extension().temporal_attn_forward(*_shape(call), *inputs, logsumexp.data_ptr(), *queue(call.q))
    return out, logsumexp


def backward(
    call: TemporalCall, grad: Tensor, logsumexp: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    """The gradients to write must be aligned like q, k and v, as newly made tensors are."""
    grad = readable(grad)
    tensors = map(view, (call.q, call.k, call.v, grad, dq, dk, dv))
    extension().temporal_attn_backward(*_shape(call), *tensors, *queue(call.q))


def _shape(call: TemporalCall) -> tuple:
    return tuple(call.q.shape), call.scale, dtype_of(call.q)
