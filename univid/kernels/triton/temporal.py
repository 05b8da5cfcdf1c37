"""Temporal attention: every pixel of every head attends along time, T x T scores for each of B·N·H little problems.

At T = 24 that is 12 FLOP a byte, so only the bytes count: every element is read once, straight from its strides.

**T <= 64: one tile.** A program takes P = 64 / S pixels ((n, h) pairs, which neighbour each other in memory), S being T's next power of
two. Row ``t·P + p`` of its 64-row tiles is frame t of pixel p: rows that follow each other are P·D contiguous elements. One 64 x 64
product scores all pixels with all; a mask keeps each pixel's own. The products so wasted stay below the time of the loads (at T = 24,
D = 64 the forward does 43 FLOP a byte, the backward 61). The backward recomputes the softmax in the tile and takes
D = rowsum(P∘dP) from it, so it needs neither ``out`` nor ``logsumexp``.

**T > 64: tiles along time**, one pixel a program: an online softmax over key tiles; a backward in three kernels (D, then query-stationary
dQ, then key-stationary dK and dV), which take the probabilities from the logsumexp. Correct for any T; made for no speed.

Budget at D = 64 in 16 bits, 4 warps: a tile is 8 KiB of shared memory and, in float32, 32 registers a thread. The forward holds q, k, v
and S, then O: 5 programs an SM or more. The backward holds q, k, v, dO, P, dS (48 KiB) and at most three float32 tiles: 3 programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import TemporalCall
from univid.kernels.triton import launch
from univid.kernels.triton.launch import Config, Tuned, cdiv

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


# --- tiles: rows (clip, frame, token, head) of a (B, T, N, H, D) tensor whose strides but the last are a tuple ----------------------


@triton.jit
def _pointers(ptr, strides, clip, frame, token, head, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = clip.to(tl.int64) * strides[0] + frame.to(tl.int64) * strides[1]
    rows += token.to(tl.int64) * strides[2] + head.to(tl.int64) * strides[3]
    return ptr + tl.multiple_of(rows, ALIGN)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _mask(rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    return rows[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


# --- one tile ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _packed(frames, tokens, heads, SLOT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows: (clip, frame, token, head), which exist, and which scores are between rows of one pixel."""
    PIXELS: tl.constexpr = BLOCK // SLOT
    tiles = tl.cdiv(tokens * heads, PIXELS)
    clip = tl.program_id(0) // tiles
    row = tl.arange(0, BLOCK)
    frame = row // PIXELS
    pixel = (tl.program_id(0) % tiles) * PIXELS + row % PIXELS
    exists = (frame < frames) & (pixel < tokens * heads)
    # Rows past the last frame or pixel are zeros and see their pixel's keys all the same: a finite softmax, and no gradient.
    own = ((row % PIXELS)[:, None] == (row % PIXELS)[None, :]) & (frame < frames)[None, :]
    return clip, frame, pixel // heads, pixel % heads, exists, own


@triton.jit
def _softmax(products, scale):
    """exp(scale · products) over 2 to the row's peak (in base 2), the peak, and the row's sum; scale is positive."""
    peak = tl.max(products, 1) * (scale * _LOG2E)
    p = tl.exp2(products * (scale * _LOG2E) - peak[:, None])
    return p, peak, tl.sum(p, 1)


@triton.jit(do_not_specialize=["frames", "tokens", "heads"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides, frames, tokens, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SLOT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, frame, token, head, exists, own = _packed(frames, tokens, heads, SLOT, BLOCK)
    mask = _mask(exists, HEAD_DIM, BLOCK_D)
    q = tl.load(_pointers(q_ptr, q_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)
    k = tl.load(_pointers(k_ptr, k_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)
    v = tl.load(_pointers(v_ptr, v_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)

    p, peak, total = _softmax(tl.where(own, _dot(q, tl.trans(k)), float("-inf")), scale)
    out = _dot(p.to(v.dtype), v) * (1.0 / total)[:, None]

    out_at = _pointers(out_ptr, out_strides, clip, frame, token, head, ALIGN, BLOCK_D)
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)
    lse_at = ((clip.to(tl.int64) * heads + head) * frames + frame) * tokens + token
    tl.store(lse_ptr + lse_at, (peak + tl.log2(total)) * _LN2, mask=exists)


@triton.jit(do_not_specialize=["frames", "tokens", "heads"])
def _backward(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, dk_strides, dv_strides, frames, tokens, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SLOT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, frame, token, head, exists, own = _packed(frames, tokens, heads, SLOT, BLOCK)
    mask = _mask(exists, HEAD_DIM, BLOCK_D)
    q = tl.load(_pointers(q_ptr, q_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)
    k = tl.load(_pointers(k_ptr, k_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)
    grad = tl.load(_pointers(grad_ptr, grad_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)
    if dq_ptr is not None or dk_ptr is not None:
        v = tl.load(_pointers(v_ptr, v_strides, clip, frame, token, head, ALIGN, BLOCK_D), mask=mask, other=0.0)

    p, _, total = _softmax(tl.where(own, _dot(q, tl.trans(k)), float("-inf")), scale)
    p *= (1.0 / total)[:, None]

    if dv_ptr is not None:
        dv = _dot(tl.trans(p.to(grad.dtype)), grad)
        dv_at = _pointers(dv_ptr, dv_strides, clip, frame, token, head, ALIGN, BLOCK_D)
        tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    if dq_ptr is not None or dk_ptr is not None:
        dp = _dot(grad, tl.trans(v))
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
        if dq_ptr is not None:
            dq = _dot(ds, k) * scale
            dq_at = _pointers(dq_ptr, dq_strides, clip, frame, token, head, ALIGN, BLOCK_D)
            tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mask)
        if dk_ptr is not None:
            dk = _dot(tl.trans(ds), q) * scale
            dk_at = _pointers(dk_ptr, dk_strides, clip, frame, token, head, ALIGN, BLOCK_D)
            tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=mask)


# --- tiles along time -------------------------------------------------------------------------------------------------------------


@triton.jit
def _strip(frames, tokens, heads, BLOCK: tl.constexpr):
    """This program's pixel (clip, token, head), the first frame of its tile, and where the pixel's row statistics begin."""
    tiles = tl.cdiv(frames, BLOCK)
    pixel = tl.program_id(0) // tiles
    head, token, clip = pixel % heads, pixel // heads % tokens, pixel // heads // tokens
    statistics = (clip.to(tl.int64) * heads + head) * frames * tokens + token
    return clip, token, head, (tl.program_id(0) % tiles) * BLOCK, statistics


@triton.jit
def _load(
    ptr, strides, clip, start, token, head, frames,
    ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame = start + tl.arange(0, BLOCK)
    at = _pointers(ptr, strides, clip, frame, token, head, ALIGN, BLOCK_D)
    return tl.load(at, mask=_mask(frame < frames, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def _store(
    ptr, strides, tile, clip, start, token, head, frames,
    ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame = start + tl.arange(0, BLOCK)
    at = _pointers(ptr, strides, clip, frame, token, head, ALIGN, BLOCK_D)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=_mask(frame < frames, HEAD_DIM, BLOCK_D))


@triton.jit
def _scores(q, k, key_start, frames, scale, BLOCK: tl.constexpr):
    """Base-2 logits, -inf for keys past the last frame."""
    key = key_start + tl.arange(0, BLOCK)
    return tl.where((key < frames)[None, :], _dot(q, tl.trans(k)) * (scale * _LOG2E), float("-inf"))


@triton.jit
def _statistics(ptr, base, start, frames, tokens, BLOCK: tl.constexpr):
    """A float32 row statistic of a tile of frames; 0 past the last frame."""
    frame = start + tl.arange(0, BLOCK)
    return tl.load(ptr + base + frame.to(tl.int64) * tokens, mask=frame < frames, other=0.0)


@triton.jit(do_not_specialize=["frames", "tokens", "heads"])
def _forward_long(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides, frames, tokens, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, token, head, start, statistics = _strip(frames, tokens, heads, BLOCK)
    q = _load(q_ptr, q_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for key_start in range(0, frames, BLOCK):
        k = _load(k_ptr, k_strides, clip, key_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        v = _load(v_ptr, v_strides, clip, key_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        s = _scores(q, k, key_start, frames, scale, BLOCK)
        risen = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - risen[:, None])
        fade = tl.exp2(peak - risen)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None] + _dot(p.to(v.dtype), v)
        peak = risen
    out *= (1.0 / total)[:, None]
    _store(out_ptr, out_strides, out, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    frame = start + tl.arange(0, BLOCK)
    lse_at = lse_ptr + statistics + frame.to(tl.int64) * tokens
    tl.store(lse_at, (peak + tl.log2(total)) * _LN2, mask=frame < frames)


@triton.jit(do_not_specialize=["frames", "tokens", "heads"])
def _delta_long(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, q_strides, k_strides, v_strides, grad_strides,
    frames, tokens, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D = rowsum(P∘dP)."""
    clip, token, head, start, statistics = _strip(frames, tokens, heads, BLOCK)
    q = _load(q_ptr, q_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    grad = _load(grad_ptr, grad_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    lse = _statistics(lse_ptr, statistics, start, frames, tokens, BLOCK) * _LOG2E
    delta = tl.zeros((BLOCK,), tl.float32)
    for key_start in range(0, frames, BLOCK):
        k = _load(k_ptr, k_strides, clip, key_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        v = _load(v_ptr, v_strides, clip, key_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        p = tl.exp2(_scores(q, k, key_start, frames, scale, BLOCK) - lse[:, None])
        delta += tl.sum(p * _dot(grad, tl.trans(v)), 1)
    frame = start + tl.arange(0, BLOCK)
    tl.store(delta_ptr + statistics + frame.to(tl.int64) * tokens, delta, mask=frame < frames)


@triton.jit(do_not_specialize=["frames", "tokens", "heads"])
def _dq_long(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, q_strides, k_strides, v_strides, grad_strides, dq_strides,
    frames, tokens, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, token, head, start, statistics = _strip(frames, tokens, heads, BLOCK)
    q = _load(q_ptr, q_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    grad = _load(grad_ptr, grad_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    lse = _statistics(lse_ptr, statistics, start, frames, tokens, BLOCK) * _LOG2E
    delta = _statistics(delta_ptr, statistics, start, frames, tokens, BLOCK)
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for key_start in range(0, frames, BLOCK):
        k = _load(k_ptr, k_strides, clip, key_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        v = _load(v_ptr, v_strides, clip, key_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        p = tl.exp2(_scores(q, k, key_start, frames, scale, BLOCK) - lse[:, None])
        ds = p * (_dot(grad, tl.trans(v)) - delta[:, None])
        dq += _dot(ds.to(k.dtype), k)
    _store(dq_ptr, dq_strides, dq * scale, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)


@triton.jit(do_not_specialize=["frames", "tokens", "heads"])
def _dkv_long(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    frames, tokens, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, token, head, start, statistics = _strip(frames, tokens, heads, BLOCK)
    k = _load(k_ptr, k_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    v = _load(v_ptr, v_strides, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for query_start in range(0, frames, BLOCK):
        # Queries past the last frame are zeros with a logsumexp of 0, so p <= 1 there, and their gradient is 0: they add nothing.
        q = _load(q_ptr, q_strides, clip, query_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        grad = _load(grad_ptr, grad_strides, clip, query_start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
        lse = _statistics(lse_ptr, statistics, query_start, frames, tokens, BLOCK) * _LOG2E
        p = tl.exp2(_scores(q, k, start, frames, scale, BLOCK) - lse[:, None])
        if dv_ptr is not None:
            dv += _dot(tl.trans(p.to(grad.dtype)), grad)
        if dk_ptr is not None:
            delta = _statistics(delta_ptr, statistics, query_start, frames, tokens, BLOCK)
            ds = p * (_dot(grad, tl.trans(v)) - delta[:, None])
            dk += _dot(tl.trans(ds.to(q.dtype)), q)
    if dk_ptr is not None:
        _store(dk_ptr, dk_strides, dk * scale, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)
    if dv_ptr is not None:
        _store(dv_ptr, dv_strides, dv, clip, start, token, head, frames, ALIGN, HEAD_DIM, BLOCK_D, BLOCK)


# --- launches ---------------------------------------------------------------------------------------------------------------------


def _one_tile(key: dict) -> list[Config]:
    warps = (8, 4) if key["D"] > 64 else (4, 8)
    return [Config({}, num_warps=w, num_stages=1) for w in warps]


def _long(key: dict) -> list[Config]:
    return [Config({}, num_warps=8 if key["D"] > 64 else 4, num_stages=1)]


_FORWARD = Tuned(_forward, _one_tile)
_BACKWARD = Tuned(_backward, _one_tile)
_FORWARD_LONG = Tuned(_forward_long, _long)
_DELTA_LONG = Tuned(_delta_long, _long)
_DQ_LONG = Tuned(_dq_long, _long)
_DKV_LONG = Tuned(_dkv_long, _long)


def unsupported(call: TemporalCall) -> str | None:
    dim = call.q.shape[-1]
    if dim % 8 or dim > 128:
        return f"head dimension {dim}: a multiple of 8 up to 128 needed"
    return launch.unsupported(call.q, call.k, call.v)


def forward(call: TemporalCall) -> tuple[Tensor, Tensor]:
    clips, frames, tokens, heads, _ = call.q.shape
    out = call.q.new_empty(call.q.shape)
    logsumexp = call.q.new_empty((clips, heads, frames, tokens), dtype=torch.float32)
    tensors = (call.q, call.k, call.v, out)
    grid, options = _launch(call, *tensors)
    kernel = _FORWARD if "SLOT" in options else _FORWARD_LONG
    kernel(grid, *tensors, logsumexp, *_strides(*tensors), frames, tokens, heads, call.scale, **options)
    return out, logsumexp


def backward(
    call: TemporalCall, grad: Tensor, logsumexp: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> None:
    _, frames, tokens, heads, _ = call.q.shape
    inputs = (call.q, call.k, call.v, grad)
    grid, options = _launch(call, *inputs, dq, dk, dv)
    sizes = (frames, tokens, heads, call.scale)
    if "SLOT" in options:
        _BACKWARD(grid, *inputs, dq, dk, dv, *_strides(*inputs, dq, dk, dv), *sizes, **options)
        return
    delta = None
    if dq is not None or dk is not None:
        delta = torch.empty_like(logsumexp)
        _DELTA_LONG(grid, *inputs, logsumexp, delta, *_strides(*inputs), *sizes, **options)
    if dq is not None:
        _DQ_LONG(grid, *inputs, logsumexp, delta, dq, *_strides(*inputs, dq), *sizes, **options)
    if dk is not None or dv is not None:
        _DKV_LONG(grid, *inputs, logsumexp, delta, dk, dv, *_strides(*inputs, dk, dv), *sizes, **options)


def _launch(call: TemporalCall, *tensors: Tensor | None):
    """The grid, and the key and constants, of a launch that touches these tensors."""
    clips, frames, tokens, heads, dim = call.q.shape
    # The head dimension's products take at least 16.
    constants = {"HEAD_DIM": dim, "BLOCK_D": max(16, launch.next_power_of_2(dim))}
    constants["ALIGN"] = 1 if any(s % 8 for strides in _strides(*tensors) for s in strides) else 8
    constants["BLOCK"] = block = 32 if call.q.dtype == torch.float32 else 64
    if frames <= block:
        constants["SLOT"] = launch.next_power_of_2(frames)
        programs = clips * cdiv(tokens * heads, block // constants["SLOT"])
    else:
        programs = clips * tokens * heads * cdiv(frames, block)
    asked = "".join(str(int(tensor is not None)) for tensor in tensors[4:])
    key = {"dtype": launch.DTYPES[call.q.dtype], "D": constants["BLOCK_D"], "T": launch.next_power_of_2(frames)}
    return lambda _: (programs, 1, 1), {"key": key | {"asked": asked}, **constants}


def _strides(*tensors: Tensor | None) -> list[tuple[int, ...]]:
    """Each tensor's strides but the last, which is 1."""
    return [(0, 0, 0, 0) if tensor is None else tensor.stride()[:4] for tensor in tensors]
