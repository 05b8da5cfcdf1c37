"""GroupNorm with SiLU through ``csrc/group_norm_{fwd,bwd}.cu`` (Hopper): a cluster of blocks holds all rows of a few
groups, so that x is read once.
"""

import torch
from torch import Tensor

from univid.kernels.calls import GroupNormSiluCall
from univid.kernels.cuda import extension, unavailable
from univid.kernels.cuda.tensors import DTYPES, dtype_of, queue, readable, refused


def unsupported(call: GroupNormSiluCall) -> str | None:
    x = call.x
    images, rows, channels = x.shape
    if reason := unavailable(x.device, hopper=True):
        return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}: bfloat16 or float16 needed"
    if channels % 8 != 0:
        return f"C = {channels}: a multiple of 8 needed"
    if not extension().group_norm_silu_fits(images, rows, channels, call.num_groups):
        width = channels // call.num_groups
        return f"N = {rows} and {width} channels a group: what fits in the shared memory of 8 multiprocessors needed"
    return refused({"x": x})


def forward(call: GroupNormSiluCall) -> tuple[Tensor, Tensor, Tensor]:
    x = call.x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((x.shape[0], call.num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    inputs = (_rows(x), _channels(call.weight), _channels(call.bias))
    outputs = (out.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    extension().group_norm_silu_forward(*_shape(call), *inputs, *outputs, *queue(x))
    return out, mean, rstd


def backward(
    call: GroupNormSiluCall,
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """dx must be aligned like x, as newly made tensors are."""
    x = call.x
    grad = readable(grad)
    sums = None
    if dweight is not None or dbias is not None:
        sums = torch.empty((x.shape[0], 2, x.shape[2]), dtype=torch.float32, device=x.device)
    extension().group_norm_silu_backward(
        *_shape(call),
        *map(_rows, (x, grad, dx)),
        *map(_channels, (call.weight, call.bias, dweight, dbias)),
        mean.data_ptr(),
        rstd.data_ptr(),
        0 if sums is None else sums.data_ptr(),
        *queue(x),
    )


def _shape(call: GroupNormSiluCall) -> tuple:
    return (*call.x.shape, call.num_groups), call.eps, call.silu, dtype_of(call.x)


def _rows(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _channels(x: Tensor | None) -> tuple[int, int, bool]:
    return (0, 0, False) if x is None else (x.data_ptr(), x.stride(0), x.dtype == torch.float32)
