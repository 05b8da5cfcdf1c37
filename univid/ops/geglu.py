"""``geglu``: the gated activation of a transformer's feed-forward (Shazeer, 2020, GLU variants), in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import GegluCall
from univid.ops import dispatch
from univid.ops.checks import check_tensor
from univid.ops.registration import contiguous_rows, register, register_gradient
from univid.ops.settings import deterministic_algorithms


def geglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``a · GELU(b)`` of the two halves ``a, b`` of x's last dimension, with GELU(b) = b·Φ(b), Φ the normal distribution's.

    Args:
        x: ``(B, T, N, 2C)``, the projection of both halves; bfloat16, float16, float32 or float64, any strides with the last
            dimension contiguous.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, C)`` in x's dtype (under autocast too), contiguous. What is in between is float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape. RuntimeError: the backend asked for by name
            cannot run the call.
    """
    return torch.ops.univid.geglu(*_arguments(x, backend=backend))


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, *, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, 2C)")
    if x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, needs (B, T, N, 2C), an even last dimension")
    return x, dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _call(x: Tensor) -> GegluCall:
    return GegluCall(x.reshape(-1, x.shape[-1]))  # a view, except of few layouts


def _output(x: Tensor, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _implementation(x, backend):
    if x.numel() == 0:
        return _output(x)
    call = _call(x)
    return dispatch.choose("geglu", call, backend).forward(call).view(*x.shape[:-1], -1)


def _implementation_backward(grad, deterministic, x, backend):
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    call, rows = _call(x), contiguous_rows(grad).reshape(-1, grad.shape[-1])
    chosen = dispatch.choose("geglu", call, backend, "backward")
    with deterministic_algorithms(deterministic):
        chosen.backward(call, rows, dx.view(-1, x.shape[-1]))
    return dx


def _flops(*_: Any, **__: Any) -> int:
    """None are counted, as PyTorch counts none for pointwise work: the operator is bound by memory."""
    return 0


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    (x,) = ctx.saved_tensors
    return torch.ops.univid.geglu_backward(grad, ctx.deterministic, x, ctx.backend), None


register("geglu(Tensor x, str? backend) -> Tensor", _implementation, _output, _flops)
register(
    "geglu_backward(Tensor grad, bool deterministic, Tensor x, str? backend) -> Tensor",
    _implementation_backward,
    lambda grad, deterministic, x, *_: x.new_empty(x.shape),
    _flops,
)
register_gradient("geglu", _setup, _gradient)
