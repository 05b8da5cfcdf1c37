"""``pyramid_st_attn``: every frame attends to all tokens of its reference frames (eq. 6 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import PyramidCall
from univid.kernels.inverse import inverse_table
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_scale, check_shape, check_tensor
from univid.ops.reference_frames import ReferenceFrames, check_entries
from univid.ops.registration import (
    asked,
    contiguous_rows,
    new_gradients,
    register,
    register_gradient,
    statistics_dtype,
)
from univid.ops.settings import deterministic_algorithms


def pyramid_st_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    refs: ReferenceFrames | Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention of every frame to all tokens of a few reference frames, the gather being fused (UniVid, eq. 6).

    ``out[b, t] = softmax(scale · q[b, t] · concat_r(k[b, refs[b, t, r]])ᵀ) · concat_r(v[b, refs[b, t, r]])``

    Args:
        q: ``(B, T, N, H, D)`` queries; bfloat16, float16, float32 or float64, any strides with the last dimension
            contiguous.
        k: ``(B, Tk, Nk, H, D)`` keys, of q's dtype. v: values, of k's shape.
        refs: a :class:`ReferenceFrames`, or an integer tensor ``(R,)``, ``(T, R)`` or ``(B, T, R)`` on q's device. -1
            is skipped; a frame listed twice counts twice; a query frame without references gives 0. In a GPU tensor
            (never synchronised on) any entry outside [0, Tk) is skipped like -1.
        scale: a number > 0; ``D ** -0.5`` by default.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).
        deterministic: gradients are bit-identical from run to run; also on under
            ``torch.use_deterministic_algorithms(True)``.

    Returns:
        ``(B, T, N, H, D)`` in q's dtype, contiguous. Softmax and sums run in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range. RuntimeError: the backend
            asked for by name cannot run the call.
    """
    arguments = _arguments(q, k, v, refs, scale=scale, backend=backend, deterministic=deterministic)
    return torch.ops.univid.pyramid_st_attn(*arguments)[0]


def pyramid_st_attn_qkv(
    qkv: Tensor,
    refs: ReferenceFrames | Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor:
    """:func:`pyramid_st_attn` on the packed projection: qkv ``(B, T, N, 3, H, D)``; the backward writes one dqkv."""
    arguments = _arguments_qkv(qkv, refs, scale=scale, backend=backend, deterministic=deterministic)
    return torch.ops.univid.pyramid_st_attn_qkv(*arguments)[0].view(*qkv.shape[:3], *qkv.shape[4:])


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(q, k, v, refs, *, scale=None, backend=None, deterministic=False) -> tuple:
    check_tensor("q", q, "(B, T, N, H, D)")
    check_tensor("k", k, "(B, Tk, Nk, H, D)")
    check_tensor("v", v, "(B, Tk, Nk, H, D)")
    clips, _, _, heads, dim = q.shape
    check_shape("k", k, (clips, k.shape[1], k.shape[2], heads, dim), "q's B, H and D")
    check_shape("v", v, k.shape, "k's shape")
    check_alike("q", q, k=k, v=v)
    options = _options(refs, q, k.shape[1], scale, backend, deterministic)
    if joined := _joined(refs, k, v):
        k, v, options = _join(k), _join(v), _of(joined.to(q.device), options)
    return (q, k, v, *options)


def _arguments_qkv(qkv, refs, *, scale=None, backend=None, deterministic=False) -> tuple:
    check_tensor("qkv", qkv, "(B, T, N, 3, H, D)")
    check_shape("qkv", qkv, (*qkv.shape[:3], 3, *qkv.shape[4:]), "q, k and v packed")
    options = _options(refs, qkv, qkv.shape[1], scale, backend, deterministic)
    if joined := _joined(refs, qkv):
        qkv, options = _join(qkv), _of(joined.to(qkv.device), options)
    return (qkv, *options)


# Full attention: frames that follow each other in memory are one long frame, whose keys fill whole tiles.


def _joined(refs: ReferenceFrames | Tensor, *tensors: Tensor) -> ReferenceFrames | None:
    follow = all(x.stride(1) == x.shape[2] * x.stride(2) != 0 for x in tensors)
    return refs.joined if follow and isinstance(refs, ReferenceFrames) else None


def _join(x: Tensor) -> Tensor:
    return x.flatten(1, 2).unsqueeze(1)


def _of(refs: ReferenceFrames, options: tuple) -> tuple:
    return (refs.rows, refs.inverse, *options[2:])


def _options(refs, q: Tensor, key_frames: int, scale, backend, deterministic) -> tuple:
    clips, frames = q.shape[:2]
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    scale, backend = check_scale(scale), dispatch.asked_for(backend)
    if isinstance(refs, ReferenceFrames):
        table = refs.table
        if refs.num_key_frames != key_frames:
            raise ValueError(
                f"refs: got a table over {refs.num_key_frames} key frames, needs one over the {key_frames} of k"
            )
        check_shape(
            "refs", table, (_one_or(clips, table, 0), frames, table.shape[2]), "(1 or B, T, R) with q's B and T"
        )
        refs = refs.to(q.device)
        return refs.rows, refs.inverse, scale, refs.padded, deterministic, backend
    if not isinstance(refs, Tensor):
        raise TypeError(f"refs: got {type(refs).__name__}, needs a ReferenceFrames or an integer tensor")
    if refs.is_floating_point() or refs.is_complex() or refs.dtype == torch.bool:
        raise TypeError(f"refs: got {refs.dtype}, needs a ReferenceFrames or an integer tensor")
    if refs.ndim not in (1, 2, 3):
        raise ValueError(f"refs: got shape {tuple(refs.shape)}, needs (R,), (T, R) or (B, T, R)")
    if refs.device != q.device:
        raise ValueError(
            f"refs: got a tensor on {refs.device}, needs q's device, {q.device} (a ReferenceFrames moves itself)"
        )
    if refs.ndim > 1:
        needed = (frames, refs.shape[1]) if refs.ndim == 2 else (_one_or(clips, refs, 0), frames, refs.shape[2])
        check_shape("refs", refs, needed, "q's T" if refs.ndim == 2 else "q's B and T")
    table = refs.view((1,) * (3 - refs.ndim) + refs.shape)
    return table, None, scale, True, deterministic, backend


def _one_or(size: int, x: Tensor, dim: int) -> int:
    return 1 if x.shape[dim] == 1 else size


# --- the registered operators -----------------------------------------------------------------------------------------

_OPTIONS = "Tensor table, Tensor? inverse, float? scale, bool padded, bool deterministic, str? backend"


def _call(q, k, v, table, inverse, scale, padded, deterministic, backend=None) -> PyramidCall:
    if inverse is None:  # a raw table: entries of any integer type and value
        table = table.long()
        if table.device.type == "cpu":
            check_entries("refs", table, k.shape[1])
        table = table.clamp(-1, k.shape[1]).int().contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return PyramidCall(q, k, v, table, scale, padded, deterministic, inverse)


def _call_qkv(qkv, *options) -> PyramidCall:
    return _call(*qkv.unbind(3), *options)


def _forward(call: PyramidCall, backend: str | None) -> tuple[Tensor, Tensor]:
    q = call.q
    if _is_empty(call):
        out, logsumexp = _outputs(q)
        return out.zero_(), logsumexp.fill_(-torch.inf)
    chosen = dispatch.choose("pyramid", call, backend)
    with deterministic_algorithms(call.deterministic):
        return chosen.forward(call)


def _backward(call: PyramidCall, grad, out, logsumexp, dq, dk, dv, backend: str | None) -> None:
    if _is_empty(call):
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
        return
    if call.inverse is None and (dk is not None or dv is not None):
        call = call._replace(inverse=inverse_table(call.table, call.k.shape[1]))
    chosen = dispatch.choose("pyramid", call, backend, "backward")
    with deterministic_algorithms(call.deterministic):
        chosen.backward(call, contiguous_rows(grad), out, logsumexp, dq, dk, dv)


def _is_empty(call: PyramidCall) -> bool:
    return call.q.numel() == 0 or call.k.numel() == 0 or call.table.shape[-1] == 0


def _outputs(q: Tensor, heads_dim: int = 3) -> tuple[Tensor, Tensor]:
    clips, frames, tokens = q.shape[:3]
    heads, dim = q.shape[heads_dim:]
    logsumexp = q.new_empty((clips, heads, frames, tokens), dtype=statistics_dtype(q.dtype))
    return q.new_empty((clips, frames, tokens, heads, dim)), logsumexp


def _implementation(q, k, v, *options):
    return _forward(_call(q, k, v, *options), options[-1])


def _implementation_qkv(qkv, *options):
    return _forward(_call_qkv(qkv, *options), options[-1])


def _implementation_backward(grad, out, logsumexp, needs, q, k, v, *options):
    gradients = new_gradients(needs, q, k, v)
    _backward(_call(q, k, v, *options), grad, out, logsumexp, *asked(needs, gradients), options[-1])
    return tuple(gradients)


def _implementation_backward_qkv(grad, out, logsumexp, qkv, *options):
    dqkv = qkv.new_empty(qkv.shape)
    _backward(_call_qkv(qkv, *options), grad, out, logsumexp, *dqkv.unbind(3), options[-1])
    return dqkv


def _flops(q, k, v, table, *_, **__) -> int:
    """Two products a score."""
    return 4 * _scores(q, k, table)


def _flops_qkv(qkv, table, *_, **__) -> int:
    return 4 * _scores((*qkv[:3], *qkv[4:]), qkv, table)


def _flops_backward(grad, out, logsumexp, needs, q, k, v, table, *_, **__) -> int:
    """The scores again, dP where dq or dk needs it, and a product for each gradient."""
    dq, dk, dv = needs
    return 2 * (1 + (dq or dk) + dq + dk + dv) * _scores(q, k, table)


def _flops_backward_qkv(grad, out, logsumexp, qkv, table, *_, **__) -> int:
    return 10 * _scores((*qkv[:3], *qkv[4:]), qkv, table)


def _scores(q, k, table) -> int:
    """Entries of all score matrices, times D."""
    clips, frames, tokens, heads, dim = q
    return clips * heads * frames * tokens * table[-1] * k[2] * dim


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, table, inverse, ctx.scale, ctx.padded, ctx.deterministic, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors, table, inverse)


def _options_of(ctx: Any, table: Tensor, inverse: Tensor | None) -> tuple:
    return table, inverse, ctx.scale, ctx.padded, ctx.deterministic, ctx.backend


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    out, logsumexp, q, k, v, table, inverse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.univid.pyramid_st_attn_backward(
        grad, out, logsumexp, needs, q, k, v, *_options_of(ctx, table, inverse)
    )
    return (*asked(needs, gradients), *(None,) * 6)


def _gradient_qkv(ctx: Any, grad: Tensor) -> tuple:
    out, logsumexp, qkv, table, inverse = ctx.saved_tensors
    dqkv = torch.ops.univid.pyramid_st_attn_qkv_backward(grad, out, logsumexp, qkv, *_options_of(ctx, table, inverse))
    return (dqkv, *(None,) * 6)


register(
    f"pyramid_st_attn(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _implementation,
    lambda q, *_: _outputs(q),
    _flops,
    autocast=range(3),
)
register(
    f"pyramid_st_attn_qkv(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)",
    _implementation_qkv,
    lambda qkv, *_: _outputs(qkv, heads_dim=4),
    _flops_qkv,
    autocast=range(1),
)
register(
    "pyramid_st_attn_backward(Tensor grad, Tensor out, Tensor logsumexp, bool[3] needs, Tensor q, Tensor k, Tensor v, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, out, logsumexp, needs, q, k, v, *_: tuple(new_gradients(needs, q, k, v)),
    _flops_backward,
)
register(
    f"pyramid_st_attn_qkv_backward(Tensor grad, Tensor out, Tensor logsumexp, Tensor qkv, {_OPTIONS}) -> Tensor",
    _implementation_backward_qkv,
    lambda grad, out, logsumexp, qkv, *_: qkv.new_empty(qkv.shape),
    _flops_backward_qkv,
)
register_gradient("pyramid_st_attn", _setup, _gradient)
register_gradient("pyramid_st_attn_qkv", _setup, _gradient_qkv)
