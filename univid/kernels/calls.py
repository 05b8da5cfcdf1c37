"""What every backend is given: one immutable call an operator, checked and normalised by ``univid.ops``.

A backend is a module ``univid.kernels.<backend>.<operator>`` with

* ``unsupported(call) -> str | None``: why this backend cannot run the call, or None;
* ``forward(call)``: the outputs, as new contiguous tensors;
* ``backward(call, ...)``: writes into the gradients it is handed (any strides, last dimension contiguous); None: not
  asked for.

A backend never sees an empty tensor, an incoming gradient whose last dimension is not contiguous, or a bad argument.
Absent an own ``backward``, the backend is forward-only. Sizes: B clips, T frames, N tokens of a frame, H heads, D head
dimension, L keys of a prompt, R reference frames, C channels. Every tensor may have any strides, its last dimension
being contiguous, except where noted.
"""

from typing import NamedTuple

from torch import Tensor


class PyramidCall(NamedTuple):
    """``forward -> (out, logsumexp)``; ``backward(call, grad, out, logsumexp, dq, dk, dv)``.

    out (B, T, N, H, D) in q's dtype; logsumexp (B, H, T, N) float32, natural logarithm, -inf where a row has no key.
    """

    q: Tensor  # (B, T, N, H, D)
    k: Tensor  # (B, Tk, Nk, H, D)
    v: Tensor  # (B, Tk, Nk, H, D)
    # (1 or B, T or 1, R) int32, contiguous; middle size 1: all T rows are equal. Entries outside [0, Tk) are skipped.
    table: Tensor
    scale: float
    padded: bool  # entries outside [0, Tk) may occur
    deterministic: bool
    inverse: Tensor | None = (
        None  # kernels/inverse.py: who reads each key frame; given to a backward that needs dk or dv
    )


class Stream(NamedTuple):
    """The keys, values and weight of one stream of a dual-stream call."""

    k: Tensor  # (B, L, H, D)
    v: Tensor  # (B, L, H, D)
    weight: Tensor | float  # a tensor is (1 or B, 1 or T, 1 or N), any float dtype


class StreamGrads(NamedTuple):
    """Where a stream's gradients go.

    ``dweight`` takes, per query row and head, rowsum(P∘dP), P being the softmax before the weight.
    """

    dk: Tensor | None  # (B, L, H, D), contiguous
    dv: Tensor | None  # (B, L, H, D), contiguous
    dweight: Tensor | None  # (B, H, T, N) float32, contiguous: not yet summed over heads


class DualStreamCall(NamedTuple):
    """``forward -> (out, lse_text, lse_image)``;
    ``backward(call, grad, out, lse_text, lse_image, dq, text_grads, image_grads)``.

    out (B, T, N, H, D) in q's dtype; a logsumexp is (B, H, T, N) float32, or of shape (0,) where its stream is None. A
    stream's grads are None where the stream is; at least one stream is there. dq is contiguous.
    """

    q: Tensor  # (B, T, N, H, D)
    text: Stream | None
    image: Stream | None
    scale: float


class TemporalCall(NamedTuple):
    """``forward -> (out, logsumexp)``; ``backward(call, grad, logsumexp, dq, dk, dv)``: out is not needed.

    out (B, T, N, H, D) in q's dtype; logsumexp (B, H, T, N) float32.
    """

    q: Tensor  # (B, T, N, H, D)
    k: Tensor  # (B, T, N, H, D)
    v: Tensor  # (B, T, N, H, D)
    scale: float


class TemporalConvCall(NamedTuple):
    """``forward -> out`` (B, T, N, C_out); ``backward(call, grad, dx, dweight, dbias)``. The residual's gradient is
    ``grad`` itself; in a backward ``residual`` is what dx is added to: grad where the residual was x, or None.

    All tensors share x's dtype. dweight lies as weight does.
    """

    x: Tensor  # (B, T, N, C)
    weight: Tensor  # (C_out, C, K), K odd, any strides; fast where C is contiguous
    bias: Tensor | None  # (C_out,) or (B, C_out), any strides
    residual: Tensor | None  # (B, T, N, C_out)


class AddBiasCall(NamedTuple):
    """``forward -> out`` (B, T, N, C); ``backward(call, dbias)``: in a backward x is the incoming gradient."""

    x: Tensor  # (B, T, N, C)
    bias: Tensor  # (C,), x's dtype or float32, any stride


class ConcatCall(NamedTuple):
    """``forward -> out`` (B, T, N, C1 + C2); ``backward(call, dx, dy)``: in a backward x and y are the incoming gradient's parts."""

    x: Tensor  # (B, T, N, C1)
    y: Tensor  # (B, T, N, C2), x's dtype


class GegluCall(NamedTuple):
    """``forward -> out`` (M, C); ``backward(call, grad, dx)``, grad (M, C)."""

    x: Tensor  # (M, 2C): a and b


class LinearGegluCall(NamedTuple):
    """``forward -> out`` (M, C); its backward is that of its parts."""

    x: Tensor  # (M, C_in)
    weight: Tensor  # (2C, C_in)
    bias: Tensor | None  # (2C,)


class AddLayerNormCall(NamedTuple):
    """``forward -> (total, y)``, total None where branch is; ``backward(call, grad, grad_total, dx, dweight, dbias)``.

    In a backward x is the total, branch and offset are None, grad is y's and grad_total, or None, total's.
    """

    x: Tensor  # (B, T, N, C)
    weight: Tensor  # (C,), x's dtype or float32, any stride
    bias: Tensor  # (C,), as weight
    eps: float
    branch: Tensor | None  # (B, T, N, C)
    offset: Tensor | None  # (T, 1, C), x's dtype or float32


class GroupNormSiluCall(NamedTuple):
    """``forward -> (out, mean, rstd)``; ``backward(call, grad, mean, rstd, dx, dweight, dbias)``.

    out (M, N, C) in x's dtype; mean and rstd (M, num_groups) float32.
    """

    x: Tensor  # (M, N, C)
    num_groups: int
    weight: Tensor  # (C,), x's dtype or float32, any stride
    bias: Tensor  # (C,), as weight
    eps: float
    silu: bool
