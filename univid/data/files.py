"""Pictures and videos on disk: mp4 (H.264), gif, folders of png. A file is written beside its name and renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError

Frames = NDArray[np.uint8]  # (T, H, W, 3), RGB

FPS = (0.01, 240)  # from what gif and mp4 hold both to more than any screen shows

_SUFFIXES = (".mp4", ".gif", ".png")


def check_writable(path: str | Path, num_frames: int = 2) -> Path:
    """See, before hours of sampling, that :func:`write_frames` will be able to write ``path``.

    Raises:
        ValueError: a suffix that nothing writes. OSError: a folder that is missing or cannot be written, or a name that is taken by
            something of another kind.
    """
    path = _named(path)
    kind = path.suffix.lower()
    if kind not in (*_SUFFIXES, ""):
        raise ValueError(f"output: {path} ends in {path.suffix!r}; .mp4, .gif, or a folder's name (png files) needed")
    if kind == ".png" and num_frames > 1:
        raise ValueError(
            f"output: {path} holds one picture; .mp4, .gif or a folder's name needed for a video, or num_frames = 1"
        )
    real = path.resolve()  # where a link leads, not the link, is written
    if not real.parent.is_dir():
        raise FileNotFoundError(f"output: the folder {real.parent} does not exist")
    if real.is_dir() and (kind or not _is_written(real)):
        raise FileExistsError(f"output: {path} is a folder that holds other things; another name needed")
    if kind == "" and real.is_file():
        raise FileExistsError(f"output: {path} is a file; a folder's name needed, or an ending: .mp4, .gif")
    if real.exists() and not (real.is_dir() or real.is_file()):
        raise FileExistsError(f"output: {path} is neither a file nor a folder; another name needed")
    if real.exists() and not os.access(real, os.W_OK):
        raise PermissionError(f"output: {path} cannot be written")
    check_place("output", path)
    return path


def check_place(name: str, path: Path) -> None:
    """See that :func:`beside` will be able to write ``path``; ``name`` is what the message calls it.

    Raises:
        ValueError: it is, or holds, the folder one stands in, which would be gone. PermissionError: it cannot be written.
    """
    real = path.resolve()
    if _holds_current_folder(real):
        raise ValueError(f"{name}: got {str(path)!r}, which holds the current folder; a folder of its own needed")
    if os.path.ismount(real) and not is_empty(real):
        raise PermissionError(f"{name}: {path} is a mount point, which cannot be replaced; another name needed")
    folder = _around(real)
    try:  # as it will be: what permissions say is not all, for root and on other machines' disks
        _room(folder, real.name).rmdir()
    except OSError as error:
        raise PermissionError(f"{name}: {path} cannot be written: {folder}: {error.strerror}") from None


def _holds_current_folder(real: Path) -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed
        return False
    return real in (here, *here.parents)


def is_empty(path: Path) -> bool:
    """Whether that is a folder with nothing in it."""
    return path.is_dir() and next(path.iterdir(), None) is None


def check_fps(fps: float) -> float:
    """Raises ValueError where it is not within ``FPS``."""
    if not FPS[0] <= fps <= FPS[1]:
        raise ValueError(f"fps: got {fps}; a number from {FPS[0]} to {FPS[1]} needed")
    return fps


def numbered(path: str | Path, count: int) -> list[Path]:
    """The names of ``count`` videos: ``path`` of one, else clip-0.mp4, clip-1.mp4, …"""
    path = _named(path)
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def _named(path: str | Path) -> Path:
    """Raises ValueError where that is no name: a folder takes another's place, but not that of the one we stand in."""
    path = Path(path)
    if path.name.lower() in ("", "..", *_SUFFIXES):
        raise ValueError(f"output: got {str(path)!r}; a name of its own needed")
    return path


def write_frames(frames: Frames, path: str | Path, fps: float = 8) -> Path:
    """Write ``(T, H, W, 3)`` uint8 as the ending of ``path`` says: .mp4, .gif, .png (one frame), or none: a folder of png files.

    mp4 needs an even height and width (chroma is stored at half of each).
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.shape[0]:
        raise ValueError(f"frames: got {frames.dtype} {frames.shape}; uint8 (T, H, W, 3) with T >= 1 needed")
    path = check_writable(path, len(frames))
    check_fps(fps)
    kind = path.suffix.lower()
    if kind == ".mp4" and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise ValueError(f"frames: mp4 needs an even height and width, got {frames.shape[1]}x{frames.shape[2]}")
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png, "": _write_folder}[kind]
    beside(path, lambda partial: write(frames, partial, fps))
    return path


def read_video(path: str | Path) -> tuple[Frames, float]:
    """All frames of a video file, RGB, and its frames per second."""
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            frames = [_to_rgb(frame) for frame in container.decode(stream)]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"video: {path} is not a video that can be read: {error}") from None
    return np.stack(frames), rate


def read_image(source: str | Path | BinaryIO | Image.Image) -> NDArray[np.uint8]:
    """A picture as ``(H, W, 3)`` uint8: turned as its EXIF says, transparency over white, 16 bits to 8."""
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"image: {source} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Pillow's decoders raise nearly anything
        raise ValueError(f"image: {source} is not a picture that can be read: {error}") from None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise ValueError("floating-point numbers, of which nothing says what is white")
    if image.mode.startswith("I"):  # Pillow clips it to 8 bits
        grey = np.asarray(image)
        clear = grey == image.info.get("transparency")  # the one grey of a png that is
        if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
            raise ValueError(f"numbers from {grey.min()} to {grey.max()}, more than 16 bits")
        if image.mode.startswith("I;16") or grey.max(initial=0) > 255:
            grey = (grey / 257).round()
        return np.repeat(np.where(clear, 255, grey).astype(np.uint8)[..., None], 3, 2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _write_mp4(frames: Frames, path: Path, fps: float) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        # Within 0.1 dB of x264's default preset at this crf, in less than half of its time.
        options = {"crf": "16", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # what every player takes
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            container.mux(stream.encode(_to_bt709(frame)))
        container.mux(stream.encode(None))


def _to_bt709(frame: av.VideoFrame) -> av.VideoFrame:
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )


def _to_rgb(frame: av.VideoFrame) -> Frames:
    # What a file leaves open is what FFmpeg and players assume of it.
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def _write_gif(frames: Frames, path: Path, fps: float) -> None:
    # One palette for all frames, so that still parts do not flicker.
    sample = Image.fromarray(frames[:: max(1, len(frames) // 8)].reshape(-1, frames.shape[2], 3))
    palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    # gif counts hundredths of a second: 13 and 12 in turn are 8 fps. Players show 0 at 10 fps.
    hundredths = np.diff(np.round(np.arange(len(frames) + 1) * 100 / fps)).clip(1)
    first = 0  # of equal frames, which Pillow makes one of: gif counts its time in 16 bits
    for i, image in enumerate(images):
        first = first if image == images[first] else i
        hundredths[i] = min(hundredths[i], 65535 - hundredths[first:i].sum())
    durations = [10 * int(each) for each in hundredths]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


def _write_png(frames: Frames, path: Path, fps: float) -> None:
    Image.fromarray(frames[0]).save(path, "PNG")


def _write_folder(frames: Frames, path: Path, fps: float) -> None:
    path.mkdir()
    for name, frame in zip(_frame_names(len(frames)), frames, strict=True):
        Image.fromarray(frame).save(path / name)


def _frame_names(count: int) -> list[str]:
    digits = max(4, len(str(count)))
    return [f"{index:0{digits}}.png" for index in range(count)]


def _is_written(folder: Path) -> bool:
    """Whether a folder holds the frames of a video, as they are written here, and nothing that would be lost."""
    files = list(folder.iterdir())
    return {path.name for path in files} == set(_frame_names(len(files))) and all(path.is_file() for path in files)


def beside(path: Path, write: Callable[[Path], object]) -> None:
    """``write(partial)``, then its file or folder takes the place of ``path``; if it fails, what was there still is.

    Where a link leads, not the link, is replaced. An empty folder is filled: it may be a mount point.

    Raises:
        OSError: it could not be written, as on a full disk; names ``path``.
    """
    real = path.resolve()
    folder = _around(real)
    room = _room(folder, real.name)
    partial = room / real.name
    old = None
    try:
        try:
            write(partial)
        except SafetensorError as error:
            raise OSError(f"path: {path} could not be written: {error}") from error
        except OSError as error:  # what the system says of a write, without a name or with one that nobody chose
            if error.errno and str(error.filename or room).startswith(str(room)):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        if folder == real:
            _fill(real, partial)
            return
        if not real.is_dir():
            partial.replace(real)
            return
        old = _room(room, real.name) / real.name  # a folder that is not empty cannot be replaced at once
        try:
            real.rename(old)
            partial.rename(real)
        except BaseException:  # a signal's too, which comes as soon as a rename is done
            if not real.exists():
                old.rename(real)
            raise
    finally:
        if old is None or real.exists():  # else it is all that there is
            shutil.rmtree(room, ignore_errors=True)


def _fill(folder: Path, partial: Path) -> None:
    """Move what is in ``partial`` into ``folder``: all of it, or nothing."""
    names = [child.name for child in partial.iterdir()]
    try:
        for name in names:
            (partial / name).rename(folder / name)
    except BaseException:
        for name in names:
            if not (partial / name).exists():
                (folder / name).rename(partial / name)
        raise


def _around(path: Path) -> Path:
    """Where there is room to write ``path``: beside it, or in it, where that is an empty folder of which nothing can take the place."""
    if not is_empty(path):
        return path.parent
    if os.path.ismount(path):
        return path
    try:
        _room(path.parent, path.name).rmdir()
    except OSError:
        return path
    return path.parent


def _room(folder: Path, name: str) -> Path:
    """An empty folder in ``folder``, for ``name``."""
    # Of a name as long as names can be, the whole and more would be too long.
    return Path(tempfile.mkdtemp(dir=folder, prefix=f".{name[:32]}."))
