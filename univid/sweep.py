"""A labelled grid of videos over text and image weights: how a clip goes from one control to the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from univid.data.files import Frames, write_frames
from univid.pipeline import UniVidPipeline

_COLUMNS = 6  # at most
_LINE = 14  # pixels of a line of the label above a video
_SIZES = (12, 11, 10, 9, 8, 7, 6)  # of its letters: the first that fits


def sweep(pipe: UniVidPipeline, weights: Sequence[tuple[float, float]], settings: dict[str, Any], path: Path) -> Path:
    """Generate one video for every pair ``(text_weight, image_weight)``, from the same noise, and write them as one grid.

    Args:
        settings: the other arguments of the pipeline's call; ``num_videos`` counts as 1.
    """
    made = [pipe(**settings | {"num_videos": 1}, text_weight=text, image_weight=image) for text, image in weights]
    labels = [(f"text {text:g}", f"image {image:g}") for text, image in weights]
    return write_frames(grid(labelled([each.frames[0] for each in made], labels)), path, made[0].fps)


def grid(videos: Sequence[Frames]) -> Frames:
    """Videos of one size ``(T, H, W, 3)`` side by side, in as few rows as can be, of equal length; white where one is missing."""
    columns = -(-len(videos) // -(-len(videos) // _COLUMNS))
    blank = [np.full_like(videos[0], 255)] * (-len(videos) % columns)
    rows = np.stack([*videos, *blank]).reshape(-1, columns, *videos[0].shape)
    return rows.transpose(2, 0, 3, 1, 4, 5).reshape(len(videos[0]), rows.shape[0] * rows.shape[3], -1, 3)


def labelled(videos: Sequence[Frames], labels: Sequence[Sequence[str]]) -> list[Frames]:
    """Each video under its words: a line for each, all in letters that fit the videos' width."""
    width = videos[0].shape[2]
    words = [word for label in labels for word in label]
    fonts = [ImageFont.load_default(size) for size in _SIZES]
    font = next((font for font in fonts if max(map(font.getlength, words)) <= width - 4), fonts[-1])
    return [_under(video, label, font) for video, label in zip(videos, labels, strict=True)]


def _under(video: Frames, words: Sequence[str], font: Any) -> Frames:
    label = Image.new("RGB", (video.shape[2], _LINE * len(words)), "white")
    for i, word in enumerate(words):
        ImageDraw.Draw(label).text((2, _LINE * (i + 0.5)), word, "black", font, anchor="lm")
    return np.concatenate((np.broadcast_to(np.asarray(label), (len(video), *label.size[::-1], 3)), video), 1)
