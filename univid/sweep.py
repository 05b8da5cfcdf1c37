"""A labelled grid of videos over text and image weights: how a clip goes from one control to the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from univid.data.files import Frames, write_frames
from univid.pipeline import UniVidPipeline

_COLUMNS = 4  # at most
_LABEL = 20  # pixels of the line above a video


def sweep(pipe: UniVidPipeline, weights: Sequence[tuple[float, float]], settings: dict[str, Any], path: Path) -> Path:
    """Generate one video for every pair ``(text_weight, image_weight)``, from the same noise, and write them as one grid.

    Args:
        settings: the other arguments of the pipeline's call; ``num_videos`` counts as 1.
    """
    videos = []
    for text, image in weights:
        made = pipe(**settings | {"num_videos": 1}, text_weight=text, image_weight=image)
        videos.append(_labelled(made.frames[0], f"text {text:g}, image {image:g}"))
    return write_frames(grid(videos), path, made.fps)


def grid(videos: Sequence[Frames]) -> Frames:
    """Videos of one size ``(T, H, W, 3)`` side by side, in rows of equal length, white where one is missing."""
    columns = min(_COLUMNS, len(videos))
    blank = [np.full_like(videos[0], 255)] * (-len(videos) % columns)
    rows = np.stack([*videos, *blank]).reshape(-1, columns, *videos[0].shape)
    return rows.transpose(2, 0, 3, 1, 4, 5).reshape(len(videos[0]), rows.shape[0] * rows.shape[3], -1, 3)


def _labelled(frames: Frames, text: str) -> Frames:
    """The frames under a line of text, in letters that fit their width."""
    width = frames.shape[2]
    line = Image.new("RGB", (width, _LABEL), "white")
    size = 14
    while size > 6 and ImageFont.load_default(size).getlength(text) > width - 4:
        size -= 1
    ImageDraw.Draw(line).text((2, _LABEL / 2), text, "black", ImageFont.load_default(size), anchor="lm")
    return np.concatenate((np.broadcast_to(np.asarray(line), (len(frames), *line.size[::-1], 3)), frames), 1)
