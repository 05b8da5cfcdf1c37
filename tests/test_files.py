"""Pictures and videos, written and read back."""

import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from univid.data.files import beside, check_place, check_writable, read_image, read_video, write_frames


@pytest.fixture
def frames():
    """(16, 96, 128, 3): smooth waves that move."""
    t, y, x = np.mgrid[:16, :96, :128]
    waves = (128 + 100 * np.sin((x + 5 * t) / 20), 128 + 100 * np.cos(y / 15 + t / 5), 40 + 7.0 * t)
    return np.stack(waves, -1).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_mp4(tmp_path, frames):
    path = write_frames(frames, tmp_path / "clip.mp4", fps=12)
    read, fps = read_video(path)
    assert (read.shape, fps) == (frames.shape, 12)
    assert psnr(read, frames) > 36
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (30, 200, 120)])
def test_mp4_keeps_colours(tmp_path, colour):
    frames = np.full((3, 64, 64, 3), colour, np.uint8)
    read, _ = read_video(write_frames(frames, tmp_path / "colour.mp4"))
    assert np.abs(read.astype(int) - frames).max() <= 4  # another matrix (BT.601) would be tens away


@pytest.mark.parametrize("fps", [7.5, 24000 / 1001])
def test_mp4_takes_fractions_of_fps(tmp_path, frames, fps):
    assert read_video(write_frames(frames, tmp_path / "clip.mp4", fps))[1] == pytest.approx(fps, rel=1e-4)


def test_gif(tmp_path, frames):
    read, fps = read_video(write_frames(frames, tmp_path / "clip.gif", fps=10))
    assert (read.shape, fps) == (frames.shape, 10)
    assert psnr(read, frames) > 22  # 256 colours


@pytest.mark.parametrize("fps", [8, 15, 24, 30])
def test_gif_is_as_long_as_it_should_be(tmp_path, frames, fps):
    """To a hundredth of a second, though no frame of it can last 1/fps."""
    with Image.open(write_frames(frames, tmp_path / "clip.gif", fps)) as gif:
        durations = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    assert len(durations) == len(frames)
    assert sum(durations) == pytest.approx(1000 * len(frames) / fps, abs=5)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 0, -8, 1e9, 1e-5])
def test_absurd_fps(tmp_path, frames, name, fps):
    with pytest.raises(ValueError, match=r"fps: got .*; a number from 0\.01 to 240 needed"):
        write_frames(frames, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0.01, 100, 240])
def test_gif_at_the_ends(tmp_path, frames, fps):
    assert read_video(write_frames(frames, tmp_path / "clip.gif", fps))[1] == min(fps, 100)


def test_gif_of_equal_frames(tmp_path, frames):
    """Pillow makes one of them, which lasts as long as gif can say."""
    with Image.open(write_frames(np.repeat(frames[:2], [3, 8], 0), tmp_path / "clip.gif", 0.01)) as gif:
        durations = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    assert durations == [300_000, 655_350]


def test_folder_of_png(tmp_path, frames):
    for _ in range(2):  # written anew in place of the old one
        path = write_frames(frames, tmp_path / "frames")
    files = sorted(path.iterdir())
    assert [file.name for file in files[:2]] == ["0000.png", "0001.png"]
    assert np.array_equal(np.stack([read_image(file) for file in files]), frames)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("names", [["holiday.png"], ["0000.png", "holiday.png"], ["0001.png", "0002.png"]], ids=repr)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_of_other_pictures_is_kept(tmp_path, frames, names, kind):
    for name in names:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        if kind == "file":
            (tmp_path / "pictures" / name).rmdir()
            Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / name)
    for write in (check_writable, lambda path: write_frames(frames, path)):
        with pytest.raises(FileExistsError, match="holds other things"):
            write(tmp_path / "pictures")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names


def test_a_folder_named_as_a_frame_is_kept(tmp_path):
    (tmp_path / "frames" / "0000.png").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds other things"):
        check_writable(tmp_path / "frames")


@pytest.mark.parametrize("name", ["clip.MP4", "clip.Gif", "frame.PNG"])
def test_endings_in_capitals(tmp_path, frames, name):
    path = write_frames(frames[:1] if name == "frame.PNG" else frames, tmp_path / name)
    assert path.name == name
    assert read_video(path)[0].shape[1:] == frames.shape[1:]


@pytest.mark.parametrize("name", ["clip.mp4", "frames"])
@pytest.mark.parametrize("there", [True, False])
def test_where_a_link_leads_is_written(tmp_path, frames, name, there):
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / f"real-{name}"
    if there:
        write_frames(frames[:1], real)
    (tmp_path / name).symlink_to(real)
    write_frames(frames, tmp_path / name)
    assert (tmp_path / name).is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == [real]
    assert len(list(real.iterdir()) if name == "frames" else read_video(real)[0]) == len(frames)


@pytest.mark.parametrize("name", ["b" * 255, "ü" * 127, "clip" * 62 + ".mp4"], ids=len)
def test_names_as_long_as_they_can_be(tmp_path, frames, name):
    for _ in range(2):
        write_frames(frames, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_png(tmp_path, frames):
    path = write_frames(frames[:1], tmp_path / "frame.png")
    assert np.array_equal(read_image(path), frames[0])


def test_image_with_transparency_and_orientation(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)  # black, transparent
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (6, 4, 3)


@pytest.mark.parametrize(("name", "dtype"), [("grey.png", np.uint16), ("grey.tif", np.uint16), ("grey.tif", np.int32)])
def test_16_bits(tmp_path, name, dtype):
    grey = np.arange(256, dtype=dtype).reshape(16, 16) * 257
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by a half
    Image.fromarray(grey).save(tmp_path / name, exif=exif)
    assert np.array_equal(read_image(tmp_path / name), np.stack([grey[::-1, ::-1] // 257] * 3, -1))
    assert read_image(Image.fromarray(np.full((2, 2), 200, np.int32))).tolist() == [[[200] * 3] * 2] * 2  # 8 bits in 32


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_that_is_transparent(tmp_path, dtype):
    """Of a png: over white."""
    Image.fromarray(np.full((2, 2), 7, dtype)).save(tmp_path / "grey.png")
    png = (tmp_path / "grey.png").read_bytes()
    chunk = b"tRNS" + (7).to_bytes(2, "big")
    (tmp_path / "clear.png").write_bytes(
        png[:33] + b"\0\0\0\2" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[33:]
    )
    assert (read_image(tmp_path / "grey.png") < 255).all()
    assert (read_image(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize(
    ("grey", "error"),
    [
        (np.ones((4, 4), np.float32), "floating-point numbers, of which nothing says what is white"),
        (np.full((4, 4), 65536, np.int32), "numbers from 65536 to 65536, more than 16 bits"),
    ],
)
def test_pictures_without_a_white(tmp_path, grey, error):
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    with pytest.raises(ValueError, match=rf"^image: .*grey\.tif is not a picture that can be read: {error}$"):
        read_image(tmp_path / "grey.tif")


@pytest.mark.parametrize(("name", "place", "value"), [("red.png", 36, 1), ("red.png", 11, 0), ("red.tif", 72, 2)])
def test_a_damaged_picture(tmp_path, name, place, value):
    """Of which Pillow raises SyntaxError, ValueError and TypeError."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] = value
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^image: .*{name} is not a picture that can be read: .+$"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "num_frames", "error"),
    [
        ("clip.avi", 2, "ends in '.avi'"),
        ("frame.png", 2, "holds one picture; .* needed for a video, or num_frames = 1"),
        ("nowhere/clip.mp4", 2, "nowhere does not exist"),
        ("notes", 2, "holds other things"),
        ("plain", 2, "is a file; a folder's name needed"),
        (".", 2, "a name of its own needed"),
        ("empty/..", 2, "a name of its own needed"),
        (".mp4", 2, r"got '.*\.mp4'; a name of its own needed"),
        (".PNG", 1, r"got '.*\.PNG'; a name of its own needed"),
        ("pipe", 2, "is neither a file nor a folder; another name needed"),
        ("pipe.mp4", 2, "is neither a file nor a folder; another name needed"),
        ("link", 2, "the folder .*nowhere does not exist"),
        ("/proc/clip.mp4", 2, "cannot be written|does not exist"),  # though root has the permission
    ],
)
def test_unwritable(tmp_path, monkeypatch, name, num_frames, error):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("keep me")
    (tmp_path / "plain").write_text("keep me")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "clip")
    for pipe in ("pipe", "pipe.mp4"):
        os.mkfifo(tmp_path / pipe)
    with pytest.raises((ValueError, OSError), match=error):
        check_writable(name if name == "." else tmp_path / name, num_frames)
    assert not list((tmp_path / "empty").iterdir())


def test_the_folder_one_stands_in_is_kept(tmp_path, frames, monkeypatch):
    """And what holds it, though both hold what a video's folder may."""
    path = write_frames(frames, tmp_path / "frames")
    monkeypatch.chdir(path)
    with pytest.raises(ValueError, match=r"frames', which holds the current folder; a folder of its own needed$"):
        write_frames(frames, path)
    (tmp_path / "holds" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "holds" / "me")
    with pytest.raises(ValueError, match=r"^path: got '\.\.', which holds the current folder"):
        check_place("path", Path(".."))


def closed(monkeypatch, folder):
    """No name can be made in ``folder``, nor one there replaced."""
    make, rename = tempfile.mkdtemp, Path.rename

    def mkdtemp(dir, **options):
        if Path(dir) == folder:
            raise PermissionError(13, "Permission denied", str(dir))
        return make(dir=dir, **options)

    def moved(self, target):
        assert folder not in (self.parent, Path(target).parent)
        return rename(self, target)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(Path, "rename", moved)


def test_an_empty_folder_is_filled(tmp_path, frames, monkeypatch):
    """One's own, in a folder that is not, as where a disk is mounted."""
    (tmp_path / "mine").mkdir()
    closed(monkeypatch, tmp_path)
    before = (tmp_path / "mine").stat().st_ino
    write_frames(frames, tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == len(frames)
    assert (tmp_path / "mine").stat().st_ino == before
    with pytest.raises(PermissionError, match=rf"^output: .*mine cannot be written: {tmp_path}: Permission denied$"):
        check_writable(tmp_path / "mine")  # it is not empty any more


def test_an_empty_folder_is_filled_or_stays_empty(tmp_path, frames, monkeypatch):
    rename = Path.rename

    def full(self, target):
        if self.name == "0003.png" and target.parent == tmp_path:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(OSError, match="No space left"):
        write_frames(frames, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mount_point_is_not_replaced(tmp_path, frames, monkeypatch):
    write_frames(frames, tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(PermissionError, match="is a mount point, which cannot be replaced; another name needed"):
        check_writable(tmp_path)


def test_bad_frames_write_nothing(tmp_path, frames):
    for bad, error in [
        (frames[:, 1:], "even height and width, got 95x128"),
        (frames[0], "uint8"),
        (frames / 255, "float64"),
    ]:
        with pytest.raises(ValueError, match=error):
            write_frames(bad, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path, frames, monkeypatch):
    path = write_frames(frames, tmp_path / "clip.mp4")
    before = path.read_bytes()

    def write_half(frames, partial, fps):
        partial.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr("univid.data.files._write_mp4", write_half)
    with pytest.raises(OSError, match="no space left"):
        write_frames(frames, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("read", [read_image, read_video])
def test_unreadable(tmp_path, read):
    (tmp_path / "text").write_text("no picture")
    with pytest.raises(ValueError, match=r"text is not a (picture|video) that can be read"):
        read(tmp_path / "text")
    with pytest.raises((ValueError, FileNotFoundError), match="missing"):
        read(tmp_path / "missing")


def test_a_picture_that_is_a_bomb(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are an error
    with pytest.raises(ValueError, match=r"^image: .*large\.png is not a picture that can be read: Image size"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_told_of_the_name_that_was_chosen(tmp_path, named):
    def write(partial):
        raise OSError(28, "No space left on device", *[str(partial)] * named)

    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/clip\.mp4'$"):
        beside(tmp_path / "clip.mp4", write)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, error):
    def write(partial):
        partial.write_bytes(b"half")
        raise error

    path = tmp_path / "clip.mp4"
    path.write_bytes(b"whole")
    with pytest.raises(OSError, match="No space left") as said:
        beside(path, write)
    assert str(path) in str(said.value)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
