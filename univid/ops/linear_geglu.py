"""``linear_geglu``: a linear layer and the GEGLU of what it gives, as a transformer's feed-forward begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from univid.kernels.calls import LinearGegluCall
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_shape, check_tensor
from univid.ops.geglu import geglu
from univid.ops.registration import register


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``geglu(x @ weight.T + bias)``. Where no gradient is asked for, in one operator, which need not write the projection.

    With gradients it is PyTorch's linear layer and :func:`univid.ops.geglu`, whose backward needs the projection.

    Args:
        x: ``(B, T, N, C_in)``; bfloat16, float16, float32 or float64, any strides with the last dimension contiguous.
        weight: ``(2C, C_in)`` of x's dtype: the rows of a, then those of b. bias: ``(2C,)`` of x's dtype, or None.
        backend: "cuda" (no gradients), "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        ``(B, T, N, C)`` in x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape. RuntimeError: the backend asked for by
            name cannot run the call.
    """
    arguments = _arguments(x, weight, bias, backend=backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return geglu(F.linear(x, weight, bias), backend=backend)
    return torch.ops.univid.linear_geglu(*arguments)


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(x, weight, bias=None, *, backend=None) -> tuple:
    check_tensor("x", x, "(B, T, N, C_in)")
    check_tensor("weight", weight, "(2C, C_in)")
    check_shape("weight", weight, (len(weight), x.shape[-1]), "2C, x's C_in")
    if len(weight) % 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, needs (2C, C_in), an even first dimension")
    if bias is not None:
        check_tensor("bias", bias, "(2C,)", strided=True)
        check_shape("bias", bias, (len(weight),), "weight's 2C")
    check_alike("x", x, weight=weight, bias=bias)
    return x, weight, bias, dispatch.asked_for(backend)


# --- the registered operator ------------------------------------------------------------------------------------------


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> LinearGegluCall:
    return LinearGegluCall(x.reshape(-1, x.shape[-1]), weight, bias)  # a view, except of few layouts


def _output(x, weight, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight) // 2))


def _implementation(x, weight, bias, backend):
    if 0 in (*x.shape[:-1], len(weight)):
        return _output(x, weight)
    call = _call(x, weight, bias)
    return dispatch.choose("linear_geglu", call, backend).forward(call).view(*x.shape[:-1], -1)


def _flops(x, weight, *_, **__) -> int:
    """The linear layer's, as PyTorch counts them."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


register(
    "linear_geglu(Tensor x, Tensor weight, Tensor? bias, str? backend) -> Tensor",
    _implementation,
    _output,
    _flops,
    autocast=range(3),
)
