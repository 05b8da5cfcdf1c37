"""UniVid's U-Net: Stable Diffusion 2.1's, with time, and with an image beside the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univid.model.blocks import (
    Conv2d,
    Downsample,
    Embedding,
    GroupNorm,
    KeysValues,
    ResidualBlock,
    Transformer,
    Upsample,
    Weight,
    join,
    sinusoids,
)
from univid.model.config import UNetConfig
from univid.model.weights import Pretrained
from univid.ops import ReferenceFrames
from univid.ops.checks import check_alike, check_number, check_shape, check_tensor

Keys = list[KeysValues]  # keys and values of a prompt or an image for every cross-attention, in the network's order
WeightChoice = float | Tensor | Sequence[float]


class FrameTables(NamedTuple):
    """What depends on T alone, by level f."""

    centers: dict[int, ReferenceFrames]
    positions: dict[int, Tensor]  # (T, 1, C) float32


class UNet(Pretrained):
    """The denoiser of a clip of latents, told what to show by a prompt, by an image, or by both.

    At T = 1, and at any T with ``refs`` that keep to each frame (``ReferenceFrames.window(T, 0)``) as long as the
    temporal modules are zero, it is Stable Diffusion's U-Net.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self._built: dict[tuple[int, torch.device], FrameTables] = {}
        channels = config.channels
        innermost = len(channels) - 1

        self.conv_in = Conv2d(config, config.in_channels, channels[0])
        self.time_embedding = Embedding(config)
        self.fps_embedding = Embedding(config, zero=True) if config.fps_conditioning else None

        width = channels[0]
        skips = [width]
        self.down_blocks: Any = nn.ModuleList()  # of Level
        for level in range(len(channels)):
            inputs = [width] + [channels[level]] * (config.blocks_per_level - 1)
            down = Level(config, level, inputs, attention=config.attention[level])
            width = channels[level]
            skips += [width] * config.blocks_per_level
            if level < innermost:
                down.downsamplers.append(Downsample(config, width))
                skips.append(width)
            self.down_blocks.append(down)

        self.mid_block = Level(config, innermost, [width, width], attention=False)
        self.mid_block.attentions.append(Transformer(config, width))

        self.up_blocks: Any = nn.ModuleList()  # of Level
        for level in reversed(range(len(channels))):
            inputs = []
            for _ in range(config.blocks_per_level + 1):
                inputs.append(width + skips.pop())
                width = channels[level]
            up = Level(config, level, inputs, attention=config.attention[level])
            if level > 0:
                up.upsamplers.append(Upsample(config, width))
            self.up_blocks.append(up)

        self.conv_norm_out = GroupNorm(config, channels[0], config.norm_eps, silu=True)
        self.conv_out = Conv2d(config, channels[0], config.out_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor | Keys | None = None,
        image: Tensor | Keys | None = None,
        *,
        text_weight: WeightChoice | dict[int, WeightChoice] = 1.0,
        image_weight: WeightChoice | dict[int, WeightChoice] = 1.0,
        fps: float | Tensor | None = None,
        refs: dict[int, ReferenceFrames] | None = None,
    ) -> Tensor:
        """The model's prediction for noisy latents.

        Args:
            x: ``(B, T, in_channels, h, w)`` in the parameters' dtype; h and w multiples of 2^(levels - 1).
            t: ``(B,)`` the noise level, 0 to 999; integers, or float32 (bfloat16 has no 999).
            text: ``(B, L, context_dim)`` tokens of the prompt, or the keys that :meth:`condition` made of them; None:
                no prompt. image: the same of the image's tokens, past the adapter.
            text_weight, image_weight: how much each counts in cross-attention: a number, a sequence of T numbers, a
                tensor as :func:`univid.ops.dual_stream_attn` takes it, ``()``, ``(B,)``, ``(1, T)``, ``(B, T)`` or
                ``(B, T, N)``, or a dict of these for the levels f = 1, 2, 4, 8, of which a missing one is 1. The number 0
                is as good as None; cross-attention without either stream is its output's bias.
            fps: frames per second, a number or ``(B,)``; None: not told.
            refs: the reference frames at the levels f = 1, 2, 4, 8; what is missing is the config's
                (:meth:`reference_frames`).

        Returns:
            ``(B, T, out_channels, h, w)``, in x's dtype.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or range; neither text nor image.
        """
        self._check(x, t, text, image, refs)
        num_frames = len(x.unbind(1))  # unlike x.shape[1] never symbolic: a compiled graph is for one T
        text_weights = self._weights("text_weight", text_weight, x)
        image_weights = self._weights("image_weight", image_weight, x)
        if refs is None or len(refs) < len(self.config.factors):
            refs = self.reference_frames(num_frames, x.device) | (refs or {})
        tables = self._frame_tables(num_frames, x.device)
        positions = {f: position.to(x.dtype) for f, position in tables.positions.items()}
        texts, images = iter(self._each(text)), iter(self._each(image))

        def attend(transformer: Transformer, h: Tensor, f: int) -> Tensor:
            return transformer(h, refs[f], positions[f], next(texts), next(images), text_weights[f], image_weights[f])

        embedding = self.time_embedding(t, x.dtype)
        if self.fps_embedding is not None and fps is not None and num_frames > 1:
            embedding = embedding + self.fps_embedding(_fps(fps, x), x.dtype)
        embedding = F.silu(embedding)

        h = self.conv_in(x.movedim(2, -1).contiguous())
        skips = [h]
        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                h = resnet(h, embedding)
                if level.attentions:
                    h = attend(level.attentions[i], h, level.factor)
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)

        h = self.mid_block.resnets[0](h, embedding)
        h = attend(self.mid_block.attentions[0], h, self.mid_block.factor)
        h = self.mid_block.resnets[1](h, embedding)

        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                h = resnet(join(h, skips.pop(), self.config.backend), embedding)
                if level.attentions:
                    h = attend(level.attentions[i], h, level.factor)
            for upsample in level.upsamplers:
                h = upsample(h)

        return self.conv_out(self.conv_norm_out(h)).movedim(-1, 2).contiguous()

    def condition(self, text: Tensor | None = None, image: Tensor | None = None) -> tuple[Keys | None, Keys | None]:
        """Keys and values of a prompt and an image, to be kept over sampling steps: ``unet(x, t, *keys)``.

        Args:
            text, image: ``(B, L, context_dim)``, or None.
        """
        attentions = [transformer.cross_attention for transformer in self.transformers()]
        return (
            None if text is None else [attention.text_keys(text) for attention in attentions],
            None if image is None else [attention.image_keys(image) for attention in attentions],
        )

    def reference_frames(
        self, num_frames: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> dict[int, ReferenceFrames]:
        """The config's reference frames at each level f: the centres of segments in eval; drawn anew in training.

        Args:
            generator: a CPU generator for the draws.
        """
        device, own_frame = torch.device(device), self.config.own_frame
        centers, _ = self._frame_tables(num_frames, device)
        if not self.training or num_frames == 1:
            return dict(centers)
        if torch.compiler.is_compiling():  # a graph would hold one draw for ever
            raise ValueError("refs: got None in a compiled training step, needs reference_frames(T), drawn outside it")
        return {
            f: ReferenceFrames.pyramid(num_frames, center.num_refs, "random", own_frame, generator).to(device)
            for f, center in centers.items()
        }

    def _frame_tables(self, num_frames: int, device: torch.device) -> FrameTables:
        """The centres, and the frames' positions, of each level; built once for a size."""
        self._build_frame_tables(num_frames, device)
        return self._built[num_frames, device]

    @torch.compiler.assume_constant_result  # not traced: reference frames are checked on the host
    def _build_frame_tables(self, num_frames: int, device: torch.device) -> None:
        if (num_frames, device) in self._built:
            return
        centers, positions = {}, {}
        with torch.inference_mode(False):  # training may come later
            for f, channels in zip(self.config.factors, self.config.channels, strict=True):
                num_refs = self.config.num_refs(f, num_frames)
                center = ReferenceFrames.pyramid(num_frames, num_refs, "center", self.config.own_frame)
                centers[f] = center.to(device)
                positions[f] = sinusoids(torch.arange(num_frames, device=device), channels)[:, None]
        self._built[num_frames, device] = FrameTables(centers, positions)

    def transformers(self) -> list[Transformer]:
        """All of them, in the network's order."""
        levels = (*self.down_blocks, self.mid_block, *self.up_blocks)
        return [transformer for level in levels for transformer in level.attentions]

    def reset_parameters(self) -> None:
        """Random weights, and zeros where the paper's modules begin as the identity; for a start on the meta device."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def to_config(self) -> dict[str, Any]:
        return self.config.to_diffusers()

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str, **choices: Any) -> Self:
        if "univid" not in config:
            raise ValueError(
                f"path: {source} is not of a UniVid U-Net; univid.model.load_sd21 reads Stable Diffusion's"
            )
        return cls(UNetConfig.from_diffusers(config, source, **choices))

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _each(self, context: Tensor | Keys | None) -> Sequence[Tensor | KeysValues | None]:
        """What each cross-attention gets of a stream."""
        return context if isinstance(context, list) else [context] * len(self.transformers())

    def _weights(self, name: str, choice: Any, x: Tensor) -> dict[int, Weight]:
        """A weight for each level."""
        by_level = choice if isinstance(choice, dict) else dict.fromkeys(self.config.factors, choice)
        self._check_levels(name, by_level)
        return {f: _weight(name, by_level.get(f, 1.0), x) for f in self.config.factors}

    def _check(self, x: Any, t: Any, text: Any, image: Any, refs: Any) -> None:
        config = self.config
        layout = f"(B, T, {config.in_channels}, h, w)"
        check_tensor("x", x, layout, strided=True)
        clips, frames, channels, height, width = x.shape
        if channels != config.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, needs {layout}")
        if frames > config.max_frames:
            raise ValueError(f"x: got T = {frames} frames, needs at most max_frames = {config.max_frames}")
        unit = config.factors[-1]
        if height % unit or width % unit:
            nearest = "x".join(str(max(1, round(size / unit)) * unit) for size in (height, width))
            raise ValueError(
                f"x: got h x w = {height}x{width}, needs multiples of {unit}, of which {nearest} is the nearest"
            )
        parameter = self.conv_in.bias
        if x.device != parameter.device:
            raise ValueError(f"x: got a tensor on {x.device}, needs the parameters' device, {parameter.device}")
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: got {x.dtype}, needs the parameters' dtype, {parameter.dtype}")
        if not isinstance(t, Tensor) or t.shape != (clips,):
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"t: got {got}, needs a tensor (B,) = ({clips},)")
        if text is None and image is None:
            raise ValueError("text, image: got neither, needs at least one")
        for name, context in (("text", text), ("image", image)):
            if isinstance(context, list):
                count = len(self.transformers())
                if len(context) != count:
                    raise ValueError(f"{name}: got keys of {len(context)} cross-attentions, needs {count}")
            elif context is not None:
                check_tensor(name, context, "(B, L, context_dim)", strided=True)
                check_shape(name, context, (clips, context.shape[1], config.context_dim), "x's B, any L, context_dim")
                check_alike("x", x, **{name: context})
        self._check_levels("refs", refs or {})

    def _check_levels(self, name: str, by_level: Any) -> None:
        if not isinstance(by_level, dict):
            raise TypeError(f"{name}: got {type(by_level).__name__}, needs a dict from level to ReferenceFrames")
        for f in by_level:
            if f not in self.config.factors:
                raise ValueError(f"{name}: got level {f!r}, needs levels of {self.config.factors}")


class Level(nn.Module):
    """The blocks of one resolution, 1/f of the latent's: each residual block has its transformer, or none has."""

    def __init__(self, config: UNetConfig, level: int, in_channels: list[int], attention: bool):
        super().__init__()
        channels = config.channels[level]
        self.factor = config.factors[level]
        self.resnets: Any = nn.ModuleList(ResidualBlock(config, level, width, channels) for width in in_channels)
        self.attentions: Any = nn.ModuleList(Transformer(config, channels) for _ in in_channels if attention)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


def _weight(name: str, weight: Any, x: Tensor) -> Weight:
    """A weight of one level: a number or a tensor; a sequence has a number for each frame."""
    if isinstance(weight, Tensor):
        return weight
    if not isinstance(weight, Sequence):
        return check_number(name, weight)
    if len(weight) != x.shape[1]:
        raise ValueError(f"{name}: got {len(weight)} numbers, needs one for each of {x.shape[1]} frames")
    return torch.tensor([[check_number(name, number) for number in weight]], device=x.device)


def _fps(fps: Any, x: Tensor) -> Tensor:
    if not isinstance(fps, Tensor):
        fps = torch.full(x.shape[:1], check_number("fps", fps), device=x.device)
    check_shape("fps", fps, x.shape[:1], "x's B")
    return fps
