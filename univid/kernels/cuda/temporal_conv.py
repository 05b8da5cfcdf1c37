"""Temporal convolution through ``csrc/temporal_conv.cu`` (Hopper): implicit matrix products over shifted rows, for the
output and for the gradients in x and the weight. The bias's gradient is Triton's.
"""

import torch
from torch import Tensor

from univid.kernels.calls import TemporalConvCall
from univid.kernels.cuda import extension, unavailable
from univid.kernels.cuda.tensors import DTYPES, dtype_of, is_aligned, queue, refused

_MAX_ROWS = 2**30
_CHOSEN = -1  # tiling: the one that suits the shape


def unsupported(call: TemporalConvCall) -> str | None:
    x, weight = call.x, call.weight
    clips, frames, tokens, channels = x.shape
    channels_out, _, taps = weight.shape
    if reason := unavailable(x.device, hopper=True):
        return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}: bfloat16 or float16 needed"
    if channels % 8 or channels_out % 8:
        return f"C = {channels} and C_out = {channels_out}: multiples of 8 needed"
    for name, rows in (("(T + K)·N", (frames + taps) * tokens), ("B·T·N", clips * frames * tokens)):
        if rows >= _MAX_ROWS:
            return f"{name} = {rows}: less than {_MAX_ROWS} needed"
    if weight.stride(1) != 1:
        return "weight: C must be contiguous"
    if any(weight.stride(dim) == 0 and weight.shape[dim] > 1 for dim in (0, 2)):
        return "weight: expanded"
    if not _is_clips(x):
        return "x: its frames must follow each other"
    return refused({"x": x, "weight": weight.transpose(1, 2)})


def forward(call: TemporalConvCall) -> Tensor:
    out = call.x.new_empty((*call.x.shape[:3], call.weight.shape[0]))
    residual = None if call.residual is None else _readable(call.residual)
    _convolve(call.x, call.weight, call.bias, residual, out, transposed=False)
    return out


def backward(
    call: TemporalConvCall, grad: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    """dx and dweight must be as x and the weight have to be, as newly made tensors are."""
    grad = _readable(grad)
    if dx is not None:
        _convolve(grad, call.weight, None, None if call.residual is None else grad, dx, transposed=True)
    if dweight is not None:
        _correlate(call.x, grad, dweight)
    if dbias is not None:
        from univid.kernels.triton.column_sums import sum_columns  # here: the rest needs no Triton

        sum_columns(grad, dbias)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, transposed: bool
) -> None:
    csrc = extension()
    sizes = (*x.shape, out.shape[-1], weight.shape[2])
    bias = _readable_bias(bias)
    workspace = x.new_empty(csrc.temporal_conv_workspace(sizes, _CHOSEN, x.device.index), dtype=torch.uint8)
    csrc.temporal_conv(
        *(sizes, transposed, dtype_of(x)),
        *(_clips(x), (weight.data_ptr(), weight.stride(0), weight.stride(2))),
        (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0) if bias.ndim == 2 else 0),
        *(_clips(residual), _clips(out), workspace.data_ptr(), _CHOSEN),
        *queue(x),
    )


def _correlate(x: Tensor, grad: Tensor, dweight: Tensor) -> None:
    csrc = extension()
    sizes = (*x.shape, *dweight.shape[::2])
    workspace = x.new_empty(csrc.temporal_conv_weight_workspace(sizes, _CHOSEN, x.device.index), dtype=torch.uint8)
    csrc.temporal_conv_weight(
        *(sizes, dtype_of(x), _clips(x), _clips(grad)),
        *((dweight.data_ptr(), dweight.stride(0), dweight.stride(2)), workspace.data_ptr(), _CHOSEN),
        *queue(x),
    )


def _is_clips(x: Tensor) -> bool:
    """Whether the rows (t, n) of a clip lie at one stride, apart from each other."""
    _, frames, tokens, _ = x.shape
    follow = frames == 1 or tokens == 1 or x.stride(1) == tokens * x.stride(2)
    return follow and (frames * tokens == 1 or _row_stride(x) != 0)


def _readable(x: Tensor) -> Tensor:
    """``x``, copied where the kernels cannot read it as it lies."""
    good = _is_clips(x) and is_aligned(x)
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _row_stride(x: Tensor) -> int:
    return x.stride(2) if x.shape[2] > 1 else x.stride(1)


def _clips(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), _row_stride(x))


def _readable_bias(bias: Tensor | None) -> Tensor | None:
    """``bias``, copied where it cannot be read in pairs of elements as it lies."""
    if bias is None:
        return None
    pairs = bias.stride(-1) == 1 and bias.data_ptr() % 4 == 0 and (bias.ndim == 1 or bias.stride(0) % 2 == 0)
    return bias if pairs else bias.clone(memory_format=torch.contiguous_format)
