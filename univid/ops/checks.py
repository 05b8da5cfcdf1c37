"""What the public functions check: one clear line that names the argument, what it got and what it needs.

Shape, dtype and device errors are raised here, once, alike for every backend; nothing inside checks again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(name: str, x: object, layout: str, *, strided: bool = False) -> Tensor:
    """``x`` as a floating-point tensor of the rank of ``layout``, such as "(B, T, N, H, D)", its last dimension
    contiguous.

    B and N may be 0, other dimensions not. ``strided=True`` takes any strides.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, needs a tensor {layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got {_short(x.dtype)}, needs bfloat16, float16, float32 or float64")
    dims = layout.strip("()").replace(",", " ").split()
    if x.ndim != len(dims):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs {layout}")
    for dim, size in zip(dims, x.shape, strict=True):
        if size == 0 and dim not in ("B", "M", "N", "Nk"):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs {layout} with {dim} >= 1")
    if not strided and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {x.stride()}, needs a contiguous last dimension (stride 1)")
    return x


def check_shape(name: str, x: Tensor, shape: Sequence[int], why: str) -> None:
    """``why`` says where ``shape`` comes from, such as "k's shape"."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs {tuple(shape)} ({why})")


def check_alike(first: str, x: Tensor, *, dtype: bool = True, **others: Tensor | None) -> None:
    """The other tensors are on x's device and, unless autocast casts them (float64 it leaves alone), of x's dtype."""
    autocast = torch.is_autocast_enabled(x.device.type) if x.device.type != "meta" else False
    for name, other in others.items():
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{name}: got a tensor on {other.device}, needs {first}'s device, {x.device}")
        cast = autocast and torch.float64 not in (x.dtype, other.dtype)
        if dtype and not cast and other.dtype != x.dtype:
            raise TypeError(f"{name}: got {_short(other.dtype)}, needs {first}'s dtype, {_short(x.dtype)}")


def check_size(name: str, value: object, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: got {type(value).__name__}, needs an integer >= {at_least}")
    if value < at_least:
        raise ValueError(f"{name}: got {value}, needs an integer >= {at_least}")


def check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
    if not -math.inf < value < math.inf:  # false for NaN too; unlike math.isfinite, traced by torch.compile
        raise ValueError(f"{name}: got {value}, needs a finite number")
    return float(value)


def check_scale(scale: object) -> float | None:
    """None stands for D ** -0.5."""
    if scale is None:
        return None
    value = check_number("scale", scale)
    if value <= 0:
        raise ValueError(f"scale: got {value}, needs a number > 0, or None for head_dim ** -0.5")
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
