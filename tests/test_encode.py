"""``univid encode``: a cache holds what the encoders make of the clips, goes on where it ended, and knows its model."""

import json
import resource
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_pipeline import make
from tests.test_data import mp4, picture, shard, shards  # noqa: F401 - fixtures
from univid.cli import main
from univid.data.autoencoder import load_autoencoder
from univid.data.cache import fingerprint
from univid.data.clip import WEIGHTS
from univid.data.dataset import DataConfig, open_dataset
from univid.data.loader import Loader
from univid.data.tensors import find_weights

SIZE = ((16, 32),)


@pytest.fixture(scope="module")
def pipe():
    return make()


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode") / "model"
    pipe.save_pretrained(folder)
    return folder


def run(source, output, model, *more):
    shown = ["--device", "cpu", "--workers", "0", "--shard-size", "4", "--batch-size", "3"]
    return main(["encode", str(source), "-o", str(output), "--model", str(model), *shown, *more])


def cached(output, **options):
    return open_dataset(DataConfig(**{"paths": (str(output),), "num_frames": 3} | options))


def test_round_trip(shards, pipe, model, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "cache"
    assert run(shards, output, model) == 0
    assert capsys.readouterr().out == f"{output}: 6 clips\n"
    assert sorted(p.name for p in output.iterdir()) == ["000000.tar", "000001.tar"]
    clips = open_dataset(DataConfig(paths=(str(shards),), num_frames=3, sizes=SIZE, fps=4))
    data = open_dataset(
        DataConfig(paths=(str(output),), num_frames=3, sizes=SIZE), fingerprint(model / "vae", model / "clip")
    )
    assert len(data) == len(clips) == 6
    for i in range(6):
        clip, kept = clips[i], data[i]
        assert (kept.key, kept.caption, kept.fps) == (clip.key, clip.caption, clip.fps) == (f"{i:05}", f"clip {i}", 4)
        pixels = clip.frames.movedim(-1, 1)[None]
        expected = {
            "latents": pipe.vae.encode(pixels / 127.5 - 1)[0],
            "text": pipe.clip.text([clip.caption])[0],
            "image": pipe.clip.image(pixels[:, 0] / 255)[0],
        }
        for name, x in expected.items():
            assert getattr(kept, name).dtype == torch.float16
            torch.testing.assert_close(getattr(kept, name).float(), x, rtol=2e-3, atol=2e-3)
    with tarfile.open(output / "000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"json", "safetensors"}
    batch = Loader(data, 2, workers=1).next()
    assert batch.frames is None and batch.latents.shape == (2, 3, 4, 8, 16)
    assert cached(output, num_frames=1)[0].latents.shape[0] == 1
    assert [cached(output, min_score={"score": 4})[i].key for i in range(2)] == ["00004", "00005"]


def test_buckets_and_pictures(tmp_path, mp4, model):  # noqa: F811
    members = {f"{i}.txt": "x" for i in range(6)} | {f"{i}.mp4": mp4(20 * i) for i in range(3)}
    members |= {f"{i}.png": picture(size=(60, 40)) for i in range(3, 6)}
    shard(tmp_path / "0.tar", members)
    sizes = ["--size", "16x32", "--size", "32x16"]
    assert run(tmp_path / "0.tar", tmp_path / "cache", model, "--num-frames", "1", *sizes) == 0
    data = cached(tmp_path / "cache", num_frames=1)
    assert sorted(data.buckets.tolist()) == [0, 0, 0, 1, 1, 1]
    loader = Loader(data, 3, workers=0)
    assert {tuple(loader.next().latents.shape) for _ in range(2)} == {(3, 1, 4, 8, 16), (3, 1, 4, 16, 8)}


def test_goes_on(shards, model, tmp_path, capsys, monkeypatch):  # noqa: F811
    output, whole = tmp_path / "cache", tmp_path / "whole"
    assert run(shards, whole, model) == 0
    from univid.data.encode import _Encoder

    write, calls = _Encoder.write, []

    def interrupted(self, *arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(_Encoder, "write", interrupted)
    assert run(shards, output, model) == 130
    assert [p.name for p in output.iterdir()] == ["000000.tar"]
    (output / ".000001.tar.partial").write_bytes(b"what a kill leaves behind")
    first = (output / "000000.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert run(shards, output, model) == 0
    assert capsys.readouterr().out == f"{output}: 2 clips; 1 shards were there\n"
    assert (output / "000000.tar").stat().st_mtime_ns == first
    for name in ("000000.tar", "000001.tar"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in output.iterdir()) == ["000000.tar", "000001.tar"]
    assert run(shards, output, model, "--num-frames", "2") == 2
    assert "is of another encoding (num_frames 3, now 2); another folder needed" in capsys.readouterr().err
    assert run(shards, output, model, "--shard-size", "6") == 2
    assert "000000.tar is of another encoding (clips [0, 4], now [0, 6]); another" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["table", "shard"])
@pytest.mark.parametrize("changed", ["caption", "clip", "cut"])
def test_clips_that_have_changed(tmp_path, mp4, model, capsys, kind, changed):  # noqa: F811
    """Under the same names; copied elsewhere they are the same."""

    def write(folder, captions, clips):
        folder.mkdir(exist_ok=True)
        if kind == "shard":
            shard(
                folder / "0.tar",
                {f"{i}.mp4": x for i, x in enumerate(clips)} | {f"{i}.txt": x for i, x in enumerate(captions)},
            )
            return
        for i, x in enumerate(clips):
            (folder / f"{i}.mp4").write_bytes(x)
        rows = [f"{i}.mp4,{caption}" for i, caption in enumerate(captions)]
        (folder / "list.csv").write_text("\n".join(["path,caption", *rows]))

    clips, captions, output = [mp4(0), mp4(20)], ["a", "b"], tmp_path / "cache"
    write(tmp_path / "clips", captions, clips)
    assert run(tmp_path / "clips", output, model) == 0
    write(tmp_path / "copy", captions, clips)
    assert run(tmp_path / "copy", output, model) == 0
    assert "0 clips; 1 shards were there" in capsys.readouterr().out
    if changed == "caption":
        captions[1] = "c"
    else:
        clips[1] = mp4(80) if changed == "clip" else clips[1][:-1]
    write(tmp_path / "clips", captions, clips)
    assert run(tmp_path / "clips", output, model) == 2
    assert "000000.tar is of another encoding (files " in capsys.readouterr().err


def test_another_model(shards, pipe, model, tmp_path):  # noqa: F811
    output = tmp_path / "cache"
    assert run(shards, output, model) == 0
    ours = fingerprint(model / "vae", model / "clip")
    other = make()
    with torch.no_grad():
        next(other.vae.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "vae")
    with torch.no_grad():
        other = make()
        next(other.clip.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "clip")
    for part, called in (("vae", "VAE"), ("clip", "text encoder")):
        theirs = fingerprint(tmp_path / part / "vae", tmp_path / part / "clip")
        assert [name for name in ours if ours[name] != theirs[name]] == [part]
        with pytest.raises(ValueError, match=rf"made with another VAE or text encoder \(fingerprint\): its {called}"):
            open_dataset(DataConfig(paths=(str(output),), num_frames=3), theirs)
    config = tmp_path / "vae" / "vae" / "config.json"
    pipe.vae.save(tmp_path / "vae" / "vae")
    assert fingerprint(tmp_path / "vae" / "vae", model / "clip") == ours
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert fingerprint(tmp_path / "vae" / "vae", model / "clip")["vae"] != ours["vae"]


def test_a_fingerprint_is_of_what_is_loaded(pipe, tmp_path):
    """Whatever precision holds it, under whatever names, and whatever lies beside."""
    vae, clip = tmp_path / "vae", tmp_path / "clip"
    make().vae.half().save(vae)
    pipe.clip.save(clip)
    ours = fingerprint(vae, clip)
    path = find_weights(vae)
    halves = load_file(path)
    assert {x.dtype for x in halves.values()} == {torch.float16}
    load_autoencoder(vae).save(vae)  # in float32, as by an export
    wide = load_file(path)
    assert {x.dtype for x in wide.values()} == {torch.float32}
    assert fingerprint(vae, clip) == ours
    older = {}  # Stable Diffusion 2.1's own names
    for name, x in wide.items():
        for today, once in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{today}." in name:
                name, x = name.replace(today, once), x[..., None, None] if x.ndim == 2 else x
        older[name] = x
    assert older.keys() != wide.keys()
    save_file(older, path)
    save_file(halves, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))  # which is not read
    config = json.loads((vae / "config.json").read_text())
    del config["scaling_factor"]  # it is diffusers' default
    (vae / "config.json").write_text(json.dumps(config))
    masked = load_file(clip / WEIGHTS) | {"attn_mask": torch.zeros(3)}
    save_file(masked, clip / WEIGHTS)
    save_file({"x": torch.zeros(1)}, clip / "model.safetensors")
    assert fingerprint(vae, clip) == ours
    for again, x in zip(load_autoencoder(vae).parameters(), pipe.vae.parameters(), strict=True):
        assert torch.equal(again, x.half().float())
    next(iter(older.values())).add_(1e-3)
    save_file(older, path)
    assert fingerprint(vae, clip)["vae"] != ours["vae"]


def test_bad_caches(shards, model, tmp_path):  # noqa: F811
    output = tmp_path / "cache"
    assert run(shards, output, model) == 0
    for options, error in (
        ({"num_frames": 4}, "num_frames: got 4; .* has 3 of each clip"),
        ({"sizes": ((16, 16),)}, r"sizes: got \(\(16, 16\),\); .* has \[\[16, 32\]\]"),
        ({"paths": (str(output), str(shards))}, "some are caches of `univid encode`, some hold clips"),
    ):
        with pytest.raises(ValueError, match=error):
            cached(output, **options)
    path = output / "000000.tar"
    data = cached(output)
    broken = bytearray(path.read_bytes())
    start = int(data.source.spans[0, 0, 0])
    broken[start : start + 8] = b"\xff" * 8
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"000000\.tar/000000000: "):
        data[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{none}/*.tar", "-o", "{new}"], "no shards match"),
        (["{shards}", "-o", "{new}", "--size", "15x32"], "sizes: got 15x32; multiples of 2 needed"),
        (["{shards}", "-o", "{new}", "--num-frames", "99"], "of 6 clips could not be read"),
        (["{shards}", "-o", "{new}", "--model", "nowhere"], "model: got 'nowhere'"),
        (["{shards}", "-o", "{new}", "--batch-size", "0"], "batch_size: got 0"),
        (["{shards}", "-o", "{new}", "--shard-size", "0"], "shard_size: got 0"),
        (["{shards}", "-o", "{new}", "--workers", "-1"], "workers: got -1; at least 0 needed"),
        (["{shards}", "-o", "{new}", "--max-skipped", "nan"], "max_skipped: got nan; a number from 0 to 1 needed"),
        (["{shards}", "-o", "{new}", "--max-skipped", "-1"], "max_skipped: got -1.0; a number from 0 to 1 needed"),
        (["{shards}", "-o", "{new}", "--num-frames", "0"], "num_frames: got 0"),
        (["{shards}", "-o", "{new}", "--size", "0x32"], "sizes: got ((0, 32),)"),
        (["{shards}", "-o", "{new}", "--min-score", "score=nan"], "min_score: none of 6"),
        (["{shards}", "-o", "{new}", "--device", "phone"], "--device: got 'phone'; cuda or cpu needed"),
        *(
            (["{shards}", "-o", "{new}", "--fps", fps], f"fps: got {float(fps)}; a number from 0.01 to 240 needed")
            for fps in ("nan", "inf", "0", "-1", "5e-324")
        ),
        (["{shards}", "-o", "{new}", "--min-score", "score=9"], "min_score: none of 6"),
        (["{shards}", "-o", "{shards}/000.tar"], "000.tar is not a folder"),
        (["{shards}", "-o", "{shards}/000.tar/x"], "output: {shards}/000.tar/x cannot be written: Not a directory"),
        (
            ["{shards}", "-o", "{new}" + "x" * 300],
            "output: {new}" + "x" * 300 + " cannot be written: File name too long",
        ),
        (["{shards}", "-o", "/proc/cache"], "output: /proc/cache cannot be written: No such file or directory"),
    ],
)
def test_bad_input(shards, model, tmp_path, capsys, arguments, error):  # noqa: F811
    places = {"shards": shards, "new": tmp_path / "cache", "none": tmp_path / "none"}
    given = [argument.format(**places) for argument in arguments]
    if "--model" not in given:
        given += ["--model", str(model)]
    assert main(["encode", "--device", "cpu", "--workers", "0", *given]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("univid:")]
    assert len(err) == 1 and error.format(**places) in err[0]
    # What only reading the clips can tell leaves the folder, with nothing in it.
    assert not (tmp_path / "cache").exists() or "--num-frames 99" in " ".join(given)
    assert not list(tmp_path.glob("cache/*"))


def test_settings_of_a_checkpoint(shards, model, tmp_path, capsys):  # noqa: F811
    """They are read as the trainer reads them: of the right kind, and where one is not said, the default."""
    other = tmp_path / "model"
    shutil.copytree(model, other)
    path = other / "generation.json"
    for text, error in (
        ('{"num_frames": "3"}', f"{path}: num_frames: got '3', needs int"),
        ('{"height": 32, "width": 32, "fps": null}', f"{path}: fps: got None, needs float"),
        ('{"frames": 3}', f"{path}: unknown key 'frames'"),
        ('{"height": 15, "num_frames": 3}', "sizes: got 15x576; multiples of 2 needed, the VAE's factor"),
    ):
        path.write_text(text)
        assert run(shards, tmp_path / "cache", other) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"univid: {error}"
    path.unlink()
    assert run(shards, tmp_path / "cache", other) == 2
    error = f"univid: num_frames: not given, and {other} has no generation.json that says it"
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_source_or_output_of_the_wrong_kind(shards, model, tmp_path, capsys):  # noqa: F811
    assert run(shards, shards, model) == 2
    assert "holds the source; another folder needed" in capsys.readouterr().err
    table = tmp_path / "table"
    table.mkdir()
    (table / "list.csv").write_text("path,caption\na.mp4,x\n")
    assert run(table, table, model) == 2
    assert "holds the source; another folder needed" in capsys.readouterr().err
    assert [path.name for path in table.iterdir()] == ["list.csv"]
    output = tmp_path / "cache"
    assert run(shards, output, model) == 0
    assert run(output, tmp_path / "again", model) == 2
    assert "is a cache already; clips needed" in capsys.readouterr().err
    shard(output / "000000.tar", {"a.txt": "something"})
    assert run(shards, output, model) == 2
    assert "000000.tar is something else than a shard of this command" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["000001.tar", "9.tar", "list.jsonl"])
def test_what_lies_in_the_output_and_is_not_of_these_clips(shards, model, tmp_path, capsys, name):  # noqa: F811
    """It would be trained on: a shard of clips that have left the source since, another's, a table. Notes would not be."""
    output = tmp_path / "cache"
    assert run(shards, output, model) == 0
    (output / "000001.tar").rename(output / name)
    (output / "000000.tar").unlink()
    (output / "notes.txt").write_text("mine")
    (shards / "001.tar").unlink()
    capsys.readouterr()
    assert run(shards, output, model) == 2
    error = f"univid: output: {output} holds {name}, which is no shard of these clips; another folder needed"
    assert error in capsys.readouterr().err.splitlines()
    assert sorted(path.name for path in output.iterdir()) == [name, "notes.txt"]
    (output / name).unlink()
    assert run(shards, output, model) == 0


def test_full_disk(shards, model, tmp_path, capsys):  # noqa: F811
    """A file may not grow past a limit, as on a disk that is full: the shard before stays, and nothing half-written."""
    output = tmp_path / "cache"
    assert run(shards, output, model) == 0
    second = (output / "000001.tar").read_bytes()
    (output / "000001.tar").unlink()
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(second) // 2, before[1]))
    try:
        status = run(shards, output, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("univid:")]
    assert err == [
        f"univid: output: {output}/000001.tar could not be written: File too large; the shards before it are whole"
    ]
    assert [p.name for p in output.iterdir() if p.suffix == ".tar" or "partial" in p.name] == ["000000.tar"]
    assert run(shards, output, model) == 0
    assert (output / "000001.tar").read_bytes() == second


def test_two_do_not_write_into_one_folder(shards, model, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "cache"
    output.mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(output / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert run(shards, output, model) == 2
        error = f"univid: output: another process writes to {output}; another folder needed"
        assert error in capsys.readouterr().err.splitlines()
        assert [path.name for path in output.iterdir()] == [".lock"]
        other.kill()
    assert run(shards, output, model) == 0
    assert not (output / ".lock").exists()


def test_a_row_without_a_path_is_left_out(tmp_path, mp4, model, capsys):  # noqa: F811
    rows = [{"path": "a.mp4", "caption": "x"}, {"caption": "of nothing"}]
    (tmp_path / "a.mp4").write_bytes(mp4(0))
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path / "list.jsonl", tmp_path / "cache", model) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache: 1 clips, 1 left out\n"


def test_a_position_belongs_to_the_clips_of_its_cache(shards, model, tmp_path):  # noqa: F811
    """Of which the names are no more than their numbers."""
    assert run(shards, tmp_path / "cache", model, "--shard-size", "3") == 0
    for name in ("000", "001"):
        assert run(shards / f"{name}.tar", tmp_path / name, model) == 0
    first, second = (Loader(cached(tmp_path / name), 1, workers=0) for name in ("000", "001"))
    with pytest.raises(ValueError, match="is of other data or settings: names "):
        second.load_state_dict(first.state_dict())
    second.load_state_dict(second.state_dict())


def test_a_broken_clip_is_left_out(tmp_path, mp4, model, capsys):  # noqa: F811
    members = {f"{i}.mp4": mp4(20 * i) for i in range(5)} | {f"{i}.txt": "x" for i in range(6)}
    shard(tmp_path / "0.tar", members | {"5.mp4": mp4(0)[:500]})
    assert run(tmp_path / "0.tar", tmp_path / "cache", model, "--workers", "2") == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache: 5 clips, 1 left out\n"
    data = cached(tmp_path / "cache")
    assert [data[i].key for i in range(5)] == list("01234")
    assert np.array_equal(data.buckets, [0] * 5)


def test_broken_clips_that_lie_together(tmp_path, mp4, model, capsys):  # noqa: F811
    """They are counted against all clips; more of them are an error, or what ``--max-skipped`` allows."""
    members = {f"{i:02}.mp4": mp4(i)[:500] if i < 10 else mp4(40) for i in range(50)}
    shard(tmp_path / "0.tar", members | {f"{i:02}.txt": "x" for i in range(50)})
    assert run(tmp_path / "0.tar", tmp_path / "cache", model, "--max-skipped", "0.1") == 2
    error = "univid: data: 10 of 50 clips could not be read, more than max_skipped=0.1 of them; the last is "
    assert error in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("00000[2-9].tar"))  # no more clips than it takes to know
    assert run(tmp_path / "0.tar", tmp_path / "cache", model, "--max-skipped", "0.2") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/cache: 40 clips, ")
