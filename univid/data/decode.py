"""Frames out of a video or picture file: a stride by frames per second, a part in time, resized and cropped."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from torch import Tensor

from univid.data.files import read_image

PICTURES = frozenset({"jpg", "jpeg", "png", "webp"})
VIDEOS = frozenset({"mp4", "webm", "mkv", "mov", "avi"})

Media = Path | bytes


def size_of(media: Media, picture: bool) -> tuple[int, int]:
    """Height and width as shown, without decoding more than a frame. Raises ValueError, OSError."""
    if picture:
        height, width, _ = _picture(media).shape
        return height, width
    with _open(media) as (container, stream):
        frame = next(container.decode(stream))
        return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def read_clip(
    media: Media, num_frames: int, size: tuple[int, int], fps: float | None, generator: np.random.Generator
) -> tuple[Tensor, float]:
    """``(T, H, W, 3)`` uint8, from a place in time that ``generator`` draws, and its frames per second.

    Every n-th frame is taken, n being the ratio of the file's rate to ``fps``, rounded; None takes all. The picture is resized to cover
    ``size`` (H, W), and the middle of it is kept.

    Raises:
        ValueError, OSError: it cannot be decoded, or it is shorter than ``num_frames``.
    """
    with _open(media) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if rate <= 0:
            raise ValueError("has no frame rate")
        stride = max(1, round(rate / fps)) if fps else 1
        there = stream.frames or _count(container, stream)
        span = (num_frames - 1) * stride + 1
        if there < span:
            raise ValueError(
                f"is shorter than T: {there} frames at {rate:g} fps; {span} needed (num_frames={num_frames}, every {stride})"
            )
        first = int(generator.integers(there - span + 1))
        frames: list[NDArray[np.uint8]] = []
        shown = None
        for number, frame in _from(container, stream, first, rate):
            # Where the rate varies: what is shown at a time is the last frame before it.
            while shown is not None and len(frames) < num_frames and number > first + len(frames) * stride:
                frames.append(_fitted(shown, size))
            if len(frames) < num_frames and number >= first + len(frames) * stride:
                frames.append(_fitted(frame, size))
            if len(frames) == num_frames:
                return torch.from_numpy(np.stack(frames)), rate / stride
            shown = frame
    raise ValueError(f"is truncated: {first + len(frames) * stride} of {there} frames can be decoded")


def read_still(media: Media, size: tuple[int, int]) -> Tensor:
    """A picture as ``(1, H, W, 3)`` uint8, resized and cropped as a frame is."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(_picture(media)), format="rgb24")
    return torch.from_numpy(_fitted(frame, size).copy())[None]


def _picture(media: Media) -> NDArray[np.uint8]:
    try:
        return read_image(media if isinstance(media, Path) else io.BytesIO(media))
    except FileNotFoundError:
        raise FileNotFoundError("does not exist") from None
    except ValueError:
        raise ValueError("is not a picture that can be read") from None


@contextmanager
def _open(media: Media) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    if isinstance(media, Path) and not media.is_file():
        raise FileNotFoundError("does not exist")
    try:
        source = str(media) if isinstance(media, Path) else io.BytesIO(media)
        # Titles, which nobody reads, are in any encoding.
        with av.open(source, "r", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # there is a worker process for every core already
            yield container, stream
    except (av.error.FFmpegError, IndexError, StopIteration) as error:
        reason = getattr(error, "strerror", None) or "no video stream"
        if isinstance(error, av.error.PermissionError) and error.errno == errno.EPERM:  # FFmpeg's word for it
            reason = "it is cut off in its header"
        raise ValueError(f"is not a video that can be read: {reason}") from None


def _count(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Frames, where the file does not say how many."""
    count = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return count


def _from(
    container: av.container.InputContainer, stream: av.VideoStream, first: int, rate: float
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Numbered frames, from the last keyframe at or before ``first``."""
    start, unit = stream.start_time or 0, float(stream.time_base or 0)
    if first and unit:
        container.seek(start + int(first / rate / unit), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None or not unit:
            raise ValueError("has frames without a time")
        yield round((frame.pts - start) * unit * rate), frame


def _fitted(frame: av.VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB, resized to cover ``size``, its middle; turned as the file says."""
    turns = round(frame.rotation / 90) % 4
    height, width = size if turns % 2 == 0 else size[::-1]
    scale = max(height / frame.height, width / frame.width)
    scaled = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    rgb = frame.reformat(width=scaled[1], height=scaled[0], format="rgb24", interpolation=Interpolation.BICUBIC)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return np.rot90(rgb.to_ndarray()[top : top + height, left : left + width], turns)
