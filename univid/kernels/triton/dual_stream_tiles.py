"""What the forward and the backward of dual-stream attention in Triton share: tiles of queries and of keys, and how a launch is planned."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from univid.kernels.calls import DualStreamCall, Stream
from univid.kernels.triton import launch
from univid.kernels.triton.launch import DTYPES, cdiv, next_power_of_2

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
MULTIPROCESSORS = 132  # of a Hopper card: what grids are made for


class Keys(NamedTuple):
    """A stream as the kernels take it. Strides of a dimension that broadcasts are 0, those of a number None.

    Flat, because Triton 3.6 forgets constants in a tuple of a tuple.
    """

    k: Tensor  # (B, L, H, D)
    v: Tensor  # (B, L, H, D)
    weight: Tensor | float  # (1 or B, 1 or T, 1 or N)
    logsumexp: Tensor  # (B, H, T, N) float32
    delta: Tensor | None  # (B, H, T, N) float32: rowsum(P∘dP), in the backward
    dk: Tensor | None  # (splits, B, L, H, D), in the backward: float32 partial sums, or with one split the gradient
    dv: Tensor | None
    length: int
    k_b: int
    k_l: int
    k_h: int
    v_b: int
    v_l: int
    v_h: int
    w_b: int | None
    w_t: int | None
    w_n: int | None


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def padded(head_dim: int) -> int:
    """Columns of a tile: a power of two that a product takes."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.constexpr_function
def full_tiles(keys: int, block: int) -> int:
    """How many tiles are surely full, L being one of the 16 numbers up to ``keys``."""
    return (keys - 15) // block


@triton.constexpr_function
def rest_tile(keys: int, block: int) -> int:
    """The size of the tile that holds what the full ones leave, 1 to ``block`` keys."""
    return max(16, triton.next_power_of_2(keys - (keys - 15) // block * block))


@triton.jit
def _row_pointers(x, base, offsets, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr):
    """To the rows at ``offsets`` from ``base``. ALIGNED: all strides are multiples of 8."""
    offsets = base + offsets[:, None]
    if ALIGNED:
        offsets = tl.multiple_of(offsets, (8, 8))
    return x + offsets + tl.arange(0, padded(HEAD_DIM))[None, :]


@triton.jit
def row_mask(exists, HEAD_DIM: tl.constexpr):
    """The mask of a tile, some of whose rows exist."""
    mask = exists[:, None]
    if padded(HEAD_DIM) != HEAD_DIM:
        mask = mask & (tl.arange(0, padded(HEAD_DIM)) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def query_pointers(x, strides, b, h, m, N, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, FLAT: tl.constexpr):
    """To the queries m = t·N + n of a (B, T, N, H, D) tensor. FLAT: frames are N tokens apart."""
    if FLAT:
        offsets = m.to(tl.int64) * strides[2]
    else:
        frames = (m // N).to(tl.int64)
        tokens = (m % N).to(tl.int64)
        offsets = frames * strides[1] + tokens * strides[2]
    return _row_pointers(x, b * strides[0] + h * strides[3], offsets, HEAD_DIM, ALIGNED)


@triton.jit
def row_pointers(x, rows, h, HEAD_DIM: tl.constexpr):
    """To the rows of a contiguous (..., H, D) tensor."""
    offsets = (rows * tl.num_programs(1) + h) * HEAD_DIM
    return x + offsets[:, None] + tl.arange(0, padded(HEAD_DIM))[None, :]


@triton.jit
def statistics_pointers(x, b, h, m, M):
    """To the queries' numbers in a float32 (B, H, T, N) tensor."""
    return x + (b * tl.num_programs(1) + h) * M + m


@triton.jit
def load_keys(stream, b, h, start, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr):
    """SIZE keys and values from ``start`` on, zeros past the end."""
    index = start + tl.arange(0, SIZE)
    mask = row_mask(index < stream.length, HEAD_DIM)
    index = index.to(tl.int64)
    k_ptrs = _row_pointers(stream.k, b * stream.k_b + h * stream.k_h, index * stream.k_l, HEAD_DIM, ALIGNED)
    v_ptrs = _row_pointers(stream.v, b * stream.v_b + h * stream.v_h, index * stream.v_l, HEAD_DIM, ALIGNED)
    return tl.load(k_ptrs, mask, 0.0), tl.load(v_ptrs, mask, 0.0)


@triton.jit
def load_all_keys(
    stream, b, h, KEYS: tl.constexpr, BLOCK_L: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr
):
    """All tiles of a stream, each (keys, values): the full ones, then the rest. An absent stream has none."""
    tiles = ()  # type: tuple
    if KEYS:
        FULL: tl.constexpr = full_tiles(KEYS, BLOCK_L)
        for i in tl.static_range(FULL):
            tiles += (load_keys(stream, b, h, i * BLOCK_L, BLOCK_L, HEAD_DIM, ALIGNED),)
        tiles += (load_keys(stream, b, h, FULL * BLOCK_L, rest_tile(KEYS, BLOCK_L), HEAD_DIM, ALIGNED),)
    return tiles


@triton.jit
def weight_pointers(stream, b, m, N):
    offsets = (m // N).to(tl.int64) * stream.w_t + (m % N).to(tl.int64) * stream.w_n
    return stream.weight + b * stream.w_b + offsets


@triton.jit
def load_weight(stream, b, m, M, N):
    """The stream's weight at every query, in float32."""
    if stream.w_b is None:
        weight = tl.zeros(m.shape, tl.float32) + stream.weight
    else:
        weight = tl.load(weight_pointers(stream, b, m, N), m < M, 0.0).to(tl.float32)
    return weight


@triton.jit
def exponent(logits, q):
    """The argument of ``power``: of 2, which is cheapest, but of e in float32, where a change of base costs digits."""
    return logits if q.dtype == tl.float32 else logits * LOG2E


@triton.jit
def power(exponents, q):
    return tl.exp(exponents) if q.dtype == tl.float32 else tl.exp2(exponents)


@triton.jit
def scores(a, b, valid, MASKED: tl.constexpr, KEY_AXIS: tl.constexpr):
    """a·bᵀ, one of which are keys; MASKED: -inf past the ``valid`` ones."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if MASKED:
        exists = tl.arange(0, s.shape[KEY_AXIS]) < valid
        s = tl.where(tl.expand_dims(exists, 1 - KEY_AXIS), s, float("-inf"))
    return s


# --- launches --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What launches need besides memory; it follows from shapes and strides, and is worked out once for each."""

    clips: int
    heads: int
    rows: int  # T·N
    tokens: int  # N
    keys: int  # of both streams
    strides: tuple[tuple[int, ...], ...]  # of q, and of the gradient in the backward
    text: tuple[Any, ...]  # what follows the tensors in Keys; empty for an absent stream
    image: tuple[Any, ...]
    query_grid: Callable[[dict], tuple[int, int, int]]  # programs along x share the query tiles of a head of a clip
    key: dict  # what the best configuration depends on
    lengths: dict[str, int]  # constexprs
    constants: dict


def plan_of(call: DualStreamCall, grad: Tensor | None = None) -> Plan:
    q, text, image, _ = call
    rows = (q.stride(),) if grad is None else (q.stride(), grad.stride())
    return _plan(q.shape, q.dtype, q.device, rows, layout_of(text), layout_of(image))


def layout_of(stream: Stream | None) -> tuple | None:
    """A stream's number of keys, and the strides of its keys and values and of its weight, if that is a tensor."""
    if stream is None:
        return None
    k, v, weight = stream
    of_weight = (weight.shape, weight.stride()) if isinstance(weight, Tensor) else None
    return k.shape[1], k.stride(), v.stride(), of_weight


@functools.lru_cache(4096)
def _plan(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    row_strides: tuple,
    text: tuple | None,
    image: tuple | None,
) -> Plan:
    clips, frames, tokens, heads, head_dim = shape
    strides = [_strides(shape, x) for x in row_strides]
    text_sizes, image_sizes = (_sizes(shape, stream) for stream in (text, image))
    text_keys, image_keys = (0 if stream is None else cdiv(stream[0], 16) * 16 for stream in (text, image))
    resident = _resident_programs(dtype, device, head_dim, text_keys, image_keys)
    read = [stride for x in strides for stride in x[:-1]] + [
        x for sizes in (text_sizes, image_sizes) for x in sizes[1:7]
    ]

    def grid(meta: dict) -> tuple[int, int, int]:
        tiles = cdiv(frames * tokens, meta["BLOCK_M"])
        return sharing(tiles, clips * heads, meta["RESIDENT"]) if meta["RESIDENT"] else tiles, heads, clips

    return Plan(
        clips,
        heads,
        frames * tokens,
        tokens,
        sum(stream[0] for stream in (text, image) if stream is not None),
        tuple(x[:4] for x in strides),
        text_sizes,
        image_sizes,
        grid,
        {
            "dtype": DTYPES[dtype],
            "D": next_power_of_2(max(16, head_dim)),
            "resident": resident,
            "keys": next_power_of_2(text_keys + image_keys),
            "rows": next_power_of_2(clips * heads * frames * tokens),
        },
        {"TEXT_KEYS": text_keys, "IMAGE_KEYS": image_keys},
        {
            "HEAD_DIM": head_dim,
            "ALIGNED": all(stride % 8 == 0 for stride in read),
            "FLAT": frames == 1 or all(t == tokens * n for _, t, n, *_ in strides),
        },
    )


def _sizes(shape: torch.Size, stream: tuple | None) -> tuple[Any, ...]:
    """What follows the tensors in ``Keys``."""
    if stream is None:
        return ()
    length, k_strides, v_strides, weight = stream
    keys = (shape[0], length, *shape[3:])
    of_weight = (None, None, None) if weight is None else _strides(*weight)
    return length, *_strides(keys, k_strides)[:3], *_strides(keys, v_strides)[:3], *of_weight


def _strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides, 0 along dimensions of one element."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))


def keys_of(
    stream: Stream | None,
    sizes: tuple[Any, ...],
    logsumexp: Tensor,
    delta: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> Keys | None:
    if stream is None:
        return None
    k, v, weight = stream
    return Keys(k, v, weight, logsumexp, delta, dk, dv, *sizes)


@functools.lru_cache(1024)
def sharing(tiles: int, heads: int, slots: int) -> int:
    """How many programs share a head's query tiles, ``slots`` running at once, so that the last is done soonest.

    Loading the keys counts as one tile.
    """
    return min(range(1, min(tiles, slots) + 1), key=lambda n: cdiv(n * heads, slots) * (cdiv(tiles, n) + 1))


def _resident_programs(dtype: torch.dtype, device: torch.device, head_dim: int, text_keys: int, image_keys: int) -> int:
    """How many programs, each with all keys and values, a multiprocessor holds: 0, 1 or 2."""
    streams = [keys for keys in (text_keys, image_keys) if keys]
    if dtype.itemsize != 2 or sum(streams) > 768:  # more would be too much code, unrolled
        return 0
    keys = sum(full_tiles(n, 64) * 64 + rest_tile(n, 64) for n in streams)
    # With them 128 rows of queries (or 64 of queries and of gradients), and 4 KB for what warps exchange.
    needed = (2 * keys + 128) * 2 * padded(head_dim) + 4096
    return min(2, _shared_memory(device.index) // needed)


@functools.cache
def _shared_memory(device: int | None) -> int:
    """Bytes that a program can have; the interpreter behaves as a Hopper card."""
    if launch.interpreted():
        return 227 * 1024
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def registers(limit: int) -> dict[str, int]:
    """A limit on the registers of a thread, which only NVIDIA's compiler takes."""
    return {"maxnreg": limit} if torch.version.cuda else {}
