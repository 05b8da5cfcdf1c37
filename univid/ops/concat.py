"""``concat``: the channels of two tensors side by side, as a U-Net joins what its way down kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import ConcatCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_shape, check_tensor
from univid.ops.registration import (
    asked,
    contiguous_rows,
    new_gradients,
    register,
    register_gradient,
)
from univid.ops.settings import deterministic_algorithms


def concat(x: Tensor, y: Tensor, *, backend: str | None = None) -> Tensor:
    """``torch.cat([x, y], dim=-1)``.

    Args:
        x: ``(B, T, N, C1)``; bfloat16, float16, float32 or float64, any strides with the last dimension contiguous.
        y: ``(B, T, N, C2)``, of x's dtype, likewise.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, C1 + C2)`` in x's dtype (under autocast too), contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape. RuntimeError: the backend asked for
            by name cannot run the call.
    """
    return torch.ops.univid.concat(*_arguments(x, y, backend=backend))


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, y, *, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, C1)")
    check_tensor("y", y, "(B, T, N, C2)")
    check_shape("y", y, (*x.shape[:3], y.shape[3]), "x's B, T and N, any C2")
    if y.dtype != x.dtype:
        raise TypeError(f"y: got {y.dtype}, needs x's dtype, {x.dtype}")
    check_alike("x", x, y=y)
    return x, y, dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _output(x, y, *_) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[3] + y.shape[3]))


def _implementation(x, y, backend):
    if x.numel() == 0:
        return _output(x, y)
    call = ConcatCall(x, y)
    return dispatch.choose("concat", call, backend).forward(call)


def _gradients(grad, needs, channels, *_) -> tuple[Tensor, ...]:
    like = (grad.new_empty(()).expand((*grad.shape[:-1], width)) for width in (channels, grad.shape[-1] - channels))
    return tuple(new_gradients(needs, *like))


def _implementation_backward(grad, needs, deterministic, channels, backend):
    gradients = _gradients(grad, needs, channels)
    if grad.numel() == 0:
        return gradients
    grad = contiguous_rows(grad)
    call = ConcatCall(*grad.split([channels, grad.shape[-1] - channels], -1))
    with deterministic_algorithms(deterministic):
        dispatch.choose("concat", call, backend, "backward").backward(call, *asked(needs, gradients))
    return gradients


def _flops(*_: Any, **__: Any) -> int:
    """None: the operator only copies."""
    return 0


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, ctx.backend = inputs
    ctx.channels = x.shape[-1]


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[:2])
    gradients = torch.ops.univid.concat_backward(grad, needs, ctx.deterministic, ctx.channels, ctx.backend)
    return *asked(needs, gradients), None


register("concat(Tensor x, Tensor y, str? backend) -> Tensor", _implementation, _output, _flops)
register(
    "concat_backward(Tensor grad, bool[2] needs, bool deterministic, SymInt channels, str? backend) -> (Tensor, Tensor)",
    _implementation_backward,
    lambda grad, needs, deterministic, channels, *_: _gradients(grad, needs, channels),
    _flops,
)
register_gradient("concat", _setup, _gradient)
