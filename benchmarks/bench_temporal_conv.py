"""``temporal_conv`` beside cuDNN's conv3d and a cuBLAS product of the same size."""

from functools import cache

import torch
import torch.nn.functional as F

from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import LEVELS, SMALL, UNET, Level
from univid.ops import reference, temporal_conv

OP = "temporal_conv"
SHAPES = LEVELS | SMALL
BATCHES = (1, 2)
VARIANTS = {"epilogue": ("none", "bias + residual")}  # the residual is the input, as in the U-Net


def problem(level: Level, batch: int, epilogue: str, device: str = "cuda") -> Problem:
    channels, taps = level.channels, level.taps
    make = lambda *s: torch.randn(*s, device=device, dtype=torch.bfloat16)  # noqa: E731
    x = make(batch, level.frames, level.tokens, channels)
    weight = make(channels, taps, channels) * (channels * taps) ** -0.5
    tensors = {"x": x, "weight": weight.transpose(1, 2)}
    if epilogue != "none":
        tensors["bias"] = make(channels)

    def formula(t: Tensors, accumulate=None):
        return reference.temporal_conv(t["x"], t["weight"], t.get("bias"), _residual(t), accumulate)

    flops = 2.0 * x.numel() * channels * taps
    size = x.numel() * 2.0
    return Problem(
        tensors=tensors,
        reference=formula,
        part=lambda t: t,
        part_of=lambda _, x: x,
        flops={"fwd": flops, "bwd": 2 * flops},
        bytes={"fwd": 2 * size, "bwd": 3 * size},
    )


def implementations(level: Level, batch: int, epilogue: str) -> dict[str, Implementation]:
    if epilogue != "none" and batch == 1:
        return {}

    def call(t: Tensors, backend: str):
        return temporal_conv(t["x"], t["weight"], t.get("bias"), residual=_residual(t), backend=backend)

    run = ours("temporal_conv", call)
    for layout, dim in (("(T, 1, N)", 2), ("(T, N, 1)", 3)):
        run[f"cuDNN conv3d over {layout}"] = Implementation(lambda t, dim=dim: _conv3d(t, dim))
    if epilogue != "none":
        run.pop("reference")
        if level in UNET.values():
            run["cuDNN conv3d over (T, 1, N), the rest compiled"] = Implementation(
                lambda t: _compiled()(_conv3d({n: t[n] for n in ("x", "weight")}, 2), t["bias"], t["x"]),
                quick=False,
                compiles=True,
            )
    else:
        run["cuBLAS product, im2col not counted"] = Implementation(
            run=lambda t: t["x"] @ t["weight"],
            prepare=_im2col,
            finish=lambda out: out.view(batch, level.frames, level.tokens, -1),
        )
    return run


def _residual(t: Tensors) -> torch.Tensor | None:
    return t["x"] if "bias" in t else None


def _conv3d(t: Tensors, dim: int) -> torch.Tensor:
    """In channels_last_3d, a dimension of size 1 beside N in place ``dim`` of (B, T, N, C)."""
    # PyTorch asks the strides for the layout, also those of the dimensions of size 1: they go in and out where these
    # say channels_last_3d, for the incoming gradient too.
    x = t["x"].unsqueeze(dim).permute(0, 4, 1, 2, 3)
    weight = t["weight"].transpose(1, 2)[:, :, None, None].permute(0, 4, 1, 2, 3)  # (C_out, C, K, 1, 1)
    out = F.conv3d(x, weight, t.get("bias"), padding=(weight.shape[2] // 2, 0, 0))
    out = out.permute(0, 2, 3, 4, 1).squeeze(dim)
    return out + t["x"] if "bias" in t else out


@cache
def _compiled():
    """Bias and residual in one pass."""
    return torch.compile(lambda out, bias, residual: out + bias + residual, dynamic=False)


def _im2col(t: Tensors) -> Tensors:
    """The matrices whose product the convolution is: (B · T · N, K · C) and (K · C, C_out)."""
    x, weight = t["x"], t["weight"]
    frames, taps = x.shape[1], weight.shape[2]
    padded = F.pad(x, (0, 0, 0, 0, taps // 2, taps // 2))
    shifted = torch.stack([padded[:, j : j + frames] for j in range(taps)], dim=-2)
    return {"x": shifted.flatten(0, 2).flatten(1), "weight": weight.permute(2, 1, 0).flatten(0, 1)}
