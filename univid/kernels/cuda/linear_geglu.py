"""A linear layer and its GEGLU through ``csrc/linear_geglu.cu`` (Hopper): what the layer gives is never written."""

import torch
from torch import Tensor

from univid.kernels.calls import LinearGegluCall
from univid.kernels.cuda import extension, unavailable
from univid.kernels.cuda.tensors import DTYPES, dtype_of, queue, refused

_MAX_ROWS = 2**30
_CHOSEN = -1  # tiling: the one that suits the shape


def unsupported(call: LinearGegluCall) -> str | None:
    x, weight, _ = call
    if reason := unavailable(x.device, hopper=True):
        return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}: bfloat16 or float16 needed"
    if x.shape[1] % 8 or len(weight) % 16:
        return f"C_in = {x.shape[1]} and 2C = {len(weight)}: multiples of 8 and 16 needed"
    if max(len(x), len(weight)) >= _MAX_ROWS:
        return f"B·T·N = {len(x)} and 2C = {len(weight)}: less than {_MAX_ROWS} needed"
    for name, tensor in {"x": x, "weight": weight}.items():
        if tensor.stride(0) == 0 and len(tensor) > 1:
            return f"{name}: expanded"
    return refused({"x": x, "weight": weight})


def forward(call: LinearGegluCall) -> Tensor:
    x, weight, bias = call
    csrc = extension()
    sizes = (len(x), x.shape[1], len(weight) // 2)
    out = x.new_empty(sizes[::2])
    if bias is not None and (bias.stride(0) != 1 or bias.data_ptr() % 4):
        bias = bias.clone(memory_format=torch.contiguous_format)
    workspace = x.new_empty(csrc.linear_geglu_workspace(sizes, _CHOSEN, x.device.index), dtype=torch.uint8)
    csrc.linear_geglu(
        *(sizes, dtype_of(x), (x.data_ptr(), x.stride(0)), (weight.data_ptr(), weight.stride(0))),
        *(0 if bias is None else bias.data_ptr(), out.data_ptr(), workspace.data_ptr(), _CHOSEN),
        *queue(x),
    )
    return out
