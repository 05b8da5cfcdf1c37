"""Dual-stream attention through ``csrc/dual_stream_{fwd,bwd,bwd_dq}.cu`` (Hopper): keys stay in shared memory, queries
pass by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from univid.kernels.calls import DualStreamCall, Stream, StreamGrads
from univid.kernels.cuda import extension, unavailable
from univid.kernels.cuda.tensors import DTYPES, dtype_of, queue, readable, refused, view

_WEIGHTS = {torch.float32: "FLOAT32", **DTYPES}
_HEAD_DIM = 64
_MAX_ROWS = 2**31 - 1


def unsupported(call: DualStreamCall) -> str | None:
    q = call.q
    if reason := unavailable(q.device, hopper=True):
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: bfloat16 or float16 needed"
    if q.shape[4] != _HEAD_DIM:
        return f"head dimension {q.shape[4]}: {_HEAD_DIM} needed"
    if q.shape[1] * q.shape[2] > _MAX_ROWS:
        return f"T·N = {q.shape[1] * q.shape[2]}: at most {_MAX_ROWS} needed"
    lengths = [0 if stream is None else stream.k.shape[1] for stream in (call.text, call.image)]
    if not extension().dual_stream_attn_fits(*lengths):
        return f"{lengths[0]} text and {lengths[1]} image keys: at most 352 of one stream, or 88 and 264 of two, needed"
    tensors = {"q": q}
    for name, stream in (("text", call.text), ("image", call.image)):
        if stream is not None:
            tensors |= {f"k_{name}": stream.k, f"v_{name}": stream.v}
    return refused(tensors, mapped=True)


def forward(call: DualStreamCall) -> tuple[Tensor, Tensor, Tensor]:
    q = call.q
    clips, frames, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (clips, heads, frames, tokens)
    lse_text, lse_image = (
        torch.empty((0,) if stream is None else shape, dtype=torch.float32, device=q.device)
        for stream in (call.text, call.image)
    )
    weights = _readable_weights(call)
    extension().dual_stream_attn_forward(
        *_shape(call),
        view(q),
        _streams(call, weights, lse_text, lse_image),
        _is_one_query(q),
        out.data_ptr(),
        *queue(q),
    )
    return out, lse_text, lse_image


def backward(
    call: DualStreamCall,
    grad: Tensor,
    out: Tensor,
    lse_text: Tensor,
    lse_image: Tensor,
    dq: Tensor | None,
    text_grads: StreamGrads | None,
    image_grads: StreamGrads | None,
) -> None:
    q = call.q
    grad = readable(grad, mapped=True)
    one_query = _is_one_query(q) and _is_one_query(grad)
    weights = _readable_weights(call)
    streams = _streams(call, weights, lse_text, lse_image)
    gradients = [tuple(map(_address, grads)) for grads in (image_grads, text_grads) if grads is not None]
    lengths = [stream[0] for stream in streams]
    if len(streams) == 1:
        gradients.append((0, 0, 0))
        lengths.append(0)
    size = extension().dual_stream_attn_workspace(tuple(q.shape), one_query, lengths, q.device.index)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    extension().dual_stream_attn_backward(
        *_shape(call),
        *map(view, (q, grad, out, dq)),
        streams,
        gradients,
        one_query,
        workspace.data_ptr(),
        *queue(q),
    )


def _shape(call: DualStreamCall) -> tuple:
    return tuple(call.q.shape), call.scale, dtype_of(call.q)


def _streams(call: DualStreamCall, weights: Sequence[Tensor | float], lse_text: Tensor, lse_image: Tensor) -> list:
    """The streams that there are, that of the image first."""
    streams = zip((call.image, call.text), weights, (lse_image, lse_text), strict=True)
    return [_stream(stream, weight, logsumexp) for stream, weight, logsumexp in streams if stream is not None]


def _stream(stream: Stream, weight: Tensor | float, logsumexp: Tensor) -> tuple:
    k, v = stream.k, stream.v
    kinds = extension().WeightType
    if isinstance(weight, Tensor):
        strides = (stride if size > 1 else 0 for size, stride in zip(weight.shape, weight.stride(), strict=True))
        of_weight = (getattr(kinds, _WEIGHTS[weight.dtype]), 0.0, (weight.data_ptr(), *strides))
    else:
        of_weight = (kinds.NUMBER, weight, (0, 0, 0, 0))
    return k.shape[1], *((x.data_ptr(), *x.stride()[:3]) for x in (k, v)), *of_weight, logsumexp.data_ptr()


def _readable_weights(call: DualStreamCall) -> list[Tensor | float]:
    """The weights of image and text, in a dtype that the kernels read; to be kept until these are launched."""
    weights = [0.0 if stream is None else stream.weight for stream in (call.image, call.text)]
    return [w.float() if isinstance(w, Tensor) and w.dtype not in _WEIGHTS else w for w in weights]


def _is_one_query(x: Tensor) -> bool:
    """Whether T·N tokens can run as one long query: frames follow each other."""
    _, frames, tokens, _, _ = x.shape
    return frames == 1 or (x.stride(1) == tokens * x.stride(2) and x.stride(2) != 0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
