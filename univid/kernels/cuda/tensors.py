"""What kernels of csrc are told of tensors, and what they need of them."""

import torch
from torch import Tensor

from univid.kernels.cuda import extension

DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
_UNIT = 16  # bytes of one access, and what addresses and strides of a tensor map are multiples of


def dtype_of(x: Tensor) -> object:
    """As the extension names it."""
    return getattr(extension().DType, DTYPES[x.dtype])


def view(x: Tensor | None) -> tuple[int, ...]:
    """Address and strides of (B, T, N, H, D), the last being 1; zeros for None."""
    return (0,) * 5 if x is None else (x.data_ptr(), *x.stride()[:4])


def queue(x: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def refused(tensors: dict[str, Tensor], *, mapped: bool = False) -> str | None:
    """Why kernels cannot read the first of these that they cannot, or None.

    ``mapped``: by tensor maps, (…, N, H, D), whose tokens N lie apart.
    """
    for name, x in tensors.items():
        if not is_aligned(x):
            return f"{name}: its address and strides must be multiples of {_UNIT} bytes"
        if mapped and _repeats_tokens(x):
            return f"{name}: expanded along its tokens"
    return None


def readable(grad: Tensor, *, mapped: bool = False) -> Tensor:
    """``grad``, copied where kernels cannot read it as it lies."""
    good = is_aligned(grad) and not (mapped and _repeats_tokens(grad))
    return grad if good else grad.clone(memory_format=torch.contiguous_format)


def is_aligned(x: Tensor) -> bool:
    units = _UNIT // x.element_size()
    strides = zip(x.shape[:-1], x.stride(), strict=False)
    return x.data_ptr() % _UNIT == 0 and all(stride % units == 0 or size == 1 for size, stride in strides)


def _repeats_tokens(x: Tensor) -> bool:
    return x.stride(-3) == 0 and x.shape[-3] > 1
