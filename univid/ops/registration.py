"""Registering operators with PyTorch (``torch.library``): what every operator of UniVid needs, in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("univid", "DEF")

_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)  # who notes that a tensor is a view of another
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    flops: Callable[..., int],
    *,
    autocast: Collection[int] = (),
) -> None:
    """Define ``univid::<schema>`` for every device.

    Args:
        schema: name, arguments and returns in PyTorch's notation.
        implementation: chooses a backend and runs it.
        fake: the outputs' shapes and dtypes.
        flops: floating-point operations, of the arguments, a tensor standing as its shape (torch.utils.flop_counter).
        autocast: positions of the arguments that autocast casts to its dtype. Inside the operator nothing autocasts.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        # An output that is a view of what the implementation made could not be changed in place.
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            return implementation(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"univid::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.univid, name)
    for device_type, key in _AUTOCAST.items():
        LIBRARY.impl(name, _autocast_rule(operator.default, device_type, autocast), key)
    register_flop_formula(operator)(flops)


def register_gradient(name: str, setup_context: Callable, backward: Callable, *, outputs: int = 1) -> None:
    """The autograd formula of ``univid::<name>``; ``backward(ctx, grad, ...)`` is called where a gradient of the first
    ``outputs`` outputs is defined, the others of them being None.

    Only those are differentiable. Differentiating twice raises RuntimeError.
    """

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)  # else zeros would be made for the logsumexp at every backward
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[outputs:])
        ctx.num_inputs = len(inputs)
        ctx.deterministic = torch.are_deterministic_algorithms_enabled()
        setup_context(ctx, inputs, output)

    def formula(ctx: Any, *grads: Tensor | None) -> tuple:
        grads = grads[:outputs]
        if all(grad is None for grad in grads):
            return (None,) * ctx.num_inputs
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if torch.is_grad_enabled():  # create_graph=True
            saved = tuple(x for x in (*grads, *ctx.saved_tensors) if x is not None)
            gradients = tuple(None if g is None else _NotTwice.apply(name, g, *saved) for g in gradients)
        return gradients

    torch.library.register_autograd(f"univid::{name}", formula, setup_context=setup, lib=LIBRARY)


class _NotTwice(torch.autograd.Function):
    """A gradient whose own gradient raises, instead of being taken for a constant."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *saved: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(f"{ctx.name}: cannot be differentiated twice")


def _autocast_rule(operator: Any, device_type: str, casts: Collection[int]) -> Callable:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    for key in _AUTOCAST.values():
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = {id(args[i]): _cast(args[i], dtype) for i in casts}  # what is given twice stays one tensor
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(cast[id(a)] if i in casts else a for i, a in enumerate(args)))

    return rule


def _cast(x: Any, dtype: torch.dtype) -> Any:
    # As PyTorch's own rules: float64 is left alone.
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x


def new_gradients(needs: list[bool], *inputs: Tensor | None) -> list[Tensor]:
    """An empty contiguous gradient for each input that needs one, and an empty tensor of shape (0,) for the others."""
    like = next(x for x in inputs if x is not None)
    return [
        x.new_empty(x.shape) if need and x is not None else like.new_empty(0)
        for need, x in zip(needs, inputs, strict=True)
    ]


def asked(needs: list[bool], gradients: list[Tensor]) -> list[Tensor | None]:
    """The gradients that were asked for, None for the others."""
    return [g if need else None for need, g in zip(needs, gradients, strict=True)]


def contiguous_rows(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not contiguous (an expanded gradient, for example)."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tensors of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
