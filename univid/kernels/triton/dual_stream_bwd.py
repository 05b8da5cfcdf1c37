"""The backward of dual-stream attention in Triton: three kernels, no atomics, the tiles of keys of ``dual_stream.py``.

Of one stream, with P its softmax before the weight w: dP = dO·Vᵀ, D = rowsum(P∘dP), dS = w·P∘(dP - D), and

* **dQ and D**, query-stationary, keys resident or streamed like the forward's. In one pass, scores and exponentials
  computed once: dQ = scale·Σ dS·K = scale·w·(Σ P∘(dP - c)·K - (D - c)·Σ P·K) for any c, and c = D over the first tile
  is close enough to D for the two sums not to cancel. D does not depend on w: summed over heads it is the weight's
  gradient, at w = 0 too.
* **dK = scale·Σ dSᵀ·Q and dV = Σ (w·P)ᵀ·dO**, key-stationary. Keys are few and queries many, so the queries are split
  over programs, each of which writes float32 partial sums. A rest of 16 keys rides on the last full tile: nobody reads
  all queries for a handful of keys.
* **The partial sums** are added in the order of the splits, whose number follows from the shapes.

Budget at D = 64 in bfloat16, 77 + 257 keys, 4 warps: dQ holds 88 KB of keys and values, and 64 queries and gradients in
16 KB; a thread keeps 32 scores, 32 dP, 32 registers of products' operands, and 3·32 sums; two programs share a
multiprocessor. dK/dV holds 64 keys and values in 16 KB and streams 64 queries and gradients, 16 KB a stage; a thread
keeps 32 scores, 32 dP, 32 registers of operands, and 2·32 sums, 2·8 more where a rest rides.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import DualStreamCall, StreamGrads
from univid.kernels.triton.dual_stream import (
    MULTIPROCESSORS,
    Keys,
    constants_of,
    exponent,
    full_tiles,
    key_of,
    keys_of,
    load_all_keys,
    load_keys,
    load_weight,
    padded_keys,
    power,
    query_grid,
    query_pointers,
    registers,
    rest_tile,
    row_mask,
    scores,
    statistics_pointers,
    strides_of,
    weight_pointers,
)
from univid.kernels.triton.launch import Config, Tuned, cdiv


class Sum(NamedTuple):
    """A (B, L, H, D) gradient, and where its partial sums (splits, B, H, L, D) begin among all partial sums."""

    gradient: Tensor
    length: int
    begin: int
    stride_b: int
    stride_l: int
    stride_h: int


# --- dQ and D --------------------------------------------------------------------------------------------------------


@triton.jit
def _query_step(
    q,
    do,
    k,
    v,
    lse,
    centre,
    delta,
    pull,
    mean,
    scale,
    valid,
    FIRST: tl.constexpr,
    MASKED: tl.constexpr,
    DQ: tl.constexpr,
):
    """One more tile of keys in delta = Σ P∘(dP - c), pull = Σ P∘(dP - c)·K and mean = Σ P·K, c being the centre.

    ``scale`` makes exponents of scores.
    """
    p = power(scores(q, k, valid, MASKED, 1) * scale - lse[:, None], q)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    if FIRST:
        centre = tl.sum(p * dp, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
    weighed = p * (dp - centre[:, None])
    delta += tl.sum(weighed, 1)
    if DQ:
        pull = tl.dot(weighed.to(k.dtype), k, pull, input_precision="ieee")
        mean = tl.dot(p.to(k.dtype), k, mean, input_precision="ieee")
    return centre, delta, pull, mean


@triton.jit
def _query_gradient(
    q,
    do,
    stream,
    tiles,
    b,
    h,
    m,
    M,
    N,
    scale,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    RESIDENT: tl.constexpr,
    DQ: tl.constexpr,
):
    """What one stream adds to dQ; writes its D where asked."""
    FULL: tl.constexpr = full_tiles(KEYS, BLOCK_L)
    lse = exponent(tl.load(statistics_pointers(stream.logsumexp, b, h, m, M), m < M, 0.0), q)
    factor = exponent(scale, q)
    c = tl.zeros(m.shape, tl.float32)
    delta = tl.zeros(m.shape, tl.float32)
    pull = tl.zeros(q.shape, tl.float32)
    mean = tl.zeros(q.shape, tl.float32)
    if RESIDENT:
        for i in tl.static_range(FULL):
            k, v = tiles[i]
            c, delta, pull, mean = _query_step(q, do, k, v, lse, c, delta, pull, mean, factor, 0, i == 0, False, DQ)
        k, v = tiles[FULL]
    else:
        if FULL > 0:
            k, v = load_keys(stream, b, h, 0, BLOCK_L, HEAD_DIM, ALIGNED)
            c, delta, pull, mean = _query_step(q, do, k, v, lse, c, delta, pull, mean, factor, 0, True, False, DQ)
        for i in range(1, FULL):
            k, v = load_keys(stream, b, h, i * BLOCK_L, BLOCK_L, HEAD_DIM, ALIGNED)
            c, delta, pull, mean = _query_step(q, do, k, v, lse, c, delta, pull, mean, factor, 0, False, False, DQ)
        k, v = load_keys(stream, b, h, FULL * BLOCK_L, rest_tile(KEYS, BLOCK_L), HEAD_DIM, ALIGNED)
    valid = stream.length - FULL * BLOCK_L
    c, delta, pull, mean = _query_step(q, do, k, v, lse, c, delta, pull, mean, factor, valid, FULL == 0, True, DQ)
    if stream.delta is not None:
        tl.store(statistics_pointers(stream.delta, b, h, m, M), delta + c, m < M)
    return (pull - delta[:, None] * mean) * (scale * load_weight(stream, b, m, M, N))[:, None]


@triton.jit(do_not_specialize=["M", "N"])
def _backward_queries(
    q_ptr,
    do_ptr,
    dq_ptr,
    text,
    image,
    q_strides,
    do_strides,
    dq_strides,
    scale,
    M,
    N,
    TEXT_KEYS: tl.constexpr,
    IMAGE_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    DQ: tl.constexpr = dq_ptr is not None
    text_tiles = ()
    image_tiles = ()
    if RESIDENT:
        text_tiles = load_all_keys(text, b, h, TEXT_KEYS, BLOCK_L, HEAD_DIM, ALIGNED)
        image_tiles = load_all_keys(image, b, h, IMAGE_KEYS, BLOCK_L, HEAD_DIM, ALIGNED)
    # A program that streams its keys has one query tile: only the loop over the keys is worth pipelining.
    STAGES: tl.constexpr = None if RESIDENT else 1
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = row_mask(m < M, HEAD_DIM)
        q = tl.load(query_pointers(q_ptr, q_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        do = tl.load(query_pointers(do_ptr, do_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        dq = tl.zeros(q.shape, tl.float32)
        if IMAGE_KEYS:
            dq += _query_gradient(
                q, do, image, image_tiles, b, h, m, M, N, scale, IMAGE_KEYS, HEAD_DIM, ALIGNED, BLOCK_L, RESIDENT, DQ
            )
        if TEXT_KEYS:
            dq += _query_gradient(
                q, do, text, text_tiles, b, h, m, M, N, scale, TEXT_KEYS, HEAD_DIM, ALIGNED, BLOCK_L, RESIDENT, DQ
            )
        if DQ:
            pointers = query_pointers(dq_ptr, dq_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT)
            tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask)


# --- dK and dV -------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _rides(keys: int, block: int) -> bool:
    """Whether the rest is small enough to ride on the last full tile."""
    return full_tiles(keys, block) > 0 and rest_tile(keys, block) == 16


@triton.constexpr_function
def _key_programs(keys: int, block: int) -> int:
    """How many programs share a stream's keys."""
    return 0 if keys == 0 else full_tiles(keys, block) + (not _rides(keys, block))


@triton.jit
def _load_pairs(first, second, exists):
    """Two numbers of every query, by four columns: a load of fewer elements than the program has threads is turned into
    one by every thread of all that it needs."""
    pointers = tl.where(tl.arange(0, 4)[None, :] % 2 == 0, first[:, None], second[:, None])
    x = tl.load(pointers, exists[:, None], 0.0)
    a, b = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    first, _ = tl.split(a)
    second, _ = tl.split(b)
    return first, second


@triton.jit
def _key_step(q, do, k, v, stream, lse, delta, weight, dk, dv, scale, valid, MASKED: tl.constexpr):
    """One more tile of queries in dk = dSᵀ·Q and dv = (w·P)ᵀ·dO; a weight that is a number is left out."""
    p = power(scores(k, q, valid, MASKED, 0) * scale - lse[None, :], q)
    if stream.w_b is not None:
        p *= weight[None, :]
    if stream.dv is not None:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    if stream.dk is not None:
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _store_partial(partial, x, b, h, split, start, length, HEAD_DIM: tl.constexpr):
    index = start + tl.arange(0, x.shape[0])
    head = (split * tl.num_programs(2) + b) * tl.num_programs(1) + h
    pointers = partial + (head * length + index)[:, None] * HEAD_DIM + tl.arange(0, x.shape[1])[None, :]
    tl.store(pointers, x, row_mask(index < length, HEAD_DIM))


@triton.jit
def _store_partials(stream, dk, dv, scale, b, h, split, start, HEAD_DIM: tl.constexpr):
    if stream.w_b is None:
        dk *= stream.weight
        dv *= stream.weight
    if stream.dk is not None:
        _store_partial(stream.dk, dk * scale, b, h, split, start, stream.length, HEAD_DIM)
    if stream.dv is not None:
        _store_partial(stream.dv, dv, b, h, split, start, stream.length, HEAD_DIM)


@triton.jit
def _key_gradients(
    stream,
    queries,
    q_strides,
    do_strides,
    start,
    scale,
    SIZE: tl.constexpr,
    RIDER: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A split's part in dK and dV of SIZE keys from ``start`` on, and of RIDER (0 or 16) keys behind them."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    q_ptr, do_ptr, split, split_rows, M, N = queries
    valid = stream.length - start
    k, v = load_keys(stream, b, h, start, SIZE, HEAD_DIM, ALIGNED)
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    if RIDER:
        k_rider, v_rider = load_keys(stream, b, h, start + SIZE, RIDER, HEAD_DIM, ALIGNED)
        dk_rider = tl.zeros(k_rider.shape, tl.float32)
        dv_rider = tl.zeros(k_rider.shape, tl.float32)
    first = split * split_rows
    end = tl.minimum(first + split_rows, M)
    for row in range(first, end, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        mask = row_mask(m < end, HEAD_DIM)
        q = tl.load(query_pointers(q_ptr, q_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        do = tl.load(query_pointers(do_ptr, do_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        lse_ptrs = statistics_pointers(stream.logsumexp, b, h, m, M)
        delta_ptrs = lse_ptrs
        if stream.dk is not None:
            delta_ptrs = statistics_pointers(stream.delta, b, h, m, M)
        lse, delta = _load_pairs(lse_ptrs, delta_ptrs, m < end)
        lse = exponent(lse, q)
        factor = exponent(scale, q)
        weight = lse
        if stream.w_b is not None:
            pointers = weight_pointers(stream, b, m, N)
            weight, _ = _load_pairs(pointers, pointers, m < end)
            weight = weight.to(tl.float32)
        dk, dv = _key_step(q, do, k, v, stream, lse, delta, weight, dk, dv, factor, valid, MASKED)
        if RIDER:
            dk_rider, dv_rider = _key_step(
                q, do, k_rider, v_rider, stream, lse, delta, weight, dk_rider, dv_rider, factor, valid - SIZE, True
            )
    _store_partials(stream, dk, dv, scale, b, h, split, start, HEAD_DIM)
    if RIDER:
        _store_partials(stream, dk_rider, dv_rider, scale, b, h, split, start + SIZE, HEAD_DIM)


@triton.jit
def _key_program(
    stream,
    queries,
    q_strides,
    do_strides,
    tile,
    scale,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One tile of a stream's keys: a full one, the last full one with its rider, or the rest alone."""
    LAST: tl.constexpr = _key_programs(KEYS, BLOCK_L) - 1
    SIZE: tl.constexpr = BLOCK_L if _rides(KEYS, BLOCK_L) else rest_tile(KEYS, BLOCK_L)
    RIDER: tl.constexpr = 16 if _rides(KEYS, BLOCK_L) else 0
    start = tile * BLOCK_L
    if tile < LAST:
        _key_gradients(
            stream, queries, q_strides, do_strides, start, scale, BLOCK_L, 0, False, HEAD_DIM, ALIGNED, FLAT, BLOCK_M
        )
    else:
        _key_gradients(
            stream,
            queries,
            q_strides,
            do_strides,
            start,
            scale,
            SIZE,
            RIDER,
            not RIDER,
            HEAD_DIM,
            ALIGNED,
            FLAT,
            BLOCK_M,
        )


@triton.jit(do_not_specialize=["split_rows", "M", "N"])
def _backward_keys(
    q_ptr,
    do_ptr,
    text,
    image,
    q_strides,
    do_strides,
    split_rows,
    scale,
    M,
    N,
    TEXT_KEYS: tl.constexpr,
    IMAGE_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    TEXT: tl.constexpr = _key_programs(TEXT_KEYS, BLOCK_L)
    IMAGE: tl.constexpr = _key_programs(IMAGE_KEYS, BLOCK_L)
    # Tiles vary fastest: programs that run at the same time read the same queries.
    tile = tl.program_id(0) % (TEXT + IMAGE)
    queries = (q_ptr, do_ptr, tl.program_id(0) // (TEXT + IMAGE), split_rows, M, N)
    if TEXT_KEYS and tile < TEXT:
        _key_program(
            text, queries, q_strides, do_strides, tile, scale, TEXT_KEYS, HEAD_DIM, ALIGNED, FLAT, BLOCK_M, BLOCK_L
        )
    if IMAGE_KEYS and tile >= TEXT:
        _key_program(
            image,
            queries,
            q_strides,
            do_strides,
            tile - TEXT,
            scale,
            IMAGE_KEYS,
            HEAD_DIM,
            ALIGNED,
            FLAT,
            BLOCK_M,
            BLOCK_L,
        )


@triton.jit(do_not_specialize=["splits"])
def _add_partials(partials, sums, splits, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up to four gradients' partial sums; each gradient has every fourth program."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) // 4 * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(4):
        if len(sums[i]) > 0 and tl.program_id(0) % 4 == i:
            size = sums[i].length * HEAD_DIM
            base = partials + sums[i].begin + index[None, :]
            total = tl.zeros([BLOCK], tl.float32)
            for first in range(0, splits, 8):
                split = first + tl.arange(0, 8)
                head = (split * tl.num_programs(2) + b) * tl.num_programs(1) + h
                mask = (split < splits)[:, None] & (index < size)[None, :]
                total += tl.sum(tl.load(base + (head * size)[:, None], mask, 0.0), 0)
            offsets = b * sums[i].stride_b + h * sums[i].stride_h + index % HEAD_DIM
            offsets += (index // HEAD_DIM).to(tl.int64) * sums[i].stride_l
            gradient = sums[i].gradient
            tl.store(gradient + offsets, total.to(gradient.dtype.element_ty), index < size)


# --- launching -------------------------------------------------------------------------------------------------------


def _query_configs(key: dict) -> list[Config]:
    if key["dtype"] == "fp32":
        return [
            Config({"BLOCK_M": 16, "BLOCK_L": 16, "RESIDENT": 0}, num_warps=8, num_stages=1),
            Config({"BLOCK_M": 32, "BLOCK_L": 16, "RESIDENT": 0}, num_warps=16, num_stages=1),
        ]
    streamed = [
        Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": 0}, num_warps=4, num_stages=2),
        Config({"BLOCK_M": 128, "BLOCK_L": 32, "RESIDENT": 0}, num_warps=8, num_stages=2),
    ]
    if key["resident"] == 0 or key["D"] > 64:
        return streamed
    programs = MULTIPROCESSORS * key["resident"]
    return [
        Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": programs}, num_warps=4, num_stages=1),
        Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": 0, **registers(168)}, num_warps=4, num_stages=2),
        *streamed,
    ]


def _key_configs(key: dict) -> list[Config]:
    if key["dtype"] == "fp32":
        return [Config({"BLOCK_M": 32, "BLOCK_L": 32}, num_warps=8, num_stages=1)]
    if key["D"] > 64:
        return [
            Config({"BLOCK_M": 32, "BLOCK_L": 64}, num_warps=4, num_stages=2),
            Config({"BLOCK_M": 64, "BLOCK_L": 64}, num_warps=8, num_stages=2),
        ]
    return [
        Config({"BLOCK_M": 64, "BLOCK_L": 64}, num_warps=4, num_stages=2),
        Config({"BLOCK_M": 32, "BLOCK_L": 64, **registers(168)}, num_warps=4, num_stages=3),
        Config({"BLOCK_M": 64, "BLOCK_L": 128}, num_warps=8, num_stages=2),
    ]


_BACKWARD_QUERIES = Tuned(_backward_queries, _query_configs)
_BACKWARD_KEYS = Tuned(_backward_keys, _key_configs)
_ADD_PARTIALS = Tuned(_add_partials, lambda key: [Config({"BLOCK": 256}, num_warps=4, num_stages=1)])


_NOTHING = StreamGrads(None, None, None)


def backward(
    call: DualStreamCall,
    grad: Tensor,
    lse_text: Tensor,
    lse_image: Tensor,
    dq: Tensor | None,
    text_grads: StreamGrads | None,
    image_grads: StreamGrads | None,
) -> None:
    """Writes the gradients that are asked for; arguments as in ``DualStreamCall``."""
    text, image = text_grads or _NOTHING, image_grads or _NOTHING
    text_delta, image_delta = _delta(text, lse_text), _delta(image, lse_image)

    passing = call if dq is not None else _keep(call, text_delta is not None, image_delta is not None)
    if passing is not None:
        text_keys = keys_of(passing.text, lse_text, text_delta)
        image_keys = keys_of(passing.image, lse_image, image_delta)
        _launch_queries(passing, grad, dq, text_keys, image_keys)

    gradients = text.dk, text.dv, image.dk, image.dv
    asked = [x is not None for x in gradients]
    passing = _keep(call, any(asked[:2]), any(asked[2:]))
    if passing is not None:
        splits, split_rows = _splits(passing)
        sizes = [0 if x is None else splits * x.numel() for x in gradients]
        partials = grad.new_empty(sum(sizes), dtype=torch.float32)
        pieces = [x if size else None for x, size in zip(partials.split(sizes), sizes, strict=True)]
        text_keys = keys_of(passing.text, lse_text, text_delta, *pieces[:2])
        image_keys = keys_of(passing.image, lse_image, image_delta, *pieces[2:])
        _launch_keys(passing, grad, text_keys, image_keys, splits, split_rows)
        _launch_sums(gradients, sizes, partials, splits)


def _delta(grads: StreamGrads, logsumexp: Tensor) -> Tensor | None:
    """Where a stream's D goes: the weight's gradient, or memory for dK to read; None where nobody needs it."""
    if grads.dweight is None and grads.dk is not None:
        return torch.empty_like(logsumexp)
    return grads.dweight


def _keep(call: DualStreamCall, text: bool, image: bool) -> DualStreamCall | None:
    """The call with these streams only; None if none is left."""
    if not text and not image:
        return None
    return call._replace(text=call.text if text else None, image=call.image if image else None)


def _launch_queries(
    call: DualStreamCall, grad: Tensor, dq: Tensor | None, text: Keys | None, image: Keys | None
) -> None:
    _, frames, tokens, *_ = call.q.shape
    _BACKWARD_QUERIES(
        query_grid(call),
        call.q,
        grad,
        dq,
        text,
        image,
        strides_of(call.q),
        strides_of(grad),
        None if dq is None else strides_of(dq),
        call.scale,
        frames * tokens,
        tokens,
        key=key_of(call),
        **constants_of(call, call.q, grad, dq),
    )


def _launch_keys(
    call: DualStreamCall, grad: Tensor, text: Keys | None, image: Keys | None, splits: int, split_rows: int
) -> None:
    clips, frames, tokens, heads, _ = call.q.shape
    _BACKWARD_KEYS(
        lambda meta: (splits * _programs(call, meta["BLOCK_L"]), heads, clips),
        call.q,
        grad,
        text,
        image,
        strides_of(call.q),
        strides_of(grad),
        split_rows,
        call.scale,
        frames * tokens,
        tokens,
        key=key_of(call),
        **constants_of(call, call.q, grad),
    )


def _launch_sums(gradients: tuple[Tensor | None, ...], sizes: list[int], partials: Tensor, splits: int) -> None:
    sums = [
        () if x is None else Sum(x, x.shape[1], sum(sizes[:i]), *strides_of(x)[:3]) for i, x in enumerate(gradients)
    ]
    clips, _, heads, head_dim = next(x.shape for x in gradients if x is not None)
    longest = max(x.shape[1] for x in gradients if x is not None)
    _ADD_PARTIALS(
        lambda meta: (4 * cdiv(longest * head_dim, meta["BLOCK"]), heads, clips),
        partials,
        tuple(sums),
        splits,
        key={},
        HEAD_DIM=head_dim,
    )


def _programs(call: DualStreamCall, block: int) -> int:
    """Programs that share the keys of a head of a clip."""
    return sum(_key_programs(padded_keys(stream), block) for stream in (call.text, call.image))


def _splits(call: DualStreamCall) -> tuple[int, int]:
    """Into how many ranges the queries are split, and the size of one: about four programs a multiprocessor."""
    clips, frames, tokens, heads, _ = call.q.shape
    wanted = max(1, 4 * MULTIPROCESSORS // (clips * heads * _programs(call, 64)))
    size = cdiv(cdiv(frames * tokens, wanted), 64) * 64
    return cdiv(frames * tokens, size), size
