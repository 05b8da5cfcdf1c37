"""``add_layer_norm``: a transformer's residual sum and the LayerNorm behind it, in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import AddLayerNormCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_number, check_shape, check_tensor
from univid.ops.registration import (
    asked,
    contiguous_rows,
    new_gradients,
    register,
    register_gradient,
)
from univid.ops.settings import deterministic_algorithms


def add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    branch: Tensor | None = None,
    offset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = x + branch`` and ``y = LayerNorm(total) · weight + bias + offset``.

    Args:
        x: ``(B, T, N, C)``, normalised over C; bfloat16, float16, float32 or float64, any strides with the last dimension
            contiguous.
        weight, bias: ``(C,)`` in x's dtype or float32; their gradients have their dtype.
        eps: a number > 0 added to the variance.
        branch: of x's shape and dtype, what the residual sum adds; None leaves x as it is.
        offset: ``(T, 1, C)`` in x's dtype or float32, added to every token of a frame (a position of the frames); None: nothing.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        total and y, both ``(B, T, N, C)`` in x's dtype (under autocast too) and contiguous; total is x itself where there is no
        branch. The statistics are those of the rounded total, in float32. The gradients in x and branch are one tensor, as those
        of PyTorch's addition are.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range. RuntimeError: the backend
            asked for by name cannot run the call.
    """
    arguments = _arguments(x, weight, bias, eps, branch=branch, offset=offset, backend=backend)
    total, y = torch.ops.univid.add_layer_norm(*arguments)
    return (x if branch is None else total), y


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, weight, bias, eps=1e-5, *, branch=None, offset=None, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, C)")
    for name, affine in (("weight", weight), ("bias", bias)):
        check_tensor(name, affine, "(C,)", strided=True)
        check_shape(name, affine, x.shape[-1:], "x's C")
    if branch is not None:
        check_tensor("branch", branch, "(B, T, N, C)")
        check_shape("branch", branch, x.shape, "x's shape")
        if branch.dtype != x.dtype:
            raise TypeError(f"branch: got {branch.dtype}, needs x's dtype, {x.dtype}")
    if offset is not None:
        check_tensor("offset", offset, "(T, 1, C)")
        check_shape("offset", offset, (x.shape[1], 1, x.shape[3]), "x's T and C")
    for name, other in (("weight", weight), ("bias", bias), ("offset", offset)):
        if other is not None and other.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: got {other.dtype}, needs x's dtype, {x.dtype}, or torch.float32")
    check_alike("x", x, dtype=False, weight=weight, bias=bias, branch=branch, offset=offset)
    eps = check_number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps: got {eps}, needs a number > 0")
    return x, weight, bias, eps, branch, offset, dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _outputs(x, weight, bias, eps, branch, *_) -> tuple[Tensor, Tensor]:
    """An operator may not return its input: without a branch, total is of shape (0,)."""
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape)


def _implementation(x, weight, bias, eps, branch, offset, backend):
    if x.numel() == 0:
        return _outputs(x, weight, bias, eps, branch)
    call = AddLayerNormCall(x, weight, bias, eps, branch, offset)
    total, y = dispatch.choose("add_layer_norm", call, backend).forward(call)
    return (x.new_empty(0) if total is None else total), y


def _implementation_backward(grad, grad_total, needs, deterministic, x, weight, bias, eps, backend):
    gradients = new_gradients(needs, x, weight, bias)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)
    call = AddLayerNormCall(x, weight, bias, eps, None, None)
    chosen = dispatch.choose("add_layer_norm", call, backend, "backward")
    grad_total = None if grad_total is None else contiguous_rows(grad_total)
    with deterministic_algorithms(deterministic):
        chosen.backward(call, contiguous_rows(grad), grad_total, *asked(needs, gradients))
    return tuple(gradients)


def _flops(*_: Any, **__: Any) -> int:
    """None are counted, as PyTorch counts none for norms and pointwise work: the operator is bound by memory."""
    return 0


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.eps, branch, offset, ctx.backend = inputs
    ctx.offset_dtype = None if offset is None else offset.dtype
    if branch is None:
        ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(x if branch is None else output[0], weight, bias)


def _gradient(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple:
    needs_x, needs_weight, needs_bias, _, needs_branch, needs_offset, _ = ctx.needs_input_grad
    needs = [needs_x or needs_branch, needs_weight, needs_bias]
    dtotal, dweight, dbias, doffset = grad_total, None, None, None
    if grad is not None and any(needs):
        gradients = torch.ops.univid.add_layer_norm_backward(
            grad, grad_total, needs, ctx.deterministic, *ctx.saved_tensors, ctx.eps, ctx.backend
        )
        dtotal, dweight, dbias = asked(needs, gradients)
    if grad is not None and needs_offset:
        doffset = grad.sum((0, 2), keepdim=True, dtype=ctx.offset_dtype)[0]
    dx, dbranch = dtotal if needs_x else None, dtotal if needs_branch else None
    return dx, dweight, dbias, None, dbranch, doffset, None


register(
    "add_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? branch, Tensor? offset, str? backend) "
    "-> (Tensor, Tensor)",
    _implementation,
    _outputs,
    _flops,
)
register(
    "add_layer_norm_backward(Tensor grad, Tensor? grad_total, bool[3] needs, bool deterministic, Tensor x, Tensor weight, "
    "Tensor bias, float eps, str? backend) -> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, grad_total, needs, deterministic, x, weight, bias, *_: tuple(new_gradients(needs, x, weight, bias)),
    _flops,
)
register_gradient("add_layer_norm", _setup, _gradient, outputs=2)
