"""Temporal attention through ``csrc/temporal_{fwd,bwd}.cu``: a warp takes all T frames of one (b, n, h)."""

import torch
from torch import Tensor

from univid.kernels.calls import TemporalCall
from univid.kernels.cuda import extension, unavailable

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
_MAX_FRAMES = 64
_MAX_HEAD_DIM = 128
_UNIT = 16  # bytes of one access


def unsupported(call: TemporalCall) -> str | None:
    q = call.q
    frames, head_dim = q.shape[1], q.shape[4]
    if reason := unavailable(q.device):
        return reason
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}: bfloat16 or float16 needed"
    if frames > _MAX_FRAMES:
        return f"T = {frames}: at most {_MAX_FRAMES} needed"
    if head_dim % 8 != 0 or head_dim > _MAX_HEAD_DIM:
        return f"head dimension {head_dim}: a multiple of 8, at most {_MAX_HEAD_DIM}, needed"
    for name, x in (("q", q), ("k", call.k), ("v", call.v)):
        if not _is_aligned(x):
            return f"{name}: its address and strides must be multiples of {_UNIT} bytes"
    return None


def forward(call: TemporalCall) -> tuple[Tensor, Tensor]:
    clips, frames, tokens, heads, _ = call.q.shape
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    logsumexp = torch.empty((clips, heads, frames, tokens), dtype=torch.float32, device=call.q.device)
    inputs = map(_view, (call.q, call.k, call.v, out))
    extension().temporal_attn_forward(*_shape(call), *inputs, logsumexp.data_ptr(), *_queue(call.q))
    return out, logsumexp


def backward(
    call: TemporalCall, grad: Tensor, logsumexp: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    """The gradients to write must be aligned like q, k and v, as newly made tensors are."""
    if not _is_aligned(grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
    tensors = map(_view, (call.q, call.k, call.v, grad, dq, dk, dv))
    extension().temporal_attn_backward(*_shape(call), *tensors, *_queue(call.q))


def _shape(call: TemporalCall) -> tuple:
    dtype = getattr(extension().DType, _DTYPES[call.q.dtype])
    return tuple(call.q.shape), call.scale, dtype


def _view(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:4])


def _queue(x: Tensor) -> tuple[int, int]:
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _is_aligned(x: Tensor) -> bool:
    units = _UNIT // x.element_size()
    strides = zip(x.shape[:-1], x.stride(), strict=False)
    return x.data_ptr() % _UNIT == 0 and all(stride % units == 0 or size == 1 for size, stride in strides)
