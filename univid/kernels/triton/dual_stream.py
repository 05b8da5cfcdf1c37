"""Dual-stream attention in Triton: one pass over the queries; each of two small sets of keys has a softmax of its own.

The T·N queries of a clip are one long query. The keys of a (clip, head), 77 of a text and 257 of an image, are few:

* **Tiles of keys.** A stream is cut into full tiles of BLOCK_L keys, which need no mask, and one masked rest of 16 to
  BLOCK_L keys: at BLOCK_L = 64, 77 keys cost 64 + 16 columns and 257 cost 4·64 + 16. The cut is known when a kernel is
  compiled, from L rounded up to 16 (TEXT_KEYS, IMAGE_KEYS; 0 for an absent stream).
* **Resident keys.** Where the keys and values of both streams fit into shared memory, a program loads them once and
  loops over many query tiles, its loop over the keys unrolled (RESIDENT: how many programs run at once): a tile's
  scores are made before the softmax over the tile before it. Else (RESIDENT = 0) a program has one query tile and
  streams the keys.
* Each stream's sum is scaled by weight / rowsum when its keys have passed; the output is written once.

Budget at D = 64 in bfloat16, 77 + 257 keys: 352 rows of keys and of values are 88 KB, twice 64 queries 16 KB; two
programs share a multiprocessor. A thread of 4 warps keeps 2·32 scores, 16 registers of probabilities, and 32 + 32 sums, 140
registers in all: descriptors of the many tiles, which LLVM would keep in 80 more, are made anew in every round
(disable_licm). The backward is in ``dual_stream_bwd.py``; what both share, in ``dual_stream_tiles.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import DualStreamCall, StreamGrads
from univid.kernels.triton import dual_stream_bwd, launch
from univid.kernels.triton.dual_stream_tiles import (
    LN2,
    MULTIPROCESSORS,
    exponent,
    full_tiles,
    keys_of,
    load_all_keys,
    load_keys,
    load_weight,
    plan_of,
    power,
    query_pointers,
    rest_tile,
    row_mask,
    row_pointers,
    scores,
    statistics_pointers,
)
from univid.kernels.triton.launch import Config, Tuned

# --- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_step(s, v, peak, total, acc, scale, FIRST: tl.constexpr):
    """The online softmax over one more tile of keys, whose scores are ``s``; ``scale`` makes exponents of scores."""
    highest = tl.max(s, 1) * scale
    if not FIRST:
        highest = tl.maximum(peak, highest)
    p = power(s * scale - highest[:, None], v)
    if FIRST:
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        rescale = power(peak - highest, v)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def _first_scores(q, stream, tiles, KEYS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Of a stream's first tile of keys."""
    return scores(q, tiles[0][0], stream.length, full_tiles(KEYS, BLOCK_L) == 0, 1)


@triton.jit
def _attend(
    q, ahead, stream, tiles, next_stream, next_tiles, b, h, m, M, N, scale,
    KEYS: tl.constexpr, NEXT_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_L: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """weight · softmax(scale·q·kᵀ)·v of one stream; writes its logsumexp.

    RESIDENT: ``ahead`` holds the scores of its first tile, and comes back with those of the next stream's.
    """
    FULL: tl.constexpr = full_tiles(KEYS, BLOCK_L)
    scale = exponent(scale, q)
    peak = tl.full(m.shape, float("-inf"), tl.float32)
    total = tl.zeros(m.shape, tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    valid = stream.length - FULL * BLOCK_L
    if RESIDENT:
        for i in tl.static_range(FULL + 1):
            s = ahead
            if i < FULL:
                ahead = scores(q, tiles[i + 1][0], valid, i + 1 == FULL, 1)
            elif NEXT_KEYS:
                ahead = _first_scores(q, next_stream, next_tiles, NEXT_KEYS, BLOCK_L)
            peak, total, acc = _softmax_step(s, tiles[i][1], peak, total, acc, scale, i == 0)
    else:
        for i in range(FULL):
            k, v = load_keys(stream, b, h, i * BLOCK_L, BLOCK_L, HEAD_DIM, ALIGNED)
            peak, total, acc = _softmax_step(scores(q, k, 0, False, 1), v, peak, total, acc, scale, False)
        k, v = load_keys(stream, b, h, FULL * BLOCK_L, rest_tile(KEYS, BLOCK_L), HEAD_DIM, ALIGNED)
        peak, total, acc = _softmax_step(scores(q, k, valid, True, 1), v, peak, total, acc, scale, FULL == 0)
    if q.dtype != tl.float32:
        peak *= LN2
    tl.store(statistics_pointers(stream.logsumexp, b, h, m, M), peak + tl.log(total), m < M)
    return acc * (load_weight(stream, b, m, M, N) / total)[:, None], ahead


@triton.jit(do_not_specialize=["M", "N"])
def _forward(
    q_ptr, out_ptr, text, image, q_strides, scale, M, N,
    TEXT_KEYS: tl.constexpr, IMAGE_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
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
        result = tl.zeros(q.shape, tl.float32)
        ahead = 0
        if RESIDENT:
            if IMAGE_KEYS:
                ahead = _first_scores(q, image, image_tiles, IMAGE_KEYS, BLOCK_L)
            else:
                ahead = _first_scores(q, text, text_tiles, TEXT_KEYS, BLOCK_L)
        # The image first, it being the longer one: its result waits in registers while the other's grows.
        if IMAGE_KEYS:
            part, ahead = _attend(
                q, ahead, image, image_tiles, text, text_tiles, b, h, m, M, N, scale, IMAGE_KEYS, TEXT_KEYS,
                HEAD_DIM, ALIGNED, BLOCK_L, RESIDENT,
            )  # fmt: skip
            result += part
        if TEXT_KEYS:
            part, ahead = _attend(
                q, ahead, text, text_tiles, None, (), b, h, m, M, N, scale, TEXT_KEYS, 0,
                HEAD_DIM, ALIGNED, BLOCK_L, RESIDENT,
            )  # fmt: skip
            result += part
        pointers = row_pointers(out_ptr, b * M + m, h, HEAD_DIM)
        tl.store(pointers, result.to(out_ptr.dtype.element_ty), mask)


# --- launching -------------------------------------------------------------------------------------------------------


def _configs(key: dict) -> list[Config]:
    if key["dtype"] == "fp32":
        return [
            Config({"BLOCK_M": 32, "BLOCK_L": 32, "RESIDENT": 0}, num_warps=8, num_stages=1),
            Config({"BLOCK_M": 64, "BLOCK_L": 32, "RESIDENT": 0}, num_warps=8, num_stages=1),
        ]
    streamed = [
        Config({"BLOCK_M": 128, "BLOCK_L": 64, "RESIDENT": 0}, num_warps=8, num_stages=2),
        Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": 0}, num_warps=4, num_stages=2),
        Config({"BLOCK_M": 64, "BLOCK_L": 32, "RESIDENT": 0}, num_warps=4, num_stages=3),
    ]
    programs = MULTIPROCESSORS * key["resident"]
    if programs == 0:
        return streamed
    if programs == MULTIPROCESSORS:
        return [Config({"BLOCK_M": 128, "BLOCK_L": 64, "RESIDENT": programs}, num_warps=8, num_stages=1), *streamed]
    # With two stages the queries of the next tile arrive while this one is worked on.
    return [
        Config({"BLOCK_M": 64, "BLOCK_L": 64, "RESIDENT": programs}, num_warps=4, num_stages=2),
        Config({"BLOCK_M": 128, "BLOCK_L": 64, "RESIDENT": MULTIPROCESSORS}, num_warps=8, num_stages=2),
        *streamed[:2],
    ]


_FORWARD = Tuned(_forward, _configs)


def unsupported(call: DualStreamCall) -> str | None:
    head_dim = call.q.shape[-1]
    if head_dim % 8 or head_dim > 128:
        return f"head dimension {head_dim}: a multiple of 8 up to 128 needed"
    clips, heads = call.q.shape[0], call.q.shape[3]
    if max(clips, heads) > 65535:  # a grid's second and third sizes
        return f"{clips} clips of {heads} heads: at most 65535 of each needed"
    return launch.unsupported(call.q)


def forward(call: DualStreamCall) -> tuple[Tensor, Tensor, Tensor]:
    q = call.q
    clips, frames, tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse_text, lse_image = (
        q.new_empty((0,) if stream is None else (clips, heads, frames, tokens), dtype=torch.float32)
        for stream in (call.text, call.image)
    )
    plan = plan_of(call)
    _FORWARD(
        plan.query_grid,
        q,
        out,
        keys_of(call.text, plan.text, lse_text),
        keys_of(call.image, plan.image, lse_image),
        *plan.strides,
        call.scale,
        plan.rows,
        plan.tokens,
        key=plan.key,
        **plan.lengths,
        **plan.constants,
    )
    return out, lse_text, lse_image


def backward(
    call: DualStreamCall,
    grad: Tensor,
    out: Tensor,
    lse_text: Tensor,
    lse_image: Tensor,
    dq: Tensor | None,
    text_grads: StreamGrads | None,
    image_grads: StreamGrads | None,
) -> None:
    dual_stream_bwd.backward(call, grad, lse_text, lse_image, dq, text_grads, image_grads)
