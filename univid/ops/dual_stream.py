"""``dual_stream_attn``: text attention and image attention, each with its softmax, summed with weights (eq. 7 of the
paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from univid.kernels.calls import DualStreamCall, Stream, StreamGrads
from univid.ops import dispatch
from univid.ops.checks import check_alike, check_number, check_scale, check_shape, check_tensor
from univid.ops.registration import (
    asked,
    contiguous_rows,
    new_gradients,
    register,
    register_gradient,
    statistics_dtype,
)
from univid.ops.settings import deterministic_algorithms


def dual_stream_attn(
    q: Tensor,
    k_text: Tensor | None,
    v_text: Tensor | None,
    k_image: Tensor | None,
    v_image: Tensor | None,
    *,
    text_weight: float | Tensor = 1.0,
    image_weight: float | Tensor = 1.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Two cross-attentions in one pass over the queries, summed with weights that a user turns (UniVid, eq. 7).

    ``out = text_weight · softmax(scale·q·k_textᵀ)·v_text + image_weight · softmax(scale·q·k_imageᵀ)·v_image``

    Args:
        q: ``(B, ..., H, D)`` queries with any number of dimensions between, usually ``(B, T, N, H, D)``; bfloat16,
            float16, float32 or float64, any strides with the last dimension contiguous.
        k_text, v_text: ``(B, L, H, D)``, shared by all queries of a clip, of q's dtype; None leaves the stream out.
        k_image, v_image: the same for the image, with its own L.
        text_weight, image_weight: a number, or a floating-point tensor whose dimensions align from the left with q's
            dimensions before H, size 1 broadcasting: ``()``, ``(B,)``, ``(1, T)``, ``(B, T)``, ``(B, T, N)``. Its
                gradient has its dtype and is finite at 0.
            The number 0 leaves the stream's work out (its keys and values get zero gradients); a tensor that holds 0 is
            computed.
        scale: a number > 0; ``D ** -0.5`` by default.
        backend: "cuda", "triton", "torch" or "reference"; by default the fastest that can run the call (or
            UNIVID_BACKEND).

    Returns:
        q's shape and dtype, contiguous. Softmax and sums run in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or both streams left out.
            RuntimeError: the backend asked for by name cannot run the call.
    """
    arguments = _arguments(
        q,
        k_text,
        v_text,
        k_image,
        v_image,
        text_weight=text_weight,
        image_weight=image_weight,
        scale=scale,
        backend=backend,
    )
    return torch.ops.univid.dual_stream_attn(*arguments)[0].view(q.shape)


# --- the public door --------------------------------------------------------------------------------------------------


def _arguments(
    q, k_text, v_text, k_image, v_image, *, text_weight=1.0, image_weight=1.0, scale=None, backend=None
) -> tuple:
    if isinstance(q, Tensor) and q.ndim < 3:
        raise ValueError(f"q: got shape {tuple(q.shape)}, needs (B, ..., H, D)")
    rank = q.ndim - 3 if isinstance(q, Tensor) else 2
    check_tensor("q", q, f"(B{', T' if rank > 1 else ''}{', N' * (rank - (rank > 1))}, H, D)")
    text = _stream("text", q, k_text, v_text, text_weight)
    image = _stream("image", q, k_image, v_image, image_weight)
    if _active(*text) is None and _active(*image) is None:
        raise ValueError("k_text, k_image: got neither stream (None, or weight 0), needs at least one")
    clips, heads, dim = q.shape[0], q.shape[-2], q.shape[-1]
    frames = q.shape[1] if rank > 1 else 1
    q = q.reshape(clips, frames, -1 if q.numel() else q.shape[1:-2].numel() // max(frames, 1), heads, dim)
    return q, *text, *image, check_scale(scale), dispatch.asked_for(backend)


def _stream(name: str, q: Tensor, k, v, weight) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """Keys, values, and the weight as a tensor (1 or B, 1 or T, 1 or N) or None, and as a number."""
    k_name, v_name, w_name = f"k_{name}", f"v_{name}", f"{name}_weight"
    if (k is None) != (v is None):
        got, missing = (v_name, k_name) if k is None else (k_name, v_name)
        raise ValueError(f"{missing}: got None, but {got} was given; needs both, or neither to leave the stream out")
    if k is not None:
        check_tensor(k_name, k, "(B, L, H, D)")
        check_tensor(v_name, v, "(B, L, H, D)")
        check_shape(k_name, k, (q.shape[0], k.shape[1], *q.shape[-2:]), "q's B, H and D")
        check_shape(v_name, v, k.shape, f"{k_name}'s shape")
        check_alike("q", q, **{k_name: k, v_name: v})
    if not isinstance(weight, Tensor):
        return k, v, None, check_number(w_name, weight)
    if not weight.is_floating_point():
        raise TypeError(f"{w_name}: got {weight.dtype}, needs a number or a floating-point tensor")
    check_alike("q", q, dtype=False, **{w_name: weight})
    queries = q.shape[:-2]
    aligned = weight.shape + (1,) * (len(queries) - weight.ndim)
    if weight.ndim > len(queries) or any(w not in (1, s) for w, s in zip(aligned, queries, strict=True)):
        raise ValueError(
            f"{w_name}: got shape {tuple(weight.shape)}, needs to align from the left with q's {tuple(queries)}, "
            "size 1 broadcasting"
        )
    return k, v, _three_dimensions(weight.view(aligned), queries), 0.0


def _three_dimensions(weight: Tensor, queries: torch.Size) -> Tensor:
    """A weight over any number of query dimensions as (1 or B, 1 or T, 1 or N), N standing for all dimensions past the
    second."""
    if weight.ndim <= 2:  # (B,) or (B, N): the queries become (B, 1, N)
        return weight.view(weight.shape[0], 1, *(weight.shape[1:] or (1,)))
    if all(size == 1 for size in weight.shape[2:]):
        return weight.view(*weight.shape[:2], 1)
    return weight.expand(*weight.shape[:2], *queries[2:]).flatten(2)


# --- the registered operators -----------------------------------------------------------------------------------------


def _call(
    q, k_text, v_text, text_weight, text_number, k_image, v_image, image_weight, image_number, scale, backend=None
):
    return DualStreamCall(
        q,
        _active(k_text, v_text, text_weight, text_number),
        _active(k_image, v_image, image_weight, image_number),
        q.shape[-1] ** -0.5 if scale is None else scale,
    )


def _active(k: Tensor | None, v: Tensor | None, weight: Tensor | None, number: float) -> Stream | None:
    """The stream, or None where it is left out."""
    if k is None or v is None or (weight is None and number == 0):
        return None
    return Stream(k, v, number if weight is None else weight)


def _outputs(q, k_text, v_text, text_weight, text_number, k_image, v_image, image_weight, image_number, *_):
    clips, frames, tokens, heads, _ = q.shape
    streams = (
        _active(k_text, v_text, text_weight, text_number),
        _active(k_image, v_image, image_weight, image_number),
    )
    shapes = ((0,) if stream is None else (clips, heads, frames, tokens) for stream in streams)
    logsumexps = (q.new_empty(shape, dtype=statistics_dtype(q.dtype)) for shape in shapes)
    return q.new_empty(q.shape), *logsumexps


def _implementation(*arguments):
    call = _call(*arguments)
    if call.q.numel() == 0:
        return _outputs(*arguments)
    return dispatch.choose("dual_stream", call, arguments[-1]).forward(call)


def _implementation_backward(grad, out, lse_text, lse_image, needs, deterministic, *arguments):
    gradients = new_gradients(needs, *_differentiable(arguments))
    call = _call(*arguments)
    if call.q.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)
    dq, *others = asked(needs, gradients)
    text = _stream_grads(call.q, call.text, others[:3])
    image = _stream_grads(call.q, call.image, others[3:])
    chosen = dispatch.choose("dual_stream", call, arguments[-1], "backward")
    with deterministic_algorithms(deterministic):
        chosen.backward(call, contiguous_rows(grad), out, lse_text, lse_image, dq, text, image)
    for rows, dweight in ((text, others[2]), (image, others[5])):
        if dweight is not None and rows is not None:
            # Rows of (B, H, T, N): over heads, and over the dimensions that the weight broadcasts.
            dweight.copy_(rows.dweight.sum(1).sum_to_size(dweight.shape))
    return tuple(gradients)


def _differentiable(arguments: tuple) -> tuple[Tensor | None, ...]:
    """q, and each stream's k, v and weight, of the registered operator's arguments."""
    return (*arguments[:4], *arguments[5:8])


def _stream_grads(q: Tensor, stream: Stream | None, gradients: list[Tensor | None]) -> StreamGrads | None:
    """Where a backend writes; a stream that is left out gets its zeros here."""
    dk, dv, dweight = gradients
    if stream is None:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return None
    clips, frames, tokens, heads, _ = q.shape
    rows = None
    if dweight is not None:
        rows = q.new_empty((clips, heads, frames, tokens), dtype=statistics_dtype(q.dtype))
    return StreamGrads(dk, dv, rows)


def _flops(q, k_text, v_text, text_weight, text_number, k_image, v_image, image_weight, image_number, *_, **__) -> int:
    """Two products a score, over the streams that are computed."""
    streams = ((k_text, text_weight, text_number), (k_image, image_weight, image_number))
    return 4 * sum(_scores(q, k) for k, weight, number in streams if k and (weight or number != 0))


def _flops_backward(grad, out, lse_text, lse_image, needs, deterministic, q, *streams, **__) -> int:
    """For each stream the scores again, dP where anything but dv needs it, and a product for each gradient."""
    dq, *others = needs
    total = 0
    for (k, _, weight, number), (dk, dv, dweight) in ((streams[:4], others[:3]), (streams[4:8], others[3:])):
        if k and (weight or number != 0):
            total += 2 * (1 + (dq or dk or dweight) + dq + dk + dv) * _scores(q, k)
    return total


def _scores(q, k) -> int:
    """Entries of all score matrices, times D."""
    clips, frames, tokens, heads, dim = q
    return clips * heads * frames * tokens * k[1] * dim


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k_text, v_text, w_text, number_text, k_image, v_image, w_image, number_image, scale, backend = inputs
    ctx.numbers = (number_text, number_image, scale, backend)
    ctx.save_for_backward(*output, q, k_text, v_text, w_text, k_image, v_image, w_image)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    *saved, q, k_text, v_text, w_text, k_image, v_image, w_image = ctx.saved_tensors
    number_text, number_image, scale, backend = ctx.numbers
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5, 6, 7)]
    arguments = (q, k_text, v_text, w_text, number_text, k_image, v_image, w_image, number_image, scale, backend)
    gradients = torch.ops.univid.dual_stream_attn_backward(grad, *saved, needs, ctx.deterministic, *arguments)
    dq, *others = asked(needs, gradients)
    return (dq, *others[:3], None, *others[3:], None, None, None)


_ARGUMENTS = (
    "Tensor q, Tensor? k_text, Tensor? v_text, Tensor? text_weight, float text_number, "
    "Tensor? k_image, Tensor? v_image, Tensor? image_weight, float image_number, float? scale, str? backend"
)

register(
    f"dual_stream_attn({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _outputs,
    _flops,
    autocast=(0, 1, 2, 5, 6),  # not the weights: a gate keeps its precision
)
register(
    "dual_stream_attn_backward(Tensor grad, Tensor out, Tensor lse_text, Tensor lse_image, bool[7] needs, "
    f"bool deterministic, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _implementation_backward,
    lambda grad, out, lse_text, lse_image, needs, deterministic, *a: tuple(new_gradients(needs, *_differentiable(a))),
    _flops_backward,
)
register_gradient("dual_stream_attn", _setup, _gradient)
