"""The backward of dual-stream attention in Triton: three kernels, no atomics, the tiles of keys of ``dual_stream.py``.

Of one stream, with P its softmax before the weight w: dP = dO·Vᵀ, D = rowsum(P∘dP), dS = w·P∘(dP - D), and

* **dQ and D**, query-stationary, keys resident or streamed like the forward's. In one pass, scores and exponentials
  computed once: dQ = scale·Σ dS·K = scale·w·(Σ P∘(dP - c)·K - (D - c)·Σ P·K) for any c, and c = D over the first tile
  is close enough to D for the two sums not to cancel. Both streams share the first sum. D does not depend on w: summed
  over heads it is the weight's gradient, at w = 0 too.
* **dK = scale·Σ dSᵀ·Q and dV = Σ (w·P)ᵀ·dO**, key-stationary. The keys of both streams, one behind the other, are cut
  into tiles of BLOCK_L, so that no stream has a rest of its own: 77 + 257 keys are six tiles, of which one holds keys of
  both (MIXED). Keys are few and queries many, so the queries are split over programs, three on a multiprocessor.
* **The partial sums** of the splits, in float32, are added in the order of the splits, whose number follows from the
  shapes; where one split will do, there are none.

Budget at D = 64 in bfloat16, 77 + 257 keys: dQ holds 88 KB of keys and values, and twice 128 queries and gradients, 64
KB; a thread of 8 warps keeps 32 scores, 32 dP, 32 registers of products' operands, and 2·32 sums. dK/dV holds 64 keys and
values in 16 KB and streams 64 queries and gradients, 16 KB a stage; a thread of 4 warps keeps 32 scores, 32 dP, 32
registers of operands, and 2·32 sums, in 168 registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import DualStreamCall, StreamGrads
from univid.kernels.triton.dual_stream_tiles import (
    MULTIPROCESSORS,
    Plan,
    exponent,
    full_tiles,
    keys_of,
    load_all_keys,
    load_keys,
    load_weight,
    padded,
    plan_of,
    power,
    query_pointers,
    registers,
    rest_tile,
    row_mask,
    row_pointers,
    scores,
    sharing,
    statistics_pointers,
    weight_pointers,
)
from univid.kernels.triton.launch import Config, Tuned, cdiv

# --- dQ and D --------------------------------------------------------------------------------------------------------


@triton.jit
def _query_step(
    q, do, k, v, lse, centre, delta, pull, mean, weight, scale, valid,
    FIRST: tl.constexpr, MASKED: tl.constexpr, WEIGHED: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """One more tile of keys in delta = Σ P∘(dP - c), pull = Σ w·P∘(dP - c)·K and mean = Σ P·K, c being the centre.

    ``scale`` makes exponents of scores. Not WEIGHED: without w.
    """
    s = scores(q, k, valid, MASKED, 1)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    p = power(s * scale - lse[:, None], q)
    if FIRST:
        centre = tl.sum(p * dp, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
    weighed = p * (dp - centre[:, None])
    delta += tl.sum(weighed, 1)
    if DQ:
        if WEIGHED:
            weighed *= weight[:, None]
        pull = tl.dot(weighed.to(k.dtype), k, pull, input_precision="ieee")
        mean = tl.dot(p.to(k.dtype), k, mean, input_precision="ieee")
    return centre, delta, pull, mean


@triton.jit
def _query_gradient(
    q, do, pull, stream, tiles, b, h, m, M, N, scale,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr, RESIDENT: tl.constexpr,
    WEIGHED: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """``pull`` and what one stream adds to dQ / scale; writes its D."""
    FULL: tl.constexpr = full_tiles(KEYS, BLOCK_L)
    lse = exponent(tl.load(statistics_pointers(stream.logsumexp, b, h, m, M), m < M, 0.0), q)
    w = load_weight(stream, b, m, M, N)
    factor = exponent(scale, q)
    c = tl.zeros(m.shape, tl.float32)
    delta = tl.zeros(m.shape, tl.float32)
    mean = tl.zeros(q.shape, tl.float32)
    if RESIDENT:
        for i in tl.static_range(FULL):
            k, v = tiles[i]
            c, delta, pull, mean = _query_step(
                q, do, k, v, lse, c, delta, pull, mean, w, factor, 0, i == 0, False, WEIGHED, DQ
            )
        k, v = tiles[FULL]
    else:
        if FULL > 0:
            k, v = load_keys(stream, b, h, 0, BLOCK_L, HEAD_DIM, ALIGNED)
            c, delta, pull, mean = _query_step(
                q, do, k, v, lse, c, delta, pull, mean, w, factor, 0, True, False, WEIGHED, DQ
            )
        for i in range(1, FULL):
            k, v = load_keys(stream, b, h, i * BLOCK_L, BLOCK_L, HEAD_DIM, ALIGNED)
            c, delta, pull, mean = _query_step(
                q, do, k, v, lse, c, delta, pull, mean, w, factor, 0, False, False, WEIGHED, DQ
            )
        k, v = load_keys(stream, b, h, FULL * BLOCK_L, rest_tile(KEYS, BLOCK_L), HEAD_DIM, ALIGNED)
    valid = stream.length - FULL * BLOCK_L
    c, delta, pull, mean = _query_step(
        q, do, k, v, lse, c, delta, pull, mean, w, factor, valid, FULL == 0, True, WEIGHED, DQ
    )
    if stream.delta is not None:
        tl.store(statistics_pointers(stream.delta, b, h, m, M), delta + c, m < M)
    if WEIGHED:
        pull -= (delta * w)[:, None] * mean
    else:
        pull = (pull - delta[:, None] * mean) * w[:, None]
    return pull


@triton.jit(do_not_specialize=["M", "N"])
def _backward_queries(
    q_ptr, do_ptr, dq_ptr, text, image, q_strides, do_strides, scale, M, N,
    TEXT_KEYS: tl.constexpr, IMAGE_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
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
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES, disable_licm=True
    ):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = row_mask(m < M, HEAD_DIM)
        q = tl.load(query_pointers(q_ptr, q_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        do = tl.load(query_pointers(do_ptr, do_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        dq = tl.zeros(q.shape, tl.float32)
        if IMAGE_KEYS:
            dq = _query_gradient(
                q, do, dq, image, image_tiles, b, h, m, M, N, scale, IMAGE_KEYS, HEAD_DIM, ALIGNED, BLOCK_L, RESIDENT,
                False, DQ,
            )  # fmt: skip
        if TEXT_KEYS:
            dq = _query_gradient(
                q, do, dq, text, text_tiles, b, h, m, M, N, scale, TEXT_KEYS, HEAD_DIM, ALIGNED, BLOCK_L, RESIDENT,
                IMAGE_KEYS > 0, DQ,
            )  # fmt: skip
        if DQ:
            pointers = row_pointers(dq_ptr, b * M + m, h, HEAD_DIM)
            tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), mask)


# --- dK and dV -------------------------------------------------------------------------------------------------------


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
def _keys_pointers(x, strides_b, stride_l, stride_h, b, h, row, ALIGNED: tl.constexpr):
    offsets = b * strides_b + h * stride_h + row.to(tl.int64) * stride_l
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 8)
    return x + offsets


@triton.jit
def _key_pointers(first, second, b, h, row, BOTH: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr):
    """To the keys and values ``row``, which are the first stream's and behind them the second's."""
    k = _keys_pointers(first.k, first.k_b, first.k_l, first.k_h, b, h, row, ALIGNED)
    v = _keys_pointers(first.v, first.v_b, first.v_l, first.v_h, b, h, row, ALIGNED)
    if BOTH:
        behind = row - first.length
        k = tl.where(behind < 0, k, _keys_pointers(second.k, second.k_b, second.k_l, second.k_h, b, h, behind, ALIGNED))
        v = tl.where(behind < 0, v, _keys_pointers(second.v, second.v_b, second.v_l, second.v_h, b, h, behind, ALIGNED))
    columns = tl.arange(0, padded(HEAD_DIM))[None, :]
    return k[:, None] + columns, v[:, None] + columns


@triton.jit
def _weight_of(stream, b, m, exists, N):
    """A stream's weight at some queries; 1 for a number, which waits until the sums are there."""
    if stream.w_b is None:
        weight = tl.full(m.shape, 1.0, tl.float32)
    else:
        pointers = weight_pointers(stream, b, m, N)
        weight, _ = _load_pairs(pointers, pointers, exists)
        weight = weight.to(tl.float32)
    return weight


@triton.jit
def _store_keys(x_ptr, x, rows, h, exists, HEAD_DIM: tl.constexpr):
    if x_ptr is not None:
        tl.store(row_pointers(x_ptr, rows, h, HEAD_DIM), x.to(x_ptr.dtype.element_ty), row_mask(exists, HEAD_DIM))


@triton.jit
def _key_gradients(
    q_ptr, do_ptr, first, second, q_strides, do_strides, row, split, split_rows, scale, M, N,
    MIXED: tl.constexpr, BOTH: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A split's part in dK and dV of the keys ``row``, which are the first stream's and behind them the second's.

    Not MIXED: all are of one stream.
    """
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    is_first = row < first.length
    total = first.length
    if BOTH:
        total += second.length
    key_mask = row_mask(row < total, HEAD_DIM)
    k_ptrs, v_ptrs = _key_pointers(first, second, b, h, row, BOTH, HEAD_DIM, ALIGNED)
    k = tl.load(k_ptrs, key_mask, 0.0)
    v = tl.load(v_ptrs, key_mask, 0.0)
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    lse_head = first.logsumexp
    delta_head = first.delta
    in_first = tl.min(row, 0) < first.length
    if BOTH and not MIXED:
        lse_head = tl.where(in_first, lse_head, second.logsumexp)
        if DK:
            delta_head = tl.where(in_first, delta_head, second.delta)
    factor = exponent(scale, k)
    end = tl.minimum((split + 1) * split_rows, M)
    for start in tl.range(split * split_rows, end, BLOCK_M, disable_licm=True):
        m = start + tl.arange(0, BLOCK_M)
        exists = m < end
        mask = row_mask(exists, HEAD_DIM)
        q = tl.load(query_pointers(q_ptr, q_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        do = tl.load(query_pointers(do_ptr, do_strides, b, h, m, N, HEAD_DIM, ALIGNED, FLAT), mask, 0.0)
        lse_ptrs = statistics_pointers(lse_head, b, h, m, M)
        delta_ptrs = lse_ptrs
        if DK:
            delta_ptrs = statistics_pointers(delta_head, b, h, m, M)
        lse, delta = _load_pairs(lse_ptrs, delta_ptrs, exists)
        lse = exponent(lse, q)[None, :]
        delta = delta[None, :]
        if MIXED:
            lse_ptrs = statistics_pointers(second.logsumexp, b, h, m, M)
            delta_ptrs = lse_ptrs
            if DK:
                delta_ptrs = statistics_pointers(second.delta, b, h, m, M)
            lse_second, delta_second = _load_pairs(lse_ptrs, delta_ptrs, exists)
            lse = tl.where(is_first[:, None], lse, exponent(lse_second, q)[None, :])
            delta = tl.where(is_first[:, None], delta, delta_second[None, :])
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        if DK:
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        p = power(s * factor - lse, q)
        if first.w_b is not None or (BOTH and second.w_b is not None):
            weight = _weight_of(first, b, m, exists, N)[None, :]
            if BOTH:
                weight = tl.where(is_first[:, None], weight, _weight_of(second, b, m, exists, N)[None, :])
            p *= weight
        if DV:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        if DK:
            ds = p * (dp - delta)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    number = tl.full(row.shape, 1.0, tl.float32)
    if first.w_b is None:
        number = tl.where(is_first, first.weight, number)
    if BOTH and second.w_b is None:
        number = tl.where(is_first, number, second.weight)
    dk *= (number * scale)[:, None]
    dv *= number[:, None]
    begin = split * tl.num_programs(2) + b
    rows = begin * first.length + row
    _store_keys(first.dk, dk, rows, h, is_first, HEAD_DIM)
    _store_keys(first.dv, dv, rows, h, is_first, HEAD_DIM)
    if BOTH:
        rows = begin * second.length + row - first.length
        exists = (row < total) & (row >= first.length)
        _store_keys(second.dk, dk, rows, h, exists, HEAD_DIM)
        _store_keys(second.dv, dv, rows, h, exists, HEAD_DIM)


@triton.jit(do_not_specialize=["split_rows", "M", "N"])
def _backward_keys(
    q_ptr, do_ptr, first, second, q_strides, do_strides, split_rows, scale, M, N,
    BOTH: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    length = first.length
    if BOTH:
        length += second.length
    tiles = tl.cdiv(length, BLOCK_L)
    # Tiles vary fastest: programs that run at the same time read the same queries.
    start = tl.program_id(0) % tiles * BLOCK_L
    split = tl.program_id(0) // tiles
    row = start + tl.arange(0, BLOCK_L)
    mixed = False
    if BOTH:
        mixed = (start < first.length) & (start + BLOCK_L > first.length)
        if mixed:
            _key_gradients(
                q_ptr, do_ptr, first, second, q_strides, do_strides, row, split, split_rows, scale, M, N,
                True, BOTH, DK, DV, HEAD_DIM, ALIGNED, FLAT, BLOCK_M,
            )  # fmt: skip
    if not mixed:
        _key_gradients(
            q_ptr, do_ptr, first, second, q_strides, do_strides, row, split, split_rows, scale, M, N,
            False, BOTH, DK, DV, HEAD_DIM, ALIGNED, FLAT, BLOCK_M,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "sizes"])
def _add_partials(partials, gradients, sizes, splits, BLOCK: tl.constexpr):
    """Adds up to four gradients' partial sums (splits, size), one behind the other; y says which gradient."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(sizes)):
        size = tl.cast(sizes[i], tl.int64)
        if tl.program_id(1) == i:
            total = tl.zeros([BLOCK], tl.float32)
            for split in range(splits):
                total += tl.load(partials + split * size + index, index < size, 0.0)
            tl.store(gradients[i] + index, total.to(gradients[i].dtype.element_ty), index < size)
        partials += splits * size


# --- launching -------------------------------------------------------------------------------------------------------


def _query_configs(key: dict) -> list[Config]:
    if key["dtype"] == "fp32":
        return [
            Config({"BLOCK_M": 16, "BLOCK_L": 16, "RESIDENT": 0}, num_warps=8, num_stages=1),
            Config({"BLOCK_M": 32, "BLOCK_L": 16, "RESIDENT": 0}, num_warps=16, num_stages=1),
        ]
    streamed = [
        Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": 0}, num_warps=4, num_stages=2),
        Config({"BLOCK_M": 64, "BLOCK_L": 32, "RESIDENT": 0}, num_warps=4, num_stages=3),
    ]
    if key["D"] > 64:
        return streamed[::-1]
    if key["resident"] == 0:
        return streamed
    resident = Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": MULTIPROCESSORS * key["resident"]}, num_stages=1)
    if key["resident"] == 1:
        return [resident, *streamed]
    # The room of two programs taken by one, whose next tile arrives while this one is worked on.
    wide = Config({"BLOCK_M": 128, "BLOCK_L": 64, "RESIDENT": MULTIPROCESSORS}, num_warps=8, num_stages=2)
    return [wide, resident, *streamed]


def _key_configs(key: dict) -> list[Config]:
    if key["dtype"] == "fp32":
        return [Config({"BLOCK_M": 32, "BLOCK_L": 32}, num_warps=8, num_stages=1)]
    if key["D"] > 64:
        return [
            Config({"BLOCK_M": 32, "BLOCK_L": 64}, num_warps=4, num_stages=2),
            Config({"BLOCK_M": 64, "BLOCK_L": 64}, num_warps=8, num_stages=2),
        ]
    return [
        Config({"BLOCK_M": 64, "BLOCK_L": 64, **registers(168)}, num_warps=4, num_stages=3),
        Config({"BLOCK_M": 64, "BLOCK_L": 64}, num_warps=4, num_stages=3),
    ]


_BACKWARD_QUERIES = Tuned(_backward_queries, _query_configs)
_BACKWARD_KEYS = Tuned(_backward_keys, _key_configs)
_ADD_PARTIALS = Tuned(_add_partials, lambda key: [Config({"BLOCK": 512}, num_warps=4, num_stages=1)])


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
    dk = text.dk is not None or image.dk is not None
    dv = text.dv is not None or image.dv is not None
    text_delta, image_delta = _delta(text, lse_text, dk), _delta(image, lse_image, dk)

    passing = call if dq is not None else _keep(call, text_delta is not None, image_delta is not None)
    if passing is not None:
        plan = plan_of(passing, grad)
        _BACKWARD_QUERIES(
            plan.query_grid,
            *(call.q, grad, dq),
            keys_of(passing.text, plan.text, lse_text, text_delta),
            keys_of(passing.image, plan.image, lse_image, image_delta),
            *(*plan.strides, call.scale, plan.rows, plan.tokens),
            key=plan.key,
            **plan.lengths,
            **plan.constants,
        )

    passing = _keep(call, *(x.dk is not None or x.dv is not None for x in (text, image)))
    if passing is None:
        return
    gradients = tuple(x for x in (text.dk, text.dv, image.dk, image.dv) if x is not None)
    plan = plan_of(passing, grad)
    splits, split_rows = _splits(plan)
    sizes = tuple(x.numel() for x in gradients)
    partials = None
    if splits > 1:
        partials = grad.new_empty(splits * sum(sizes), dtype=torch.float32)
        pieces = iter(partials.split([splits * size for size in sizes]))
        text, image = (
            grads._replace(**{name: next(pieces) for name in ("dk", "dv") if getattr(grads, name) is not None})
            for grads in (text, image)
        )
    keys = (
        keys_of(passing.text, plan.text, lse_text, text_delta, text.dk, text.dv),
        keys_of(passing.image, plan.image, lse_image, image_delta, image.dk, image.dv),
    )
    first, second = keys if keys[0] is not None else keys[::-1]
    _BACKWARD_KEYS(
        lambda meta: (splits * cdiv(plan.keys, meta["BLOCK_L"]), plan.heads, plan.clips),
        *(call.q, grad, first, second, *plan.strides, split_rows, call.scale, plan.rows, plan.tokens),
        key=plan.key,
        BOTH=second is not None,
        DK=dk,
        DV=dv,
        **plan.constants,
    )
    if partials is not None:
        longest = max(sizes)
        _ADD_PARTIALS(
            lambda meta: (cdiv(longest, meta["BLOCK"]), len(sizes), 1), partials, gradients, sizes, splits, key={}
        )


def _delta(grads: StreamGrads, logsumexp: Tensor, dk: bool) -> Tensor | None:
    """Where a stream's D goes: the weight's gradient, or memory for the kernel of ``dk``; None where nobody reads it."""
    if grads.dweight is None and (grads.dk is not None or (dk and grads.dv is not None)):
        return torch.empty_like(logsumexp)
    return grads.dweight


def _keep(call: DualStreamCall, text: bool, image: bool) -> DualStreamCall | None:
    """The call with these streams only; None if none is left."""
    if not text and not image:
        return None
    return call._replace(text=call.text if text else None, image=call.image if image else None)


def _splits(plan: Plan) -> tuple[int, int]:
    """Into how many ranges the queries are split, and the size of one, three programs running on a multiprocessor."""
    tiles = cdiv(plan.rows, 64)
    splits = sharing(tiles, plan.clips * plan.heads * cdiv(plan.keys, 64), 3 * MULTIPROCESSORS)
    size = cdiv(tiles, splits) * 64
    return cdiv(plan.rows, size), size
