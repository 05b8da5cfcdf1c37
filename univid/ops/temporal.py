"""``temporal_attn``: every pixel attends along time (eq. 8 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import TemporalCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_scale, check_shape, check_tensor
from univid.ops.registration import (
    asked,
    contiguous_rows,
    new_gradients,
    register,
    register_gradient,
    statistics_dtype,
)
from univid.ops.settings import deterministic_algorithms


def temporal_attn(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Self-attention along time for every pixel and head (UniVid, eq. 8).

    ``out[b, :, n, h] = softmax(scale · q[b, :, n, h] · k[b, :, n, h]ᵀ) · v[b, :, n, h]``

    Args:
        q, k, v: ``(B, T, N, H, D)``; bfloat16, float16, float32 or float64, any strides with the last dimension
            contiguous.
        scale: a number > 0; ``D ** -0.5`` by default.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, H, D)`` in q's dtype, contiguous. Softmax and sums run in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range. RuntimeError: the backend
            asked for by name cannot run the call.
    """
    return torch.ops.univid.temporal_attn(*_arguments(q, k, v, scale=scale, backend=backend))[0]


def temporal_attn_qkv(qkv: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """:func:`temporal_attn` on the packed projection: qkv ``(B, T, N, 3, H, D)``; the backward writes one dqkv."""
    return torch.ops.univid.temporal_attn_qkv(*_arguments_qkv(qkv, scale=scale, backend=backend))[0]


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(q, k, v, *, scale=None, backend=None) -> tuple:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, "(B, T, N, H, D)")
        check_shape(name, x, q.shape, "q's shape")
    check_alike("q", q, k=k, v=v)
    return q, k, v, check_scale(scale), dispatch.asked_for(backend)


def _arguments_qkv(qkv, *, scale=None, backend=None) -> tuple:
    check_tensor("qkv", qkv, "(B, T, N, 3, H, D)")
    check_shape("qkv", qkv, (*qkv.shape[:3], 3, *qkv.shape[4:]), "q, k and v packed")
    return qkv, check_scale(scale), dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _call(q, k, v, scale, backend=None) -> TemporalCall:
    return TemporalCall(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def _call_qkv(qkv, *options) -> TemporalCall:
    return _call(*qkv.unbind(3), *options)


def _forward(call: TemporalCall, backend: str | None) -> tuple[Tensor, Tensor]:
    if call.q.numel() == 0:
        return _outputs(call.q)
    return dispatch.choose("temporal", call, backend).forward(call)


def _backward(call: TemporalCall, grad, logsumexp, dq, dk, dv, backend: str | None, deterministic: bool) -> None:
    if call.q.numel() == 0:
        return
    chosen = dispatch.choose("temporal", call, backend, "backward")
    with deterministic_algorithms(deterministic):
        chosen.backward(call, contiguous_rows(grad), logsumexp, dq, dk, dv)


def _outputs(q: Tensor, heads_dim: int = 3) -> tuple[Tensor, Tensor]:
    clips, frames, tokens = q.shape[:3]
    heads, dim = q.shape[heads_dim:]
    logsumexp = q.new_empty((clips, heads, frames, tokens), dtype=statistics_dtype(q.dtype))
    return q.new_empty((clips, frames, tokens, heads, dim)), logsumexp


def _implementation(q, k, v, scale, backend):
    return _forward(_call(q, k, v, scale), backend)


def _implementation_qkv(qkv, scale, backend):
    return _forward(_call_qkv(qkv, scale), backend)


def _implementation_backward(grad, logsumexp, needs, deterministic, q, k, v, scale, backend):
    gradients = new_gradients(needs, q, k, v)
    _backward(_call(q, k, v, scale), grad, logsumexp, *asked(needs, gradients), backend, deterministic)
    return tuple(gradients)


def _implementation_backward_qkv(grad, logsumexp, deterministic, qkv, scale, backend):
    dqkv = qkv.new_empty(qkv.shape)
    _backward(_call_qkv(qkv, scale), grad, logsumexp, *dqkv.unbind(3), backend, deterministic)
    return dqkv


def _flops(q, *_, **__) -> int:
    """Two products a score."""
    return 4 * _scores(*q)


def _flops_qkv(qkv, *_, **__) -> int:
    return 4 * _scores(*qkv[:3], *qkv[4:])


def _flops_backward(grad, logsumexp, needs, deterministic, q, *_, **__) -> int:
    """The scores again, dP where dq or dk needs it, and a product for each gradient."""
    dq, dk, dv = needs
    return 2 * (1 + (dq or dk) + dq + dk + dv) * _scores(*q)


def _flops_backward_qkv(grad, logsumexp, deterministic, qkv, *_, **__) -> int:
    return 10 * _scores(*qkv[:3], *qkv[4:])


def _scores(clips: int, frames: int, tokens: int, heads: int, dim: int) -> int:
    """Entries of all score matrices, times D."""
    return clips * tokens * heads * frames * frames * dim


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    logsumexp, q, k, v = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.univid.temporal_attn_backward(
        grad, logsumexp, needs, ctx.deterministic, q, k, v, ctx.scale, ctx.backend
    )
    return (*asked(needs, gradients), None, None)


def _gradient_qkv(ctx: Any, grad: Tensor) -> tuple:
    logsumexp, qkv = ctx.saved_tensors
    dqkv = torch.ops.univid.temporal_attn_qkv_backward(grad, logsumexp, ctx.deterministic, qkv, ctx.scale, ctx.backend)
    return dqkv, None, None


register(
    "temporal_attn(Tensor q, Tensor k, Tensor v, float? scale, str? backend) -> (Tensor, Tensor)",
    _implementation,
    lambda q, *_: _outputs(q),
    _flops,
    autocast=range(3),
)
register(
    "temporal_attn_qkv(Tensor qkv, float? scale, str? backend) -> (Tensor, Tensor)",
    _implementation_qkv,
    lambda qkv, *_: _outputs(qkv, heads_dim=4),
    _flops_qkv,
    autocast=range(1),
)
register(
    "temporal_attn_backward(Tensor grad, Tensor logsumexp, bool[3] needs, bool deterministic, Tensor q, Tensor k, "
    "Tensor v, float? scale, str? backend) -> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, logsumexp, needs, deterministic, q, k, v, *_: tuple(new_gradients(needs, q, k, v)),
    _flops_backward,
)
register(
    "temporal_attn_qkv_backward(Tensor grad, Tensor logsumexp, bool deterministic, Tensor qkv, float? scale, "
    "str? backend) -> Tensor",
    _implementation_backward_qkv,
    lambda grad, logsumexp, deterministic, qkv, *_: qkv.new_empty(qkv.shape),
    _flops_backward_qkv,
)
register_gradient("temporal_attn", _setup, _gradient)
register_gradient("temporal_attn_qkv", _setup, _gradient_qkv)
