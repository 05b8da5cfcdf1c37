"""What a call of the pipeline takes beside its settings: prompts, pictures, generators; checked, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from univid.data.files import read_image

Picture = str | Path | Image.Image | np.ndarray | Tensor


MOST_VIDEOS = 10_000  # of a prompt: more than fits any memory


def check_num_videos(num_videos: Any) -> None:
    """Raises ValueError where that is no number of videos."""
    if type(num_videos) is not int or num_videos < 1:
        raise ValueError(f"num_videos: got {num_videos!r}; a whole number >= 1 needed")
    if num_videos > MOST_VIDEOS:
        raise ValueError(f"num_videos: got {num_videos}; at most {MOST_VIDEOS} needed")


def conditions(
    prompt: str | Sequence[str] | None, image: Picture | Sequence[Picture] | None, num_videos: int
) -> tuple[list[str], list[Tensor], int]:
    """Prompts, pictures, and the number of videos: ``num_videos`` of each prompt or picture, those of one after another."""
    prompts: list[Any] = [] if prompt is None else list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if not all(isinstance(p, str) for p in prompts) or (prompt is not None and not prompts):
        raise TypeError(f"prompt: got {prompt!r}; a text, or a list of texts, needed")
    pictures: list[Any] = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    if image is not None and not pictures:
        raise TypeError(f"image: got {image!r}; a picture, or a list of pictures, needed")
    if len(pictures) > 1 and len(prompts) > 1 and len(pictures) != len(prompts):
        raise ValueError(f"image: got {len(pictures)} images for {len(prompts)} prompts; one, or one for each needed")
    check_num_videos(num_videos)
    return prompts, [_picture(p) for p in pictures], max(len(prompts), len(pictures)) * num_videos


def generators(generator: Any, seed: Any, videos: int) -> Iterable[torch.Generator]:
    """One for each video: seeded one after another, or what was given, one for each or one for all."""
    seed = 0 if seed is None else seed
    if type(seed) is not int or not -(2**63) <= seed < 2**63 - videos:
        raise ValueError(f"seed: got {seed!r}; a whole number of 64 bits needed")
    if generator is None:
        return (torch.Generator().manual_seed(seed + i) for i in range(videos))
    given = list(generator) if isinstance(generator, (list, tuple)) else [generator] * videos
    if not all(isinstance(one, torch.Generator) and one.device.type == "cpu" for one in given):
        raise TypeError(f"generator: got {generator!r}; a torch.Generator on the CPU, or one for each video, needed")
    if len(given) != videos:
        raise ValueError(f"generator: got {len(given)} of them for {videos} videos; one, or one for each, needed")
    return given


def _picture(image: Picture) -> Tensor:
    """``(3, H, W)`` float32 in [0, 1]."""
    if isinstance(image, (str, Path, Image.Image)):
        image = read_image(image)
    got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, (np.ndarray, Tensor)) else type(image).__name__
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = rearrange(torch.from_numpy(image.copy()), "h w c -> c h w") / 255
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and image.shape[0] == 3:
        if not image.numel():
            raise ValueError(f"image: got {got}; at least one pixel needed")
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"image: got numbers from {image.min():g} to {image.max():g}; from 0 to 1 needed")
        return image.float()
    raise TypeError(
        f"image: got {got}; a file, a PIL image, uint8 (H, W, 3) or a float tensor (3, H, W) in [0, 1] needed"
    )
