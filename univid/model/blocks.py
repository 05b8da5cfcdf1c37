"""The blocks of the U-Net: Stable Diffusion 2.1's, and what the paper gives them of time (eq. 5).

Activations are channels-last, ``(B, T, h, w, C)`` in residual blocks and ``(B, T, N, C)`` with N = h·w in transformers:
views of one buffer. Parameters have diffusers' names. They are contiguous in the layout they are used in, so that a
convolution's weight is ``(C_out, K, K, C)``; `weights.py` turns files into that and back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univid.model.config import UNetConfig
from univid.ops import (
    ReferenceFrames,
    add_bias,
    add_layer_norm,
    concat,
    dual_stream_attn,
    geglu,
    group_norm_silu,
    linear_geglu,
    pyramid_st_attn_qkv,
    temporal_attn_qkv,
    temporal_conv,
)

KeysValues = tuple[Tensor, Tensor]  # of a prompt or an image, for one cross-attention: each (B, L, H, D)
Weight = float | Tensor


# --- residual blocks --------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each followed by PSTC; the time embedding is added in between, by the first PSTC."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = GroupNorm(config, in_channels, config.norm_eps, silu=True)
        self.conv1 = Conv2d(config, in_channels, out_channels)
        self.temporal_conv1 = TemporalConv(config, level, out_channels)
        self.time_emb_proj = nn.Linear(4 * config.channels[0], out_channels)
        self.norm2 = GroupNorm(config, out_channels, config.norm_eps, silu=True)
        self.conv2 = Conv2d(config, out_channels, out_channels)
        self.temporal_conv2 = TemporalConv(config, level, out_channels)
        # A 1x1 convolution: on channels-last activations, a linear layer.
        self.conv_shortcut = nn.Linear(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x ``(B, T, h, w, C)``, embedding ``(B, 4·C_1)`` after its SiLU."""
        h = self.temporal_conv1(self.conv1(self.norm1(x)), self.time_emb_proj(embedding))
        h = self.temporal_conv2(self.conv2(self.norm2(h)))
        return self.conv_shortcut(x) + h


class TemporalConv(nn.Module):
    """PSTC (III-A1): ``y = x + temporal_conv(x)``, the identity at first. An image passes by. ``offset`` ``(B, C)`` is added
    behind it."""

    def __init__(self, config: UNetConfig, level: int, channels: int):
        super().__init__()
        self.backend = config.backend
        self.taps = config.pstc_kernels[level]
        if self.taps:
            self.weight = nn.Parameter(torch.empty(channels, self.taps, channels))  # (C_out, K, C)
            self.bias = nn.Parameter(torch.empty(channels))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        if not self.taps or x.shape[1] == 1:
            return x if offset is None else x + offset[:, None, None, None]
        x_ = x.flatten(2, 3)
        bias = self.bias if offset is None else self.bias + offset
        return temporal_conv(x_, self.weight.transpose(1, 2), bias, residual=x_, backend=self.backend).view_as(x)


class Conv2d(nn.Module):
    """A 3x3 convolution of every frame. PyTorch would add its bias in a pass behind cuDNN's, as here: that pass is ours."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.backend = config.backend
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Conv2d's: uniform in ±1/sqrt(fan in)."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(
            x.flatten(0, 1).permute(0, 3, 1, 2),  # (B·T, C, h, w), in channels_last memory
            self.weight.permute(0, 3, 1, 2),
            stride=self.stride,
            padding=1,
        )
        # Contiguous as it is, except where PyTorch's convolution ignores channels_last (the meta device).
        y = y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])
        return add_bias(y.flatten(2, 3), self.bias, backend=self.backend).view_as(y)


class Downsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.conv = Conv2d(config, channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.conv = Conv2d(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        clips, frames, height, width, channels = x.shape
        x = x[:, :, :, None, :, None].expand(clips, frames, height, 2, width, 2, channels)  # the nearest neighbour
        return self.conv(x.reshape(clips, frames, 2 * height, 2 * width, channels))


def join(x: Tensor, skip: Tensor, backend: str | None) -> Tensor:
    """The channels of x, and behind them those of what the way down kept."""
    return concat(x.flatten(2, 3), skip.flatten(2, 3), backend=backend).unflatten(2, x.shape[2:4])


class GroupNorm(nn.GroupNorm):
    """GroupNorm of every frame, with the SiLU that follows it."""

    def __init__(self, config: UNetConfig, channels: int, eps: float, silu: bool):
        super().__init__(config.norm_groups, channels, eps)
        self.silu = silu
        self.backend = config.backend

    def forward(self, x: Tensor) -> Tensor:
        y = group_norm_silu(
            x.flatten(2, 3).flatten(0, 1),
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            silu=self.silu,
            backend=self.backend,
        )
        return y.view_as(x)


# --- transformers -----------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A transformer block between two linear layers, with a residual around all."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.norm = GroupNorm(config, channels, 1e-6, silu=False)  # not the residual blocks' 1e-5
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks: Any = nn.ModuleList([TransformerBlock(config, channels)])
        self.proj_out = nn.Linear(channels, channels)

    @property
    def cross_attention(self) -> DualStreamAttention:
        (block,) = self.transformer_blocks
        return block.attn2

    def forward(
        self,
        x: Tensor,
        refs: ReferenceFrames,
        position: Tensor,
        text: Tensor | KeysValues | None,
        image: Tensor | KeysValues | None,
        text_weight: Weight = 1.0,
        image_weight: Weight = 1.0,
    ) -> Tensor:
        """x ``(B, T, h, w, C)``, position ``(T, 1, C)`` of the frames; text, image as :class:`DualStreamAttention` takes them."""
        h = self.proj_in(self.norm(x).flatten(2, 3))
        for block in self.transformer_blocks:  # one
            h = block(h, refs, position, text, image, text_weight, image_weight)
        return x + self.proj_out(h).view_as(x)


class TransformerBlock(nn.Module):
    """PSTA, DSCA, TA and feed-forward, each on LayerNorm with a residual."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.norm1 = LayerNorm(config, channels)
        self.attn1 = PyramidAttention(config, channels)
        self.norm2 = LayerNorm(config, channels)
        self.attn2 = DualStreamAttention(config, channels)
        self.attn_temporal = TemporalAttention(config, channels) if config.temporal_attention else None
        self.norm3 = LayerNorm(config, channels)
        self.ff = FeedForward(config, channels)

    def forward(
        self,
        x: Tensor,
        refs: ReferenceFrames,
        position: Tensor,
        text: Tensor | KeysValues | None,
        image: Tensor | KeysValues | None,
        text_weight: Weight,
        image_weight: Weight,
    ) -> Tensor:
        """x ``(B, T, N, C)``."""
        x, y = self.norm1(x)
        x, y = self.norm2(x, self.attn1(y, refs))
        branch = self.attn2(y, text, image, text_weight, image_weight)
        if self.attn_temporal is not None and x.shape[1] > 1:  # an image has no time
            x, y = self.attn_temporal.norm(x, branch, position)
            branch = self.attn_temporal(y)
        x, y = self.norm3(x, branch)
        return x + self.ff(y)


class LayerNorm(nn.LayerNorm):
    """The residual sum of x and a branch, if there is one, and its LayerNorm, to which an offset may be added."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__(channels)
        self.backend = config.backend

    def forward(  # type: ignore[override] # two outputs
        self, x: Tensor, branch: Tensor | None = None, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, self.weight, self.bias, self.eps, branch=branch, offset=offset, backend=self.backend)


class PyramidAttention(nn.Module):
    """PSTA (eq. 6) in the place, and with the weights, of Stable Diffusion's self-attention."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = config.backend
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, refs: ReferenceFrames) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, -1, self.head_dim))
        return self.to_out(pyramid_st_attn_qkv(qkv, refs, backend=self.backend).flatten(-2))


class DualStreamAttention(nn.Module):
    """DSCA (eq. 7): one query; the text's keys and values are Stable Diffusion's, the image's start as copies of
    them."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = config.backend
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(config.context_dim, channels, bias=False)
        self.to_v = nn.Linear(config.context_dim, channels, bias=False)
        self.to_k_image = nn.Linear(config.context_dim, channels, bias=False)
        self.to_v_image = nn.Linear(config.context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def text_keys(self, text: Tensor) -> KeysValues:
        return self._heads(self.to_k(text)), self._heads(self.to_v(text))

    def image_keys(self, image: Tensor) -> KeysValues:
        return self._heads(self.to_k_image(image)), self._heads(self.to_v_image(image))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues | None,
        image: Tensor | KeysValues | None,
        text_weight: Weight,
        image_weight: Weight,
    ) -> Tensor:
        """x ``(B, T, N, C)``; text, image: tokens ``(B, L, context_dim)``, or keys and values that were kept."""
        if text is None or _is_zero(text_weight):
            text_kv: KeysValues | tuple[None, None] = None, None
        else:
            text_kv = self.text_keys(text) if isinstance(text, Tensor) else text
        if image is None or _is_zero(image_weight):
            image_kv: KeysValues | tuple[None, None] = None, None
        else:
            image_kv = self.image_keys(image) if isinstance(image, Tensor) else image
        if text_kv[0] is None and image_kv[0] is None:
            return self.to_out(x.new_zeros(x.shape[-1])).expand_as(x)  # attention to nothing is 0
        out = dual_stream_attn(
            self._heads(self.to_q(x)),
            *text_kv,
            *image_kv,
            text_weight=text_weight,
            image_weight=image_weight,
            backend=self.backend,
        )
        return self.to_out(out.flatten(-2))


class TemporalAttention(nn.Module):
    """TA (eq. 8), on the norm to which the frame's sinusoidal position is added; its output is 0 at first."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = config.backend
        self.norm = LayerNorm(config, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Sequential(ZeroLinear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, -1, self.head_dim))
        return self.to_out(temporal_attn_qkv(qkv, backend=self.backend).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        gated = GEGLU(config, channels, 4 * channels)
        self.net = nn.Sequential(gated, nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)
        self.backend = config.backend

    def forward(self, x: Tensor) -> Tensor:
        if _is_plain(self.proj):
            return linear_geglu(x, self.proj.weight, self.proj.bias, backend=self.backend)
        return geglu(self.proj(x), backend=self.backend)


# --- embeddings -------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """A two-layer perceptron on the sinusoids of a number: the noise level, or the frames per second."""

    def __init__(self, config: UNetConfig, zero: bool = False):
        super().__init__()
        channels = config.channels[0]
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = (ZeroLinear if zero else nn.Linear)(4 * channels, 4 * channels)

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """values ``(B,)``."""
        x = sinusoids(values, self.linear_1.in_features).to(dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class ZeroLinear(nn.Linear):
    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


def sinusoids(values: Tensor, channels: int) -> Tensor:
    """``(M,)`` to ``(M, channels)`` float32: cosines first, then sines, of frequencies from 1 down to almost 1/10000."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=values.device).float() / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _is_plain(linear: nn.Module) -> bool:
    """Whether its weight is all that there is to it: nothing wraps it, quantises it, adds to it (LoRA), or hangs on its call
    (hooks, offloading)."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and not (linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear))
    )


def _is_zero(weight: Weight) -> bool:
    """The number 0 leaves a stream out; a tensor that holds 0 is computed."""
    return not isinstance(weight, Tensor) and weight == 0
