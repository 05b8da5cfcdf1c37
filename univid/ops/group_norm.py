"""``group_norm_silu``: GroupNorm and SiLU on channels-last activations, in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import GroupNormSiluCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_number, check_shape, check_size, check_tensor
from univid.ops.registration import (
    asked,
    contiguous_rows,
    new_gradients,
    register,
    register_gradient,
    statistics_dtype,
)
from univid.ops.settings import deterministic_algorithms


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``y = GroupNorm(x) · weight + bias``, then ``y · sigmoid(y)``.

    Args:
        x: ``(M, N, C)`` channels-last, normalised for every M over N and the C / num_groups adjacent channels of a
            group; bfloat16, float16, float32 or float64, any strides with the last dimension contiguous.
        num_groups: divides C.
        weight, bias: ``(C,)`` in x's dtype or float32; their gradients have their dtype.
        eps: a number > 0 added to the variance.
        silu: False leaves the activation out.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(M, N, C)`` in x's dtype (under autocast too), contiguous. Sums run in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range. RuntimeError: the backend
            asked for by name cannot run the call.
    """
    arguments = _arguments(x, num_groups, weight, bias, eps, silu=silu, backend=backend)
    return torch.ops.univid.group_norm_silu(*arguments)[0]


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, num_groups, weight, bias, eps, *, silu=True, backend=None) -> tuple:
    check_tensor("x", x, "(M, N, C)")
    check_size("num_groups", num_groups)
    if x.shape[-1] % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, needs a divisor of C = {x.shape[-1]}")
    for name, affine in (("weight", weight), ("bias", bias)):
        check_tensor(name, affine, "(C,)", strided=True)
        check_shape(name, affine, x.shape[-1:], "x's C")
        if affine.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: got {affine.dtype}, needs x's dtype, {x.dtype}, or torch.float32")
    check_alike("x", x, dtype=False, weight=weight, bias=bias)
    eps = check_number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps: got {eps}, needs a number > 0")
    return x, num_groups, weight, bias, eps, bool(silu), dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _outputs(x, num_groups, *_) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=statistics_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _implementation(x, num_groups, weight, bias, eps, silu, backend):
    call = GroupNormSiluCall(x, num_groups, weight, bias, eps, silu)
    if x.numel() == 0:
        out, mean, rstd = _outputs(x, num_groups)
        return out, mean.zero_(), rstd.zero_()
    return dispatch.choose("group_norm", call, backend).forward(call)


def _implementation_backward(grad, mean, rstd, needs, deterministic, x, num_groups, weight, bias, eps, silu, backend):
    gradients = new_gradients(needs, x, weight, bias)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)
    call = GroupNormSiluCall(x, num_groups, weight, bias, eps, silu)
    chosen = dispatch.choose("group_norm", call, backend, "backward")
    with deterministic_algorithms(deterministic):
        chosen.backward(call, contiguous_rows(grad), mean, rstd, *asked(needs, gradients))
    return tuple(gradients)


def _flops(*_: Any, **__: Any) -> int:
    """None are counted, as PyTorch counts none for norms and pointwise work: the operator is bound by memory."""
    return 0


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, num_groups, weight, bias, eps, silu, backend = inputs
    ctx.options = (num_groups, eps, silu, backend)
    ctx.save_for_backward(*output[1:], x, weight, bias)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    mean, rstd, x, weight, bias = ctx.saved_tensors
    num_groups, eps, silu, backend = ctx.options
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    gradients = torch.ops.univid.group_norm_silu_backward(
        grad, mean, rstd, needs, ctx.deterministic, x, num_groups, weight, bias, eps, silu, backend
    )
    dx, dweight, dbias = asked(needs, gradients)
    return dx, None, dweight, dbias, None, None, None


_ARGUMENTS = "Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, bool silu, str? backend"

register(f"group_norm_silu({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _implementation, _outputs, _flops)
register(
    f"group_norm_silu_backward(Tensor grad, Tensor mean, Tensor rstd, bool[3] needs, bool deterministic, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, mean, rstd, needs, deterministic, x, num_groups, weight, bias, *_: tuple(
        new_gradients(needs, x, weight, bias)
    ),
    _flops,
)
register_gradient("group_norm_silu", _setup, _gradient)
