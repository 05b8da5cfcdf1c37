"""``add_bias``: a bias behind an operator that has none of its own, such as cuDNN's convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import AddBiasCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_shape, check_tensor
from univid.ops.registration import contiguous_rows, register, register_gradient
from univid.ops.settings import deterministic_algorithms


def add_bias(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """``x + bias``, a number for each channel.

    Args:
        x: ``(B, T, N, C)``; bfloat16, float16, float32 or float64, any strides with the last dimension contiguous.
        bias: ``(C,)``, of x's dtype or float32, any stride.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, C)`` in x's dtype (under autocast too), contiguous. The bias's gradient is summed in float32; x's is the
        incoming one itself.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape. RuntimeError: the backend asked for
            by name cannot run the call.
    """
    return torch.ops.univid.add_bias(*_arguments(x, bias, backend=backend))


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, bias, *, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, C)")
    check_tensor("bias", bias, "(C,)", strided=True)
    check_shape("bias", bias, x.shape[-1:], "x's C")
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"bias: got {bias.dtype}, needs x's dtype, {x.dtype}, or torch.float32")
    check_alike("x", x, dtype=False, bias=bias)
    return x, bias, dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _implementation(x, bias, backend):
    if x.numel() == 0:
        return x.new_empty(x.shape)
    call = AddBiasCall(x, bias)
    return dispatch.choose("add_bias", call, backend).forward(call)


def _implementation_backward(grad, deterministic, bias, backend):
    dbias = bias.new_empty(bias.shape)
    if grad.numel() == 0:
        return dbias.zero_()
    call = AddBiasCall(contiguous_rows(grad), bias)
    with deterministic_algorithms(deterministic):
        dispatch.choose("add_bias", call, backend, "backward").backward(call, dbias)
    return dbias


def _flops(*_: Any, **__: Any) -> int:
    """None are counted, as PyTorch counts none for pointwise work: the operator is bound by memory."""
    return 0


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, bias, ctx.backend = inputs
    ctx.save_for_backward(bias)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    needs_x, needs_bias, _ = ctx.needs_input_grad
    dbias = None
    if needs_bias:
        dbias = torch.ops.univid.add_bias_backward(grad, ctx.deterministic, *ctx.saved_tensors, ctx.backend)
    return grad if needs_x else None, dbias, None


register(
    "add_bias(Tensor x, Tensor bias, str? backend) -> Tensor",
    _implementation,
    lambda x, *_: x.new_empty(x.shape),
    _flops,
)
register(
    "add_bias_backward(Tensor grad, bool deterministic, Tensor bias, str? backend) -> Tensor",
    _implementation_backward,
    lambda grad, deterministic, bias, *_: bias.new_empty(bias.shape),
    _flops,
)
register_gradient("add_bias", _setup, _gradient)
