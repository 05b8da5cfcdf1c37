"""Attention kernels that one would call instead of ours, on q (B, Sq, H, D) and k, v (B, Sk, H, D)."""

import importlib
import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from univid.ops import ReferenceFrames

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # what it compiles, other processes find
try:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
except Exception:  # not installed, or not for this machine
    flash_attn_func = flash_attn_varlen_func = None
OLDER = {}  # FlashAttention's earlier packages
for version, package in (("FlashAttention-3", "flash_attn_interface"), ("FlashAttention-2", "flash_attn")):
    try:
        OLDER[version] = importlib.import_module(package).flash_attn_func
    except Exception:  # as above; flash-attn-4 alone leaves a flash_attn without it
        continue

torch._dynamo.config.recompile_limit = 128  # a compiled peer is compiled for each of its shapes

BLOCK = 128  # rows and columns of a block in block-sparse attention


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return run


ATTENTION = {
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA mem-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
}
for name, attend in (OLDER | ({"FlashAttention-4": flash_attn_func} if flash_attn_func else {})).items():
    ATTENTION[name] = lambda q, k, v, attend=attend: _first(attend(q, k, v))

COMPILED = ("FlashAttention-4",)  # at their first calls


def paged(page_table: Tensor, keys: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashAttention-4 over pages of keys and values (pages, tokens, H, D): row i of q reads the pages
    ``page_table[i]``, which hold ``keys[i]`` keys."""
    return lambda q, k, v: _first(flash_attn_varlen_func(q, k, v, page_table=page_table, seqused_k=keys))


def block_sparse(refs: ReferenceFrames, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashAttention-4's block-sparse attention over whole clips, whose frames of ``tokens`` tokens are padded to whole
    blocks; the keys that are padding are masked."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    blocks = -(-tokens // BLOCK)
    padded = blocks * BLOCK

    @cute.jit
    def is_token(batch, head, query, key, seqlen_info, aux_tensors):
        return key % utils.scalar_to_ssa(padded, cutlass.Int32) < utils.scalar_to_ssa(tokens, cutlass.Int32)

    some = reads(refs).repeat_interleave(blocks, 0).repeat_interleave(blocks, 1)
    last = torch.arange(some.shape[1], device=some.device) % blocks == blocks - 1
    partial = some & last if padded > tokens else torch.zeros_like(some)

    def tensors(partial: Tensor, full: Tensor) -> BlockSparseTensorsTorch:
        lists = (x.contiguous() for x in (*_lists(partial), *_lists(full)))
        return BlockSparseTensorsTorch(*lists, block_size=(BLOCK, BLOCK))

    options = {
        "block_sparse_tensors": tensors(partial, some & ~partial),
        "block_sparse_tensors_bwd": tensors(partial.T, (some & ~partial).T),
        "mask_mod": is_token if padded > tokens else None,
    }
    return lambda q, k, v: _first(flash_attn_func(q, k, v, **options))


def flex(refs: ReferenceFrames, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over whole clips, with a block mask."""
    allowed = reads(refs)
    frames = len(allowed)
    size = frames * tokens
    start = torch.arange(0, size, BLOCK, device=allowed.device)[:, None]
    frame = torch.arange(frames, device=allowed.device)
    # Which frames a block's tokens belong to; a product of such is nonzero where any two of them meet.
    spans = ((frame >= start // tokens) & (frame <= (start + BLOCK - 1).clamp(max=size - 1) // tokens)).float()
    some, none = (spans @ x.float() @ spans.T > 0 for x in (allowed, ~allowed))
    if size % BLOCK:
        none[-1], none[:, -1] = True, True  # tokens past the end
    mask = BlockMask.from_kv_blocks(
        *_lists(some & none),
        *_lists(some & ~none),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, query, key: allowed[query // tokens, key // tokens],
        seq_lengths=(size, size),
    )
    return lambda q, k, v: _compiled_flex()(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def reads(refs: ReferenceFrames) -> Tensor:
    """Whether frame i reads frame j, (T, T), of a table (1, T, R) that names no frame twice."""
    table = refs.table[0].long()
    return torch.zeros(len(table), refs.num_key_frames, dtype=torch.bool, device=table.device).scatter_(1, table, True)


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a matrix of blocks, how many it has, and which, the others after them."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
