"""``temporal_conv``: a convolution along time on channels-last activations (the PSTC of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import TemporalConvCall
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


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution along T with zero padding K//2, bias and residual added in the same pass.

    ``out[b, t, n] = Σ_j weight[:, :, j] · x[b, t + j - K//2, n] + bias[b] + residual[b, t, n]``, frames outside being 0.
    A residual that is x itself costs no pass in the backward either.

    Args:
        x: ``(B, T, N, C)``; bfloat16, float16, float32 or float64, any strides with the last dimension contiguous.
        weight: ``(C_out, C, K)``, K odd, of x's dtype, any strides: fast when C is contiguous (store (C_out, K, C),
            pass its transpose).
        bias: ``(C_out,)``, ``(B, C_out)`` for one of each clip (a time embedding), or None, of x's dtype.
        residual: ``(B, T, N, C_out)`` or None, of x's dtype.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, C_out)`` in x's dtype, contiguous. Sums run in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range. RuntimeError: the backend
            asked for by name cannot run the call.
    """
    return torch.ops.univid.temporal_conv(*_arguments(x, weight, bias, residual=residual, backend=backend))


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, weight, bias=None, *, residual=None, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, C)")
    check_tensor("weight", weight, "(C_out, C, K)", strided=True)
    channels_out, _, taps = weight.shape
    check_shape("weight", weight, (channels_out, x.shape[-1], taps), "x's C")
    if taps % 2 == 0:
        raise ValueError(f"weight: got K = {taps} in shape {tuple(weight.shape)}, needs an odd K")
    if bias is not None:
        of_clips = isinstance(bias, Tensor) and bias.ndim == 2
        check_tensor("bias", bias, "(B, C_out)" if of_clips else "(C_out,)", strided=True)
        check_shape("bias", bias, (*x.shape[: int(of_clips)], channels_out), "x's B, weight's C_out")
    if residual is not None:
        check_tensor("residual", residual, "(B, T, N, C_out)")
        check_shape("residual", residual, (*x.shape[:3], channels_out), "the output's shape")
    check_alike("x", x, weight=weight, bias=bias, residual=residual)
    return x, weight, bias, residual, dispatch.asked_for(backend)


# --- the registered operators -----------------------------------------------------------------------------------------


def _output(x, weight, *_) -> Tensor:
    return x.new_empty((*x.shape[:3], weight.shape[0]))


def _implementation(x, weight, bias, residual, backend):
    call = TemporalConvCall(x, weight, bias, residual)
    if x.numel() == 0:
        return _output(x, weight)
    return dispatch.choose("temporal_conv", call, backend).forward(call)


def _gradients(needs, x, weight, bias) -> tuple[Tensor, ...]:
    """That of the weight lies as the weight does, so that a parameter takes it as it is."""
    dx, dweight, dbias = new_gradients(needs, x, weight, bias)
    return dx, torch.empty_like(weight) if needs[1] else dweight, dbias


def _implementation_backward(grad, needs, deterministic, x, weight, bias, adds_grad, backend):
    gradients = _gradients(needs, x, weight, bias)
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    grad = contiguous_rows(grad)
    call = TemporalConvCall(x, weight, bias, grad if adds_grad else None)
    chosen = dispatch.choose("temporal_conv", call, backend, "backward")
    with deterministic_algorithms(deterministic):
        chosen.backward(call, grad, *asked(needs, gradients))
    return gradients


def _flops(x, weight, *_, **__) -> int:
    """All K taps count, also those on frames outside."""
    clips, frames, tokens, channels = x
    return 2 * clips * frames * tokens * channels * weight[0] * weight[2]


def _flops_backward(grad, needs, deterministic, x, weight, *_, **__) -> int:
    return (needs[0] + needs[1]) * _flops(x, weight)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, residual, ctx.backend = inputs
    ctx.adds_grad = residual is x
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    dx = dweight = dbias = None
    if any(needs):
        gradients = torch.ops.univid.temporal_conv_backward(
            grad, needs, ctx.deterministic, x, weight, bias, ctx.adds_grad and needs[0], ctx.backend
        )
        dx, dweight, dbias = asked(needs, gradients)
    return dx, dweight, dbias, grad if ctx.needs_input_grad[3] and not ctx.adds_grad else None, None


register(
    "temporal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? backend) -> Tensor",
    _implementation,
    _output,
    _flops,
    autocast=range(4),
)
register(
    "temporal_conv_backward(Tensor grad, bool[3] needs, bool deterministic, Tensor x, Tensor weight, Tensor? bias, "
    "bool adds_grad, str? backend) -> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, needs, deterministic, x, weight, bias, *_: _gradients(needs, x, weight, bias),
    _flops_backward,
)
register_gradient("temporal_conv", _setup, _gradient)
