"""Stable Diffusion's autoencoder (diffusers' AutoencoderKL): frames to latents and back, some frames at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from univid.data.tensors import check_keys, find_weights, of_today, read_json, read_safetensors, reason


class Autoencoder(nn.Module):
    """Latents as the U-Net sees them: scaled to about unit variance.

    Args:
        vae: diffusers' autoencoder; its config has the scaling factor (0.18215 for Stable Diffusion 2.1).
        chunk: frames that are encoded or decoded together; what bounds the memory.
    """

    vae: Any  # diffusers leaves its types open

    def __init__(self, vae: AutoencoderKL, chunk: int = 4):
        super().__init__()
        self.vae = vae
        self.vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.chunk = chunk

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``(B, T, 3, H, W)`` in [-1, 1] to ``(B, T, 4, H/8, W/8)``: the mean, or with a generator a sample."""

        def encode(x: Tensor) -> Tensor:
            posterior = self.vae.encode(x).latent_dist
            return posterior.mode() if generator is None else posterior.sample(generator)

        return self._in_chunks(encode, frames) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``(B, T, 4, h, w)`` to uint8 frames ``(B, T, 8h, 8w, 3)``, on the CPU.

        Raises:
            FloatingPointError: pixels that are not finite, of latents or weights that are not.
        """
        finite = []  # read once, at the end: a number on a GPU has to be waited for

        def decode(x: Tensor) -> Tensor:
            pixels = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
            finite.append(pixels.isfinite().all())
            return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

        # Rounded where they were computed, so that a quarter of float32's bytes go over the bus, and all at once.
        frames = self._in_chunks(decode, latents).cpu()
        if not torch.stack(finite).all():
            raise FloatingPointError(
                "frames: got numbers that are not finite; weights that are, and guidance scales at which nothing"
                " overflows, needed"
            )
        return frames

    def _in_chunks(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function`` on ``(M, C, h, w)`` for all frames of ``(B, T, C, h, w)``."""
        weight = next(self.vae.parameters())
        parts = [
            function(part.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last))
            for part in x.flatten(0, 1).split(self.chunk)
        ]
        return torch.cat(parts).unflatten(0, x.shape[:2])

    def save(self, folder: Path) -> None:
        """The folder that :func:`load_autoencoder` reads, in diffusers' layout."""
        self.vae.save_pretrained(folder, safe_serialization=True)


def load_autoencoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """From diffusers' folder: ``config.json`` and weights as safetensors.

    Raises:
        FileNotFoundError, ValueError: no such file, a truncated one, or a key that is missing, left over or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"vae: {folder} has no config.json, the configuration of diffusers' AutoencoderKL")
    config = read_json(folder / "config.json")
    try:
        vae = AutoencoderKL.from_config(config)
    except ImportError:
        raise
    except Exception as error:  # diffusers checks few of the values
        raise ValueError(f"vae: {folder / 'config.json'} is not of diffusers' AutoencoderKL: {reason(error)}") from None
    _check_scale(folder / "config.json", vae.config)
    weights = find_weights(folder)
    state = vae.state_dict()
    tensors = dict(of_today(key, x) for key, x in read_safetensors(weights).items())
    check_keys(weights, {key: x.shape for key, x in state.items()}, tensors)
    vae.load_state_dict(tensors)
    return Autoencoder(vae).to(dtype)  # not vae.to, which warns of modules that it does not have


def _check_scale(path: Path, config: Any) -> None:
    """See that latents are scaled as :class:`Autoencoder` does it, by one number."""
    factor = config.scaling_factor
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise ValueError(f"vae: {path}: scaling_factor: got {factor!r}, needs a number > 0")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(name):
            raise ValueError(
                f"vae: {path}: {name}: got {config[name]!r}, needs null (Stable Diffusion 2's autoencoder)"
            )
