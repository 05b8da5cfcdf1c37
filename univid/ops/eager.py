"""The backends ``torch`` (gather and ``scaled_dot_product_attention``; any device) and ``reference`` (the formulas).

Both are differentiable functions on PyTorch's own operators: the backward runs the forward again and lets autograd
differentiate it. SDPA keeps its logsumexp to itself: the ``torch`` backend returns -inf in its place, which its own
backward does not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from univid.kernels.calls import (
    AddBiasCall,
    AddLayerNormCall,
    ConcatCall,
    DualStreamCall,
    GegluCall,
    GroupNormSiluCall,
    LinearGegluCall,
    PyramidCall,
    Stream,
    StreamGrads,
    TemporalCall,
    TemporalConvCall,
)
from univid.ops import reference
from univid.ops.settings import ieee_convolutions

# Past this many batches some of SDPA's kernels leave their launch grid (65535 in y and z).
_MAX_BATCH = 32768


class Eager:
    """A backend made of a differentiable ``function(call) -> outputs``, the first of them being ``out``."""

    def __init__(self, function: Callable, differentiable: tuple[str, ...]):
        self.function = function
        self.differentiable = differentiable  # the call's tensors, in the order of the gradients handed to ``backward``

    def unsupported(self, call: Any) -> str | None:
        return None

    def forward(self, call: Any) -> Any:
        outputs = self.function(call)
        return tuple(x.contiguous() for x in outputs) if isinstance(outputs, tuple) else outputs.contiguous()

    def backward(self, call: Any, grad: Tensor, *saved_then_gradients: Tensor | None) -> None:
        gradients = saved_then_gradients[-len(self.differentiable) :]
        wanted = {name: g for name, g in zip(self.differentiable, gradients, strict=True) if g is not None}
        leaves = {name: getattr(call, name).detach().requires_grad_() for name in wanted}
        with _recording():
            out = self.function(call._replace(**leaves))
        out = out[0] if isinstance(out, tuple) else out
        results = torch.autograd.grad(out, list(leaves.values()), _aligned(grad))
        for g, result in zip(wanted.values(), results, strict=True):
            g.copy_(result)


class EagerAddLayerNorm(Eager):
    """The same for a sum and its norm; ``function(call) -> y`` is the norm, of a call without a branch."""

    def forward(self, call: AddLayerNormCall) -> tuple[Tensor | None, Tensor]:
        total = None if call.branch is None else (call.x + call.branch).contiguous()
        norm = call._replace(x=call.x if total is None else total, branch=None)
        return total, self.function(norm).contiguous()

    def backward(self, call: AddLayerNormCall, grad: Tensor, *saved_then_gradients: Tensor | None) -> None:
        grad_total, *gradients = saved_then_gradients
        super().backward(call, grad, *gradients)
        if grad_total is not None and gradients[0] is not None:
            gradients[0].add_(grad_total)


class EagerAddBias(Eager):
    """The same, whose only gradient that is computed is the bias's."""

    def backward(self, call: AddBiasCall, dbias: Tensor) -> None:  # type: ignore[override]
        dbias.copy_(call.x.sum((0, 1, 2), dtype=torch.promote_types(dbias.dtype, torch.float32)))


class EagerConcat(Eager):
    """The same; its gradients are copies."""

    def backward(self, call: ConcatCall, dx: Tensor | None, dy: Tensor | None) -> None:  # type: ignore[override]
        for part, gradient in zip(call, (dx, dy), strict=True):
            if gradient is not None:
                gradient.copy_(part)


class EagerConvolution(Eager):
    """The same, where dx may be added to a residual."""

    def backward(self, call: TemporalConvCall, grad: Tensor, *gradients: Tensor | None) -> None:
        self.differentiate(call._replace(residual=None), grad, *gradients)
        if call.residual is not None and gradients[0] is not None:
            gradients[0].add_(call.residual)

    def differentiate(self, call: TemporalConvCall, grad: Tensor, *gradients: Tensor | None) -> None:
        with ieee_convolutions(call.x):
            super().backward(call, grad, *gradients)


class TorchConvolution(EagerConvolution):
    """On a GPU its backward does not run the forward again, for a convolution's gradients follow from its inputs."""

    def differentiate(self, call: TemporalConvCall, grad: Tensor, *gradients: Tensor | None) -> None:
        if not call.x.is_cuda:
            return super().differentiate(call, grad, *gradients)
        dx, dweight, dbias = gradients
        x, weight, options = _over_time(call)
        of_all = dbias is not None and dbias.ndim == 1  # not one of each clip
        needs = [dx is not None, dweight is not None, of_all]
        if any(needs):
            with ieee_convolutions(x):
                results = torch.ops.aten.convolution_backward(
                    _planes(_aligned(grad)), x, weight, [len(weight)], **options, output_mask=needs
                )
        if dx is not None:
            dx.copy_(results[0].squeeze(3).permute(0, 2, 3, 1))  # of (B, C, T, 1, N)
        if dweight is not None:
            dweight.copy_(results[1].flatten(2))  # of (C_out, C, K, 1, 1)
        if dbias is not None:
            dbias.copy_(results[2] if of_all else grad.sum((1, 2)))


class EagerDualStream:
    """The same for two streams; ``function(q, k, v, scale) -> (out, logsumexp)`` is one stream's attention, before its
    weight."""

    def __init__(self, function: Callable):
        self.function = function

    def unsupported(self, call: DualStreamCall) -> str | None:
        return None

    def forward(self, call: DualStreamCall) -> tuple[Tensor, ...]:
        parts, logsumexps = [], []
        for stream in (call.text, call.image):
            if stream is None:
                logsumexps.append(call.q.new_empty(0, dtype=torch.promote_types(call.q.dtype, torch.float32)))
                continue
            part, logsumexp = self.function(call.q, stream.k, stream.v, call.scale)
            parts.append(part * _gate(stream, part.dtype))
            logsumexps.append(logsumexp.contiguous())
        return sum(parts[1:], parts[0]).to(call.q.dtype).contiguous(), *logsumexps

    def backward(
        self,
        call: DualStreamCall,
        grad: Tensor,
        out: Tensor,
        lse_text: Tensor,
        lse_image: Tensor,
        dq: Tensor | None,
        text_grads: StreamGrads | None,
        image_grads: StreamGrads | None,
    ) -> None:
        dqs = []
        for stream, grads in ((call.text, text_grads), (call.image, image_grads)):
            if stream is None or grads is None:
                continue
            tensors = {"q": call.q, "k": stream.k, "v": stream.v}
            wanted = {name: g for name, g in zip("qkv", (dq, grads.dk, grads.dv), strict=True) if g is not None}
            leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
            with _recording():
                part, _ = self.function(**(tensors | leaves), scale=call.scale)
            grad_ = grad.to(part.dtype)
            if grads.dweight is not None:
                grads.dweight.copy_((part.detach() * grad_).sum(-1).permute(0, 3, 1, 2))
            if not wanted:
                continue
            results = torch.autograd.grad(part, list(leaves.values()), grad_ * _gate(stream, part.dtype))
            for (name, g), result in zip(wanted.items(), results, strict=True):
                if name == "q":
                    dqs.append(result.to(part.dtype))
                else:
                    g.copy_(result)
        if dq is not None:
            dq.copy_(sum(dqs[1:], dqs[0]))


def _gate(stream: Stream, dtype: torch.dtype) -> Tensor | float:
    return stream.weight[..., None, None].to(dtype) if isinstance(stream.weight, Tensor) else stream.weight


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd records, also where the dispatcher has passed it already (inside an operator under a
    TorchDispatchMode)."""
    key = torch._C.DispatchKey
    autograd = torch._C.DispatchKeySet(key.AutogradFunctionality) | torch._C.DispatchKeySet(key.ADInplaceOrView)
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


# --- torch ------------------------------------------------------------------------------------------------------------


def _pyramid(call: PyramidCall) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    clips, frames, tokens, heads, dim = q.shape
    rows, num_refs = call.table.shape[1:]
    table = call.table.long().expand(clips, rows, num_refs)
    inside = (table >= 0) & (table < k.shape[1])
    clip = torch.arange(clips, device=q.device)[:, None, None]
    chosen = (torch.where(inside, table, 0) + clip * k.shape[1]).flatten()
    mask = None
    if call.padded:
        # A row without any reference attends to all, so that its softmax is finite, and is zeroed below.
        empty = ~inside.any(-1, keepdim=True)
        mask = (inside | empty).flatten(0, 1).repeat_interleave(k.shape[2], dim=-1)[:, None, None]
    k_, v_ = (
        x.flatten(0, 1).index_select(0, chosen).reshape(clips * rows, num_refs * k.shape[2], heads, dim).transpose(1, 2)
        for x in (k, v)
    )
    q_ = _aligned(q).reshape(clips * rows, frames // rows * tokens, heads, dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=call.scale).transpose(1, 2)
    if mask is not None:
        out = out.masked_fill(empty.view(-1, 1, 1, 1), 0)
    return out.reshape(q.shape).contiguous(), _no_logsumexp(q)


def _stream(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    clips, frames, tokens, heads, dim = q.shape
    q_ = _aligned(q).reshape(clips, frames * tokens, heads, dim).transpose(1, 2)
    k_, v_ = (_aligned(x).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(q_, k_, v_, scale=scale)
    # The weighted sum of both streams is made in float32.
    return out.transpose(1, 2).reshape(q.shape).to(torch.promote_types(q.dtype, torch.float32)), _no_logsumexp(q)


def _temporal(call: TemporalCall) -> tuple[Tensor, Tensor]:
    """A clip at a time, so that its pixels are the batch without a copy."""
    out = []
    for clip in zip(*map(_aligned, (call.q, call.k, call.v)), strict=True):
        pixels = zip(*(x.permute(1, 2, 0, 3).split(_MAX_BATCH) for x in clip), strict=True)
        out.append(torch.cat([F.scaled_dot_product_attention(q, k, v, scale=call.scale) for q, k, v in pixels]))
    return torch.stack(out).permute(0, 3, 1, 2, 4).contiguous(), _no_logsumexp(call.q)


def _temporal_conv(call: TemporalConvCall) -> Tensor:
    """A convolution over the (T, N) plane on channels-last memory as it is."""
    of_clips = call.bias is not None and call.bias.ndim == 2
    bias = None if of_clips else call.bias
    with ieee_convolutions(call.x):
        if call.x.is_cuda:
            x, weight, options = _over_time(call)
            out = torch.ops.aten.convolution(x, weight, bias, **options).permute(0, 2, 3, 4, 1).squeeze(2)
        else:
            # Some of PyTorch's convolutions on the host (float64) have no gradient of a weight that is not contiguous.
            x, weight, padding = call.x.permute(0, 3, 1, 2), call.weight.contiguous(), call.weight.shape[2] // 2
            out = F.conv2d(x, weight[..., None], bias, padding=(padding, 0)).permute(0, 2, 3, 1)
    if call.bias is not None and of_clips:
        out = out + call.bias[:, None, None]
    out = out if call.residual is None else out + call.residual
    return out.contiguous()


def _over_time(call: TemporalConvCall) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Input, weight and options of PyTorch's convolution, in three dimensions, (T, 1, N): cuDNN has faster kernels there.

    PyTorch asks the strides for the layout, also those of dimensions of size 1, which go in where these say channels_last_3d.
    """
    weight = call.weight.transpose(1, 2)[:, :, None, None].permute(0, 4, 1, 2, 3)
    none, one = [0, 0, 0], [1, 1, 1]
    padding = [call.weight.shape[2] // 2, 0, 0]
    shape = {
        "stride": one,
        "padding": padding,
        "dilation": one,
        "transposed": False,
        "output_padding": none,
        "groups": 1,
    }
    return _planes(call.x), weight, shape


def _planes(x: Tensor) -> Tensor:
    """(B, T, N, C) as (B, C, T, 1, N)."""
    return x.unsqueeze(2).permute(0, 4, 1, 2, 3)


def _group_norm_silu(call: GroupNormSiluCall) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(call.x.dtype, torch.float32)
    groups = call.x.to(dtype).unflatten(-1, (call.num_groups, -1))
    # Not F.group_norm: on a GPU it takes the variance as a difference of means, and channels first.
    var, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
    rstd = (var + call.eps).rsqrt()
    out = ((groups - mean) * rstd).flatten(-2) * call.weight + call.bias
    out = F.silu(out) if call.silu else out
    return out.to(call.x.dtype).contiguous(), mean.flatten(1), rstd.flatten(1)


def _add_bias(call: AddBiasCall) -> Tensor:
    return (call.x + call.bias).to(call.x.dtype)


def _geglu(call: GegluCall) -> Tensor:
    a, b = call.x.chunk(2, dim=-1)
    return a * F.gelu(b)


def _linear_geglu(call: LinearGegluCall) -> Tensor:
    return _geglu(GegluCall(F.linear(*call)))


def _layer_norm(call: AddLayerNormCall) -> Tensor:
    dtype = torch.promote_types(call.x.dtype, torch.float32)
    # Weight and bias outside of F.layer_norm, whose gradients of them on the CPU are long sums one by one.
    y = F.layer_norm(call.x.to(dtype), call.x.shape[-1:], eps=call.eps) * call.weight + call.bias
    return (y if call.offset is None else y + call.offset).to(call.x.dtype)


def _aligned(x: Tensor) -> Tensor:
    """``x``, copied where SDPA's kernels, which read 16 bytes at a time on a GPU, would not find it."""
    unit = 16 // x.element_size() or 1
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    if not x.is_cuda or (x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _no_logsumexp(q: Tensor) -> Tensor:
    clips, frames, tokens, heads, _ = q.shape
    return q.new_full((clips, heads, frames, tokens), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))


# --- reference --------------------------------------------------------------------------------------------------------


def _reference_pyramid(call: PyramidCall) -> tuple[Tensor, Tensor]:
    return reference.pyramid_st_attn(call.q, call.k, call.v, call.table, call.scale)


def _reference_stream(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Wider inputs, so that the weighted sum of both streams is not rounded in between.
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, (logsumexp,) = reference.dual_stream_attn(q.to(dtype), [(k, v, 1.0)], scale)
    return out, logsumexp


def _reference_temporal(call: TemporalCall) -> tuple[Tensor, Tensor]:
    return reference.temporal_attn(*call)


def _reference_temporal_conv(call: TemporalConvCall) -> Tensor:
    return reference.temporal_conv(*call)


def _reference_group_norm_silu(call: GroupNormSiluCall) -> tuple[Tensor, Tensor, Tensor]:
    return reference.group_norm_silu(*call)


def _reference_add_bias(call: AddBiasCall) -> Tensor:
    return reference.add_bias(*call)


def _concat(call: ConcatCall) -> Tensor:
    return reference.concat(*call)


def _reference_geglu(call: GegluCall) -> Tensor:
    return reference.geglu(*call)


def _reference_linear_geglu(call: LinearGegluCall) -> Tensor:
    return reference.linear_geglu(*call)


def _reference_layer_norm(call: AddLayerNormCall) -> Tensor:
    return reference.add_layer_norm(*call)[1]


_QKV = ("q", "k", "v")
_AFFINE = ("x", "weight", "bias")

BACKENDS = {
    "torch": {
        "pyramid": Eager(_pyramid, _QKV),
        "dual_stream": EagerDualStream(_stream),
        "temporal": Eager(_temporal, _QKV),
        "temporal_conv": TorchConvolution(_temporal_conv, _AFFINE),
        "group_norm": Eager(_group_norm_silu, _AFFINE),
        "concat": EagerConcat(_concat, ("x", "y")),
        "add_bias": EagerAddBias(_add_bias, ("bias",)),
        "geglu": Eager(_geglu, ("x",)),
        "linear_geglu": Eager(_linear_geglu, _AFFINE),
        "add_layer_norm": EagerAddLayerNorm(_layer_norm, _AFFINE),
    },
    "reference": {
        "pyramid": Eager(_reference_pyramid, _QKV),
        "dual_stream": EagerDualStream(_reference_stream),
        "temporal": Eager(_reference_temporal, _QKV),
        "temporal_conv": EagerConvolution(_reference_temporal_conv, _AFFINE),
        "group_norm": Eager(_reference_group_norm_silu, _AFFINE),
        "concat": EagerConcat(_concat, ("x", "y")),
        "add_bias": EagerAddBias(_reference_add_bias, ("bias",)),
        "geglu": Eager(_reference_geglu, ("x",)),
        "linear_geglu": Eager(_reference_linear_geglu, _AFFINE),
        "add_layer_norm": EagerAddLayerNorm(_reference_layer_norm, _AFFINE),
    },
}
