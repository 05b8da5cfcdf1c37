"""Clips on disk: shards, tables, pictures, what is read of them, and what is said of bad ones. Real files, written here."""

import functools
import io
import json
import logging
import os
import tarfile
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from univid.data.dataset import DataConfig, open_dataset
from univid.data.files import read_video, write_frames
from univid.data.loader import Loader
from univid.data.paths import braces


def video(path, value=0, num_frames=8, size=(32, 48), fps=8):
    """Frame t of clip ``value`` is a grey of value + 5t."""
    greys = value + 5 * np.arange(num_frames)
    write_frames(np.broadcast_to(greys[:, None, None, None], (num_frames, *size, 3)).astype(np.uint8), path, fps)
    return path.read_bytes()


def picture(value=100, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path, members):
    """A tar of named bytes, texts and JSON objects."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """Clips of 8 frames; each is written once."""
    folder = tmp_path_factory.mktemp("mp4")
    return functools.cache(
        lambda value=0, **options: video(folder / f"{value}-{len(os.listdir(folder))}.mp4", value, **options)
    )


@pytest.fixture
def shards(tmp_path, mp4):
    """Two shards of three clips, with captions and scores."""
    for number in range(2):
        members = {}
        for i in range(3 * number, 3 * number + 3):
            members |= {
                f"{i:05}.mp4": mp4(20 * i),
                f"{i:05}.txt": f"clip {i}\n",
                f"{i:05}.json": {"score": i, "url": "x"},
            }
        shard(tmp_path / f"{number:03}.tar", members)
    return tmp_path


def config(path, **options):
    defaults = {"num_frames": 3, "sizes": ((32, 48),)}
    return DataConfig(**defaults | {"paths": (str(path),)} | options)


def opened(path, **options):
    return open_dataset(config(path, **options))


def greys(sample):
    return sample.frames.float().mean((1, 2, 3)).numpy()


@pytest.mark.parametrize("pattern", ["", "*.tar", "{000..001}.tar", "{000,001}.tar", "00?.tar"])
def test_shards(shards, pattern):
    data = opened(shards / pattern)
    assert len(data) == 6
    for i in range(6):
        sample = data[i]
        assert (sample.key, sample.caption, sample.fps) == (f"{i:05}", f"clip {i}", 8)
        assert sample.frames.shape == (3, 32, 48, 3)
        first = (greys(sample)[0] - 20 * i) / 5
        assert abs(first - round(first)) < 0.3 and -0.3 < first < 5.3
        np.testing.assert_allclose(greys(sample) - greys(sample)[0], [0, 5, 10], atol=2)
    assert np.array_equal(data[2].frames, data[2].frames)


@pytest.mark.parametrize("pattern", ["*", "00*"])
def test_a_pattern_means_shards_alone(shards, pattern):
    """And not their indices, which the first time leaves beside them."""
    for _ in range(2):
        assert len(opened(shards / pattern)) == 6


def test_index_is_kept_and_made_anew(shards, tmp_path, mp4):
    first = opened(shards / "000.tar")
    index = shards / "000.tar.index.npz"
    assert index.is_file()
    written = index.stat().st_mtime_ns
    assert opened(shards / "000.tar")[1].caption == first[1].caption
    assert index.stat().st_mtime_ns == written
    shard(shards / "000.tar", {"a.mp4": mp4(0), "a.json": {"caption": "another"}})
    os.utime(shards / "000.tar", (1, 1))
    assert [opened(shards / "000.tar")[0].caption] == ["another"]
    index.write_bytes(b"nonsense")
    assert len(opened(shards / "000.tar")) == 1


def test_index_of_a_folder_that_cannot_be_written(shards, tmp_path, monkeypatch):
    from univid.data import shards as module

    keep, kept = module._keep, []

    def refuse(place, arrays):
        if place.parent == shards:
            raise OSError(28, "No space left on device")
        kept.append(place)
        keep(place, arrays)

    monkeypatch.setattr(module, "_keep", refuse)
    assert len(opened(shards, cache=str(tmp_path / "cache"))) == 6
    assert len(kept) == 2 and all(place.parent == tmp_path / "cache" for place in kept)
    monkeypatch.setattr(module, "_scan", lambda path: pytest.fail("the kept one serves"))
    assert len(opened(shards, cache=str(tmp_path / "cache"))) == 6


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_table(tmp_path, mp4, kind):
    (tmp_path / "clips").mkdir()
    rows = [{"path": f"clips/{i}.mp4", "caption": f'clip "{i}", moving', "score": i / 2} for i in range(4)]
    for i, row in enumerate(rows):
        (tmp_path / row["path"]).write_bytes(mp4(20 * i))
    if kind == "csv":
        lines = ["path,caption,score"] + [
            f'{r["path"]},"clip ""{i}"", moving",{r["score"]}' for i, r in enumerate(rows)
        ]
    else:
        lines = [json.dumps(row) for row in rows]
    (tmp_path / f"list.{kind}").write_text("\n".join(lines) + "\n")
    for path in (tmp_path, tmp_path / f"list.{kind}"):
        data = opened(path, min_score={"score": 1})
        assert [(s.key, s.caption) for s in map(data.__getitem__, range(2))] == [
            (f"clips/{i}.mp4", f'clip "{i}", moving') for i in (2, 3)
        ]
        assert 38 < greys(data[0])[0] < 68


def test_frames_are_those_of_the_file(tmp_path, mp4):
    """At the file's own size the pixels are read_video's; with fps every n-th frame; from anywhere in the clip."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 8, 12, 3)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    write_frames(noise, tmp_path / "noise.mp4", 24)
    whole, _ = read_video(tmp_path / "noise.mp4")
    (tmp_path / "list.csv").write_text("path,caption\nnoise.mp4,noise\n")
    starts = set()
    for fps, stride in ((None, 1), (24, 1), (12, 2), (8, 3), (10, 2), (60, 1)):
        data = opened(tmp_path, fps=fps, num_frames=5)
        for seed in range(6):
            sample = data.read(0, np.random.default_rng(seed))
            error = [np.abs(sample.frames[0].numpy().astype(int) - frame).mean() for frame in whole]
            start = int(np.argmin(error))
            starts.add(start)
            assert sample.fps == 24 / stride
            wanted = whole[start : start + 5 * stride : stride]
            assert np.abs(sample.frames.numpy().astype(int) - wanted).max() <= 2
    assert len(starts) > 8 and max(starts) > 15
    assert opened(tmp_path, num_frames=30)[0].frames.shape[0] == 30


def test_resize_covers_and_keeps_the_middle(tmp_path):
    frames = np.zeros((2, 32, 96, 3), np.uint8)
    frames[:, :, 32:64] = 255  # the middle third is white
    write_frames(frames, tmp_path / "wide.mp4", 8)
    (tmp_path / "list.csv").write_text("path,caption\nwide.mp4,wide\n")
    sample = opened(tmp_path, num_frames=2, sizes=((16, 16),))[0]
    assert sample.frames.shape == (2, 16, 16, 3)
    assert sample.frames[:, :, 2:-2].float().mean() > 245
    tall = opened(tmp_path, num_frames=2, sizes=((64, 24),))[0]
    assert tall.frames.shape == (2, 64, 24, 3)
    assert tall.frames.float().mean() > 245


def test_turned_as_the_file_says(tmp_path):
    """As phones write it: a quarter turn clockwise stands in the track's matrix, and the pixels lie on their side."""
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :, :24] = 255  # on the left, which a turn takes to the top
    write_frames(frames, tmp_path / "clip.mp4", 8)
    words = lambda *values: b"".join(int(x * 2**16).to_bytes(4, "big", signed=True) for x in values)  # noqa: E731
    data = (tmp_path / "clip.mp4").read_bytes()
    tkhd = data.index(b"tkhd")
    matrix = data.index(words(1, 0, 0, 0, 1), tkhd)
    (tmp_path / "clip.mp4").write_bytes(data[:matrix] + words(0, 1, 0, -1, 0) + data[matrix + 20 :])
    (tmp_path / "list.csv").write_text("path,caption\nclip.mp4,clip\n")
    data = opened(tmp_path, sizes=((48, 32), (32, 48)))
    assert data.buckets.tolist() == [0]
    shown = data[0].frames.float()
    assert shown.shape == (3, 48, 32, 3)
    assert shown[:, :22].min() > 240 and shown[:, 26:].max() < 15


def test_a_rate_that_varies(tmp_path):
    """A time without a frame of its own shows the one before it."""
    with av.open(tmp_path / "clip.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for pts in (0, 1, 2, 5, 6, 7, 8, 9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * pts, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "list.csv").write_text("path,caption\nclip.mp4,clip\n")
    sample = opened(tmp_path, num_frames=6, sizes=((32, 32),)).read(0, np.random.default_rng(0))
    shown = greys(sample)
    assert (np.diff(shown) > -2).all() and shown[-1] > shown[0] + 60


def test_pictures(tmp_path, mp4):
    members = {"a.png": picture(), "a.txt": "red", "b.mp4": mp4(50), "b.txt": "grey"}
    shard(tmp_path / "0.tar", members)
    data = opened(tmp_path, num_frames=1, sizes=((16, 16),), fps=8)
    assert len(data) == 2
    red, grey = data[0], data[1]
    assert red.frames.shape == grey.frames.shape == (1, 16, 16, 3)
    assert (red.frames.float().mean((0, 1, 2)) - torch.tensor([100.0, 0, 0])).abs().max() < 2
    assert 48 < grey.frames.float().mean() < 87
    assert [s.key for s in map(opened(tmp_path).__getitem__, range(1))] == ["b"]  # clips alone where T > 1
    shard(tmp_path / "0.tar", {"a.png": picture(), "a.txt": "red"})
    with pytest.raises(ValueError, match="holds pictures alone; num_frames=3 needs clips"):
        opened(tmp_path)


def test_buckets(tmp_path, mp4):
    sizes = ((32, 48), (32, 32), (48, 32))
    members = {}
    for i in range(9):
        wide = {"size": sizes[i % 3]} if i % 3 else {}
        members |= {f"{i}.mp4": mp4(20 * i, **wide), f"{i}.txt": "x"}
    members["broken.mp4"], members["broken.txt"] = mp4(0)[:300], "x"
    shard(tmp_path / "0.tar", members)
    data = opened(tmp_path, sizes=sizes)
    assert data.buckets.tolist() == [0, 1, 2] * 3 + [1]
    loader = Loader(data, 2, workers=0)
    shapes = [tuple(loader.next().frames.shape[2:4]) for _ in range(9)]
    assert set(shapes) == set(sizes)
    shard(tmp_path / "1.tar", {"a.mp4": mp4(0), "a.txt": "x", "a.json": {"width": 20, "height": 30}})
    assert opened(tmp_path / "1.tar", sizes=sizes).buckets.tolist() == [2]  # its JSON saves the look


def test_the_video_of_a_key_counts_and_nothing_is_there_twice(tmp_path, mp4):
    both = {"a.mp4": mp4(50), "a.jpg": picture(), "a.txt": "grey"}
    for members in (both, dict(reversed(both.items()))):
        shard(tmp_path / "0.tar", members)
        assert 48 < greys(opened(tmp_path)[0])[0] < 87
    for twice, kind in (
        ({"a.webm": mp4(0)}, "video"),
        ({"a.png": picture()}, "picture"),
        ({"a.TXT": "x"}, "txt"),
        ({"a.json": {}, "a.JSON": {}}, "json"),
    ):
        name = list(twice)[-1]
        shard(tmp_path / "0.tar", both | twice)
        with pytest.raises(ValueError, match=rf"^data: .*0\.tar: {name} is the second {kind} of its key; one needed$"):
            opened(tmp_path)


def test_names_with_more_dots_are_counted(tmp_path, mp4, caplog):
    """Also where an index is there already."""
    members = {"a.mp4": mp4(0), "a.txt": "a", "b.v1.mp4": mp4(0), "b.v1.txt": "b", "c.v1.MP4": mp4(0), "._a.mp4": ""}
    shard(tmp_path / "0.tar", {"z.mp4": mp4(0), "z.txt": "z"})
    shard(tmp_path / "1.tar", members)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "univid.data"):
            assert len(opened(tmp_path)) == 2
        message = f"data: left out 2 files whose key would have a dot, which ends it; one is {tmp_path}/1.tar/b.v1.mp4"
        assert [record.getMessage() for record in caplog.records] == [message]


def test_a_folder_of_shards_says_that_its_table_is_not_read(shards, caplog):
    (shards / "list.csv").write_text("path,caption\na.mp4,x\n")
    with caplog.at_level(logging.WARNING, "univid.data"):
        assert len(opened(shards)) == 6
    assert f"data: {shards} holds shards, which are read, and list.csv, which is not" in caplog.text


@pytest.mark.parametrize("kind", ["shard", "table"])
def test_names_that_are_not_utf8(tmp_path, mp4, kind, caplog):
    """They are read, and shown with escapes: in Latin-1 what old machines pack, a half of a pair what JSON lets pass."""
    names = ["caf\udce9", "a"]
    if kind == "shard":
        members = {f"{name}.mp4": mp4(0) for name in names} | {f"{name}.txt": "x" for name in names}
        shard(tmp_path / "0.tar", members | {"\udce9.b.mp4": mp4(0)})
    else:
        names.append("\ud800")  # which no file can have
        rows = [{"path": f"{name}.mp4", "caption": "x"} for name in names]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for name in names[:2]:
            (tmp_path / f"{name}.mp4").write_bytes(mp4(0))
    for _ in range(2):  # without and with an index
        data = opened(tmp_path)
        keys = [data[i].key.removesuffix(".mp4") for i in range(2)]
        assert keys == [r"caf\udce9", "a"]
        assert len(Loader(data, 2, workers=0).next().keys) == 2
    if kind == "shard":
        assert caplog.messages[-1].endswith(r"one is " + f"{tmp_path}/0.tar/" + r"\udce9.b.mp4")
    else:
        with pytest.raises(ValueError, match=r"^.*/\\ud800\.mp4: does not exist$"):
            data[2]


def test_what_says_what_a_cache_is_of_but_is_not_json(tmp_path, mp4):
    shard(tmp_path / "0.tar", {"univid.json": "nonsense", "a.mp4": mp4(0), "a.txt": "x"})
    for _ in range(2):  # without and with an index
        with pytest.raises(ValueError, match=r"^data: .*0\.tar: univid\.json is not a JSON object: "):
            opened(tmp_path)


def test_min_score(shards):
    assert [opened(shards, min_score={"score": 3.5})[i].key for i in range(2)] == ["00004", "00005"]
    with pytest.raises(ValueError, match="no sample has a number 'beauty'; there are: score"):
        opened(shards, min_score={"beauty": 1})
    with pytest.raises(ValueError, match=r"none of 6 samples passes \{'score': 9\}"):
        opened(shards, min_score={"score": 9})


def test_broken_clips_are_skipped(tmp_path, mp4, caplog):
    members = {f"{i}.mp4": mp4(20 * i) for i in range(8)} | {f"{i}.txt": "x" for i in range(10)}
    members["8.mp4"] = mp4(0)[:-200]
    members["9.mp4"] = mp4(0, num_frames=2)
    shard(tmp_path / "0.tar", members)
    seen = []
    for workers in (0, 2):
        loader = Loader(opened(tmp_path), 5, workers=workers, max_skipped=0.5)
        with caplog.at_level(logging.WARNING, "univid.data"):
            batches = [loader.next() for _ in range(4)]
        assert loader.skipped == 4  # each of the two, in each of two epochs, unless one took another's place
        seen.append([(batch.keys, batch.frames.numpy().tobytes()) for batch in batches])
        assert not {key for keys, _ in seen[-1] for key in keys} & {"8", "9"}
    assert seen[0] == seen[1]
    log = caplog.text
    assert f"{tmp_path}/0.tar/9: is shorter than T: 2 frames at 8 fps; 3 needed" in log
    assert f"{tmp_path}/0.tar/8: is " in log
    loader = Loader(opened(tmp_path), 5, workers=0, max_skipped=0.01)
    with pytest.raises(ValueError, match=r"could not be read, more than max_skipped=0\.01"):
        for _ in range(30):
            loader.next()


def test_a_video_cut_inside_its_header_is_called_cut(tmp_path, mp4):
    shard(tmp_path / "0.tar", {"a.mp4": mp4(0)[:400], "a.txt": "x"})
    with pytest.raises(ValueError, match=r"0\.tar/a: is not a video that can be read: it is cut off in its header$"):
        opened(tmp_path)[0]


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_title_in_another_encoding_is_not_in_the_way(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with av.open(path, "w") as container:
        container.metadata["title"] = "Caf_"
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert path.read_bytes().count(b"Caf_") == 1
    path.write_bytes(path.read_bytes().replace(b"Caf_", "Café".encode("latin-1")))
    (tmp_path / "list.csv").write_text(f"path,caption\n{path.name},x\n")
    assert opened(tmp_path)[0].frames.shape == (3, 32, 48, 3)
    assert opened(tmp_path, sizes=((48, 32), (32, 48))).buckets.tolist() == [1]
    assert len(read_video(path)[0]) == 8


def test_captions(tmp_path, mp4, caplog):
    shard(tmp_path / "0.tar", {"a.mp4": mp4(0), "b.mp4": mp4(0), "b.json": {"caption": "from JSON"}})
    with caplog.at_level(logging.WARNING, "univid.data"):
        data = opened(tmp_path)
    assert (len(data), data[0].caption) == (1, "from JSON")
    assert f"left out 1 of 2 clips without a caption; one is {tmp_path}/0.tar/a" in caplog.text
    shard(tmp_path / "0.tar", {"a.mp4": mp4(0)})
    with pytest.raises(ValueError, match=r"captions are missing: .*/a has neither a text in key\.txt nor"):
        opened(tmp_path)
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,\n")
    with pytest.raises(ValueError, match=r"captions are missing: none of 1 rows of .*list\.csv"):
        opened(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("path,text\na.mp4,x\n")
    with pytest.raises(ValueError, match=r"list\.csv has no column 'caption'"):
        opened(tmp_path / "list.csv")


@pytest.mark.parametrize(
    "files",
    [{"b.txt": ""}, {"b.txt": " \n"}, {"b.json": {"caption": " "}}, {"b.json": {"caption": ["a", "b"]}}],
    ids=str,
)
def test_captions_that_are_none(tmp_path, mp4, files):
    bare = {"b.mp4": mp4(0), **files}
    shard(tmp_path / "0.tar", bare | {"a.mp4": mp4(0), "a.txt": "", "a.json": {"caption": "from JSON"}})
    assert [sample.caption for sample in map(opened(tmp_path).__getitem__, range(1))] == ["from JSON"]
    assert len(opened(tmp_path)) == 1
    shard(tmp_path / "0.tar", bare)
    with pytest.raises(ValueError, match=r"captions are missing: .*/b has neither a text in key\.txt nor one as"):
        opened(tmp_path)
    if "b.json" in files:
        (tmp_path / "list.jsonl").write_text(json.dumps({"path": "b.mp4", **files["b.json"]}))
        with pytest.raises(ValueError, match=r"captions are missing: none of 1 rows of .*list\.jsonl"):
            opened(tmp_path / "list.jsonl")


@pytest.mark.parametrize("caption", ["a\u2028b", "a\x85b", "a\u2029b"], ids=ascii)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
def test_lines_of_jsonl_end_where_json_lets_them(tmp_path, mp4, caption, mark):
    (tmp_path / "a.mp4").write_bytes(mp4(0))
    row = json.dumps({"path": "a.mp4", "caption": caption}, ensure_ascii=False)
    for end in ("\n", "\r\n"):
        (tmp_path / "list.jsonl").write_bytes(f"{mark}{row}{end}{row}{end}".encode())
        assert [opened(tmp_path)[i].caption for i in range(2)] == [caption] * 2


def test_numbers_that_are_too_large(tmp_path, mp4):
    """No float holds 400 digits: such a field is no score. Python reads no 5,000 of them."""
    files = {"a.mp4": mp4(0), "a.json": f'{{"caption": "x", "id": {10**400}, "score": 1}}'}
    shard(tmp_path / "0.tar", files)
    (tmp_path / "list.jsonl").write_text(f'{{"path": "a.mp4", {files["a.json"][1:]}')
    for name in ("0.tar", "list.jsonl"):
        assert opened(tmp_path / name).numbers(0) == {"score": 1}
    digits = "1" * 5000
    shard(tmp_path / "0.tar", files | {"a.json": f'{{"id": {digits}}}'})
    (tmp_path / "list.jsonl").write_text(f'{{"path": "a.mp4", "caption": "x", "id": {digits}}}')
    for name, place in (("0.tar", r"0\.tar: a\.json"), ("list.jsonl", r"list\.jsonl: line 1")):
        with pytest.raises(ValueError, match=f"{place} is not a JSON object: Exceeds"):
            opened(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("*.tar", "no shards match '.*tar'"),
        ("", r"^data: .*/test_bad_paths\w+ holds no \.tar and no \.csv or \.jsonl table; one needed$"),
        ("nowhere.tar", "nowhere.tar does not exist"),
        ("notes.txt", "notes.txt; tar shards"),
        ("empty/0.tar", "0.tar is an empty shard"),
        ("empty/1.tar", "1.tar is not a whole tar file"),
        ("empty/2.tar", "2.tar is an empty shard"),
        ("empty/3.tar", "3.tar is not a whole tar file"),
        ("empty/4.tar", "4.tar: a.json is not a JSON object"),
        ("empty/list.csv", "list.csv lists no clips"),
        ("{empty/list.csv,empty/0.tar}", "tar shards or one table needed"),
    ],
)
def test_bad_paths(tmp_path, mp4, path, error):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    shard(tmp_path / "empty" / "0.tar", {})
    (tmp_path / "empty" / "1.tar").write_bytes(b"x" * 3000)
    shard(tmp_path / "empty" / "2.tar", {"a.txt": "a caption of nothing"})
    whole = shard(tmp_path / "empty" / "3.tar", {"a.mp4": mp4(0), "b.mp4": mp4(20)}).read_bytes()
    (tmp_path / "empty" / "3.tar").write_bytes(whole[: len(mp4(0)) + 1500])
    shard(tmp_path / "empty" / "4.tar", {"a.mp4": mp4(0), "a.json": "[1"})
    (tmp_path / "empty" / "list.csv").write_text("path,caption\n")
    with pytest.raises((ValueError, OSError), match=error) as raised:
        opened(tmp_path / path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"sizes": ()}, "sizes: got none"),
        ({"sizes": ((0, 3),)}, "sizes: got"),
        ({"fps": 0}, "fps: got 0"),
        ({"paths": ()}, "paths: got none"),
    ],
)
def test_bad_config(shards, given, error):
    with pytest.raises(ValueError, match=error):
        open_dataset(config(shards, **given))


def test_braces():
    assert braces("a{08..11}b{x,y}") == [f"a{n}b{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    assert braces("plain") == ["plain"]
