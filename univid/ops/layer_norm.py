"""``layer_norm``: LayerNorm of channels-last activations, with what is added to every token of a frame, in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import LayerNormCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_number, check_shape, check_tensor
from univid.ops.registration import (
    asked,
    contiguous_rows,
    deterministic_algorithms,
    new_gradients,
    register,
    register_gradient,
    statistics_dtype,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, offset: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``LayerNorm(x) · weight + bias + offset`` (Ba, Kiros and Hinton, 2016), normalised over the channels of each token.

    Args:
        x: ``(B, T, N, C)``; bfloat16, float16, float32 or float64, any strides with the last dimension contiguous.
        weight, bias: ``(C,)`` in x's dtype or float32; their gradients have their dtype.
        eps: a number > 0 added to the variance.
        offset: ``(T, C)`` in x's dtype or float32, added to every token of a frame, such as the frame's position; or None.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, C)`` in x's dtype (under autocast too), contiguous. What is in between is float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range. RuntimeError: the backend
            asked for by name cannot run the call.
    """
    return torch.ops.univid.layer_norm(*_arguments(x, weight, bias, eps, offset=offset, backend=backend))


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, weight, bias, eps, *, offset=None, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, C)")
    for name, affine in (("weight", weight), ("bias", bias)):
        check_tensor(name, affine, "(C,)", strided=True)
        check_shape(name, affine, x.shape[-1:], "x's C")
    if offset is not None:
        check_tensor("offset", offset, "(T, C)")
        check_shape("offset", offset, (x.shape[1], x.shape[3]), "x's T and C")
    for name, tensor in (("weight", weight), ("bias", bias), ("offset", offset)):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: got {tensor.dtype}, needs x's dtype, {x.dtype}, or torch.float32")
    check_alike("x", x, dtype=False, weight=weight, bias=bias, offset=offset)
    eps = check_number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps: got {eps}, needs a number > 0")
    return x, weight, bias, eps, offset, dispatch.check_backend(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _call(x: Tensor, weight: Tensor, bias: Tensor, eps: float, offset: Tensor | None) -> LayerNormCall:
    rows = x.reshape(-1, x.shape[-1])  # a view, except of few layouts
    return LayerNormCall(rows, weight, bias, eps, offset, x.shape[2])


def _implementation(x, weight, bias, eps, offset, backend):
    if x.numel() == 0:
        return x.new_empty(x.shape)
    call = _call(x, weight, bias, eps, offset)
    return dispatch.choose("layer_norm", call, backend).forward(call).view(x.shape)


def _implementation_backward(grad, needs, deterministic, x, weight, bias, eps, backend):
    gradients = new_gradients(needs, x, weight, bias)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)
    call = _call(x, weight, bias, eps, None)
    chosen = dispatch.choose("layer_norm", call, backend, "backward")
    dx, *of_affine = asked(needs, gradients)
    dx = None if dx is None else dx.view(call.x.shape)
    with deterministic_algorithms(deterministic):
        chosen.backward(call, contiguous_rows(grad).reshape(call.x.shape), dx, *of_affine)
    return tuple(gradients)


def _flops(*_: Any, **__: Any) -> int:
    """None are counted, as PyTorch counts none for norms: the operator is bound by memory."""
    return 0


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, eps, offset, backend = inputs
    ctx.options = (eps, backend)
    ctx.offset_dtype = None if offset is None else offset.dtype
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    eps, backend = ctx.options
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2)]
    gradients: list[Tensor | None] = [None] * 3
    if any(needs):
        arguments = (grad, needs, ctx.deterministic, x, weight, bias, eps, backend)
        gradients = asked(needs, torch.ops.univid.layer_norm_backward(*arguments))
    doffset = None
    if ctx.needs_input_grad[4]:
        doffset = grad.sum((0, 2), dtype=statistics_dtype(grad.dtype)).to(ctx.offset_dtype)
    dx, dweight, dbias = gradients
    return dx, dweight, dbias, None, doffset, None


register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? offset, str? backend) -> Tensor",
    _implementation,
    lambda x, *_: x.new_empty(x.shape),
    _flops,
)
register(
    "layer_norm_backward(Tensor grad, bool[3] needs, bool deterministic, Tensor x, Tensor weight, Tensor bias, float eps, "
    "str? backend) -> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, needs, deterministic, x, weight, bias, *_: tuple(new_gradients(needs, x, weight, bias)),
    _flops,
)
register_gradient("layer_norm", _setup, _gradient)
