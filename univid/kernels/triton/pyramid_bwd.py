"""The backward of pyramid attention in Triton: a query-stationary kernel for dQ, a key-stationary one for dK and dV.

Seven products instead of five, but no atomics and no partial sums: gradients are bit-identical from run to run. Lists
of frames are streamed as ``pyramid.py`` tells; dK/dV streams the readers of a key frame, from the inverse table.

* A program of dK/dV holds a tile of keys and values of one frame, the longest lists first. Keys are the rows of its
  scores, so that P and dS are left operands straight from registers. A frame without readers gets zeros.
* Where all rows of the table are equal, every key frame has the same readers, all T frames: key frames are packed as
  one long key, and what a frame gets is multiplied by how often the row lists it.

Budget at D = 64 in 16 bits, compiled for sm_90. dQ: 128 queries and gradients (32 KB), three stages of 64 keys and
values (48 KB), two programs of 4 warps to an SM; in short rows 64 queries at 128 registers, three programs. dK/dV: 64
keys and values (16 KB), three stages of 64 queries and gradients (48 KB), three programs of 4 warps at 168 registers:
64 accumulators, 32 scores, 32 dP and halves of both, some invariants of the loop spilled.
"""

import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import PyramidCall
from univid.kernels.triton.launch import Config, Tuned, cdiv
from univid.kernels.triton.pyramid import (
    LOG2E,
    configs_of,
    constants_of,
    frame_at,
    has_equal_rows,
    has_long_rows,
    has_same_strides,
    head_of,
    key_of,
    load_rows,
    next_slots,
    next_tile,
    offset_of,
    offset_pair,
    query_grid,
    query_tile,
    references_of,
    store_rows,
    strides_of,
    strike_out,
    table_of,
    table_stride_of,
    whole_tiles,
)


@triton.jit(do_not_specialize=["T", "N", "H"])
def _statistics(
    out_ptr,
    grad_ptr,
    logsumexp_ptr,
    statistics_ptr,
    grad_strides,
    T,
    N,
    H,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(B, H, T, N, 2): the logsumexp of powers of two, and delta = rowsum(dO∘O).

    Heads, which are neighbours in memory, are the fastest index of this grid.
    """
    queries = T * N
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    clip = program // (H * tiles)
    head = program % H
    index = program // H % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = index < queries
    grad_head = head_of(grad_ptr, clip, head, grad_strides, ALIGNED)
    grad = load_rows(grad_head, offset_of(index // N, index % N, grad_strides, ALIGNED), exists, HEAD_DIM, BLOCK_D)
    out_head = out_ptr + (clip.to(tl.int64) * queries * H + head) * HEAD_DIM
    out = load_rows(out_head, index.to(tl.int64) * H * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    row = (clip.to(tl.int64) * H + head) * queries + index
    logsumexp = tl.load(logsumexp_ptr + row, mask=exists)
    tl.store(statistics_ptr + 2 * row, logsumexp * LOG2E, mask=exists)
    tl.store(statistics_ptr + 2 * row + 1, delta, mask=exists)


@triton.jit
def _attend_dq(q, k, v, grad, logsumexp, delta, keys, scale_log2, dq, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if MASKED:
        scores = strike_out(scores, keys, BLOCK_N)
    ds = tl.exp2(scores * scale_log2 - logsumexp[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["scale", "T", "N", "Nk", "H", "R", "table_stride"])
def _backward_q(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    grad_ptr,
    statistics_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dq_strides,
    scale,
    T,
    N,
    Nk,
    H,
    R,
    table_stride,
    EQUAL_ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    clip, head, row, frame, token, index, exists = query_tile(T, N, H, EQUAL_ROWS, BLOCK_M)
    references, count = references_of(table_ptr, clip, row, R, table_stride, PADDED)
    q_head = head_of(q_ptr, clip, head, q_strides, ALIGNED)
    q = load_rows(q_head, offset_of(frame, token, q_strides, ALIGNED), exists, HEAD_DIM, BLOCK_D)
    grad_head = head_of(grad_ptr, clip, head, grad_strides, ALIGNED)
    grad = load_rows(grad_head, offset_of(frame, token, grad_strides, ALIGNED), exists, HEAD_DIM, BLOCK_D)
    statistics = statistics_ptr + 2 * ((clip.to(tl.int64) * H + head) * T * N + index)
    logsumexp = tl.load(statistics, mask=exists, other=0.0)
    delta = tl.load(statistics + 1, mask=exists, other=0.0)
    k_head = head_of(k_ptr, clip, head, k_strides, ALIGNED)
    v_head = head_of(v_ptr, clip, head, v_strides, ALIGNED)
    scale_log2 = scale * LOG2E
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    slots = tl.arange(0, BLOCK_N)
    whole = whole_tiles(Nk, BLOCK_N)
    k_rows, v_rows = offset_pair(0, slots, k_strides, v_strides, SAME_STRIDES, ALIGNED)
    entry = 0
    start = 0
    key_frame = frame_at(references, entry, count, False)
    for _ in range(count * whole):
        k_tile, v_tile = offset_pair(key_frame, start, k_strides, v_strides, SAME_STRIDES, ALIGNED)
        k = load_rows(k_head + k_tile, k_rows, None, HEAD_DIM, BLOCK_D)
        v = load_rows(v_head + v_tile, v_rows, None, HEAD_DIM, BLOCK_D)
        entry, start = next_tile(entry, start, whole, BLOCK_N)
        key_frame = frame_at(references, entry, count, False)
        dq = _attend_dq(q, k, v, grad, logsumexp, delta, 0, scale_log2, dq, False, BLOCK_N)

    packed = Nk - whole * BLOCK_N
    keys = count * packed
    packed = tl.maximum(packed, 1)
    entries = slots // packed
    tokens = slots % packed
    key_frames = frame_at(references, entries, count, False)
    for _ in range(keys // BLOCK_N):
        key_tokens = tokens + whole * BLOCK_N
        k_rows, v_rows = offset_pair(key_frames, key_tokens, k_strides, v_strides, SAME_STRIDES, ALIGNED)
        k = load_rows(k_head, k_rows, None, HEAD_DIM, BLOCK_D)
        v = load_rows(v_head, v_rows, None, HEAD_DIM, BLOCK_D)
        entries, tokens = next_slots(entries, tokens, packed, BLOCK_N)
        key_frames = frame_at(references, entries, count, False)
        dq = _attend_dq(q, k, v, grad, logsumexp, delta, 0, scale_log2, dq, False, BLOCK_N)
    if keys % BLOCK_N > 0:  # apart, since a mask in the loop costs every tile
        key_tokens = tokens + whole * BLOCK_N
        k_rows, v_rows = offset_pair(key_frames, key_tokens, k_strides, v_strides, SAME_STRIDES, ALIGNED)
        k = load_rows(k_head, k_rows, None, HEAD_DIM, BLOCK_D)
        v = load_rows(v_head, v_rows, None, HEAD_DIM, BLOCK_D)
        dq = _attend_dq(q, k, v, grad, logsumexp, delta, keys % BLOCK_N, scale_log2, dq, True, BLOCK_N)

    dq_head = head_of(dq_ptr, clip, head, dq_strides, ALIGNED)
    store_rows(dq_head, offset_of(frame, token, dq_strides, ALIGNED), dq * scale, exists, HEAD_DIM, BLOCK_D)


@triton.jit
def _load_statistics(ptr, index, BLOCK_M: tl.constexpr, num_warps: tl.constexpr):
    """Logsumexp and delta of some queries.

    Triton 3.6 takes a load of fewer numbers than there are threads for so cheap that it lets every thread load all
    that it needs by itself: here a row of the scores, 16 copies with as many pointers. Where two numbers a query are
    too few, each is loaded twice.
    """
    if num_warps > BLOCK_M // 16:
        pairs = tl.load(ptr + 2 * index[:, None] + (tl.arange(0, 4) % 2)[None, :])
        logsumexps, deltas = tl.split(tl.reshape(pairs, (BLOCK_M, 2, 2)))
        logsumexp, _ = tl.split(logsumexps)
        delta, _ = tl.split(deltas)
    else:
        logsumexp, delta = tl.split(tl.load(ptr + 2 * index[:, None] + tl.arange(0, 2)[None, :]))
    return logsumexp, delta


@triton.jit
def _attend_dkv(q, k, v, grad, logsumexp, delta, scale_log2, dk, dv, DK: tl.constexpr, DV: tl.constexpr):
    """Keys are the rows here. A query whose logsumexp is inf adds nothing."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - logsumexp[None, :])
    if DV:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    if DK:
        ds = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["scale", "T", "N", "Tk", "Nk", "H", "inverse_stride"])
def _backward_kv(
    q_ptr,
    k_ptr,
    v_ptr,
    inverse_ptr,
    grad_ptr,
    statistics_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dk_strides,
    dv_strides,
    scale,
    T,
    N,
    Tk,
    Nk,
    H,
    inverse_stride,
    EQUAL_ROWS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    num_warps: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(Tk * Nk if EQUAL_ROWS else Nk, BLOCK_N)
    lists = 1 if EQUAL_ROWS else Tk
    clip_head = program // (tiles * lists)
    clip = clip_head // H
    head = clip_head % H
    offsets = inverse_ptr + clip * inverse_stride
    order = offsets + Tk + 1
    readers = order + Tk
    token = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if EQUAL_ROWS:  # frames that are read come first in ``order``: few tiles hold both kinds
        exists = token < Tk * Nk
        frame = tl.load(order + token // Nk, mask=exists, other=0)
        token = token % Nk
        listed = tl.where(exists, tl.load(offsets + frame + 1) - tl.load(offsets + frame), 0)
        count = tl.where(tl.max(listed, 0) > 0, T, 0)
    else:
        exists = token < Nk
        frame = tl.load(order + program // tiles % Tk)
        first_reader = tl.load(offsets + frame)
        count = tl.load(offsets + frame + 1) - first_reader
        readers += first_reader

    k_head = head_of(k_ptr, clip, head, k_strides, ALIGNED)
    k = load_rows(k_head, offset_of(frame, token, k_strides, ALIGNED), exists, HEAD_DIM, BLOCK_D)
    v_head = head_of(v_ptr, clip, head, v_strides, ALIGNED)
    v = load_rows(v_head, offset_of(frame, token, v_strides, ALIGNED), exists, HEAD_DIM, BLOCK_D)
    q_head = head_of(q_ptr, clip, head, q_strides, ALIGNED)
    grad_head = head_of(grad_ptr, clip, head, grad_strides, ALIGNED)
    statistics_head = statistics_ptr + (clip.to(tl.int64) * H + head) * T * N * 2
    scale_log2 = scale * LOG2E
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    slots = tl.arange(0, BLOCK_M)
    whole = whole_tiles(N, BLOCK_M)
    q_rows, grad_rows = offset_pair(0, slots, q_strides, grad_strides, SAME_STRIDES, ALIGNED)
    entry = 0
    start = 0
    query_frame = frame_at(readers, entry, count, EQUAL_ROWS)
    for _ in range(count * whole):
        q_tile, grad_tile = offset_pair(query_frame, start, q_strides, grad_strides, SAME_STRIDES, ALIGNED)
        q = load_rows(q_head + q_tile, q_rows, None, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_head + grad_tile, grad_rows, None, HEAD_DIM, BLOCK_D)
        index = query_frame * N + start + slots
        logsumexp, delta = _load_statistics(statistics_head, index, BLOCK_M, num_warps)
        entry, start = next_tile(entry, start, whole, BLOCK_M)
        query_frame = frame_at(readers, entry, count, EQUAL_ROWS)
        dk, dv = _attend_dkv(q, k, v, grad, logsumexp, delta, scale_log2, dk, dv, DK, DV)

    packed = N - whole * BLOCK_M
    queries = count * packed
    packed = tl.maximum(packed, 1)
    entries = slots // packed
    tokens = slots % packed
    query_frames = frame_at(readers, entries, count, EQUAL_ROWS)
    for first in range(0, queries, BLOCK_M):
        query_tokens = tokens + whole * BLOCK_M
        q_rows, grad_rows = offset_pair(query_frames, query_tokens, q_strides, grad_strides, SAME_STRIDES, ALIGNED)
        q = load_rows(q_head, q_rows, None, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_head, grad_rows, None, HEAD_DIM, BLOCK_D)
        index = query_frames * N + query_tokens
        logsumexp, delta = _load_statistics(statistics_head, index, BLOCK_M, num_warps)
        logsumexp = tl.where(first + slots < queries, logsumexp, float("inf"))
        entries, tokens = next_slots(entries, tokens, packed, BLOCK_M)
        query_frames = frame_at(readers, entries, count, EQUAL_ROWS)
        dk, dv = _attend_dkv(q, k, v, grad, logsumexp, delta, scale_log2, dk, dv, DK, DV)

    if EQUAL_ROWS:
        dk = tl.where(listed[:, None] > 0, dk * listed[:, None].to(tl.float32), 0.0)
        dv = tl.where(listed[:, None] > 0, dv * listed[:, None].to(tl.float32), 0.0)
    if DK:
        dk_head = head_of(dk_ptr, clip, head, dk_strides, ALIGNED)
        store_rows(dk_head, offset_of(frame, token, dk_strides, ALIGNED), dk * scale, exists, HEAD_DIM, BLOCK_D)
    if DV:
        dv_head = head_of(dv_ptr, clip, head, dv_strides, ALIGNED)
        store_rows(dv_head, offset_of(frame, token, dv_strides, ALIGNED), dv, exists, HEAD_DIM, BLOCK_D)


# --- the launches ----------------------------------------------------------------------------------------------------


def _configs_q(key: dict) -> list[Config]:
    tiles: list[tuple[int, ...]]
    if key["dtype"] == "fp32":
        tiles = [(32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)]
    elif key["D"] > 64:
        tiles = [(64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3)]
    elif has_long_rows(key):
        tiles = [(128, 64, 4, 3), (64, 64, 4, 3, 128), (64, 64, 4, 3), (128, 64, 8, 3)]
    else:
        tiles = [(64, 64, 4, 3, 128), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3)]
    return configs_of(tiles)


def _configs_kv(key: dict) -> list[Config]:
    tiles: list[tuple[int, ...]]
    if key["dtype"] == "fp32":
        tiles = [(32, 32, 8, 2), (64, 32, 4, 2)] if key["D"] <= 64 else [(64, 32, 8, 2)]
    elif key["D"] > 64:
        tiles = [(64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)]
    else:
        tiles = [(64, 64, 4, 3, 168), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 3)]
    return configs_of(tiles)


_STATISTICS = Tuned(_statistics, lambda key: [Config({"BLOCK_M": 64})])
_BACKWARD_Q = Tuned(_backward_q, _configs_q)
_BACKWARD_KV = Tuned(_backward_kv, _configs_kv)


def backward(
    call: PyramidCall,
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    q, k, v = call.q, call.k, call.v
    clips, frames, tokens, heads = q.shape[:4]
    key_frames, key_tokens = k.shape[1:3]
    constants = constants_of(q, k, v, grad, *(x for x in (dq, dk, dv) if x is not None))
    strides = (strides_of(q), strides_of(k), strides_of(v), strides_of(grad))
    statistics = logsumexp.new_empty((*logsumexp.shape, 2))
    _STATISTICS(
        lambda meta: (clips * heads * cdiv(frames * tokens, meta["BLOCK_M"]),),
        *(out, grad, logsumexp, statistics, strides_of(grad), frames, tokens, heads),
        key={},
        **constants,
    )
    if dq is not None:
        _BACKWARD_Q(
            query_grid(call),
            *(q, k, v, table_of(call), grad, statistics, dq),
            *(*strides, strides_of(dq)),
            *(call.scale, frames, tokens, key_tokens, heads, call.table.shape[2], table_stride_of(call)),
            key=key_of(call),
            EQUAL_ROWS=has_equal_rows(call),
            PADDED=call.padded,
            SAME_STRIDES=has_same_strides(k, v),
            **constants,
        )
    if dk is not None or dv is not None:
        inverse = call.inverse
        assert inverse is not None
        lists, listed = (1, key_frames * key_tokens) if has_equal_rows(call) else (key_frames, key_tokens)
        dk_, dv_ = (k if dk is None else dk), (v if dv is None else dv)  # never written where not asked for
        _BACKWARD_KV(
            lambda meta: (clips * heads * lists * cdiv(listed, meta["BLOCK_N"]),),
            *(q, k, v, inverse, grad, statistics, dk_, dv_),
            *(*strides, strides_of(dk_), strides_of(dv_)),
            *(call.scale, frames, tokens, key_frames, key_tokens, heads),
            inverse.stride(0) if inverse.shape[0] > 1 else 0,
            key=key_of(call) | {"dk": dk is not None, "dv": dv is not None},
            EQUAL_ROWS=has_equal_rows(call),
            DK=dk is not None,
            DV=dv is not None,
            SAME_STRIDES=has_same_strides(q, grad),
            **constants,
        )
