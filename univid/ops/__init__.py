"""The operators: fast attention, convolution and norms for video models.

Each takes PyTorch tensors on any device and runs on the fastest backend that can: compiled CUDA (Hopper), Triton (other
GPUs), or PyTorch. ``explain`` says which one would run a call, and why the faster ones would not.
"""

from univid.ops.add_bias import add_bias
from univid.ops.add_layer_norm import add_layer_norm
from univid.ops.concat import concat
from univid.ops.dispatch import BACKENDS
from univid.ops.dual_stream import dual_stream_attn
from univid.ops.explain import explain
from univid.ops.geglu import geglu
from univid.ops.group_norm import group_norm_silu
from univid.ops.linear_geglu import linear_geglu
from univid.ops.pyramid import pyramid_st_attn, pyramid_st_attn_qkv
from univid.ops.reference_frames import ReferenceFrames
from univid.ops.temporal import temporal_attn, temporal_attn_qkv
from univid.ops.temporal_conv import temporal_conv

__all__ = [
    "BACKENDS",
    "ReferenceFrames",
    "add_bias",
    "add_layer_norm",
    "concat",
    "dual_stream_attn",
    "explain",
    "geglu",
    "group_norm_silu",
    "linear_geglu",
    "pyramid_st_attn",
    "pyramid_st_attn_qkv",
    "temporal_attn",
    "temporal_attn_qkv",
    "temporal_conv",
]
