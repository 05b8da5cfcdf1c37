"""The meaning of every operator, in plain einsum: the oracle of the tests and the "naive" row of the benchmarks.

Each function is the formula and nothing else: no checks, no tricks, any device, differentiable by autograd. The
arithmetic runs in ``accumulate``: float32 by default (float64 for float64 inputs); with ``accumulate=q.dtype`` every
operation is rounded to the input's dtype, which is the yardstick of the tests' tolerances. Attention returns ``(out,
logsumexp)``.
"""

import torch
from torch import Tensor


def pyramid_st_attn(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float, accumulate: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 6 of the paper: frame t of q (B, T, N, H, D) attends to the frames ``table[b, t]`` of k, v (B, Tk, Nk, H, D).

    ``table`` is (1 or B, 1 or T, R) integer; entries outside [0, Tk) are skipped. Returns (B, T, N, H, D) and (B, H, T,
    N).
    """
    clips, frames = q.shape[:2]
    q_, k_, v_ = _promote(accumulate, q, k, v)
    table = table.long().expand(clips, frames, -1)
    inside = (table >= 0) & (table < k.shape[1])
    clip = torch.arange(clips, device=q.device)[:, None, None]
    chosen = (clip, torch.where(inside, table, 0))  # advanced index: (B, T, R, Nk, H, D)
    scores = torch.einsum("btnhd,btrmhd->bhtnrm", q_ * scale, k_[chosen])
    scores = scores.masked_fill(~inside[:, None, :, None, :, None], -torch.inf)
    p, logsumexp = _softmax(scores.flatten(-2))
    out = torch.einsum("bhtnrm,btrmhd->btnhd", p.view_as(scores), v_[chosen])
    return out.to(q.dtype), logsumexp


def dual_stream_attn(
    q: Tensor,
    streams: list[tuple[Tensor, Tensor, Tensor | float]],
    scale: float,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Eq. 7: the sum over streams (k, v, weight) of weight · softmax(scale · q · kᵀ) · v.

    q (B, T, N, H, D); k, v (B, L, H, D); a weight is a number or a tensor (1 or B, 1 or T, 1 or N).
    """
    (q_,) = _promote(accumulate, q)
    out, logsumexps = torch.zeros_like(q_), []
    for k, v, weight in streams:
        k_, v_ = k.to(q_.dtype), v.to(q_.dtype)
        p, logsumexp = _softmax(torch.einsum("btnhd,blhd->bhtnl", q_ * scale, k_))
        weight_ = weight.to(q_.dtype)[..., None, None] if isinstance(weight, Tensor) else weight
        out = out + weight_ * torch.einsum("bhtnl,blhd->btnhd", p, v_)
        logsumexps.append(logsumexp)
    return out.to(q.dtype), logsumexps


def temporal_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float, accumulate: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 8: every pixel of every head attends along time. q, k, v (B, T, N, H, D)."""
    q_, k_, v_ = _promote(accumulate, q, k, v)
    p, logsumexp = _softmax(torch.einsum("btnhd,bsnhd->bhnts", q_ * scale, k_))
    return torch.einsum("bhnts,bsnhd->btnhd", p, v_).to(q.dtype), logsumexp.transpose(-1, -2)


def temporal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, accumulate: torch.dtype | None = None
) -> Tensor:
    """out[b, t, n, o] = Σ_{j, c} x[b, t + j - K//2, n, c] · weight[o, c, j] + bias[b, o] + residual[b, t, n, o], frames
    outside being 0; bias (C_out,) or (B, C_out)."""
    x_, weight_ = _promote(accumulate, x, weight)
    frames, taps = x.shape[1], weight.shape[2]
    padded = torch.nn.functional.pad(x_, (0, 0, 0, 0, taps // 2, taps // 2))
    shifted = torch.stack([padded[:, j : j + frames] for j in range(taps)], dim=-1)
    out = torch.einsum("btncj,ocj->btno", shifted, weight_)
    if bias is not None and bias.ndim == 2:
        bias = bias[:, None, None]
    for term in (bias, residual):
        out = out if term is None else out + term.to(out.dtype)
    return out.to(x.dtype)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm over x (M, N, C) per M, then SiLU. Returns out and each group's mean and 1/standard deviation (M,
    num_groups)."""
    x_, weight_, bias_ = _promote(accumulate, x, weight, bias)
    groups = x_.unflatten(-1, (num_groups, -1))
    mean = groups.mean((1, 3), keepdim=True)
    rstd = ((groups - mean).square().mean((1, 3), keepdim=True) + eps).rsqrt()
    out = ((groups - mean) * rstd).flatten(-2) * weight_ + bias_
    out = out * out.sigmoid() if silu else out
    return out.to(x.dtype), mean.flatten(1), rstd.flatten(1)


def add_bias(x: Tensor, bias: Tensor, accumulate: torch.dtype | None = None) -> Tensor:
    """x + bias, x (B, T, N, C), bias (C,)."""
    x_, bias_ = _promote(accumulate, x, bias)
    return (x_ + bias_).to(x.dtype)


def concat(x: Tensor, y: Tensor) -> Tensor:
    """The channels of x (B, T, N, C1), then those of y (B, T, N, C2)."""
    return torch.cat([x, y], dim=-1)


def geglu(x: Tensor, accumulate: torch.dtype | None = None) -> Tensor:
    """a · b · Φ(b) of the halves (a, b) of x's last dimension."""
    (x_,) = _promote(accumulate, x)
    a, b = x_.chunk(2, dim=-1)
    return (a * (b * (0.5 * (1 + (b * 0.5**0.5).erf())))).to(x.dtype)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, accumulate: torch.dtype | None = None) -> Tensor:
    """GEGLU of x · weightᵀ + bias, which is not rounded in between."""
    x_, weight_ = _promote(accumulate, x, weight)
    y = torch.einsum("...c,oc->...o", x_, weight_)
    return geglu(y if bias is None else y + bias.to(y.dtype), accumulate).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch: Tensor | None,
    offset: Tensor | None,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """total = x + branch, rounded, and its LayerNorm over C, plus offset. x, branch (B, T, N, C), offset (T, 1, C)."""
    x_, weight_, bias_ = _promote(accumulate, x, weight, bias)
    total = x if branch is None else (x_ + branch.to(x_.dtype)).to(x.dtype)
    centred = total.to(x_.dtype)
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd * weight_ + bias_
    y = y if offset is None else y + offset.to(y.dtype)
    return total, y.to(x.dtype)


def _promote(accumulate: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    accumulate = accumulate or torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(accumulate) for t in tensors)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the last dimension; a row of -inf only gives 0 and -inf, and passes no gradient."""
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = (scores - peak).exp()
    total = p.sum(-1, keepdim=True)
    logsumexp = (total.detach().log() + peak).squeeze(-1)
    return p / total.clamp(min=torch.finfo(scores.dtype).tiny), logsumexp
