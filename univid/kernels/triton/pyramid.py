"""Pyramid attention in Triton: every frame attends to all tokens of its reference frames; the gather is fused.

What the backward (``pyramid_bwd.py``) shares with the forward, the forward itself, and the backend's contract.

* A program holds a tile of rows of one head and streams the tokens of a list of frames past it: keys and values of the
  references or, for dK and dV, queries and incoming gradients of the readers. Float32 accumulators stay in registers.
* Tiles are powers of two, frames are not. Whole tiles of a frame are streamed with one scalar frame index and no mask.
  What is left of every frame is packed, token after token, and gathered row by row, so that only the very last tile of
  a program is not full; frames under two tiles are packed altogether. Slots past the end repeat tokens of the last
  frame: loads need no mask, only that tile's scores are struck out.
* Where all rows of the table are equal (EQUAL_ROWS) the T·N queries of a clip are one long query.
* The head is the slowest index of the grids, so that its keys and values stay in the L2 cache.

Budget of the forward at D = 64 in 16 bits, compiled for sm_90: 64 queries (8 KB) and two stages of 128 keys and values
(64 KB) are 72 KB of shared memory, three programs of 4 warps to an SM at 168 registers: 64 scores, 32 for P in halves
and 32 outputs a thread, without spills in the loops. Triton waits for QKᵀ in every tile, so what hides one program's
softmax is another program: three that hold 64 queries beat two that hold 128.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import PyramidCall
from univid.kernels.triton import launch
from univid.kernels.triton.launch import Config, Tuned, cdiv, next_power_of_2

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))

_LIMITS = torch.version.hip is None and torch.version.xpu is None  # only Triton's NVIDIA compiler takes ``maxnreg``


# --- what the kernels share ------------------------------------------------------------------------------------------


@triton.jit
def head_of(ptr, clip, head, strides, ALIGNED: tl.constexpr):
    """The first element of a head of a clip. ALIGNED: all strides are multiples of 8."""
    offset = clip.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return ptr + offset


@triton.jit
def offset_of(frame, token, strides, ALIGNED: tl.constexpr):
    """Of a token of a frame, or of many, from its head's first element."""
    offset = tl.cast(frame, tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def offset_pair(frame, token, strides, other_strides, SAME_STRIDES: tl.constexpr, ALIGNED: tl.constexpr):
    """``offset_of`` in two tensors. SAME_STRIDES: those of frames and tokens, so that one computation serves both."""
    offset = offset_of(frame, token, strides, ALIGNED)
    if SAME_STRIDES:
        other = offset
    else:
        other = offset_of(frame, token, other_strides, ALIGNED)
    return offset, other


@triton.jit
def load_rows(ptr, offsets, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows at ``offsets``, zeros where they do not exist (None: all do)."""
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + dims[None, :]
    if exists is None:
        x = tl.load(ptrs) if HEAD_DIM == BLOCK_D else tl.load(ptrs, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        x = tl.load(ptrs, mask=exists[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    return x


@triton.jit
def store_rows(ptr, offsets, x, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + dims[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=exists[:, None] & (dims[None, :] < HEAD_DIM))


@triton.jit
def query_tile(T, N, H, EQUAL_ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The program's clip, head and table row; of its queries the frames, tokens, indices in the clip, and existence."""
    tokens = T * N if EQUAL_ROWS else N
    rows = 1 if EQUAL_ROWS else T
    tiles = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    clip_head = program // (tiles * rows)
    row = program // tiles % rows
    index = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = index < tokens
    if EQUAL_ROWS:
        frame = index // N
        token = index % N
    else:
        frame = row
        token = index
        index += row * N
    return clip_head // H, clip_head % H, row, frame, token, index, exists


@triton.jit
def references_of(table_ptr, clip, row, R, table_stride, PADDED: tl.constexpr):
    """A row of the table and how many frames it lists (PADDED: written behind them by ``_compact``)."""
    if PADDED:
        references = table_ptr + clip * table_stride + row * (R + 1)
        count = tl.load(references + R)
    else:
        references = table_ptr + clip * table_stride + row * R
        count = R
    return references, count


@triton.jit
def whole_tiles(tokens, BLOCK: tl.constexpr):
    """How many tiles of a frame are streamed whole; its other tokens are packed."""
    whole = tokens // BLOCK
    return tl.where(whole < 2, 0, whole)


@triton.jit
def next_tile(entry, start, whole, BLOCK: tl.constexpr):
    """The whole tile after the one at token ``start`` of the list's frame ``entry``."""
    start += BLOCK
    ends = start == whole * BLOCK
    return entry + ends.to(tl.int32), tl.where(ends, 0, start)


@triton.jit
def next_slots(entry, token, packed, BLOCK: tl.constexpr):
    """The packed tile after the one of these list entries and tokens, there being ``packed`` tokens of a frame."""
    token += BLOCK % packed
    wraps = token >= packed
    return entry + BLOCK // packed + wraps.to(tl.int32), tl.where(wraps, token - packed, token)


@triton.jit
def frame_at(frames, entry, count, ALL_FRAMES: tl.constexpr):
    """The frame at an entry of the list; the last one past its end. ALL_FRAMES: the list is 0, 1, ..., count - 1."""
    entry = tl.minimum(entry, tl.maximum(count, 1) - 1)
    return entry if ALL_FRAMES else tl.load(frames + entry)


@triton.jit
def strike_out(scores, keys, BLOCK_N: tl.constexpr):
    """All but the first ``keys`` columns of a tile become -inf."""
    return tl.where(tl.arange(0, BLOCK_N)[None, :] < keys, scores, float("-inf"))


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(q, k, v, keys, scale_log2, acc, peak, total, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of the online softmax, in powers of two."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = strike_out(scores, keys, BLOCK_N)
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["scale", "T", "N", "Nk", "H", "R", "table_stride"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    out_ptr,
    logsumexp_ptr,
    q_strides,
    k_strides,
    v_strides,
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
    k_head = head_of(k_ptr, clip, head, k_strides, ALIGNED)
    v_head = head_of(v_ptr, clip, head, v_strides, ALIGNED)
    scale_log2 = scale * LOG2E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

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
        acc, peak, total = _attend(q, k, v, 0, scale_log2, acc, peak, total, False, BLOCK_N)

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
        acc, peak, total = _attend(q, k, v, 0, scale_log2, acc, peak, total, False, BLOCK_N)
    if keys % BLOCK_N > 0:  # apart, since a mask in the loop costs every tile
        key_tokens = tokens + whole * BLOCK_N
        k_rows, v_rows = offset_pair(key_frames, key_tokens, k_strides, v_strides, SAME_STRIDES, ALIGNED)
        k = load_rows(k_head, k_rows, None, HEAD_DIM, BLOCK_D)
        v = load_rows(v_head, v_rows, None, HEAD_DIM, BLOCK_D)
        acc, peak, total = _attend(q, k, v, keys % BLOCK_N, scale_log2, acc, peak, total, True, BLOCK_N)

    total = tl.where(total > 0, total, 1.0)  # without keys: acc is 0 and peak -inf
    queries = T * N
    out_head = out_ptr + (clip.to(tl.int64) * queries * H + head) * HEAD_DIM
    store_rows(out_head, index.to(tl.int64) * H * HEAD_DIM, acc / total[:, None], exists, HEAD_DIM, BLOCK_D)
    logsumexp_head = logsumexp_ptr + (clip.to(tl.int64) * H + head) * queries
    tl.store(logsumexp_head + index, peak * LN2 + tl.log(total), mask=exists)


# --- tables with padding ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "Tk"])
def _compact(table_ptr, compact_ptr, R, Tk, BLOCK: tl.constexpr):
    """In each row, the entries inside [0, Tk) move to the front, in order; their number goes behind the R places."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, R, BLOCK):
        column = start + tl.arange(0, BLOCK)
        entry = tl.load(table_ptr + row * R + column, mask=column < R, other=-1)
        inside = ((entry >= 0) & (entry < Tk)).to(tl.int32)
        place = count + tl.cumsum(inside, 0) - 1
        tl.store(compact_ptr + row * (R + 1) + place, entry, mask=inside > 0)
        count += tl.sum(inside, 0)
    tl.store(compact_ptr + row * (R + 1) + R, count)


# --- the backend's contract ------------------------------------------------------------------------------------------


def unsupported(call: PyramidCall) -> str | None:
    dim = call.q.shape[-1]
    reason = launch.unsupported(call.q, call.k, call.v)
    if reason is None and (dim % 8 or dim > 128):
        reason = f"head dimension {dim}: a multiple of 8 up to 128 needed"
    return reason


def _configs(key: dict) -> list[Config]:
    tiles: list[tuple[int, ...]]
    if key["dtype"] == "fp32":
        tiles = [(32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)] if key["D"] <= 64 else [(32, 32, 8, 2)]
    elif key["D"] > 64:
        tiles = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)]
    elif has_long_rows(key):
        tiles = [(64, 128, 4, 2, 168), (128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2, 128)]
    else:
        tiles = [(64, 128, 4, 2, 168), (64, 64, 4, 2, 128), (64, 64, 4, 3), (128, 64, 4, 3)]
    return configs_of(tiles)


_FORWARD = Tuned(_forward, _configs)
_COMPACT = Tuned(_compact, lambda key: [Config({"BLOCK": 64}, num_warps=1)])


def forward(call: PyramidCall) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    clips, frames, tokens, heads = q.shape[:4]
    out = q.new_empty(q.shape)
    logsumexp = q.new_empty((clips, heads, frames, tokens), dtype=torch.float32)
    _FORWARD(
        query_grid(call),
        *(q, k, v, table_of(call), out, logsumexp),
        *(strides_of(q), strides_of(k), strides_of(v)),
        *(call.scale, frames, tokens, k.shape[2], heads, call.table.shape[2], table_stride_of(call)),
        key=key_of(call),
        EQUAL_ROWS=has_equal_rows(call),
        PADDED=call.padded,
        SAME_STRIDES=has_same_strides(k, v),
        **constants_of(q, k, v),
    )
    return out, logsumexp


def backward(
    call: PyramidCall,
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    from univid.kernels.triton import pyramid_bwd  # here, because it builds on this file

    pyramid_bwd.backward(call, grad, out, logsumexp, dq, dk, dv)


# --- what the launches share -----------------------------------------------------------------------------------------


def has_equal_rows(call: PyramidCall) -> bool:
    return call.table.shape[1] == 1


def query_grid(call: PyramidCall) -> Callable[[dict], tuple[int]]:
    clips, frames, tokens, heads, _ = call.q.shape
    rows = call.table.shape[1]
    return lambda meta: (clips * heads * rows * cdiv(frames * tokens // rows, meta["BLOCK_M"]),)


def table_of(call: PyramidCall) -> Tensor:
    """The table as the kernels read it: compacted where it may be padded."""
    if not call.padded:
        return call.table
    batches, rows, refs = call.table.shape
    compact = call.table.new_empty((batches, rows, refs + 1))
    _COMPACT(lambda meta: (batches * rows,), call.table, compact, refs, call.k.shape[1], key={})
    return compact


def table_stride_of(call: PyramidCall) -> int:
    """From a clip's table, as the kernels read it, to the next clip's; 0 where all clips share one."""
    batches, rows, refs = call.table.shape
    return rows * (refs + call.padded) if batches > 1 else 0


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Of B, T, N and H; 0 where the size is 1, since such a stride may be any number."""
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in range(4))


def has_same_strides(x: Tensor, y: Tensor) -> bool:
    """Of frames and tokens."""
    return strides_of(x)[1:3] == strides_of(y)[1:3]


def constants_of(*tensors: Tensor) -> dict:
    dim = tensors[0].shape[-1]
    aligned = all(stride % 8 == 0 for x in tensors for stride in strides_of(x))
    return {"HEAD_DIM": dim, "BLOCK_D": _padded(dim), "ALIGNED": aligned}


def key_of(call: PyramidCall) -> dict:
    """What the best configuration depends on; numbers of tokens in powers of two."""
    _, _, tokens, _, dim = call.q.shape
    return {
        "dtype": launch.DTYPES[call.q.dtype],
        "D": _padded(dim),
        "queries": next_power_of_2(tokens),
        "keys": next_power_of_2(call.k.shape[2]),
        "equal_rows": has_equal_rows(call),
    }


def has_long_rows(key: dict) -> bool:
    """Whether tiles of 128 queries waste little of a row of the table."""
    return key["equal_rows"] or key["queries"] > 256


def configs_of(tiles: list[tuple[int, ...]]) -> list[Config]:
    """Of (BLOCK_M, BLOCK_N, warps, stages) and, where more programs shall fit an SM, the most registers of a thread."""
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n} | ({"maxnreg": limit[0]} if limit and _LIMITS else {}), warps, stages)
        for m, n, warps, stages, *limit in tiles
    ]


def _padded(dim: int) -> int:
    """A tile's extent along the head dimension."""
    return max(16, next_power_of_2(dim))
