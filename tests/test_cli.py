"""The command line, in this process."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.small_pipeline import make
from univid.cli import main
from univid.data.files import read_video

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    make().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "torch")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_generate(model, picture, tmp_path, capsys, name):
    output = tmp_path / name
    assert main(["generate", "a cat", "--image", picture, "--model", model, "-o", str(output), "--steps", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    if output.suffix:
        assert read_video(output)[0].shape == (3, 16, 32, 3)
    else:
        assert sorted(path.name for path in output.iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_the_first_processor(model, tmp_path):
    arguments = ["--model", model, "-o", str(tmp_path / "x.mp4"), "--steps", "1", "--device", "cpu:0"]
    assert main(["generate", "a cat", *arguments]) == 0


def test_a_checkpoint_of_pictures(model, tmp_path):
    """One frame is its default."""
    folder = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((folder / "generation.json").read_text())
    (folder / "generation.json").write_text(json.dumps(settings | {"num_frames": 1}))
    output = tmp_path / "x.png"
    assert main(["generate", "a cat", "--model", str(folder), "-o", str(output), "--steps", "1"]) == 0
    assert Image.open(output).size == (32, 16)


def test_every_option_reaches_the_pipeline(model, picture, tmp_path, monkeypatch):
    options = {
        "image": picture,
        "negative_prompt": "blurry",
        "num_frames": 5,
        "height": 32,
        "width": 48,
        "fps": 12.5,
        "steps": 7,
        "scheduler": "euler",
        "guidance_scale": 6.5,
        "image_guidance_scale": 2.5,
        "guidance_rescale": 0.3,
        "text_weight": 0.4,
        "image_weight": 0.6,
        "seed": 11,
        "num_videos": 2,
    }
    got = {}

    def call(self, **settings):
        got.update(settings, low_memory=self.low_memory)
        raise KeyboardInterrupt

    monkeypatch.setattr("univid.pipeline.UniVidPipeline.__call__", call)
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["a cat", "--model", model, "-o", str(tmp_path / "x.mp4"), "--low-memory", *flags]
    assert main(["generate", *arguments]) == 130
    assert got == options | {"prompt": "a cat", "low_memory": True}


def test_weights(model, picture, tmp_path):
    made = []
    for more in ([], ["--image-weight", "0"], ["--image-weight", "1=0,2=0"], ["--image-weight", "0,0,1"]):
        output = tmp_path / f"{len(made)}"
        assert (
            main(["generate", "a cat", "--image", picture, "--model", model, "-o", str(output), "--steps", "1", *more])
            == 0
        )
        made.append(np.stack([np.asarray(Image.open(path)) for path in sorted(output.iterdir())]))
    assert np.array_equal(made[1], made[2])
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[3], made[1])


def test_sweep(model, picture, tmp_path):
    output = tmp_path / "sweep.mp4"
    arguments = [
        "--image",
        picture,
        "--model",
        model,
        "-o",
        str(output),
        "--steps",
        "1",
        "--sweep",
        "0,0.5,1,1:1,0.2:2,2,0.3",
    ]
    assert main(["generate", "a cat", *arguments]) == 0
    frames, _ = read_video(output)
    assert frames.shape == (3, 2 * (16 + 28), 4 * 32, 3)
    assert np.median(frames[:, 44 + 8 :, 3 * 32 + 8 :]) > 250  # three videos in the second row
    labels = frames[:, :26].astype(int)
    assert labels.min() < 128 < 200 < labels.max()


def test_sweep_goes_from_the_image_to_the_text(model, picture, tmp_path):
    """Each cell is the clip of its own text and image weight, not of the two swapped."""
    arguments = ["generate", "a cat", "--image", picture, "--model", model, "--steps", "1"]
    grid = tmp_path / "grid"
    assert main([*arguments, "-o", str(grid), "--sweep", "0.2:2,1"]) == 0
    read = lambda folder: np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])  # noqa: E731
    cells = np.split(read(grid)[:, 28:], 2, axis=2)
    for cell, (text, image) in zip(cells, (("0.2", "2"), ("1", "0")), strict=True):
        made = []
        for weights in ((text, image), (image, text)):
            alone = tmp_path / "-then-".join(weights).replace(".", "_")
            assert main([*arguments, "-o", str(alone), "--text-weight", weights[0], "--image-weight", weights[1]]) == 0
            made.append(read(alone))
        assert np.array_equal(cell, made[0])
        assert not np.array_equal(cell, made[1])


def test_a_name_that_is_not_written_may_be_taken(model, tmp_path):
    (tmp_path / "x.mp4").mkdir()
    arguments = ["--model", model, "-o", str(tmp_path / "x.mp4"), "--steps", "1"]
    assert main(["generate", "a cat", *arguments, "--num-videos", "2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.mp4", "x-1.mp4", "x.mp4"]


def test_info(model, capsys):
    assert main(["info", model]) == 0
    printed = capsys.readouterr().out
    for part in ("unet", "image_adapter", "vae", "clip", "M parameters in", "F32", "max_frames", "guidance_scale"):
        assert part in printed


def test_info_of_a_configuration_that_is_none(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"univid": [1]}))
    for command in (["info", str(folder)], ["generate", "x", "--model", str(folder), "-o", str(tmp_path / "x.mp4")]):
        assert main(command) == 2
        assert capsys.readouterr().err == f"univid: {path}: univid: got [1], needs an object\n"


def test_info_without_settings(model, tmp_path, capsys):
    """Which `generate` takes as well."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation.json").unlink()
    assert main(["info", str(folder)]) == 0
    assert "settings:" not in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "All 12 operators are right" in printed
    assert "GPU: " in printed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "PROMPT, --image: got neither"),
        (["x", "-o", "clip.avi"], "ends in '.avi'"),
        (["x", "-o", ".mp4"], "got '.mp4'; a name of its own needed"),
        (["x", "-o", ".mp4", "--num-videos", "2"], "got '.mp4'; a name of its own needed"),
        (["x", "-o", "pictures"], "pictures is a folder that holds other things"),
        (["x", "-o", "nowhere/clip.mp4"], "nowhere does not exist"),
        (["x", "--num-frames", "99"], "num_frames: got 99; at most 24"),
        (["x", "--height", "17"], "of which the nearest is 16x32"),
        (["x", "--scheduler", "magic"], "scheduler: got 'magic'"),
        (["x", "--image", "nowhere.png"], "nowhere.png does not exist"),
        (["x", "--image", "text.png"], "text.png is not a picture that can be read"),
        (["x", "-o", "text.png"], "text.png holds one picture; .mp4, .gif or a folder's name needed for a video"),
        (["x", "-o", "text.png/clip.mp4"], "text.png does not exist"),
        (["x", "--device", "cuda"], "--device: got 'cuda'; PyTorch finds no GPU here"),
        (["x", "--device", "phone"], "--device: got 'phone'; cuda or cpu needed"),
        (["x", "--device", "cpu:one"], "--device: got 'cpu:one'; cuda or cpu needed"),
        (["x", "--num-frames", "0"], "num_frames: got 0"),
        (["x", "--num-frames", "0", "-o", "x.png"], "num_frames: got 0"),
        (["x", "--text-weight", "0"], "both are absent"),
        (["x", "--text-weight", "1,2"], "text_weight: got 2 weights, 3 needed"),
        (["x", "--sweep", "0,1"], "PROMPT and --image are needed"),
        (["x", "--image", "red.png", "--sweep", "0,b"], "got 'b'"),
        (["x", "--image", "red.png", "--sweep", "0,nan"], "got 'nan'"),
        (["x", "--image", "red.png", "--sweep", "0,0:0"], "--sweep: got '0:0'; at least one of text and image"),
        (["x", "--seed", "99999999999999999999"], "seed: got 99999999999999999999; a whole number of 64 bits needed"),
        (["x", "--image", "red.png", "--sweep", "0,1", "--text-weight", "0.5"], "--text-weight: got 0.5 with --sweep"),
        (["x", "--image", "red.png", "--sweep", "0,1", "--image-weight", "1"], "--image-weight: got 1.0 with --sweep"),
        (["x", "--image", "red.png", "--sweep", "0,1", "--num-videos", "2"], "--num-videos: got 2 with --sweep"),
        (["x", "--model", "nowhere"], "model: got 'nowhere'"),
        (["x", "--model", ""], "model: got ''"),
        (["x", "--fps", "0.00001", "-o", "q.gif"], "fps: got 1e-05; a number from 0.01 to 240 needed"),
        (["x", "--text-weight", "nan"], "text_weight: got nan; finite numbers needed"),
        (["x", "--text-weight", "0,inf,1"], "text_weight: got [0.0, inf, 1.0]; finite numbers needed"),
        (["x", "--text-weight", "1=nan"], "text_weight: got {1: nan}; finite numbers needed"),
        (["x", "--steps", "2000", "--scheduler", "dpm++"], "steps: got 2000; at most 1000 needed"),
        (["x", "--num-videos", "100000000"], "num_videos: got 100000000; at most 10000 needed"),
        (["x", "-o", "two\nlines.avi"], "two\\nlines.avi ends in '.avi'"),
        (["x", "--num-videos", "2", "-o", "taken.mp4"], "taken-1.mp4 is a folder that holds other things"),
    ],
)
def test_bad_input(model, picture, tmp_path, capsys, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("univid.model.UNet.forward", lambda *_, **__: pytest.fail("it was sampled"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "taken-1.mp4").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").write_text("keep me")
    before = sorted(tmp_path.iterdir())
    default = [] if "--model" in arguments else ["--model", model]
    assert main(["generate", *default, *arguments]) == 2
    printed = capsys.readouterr().err
    assert error in printed
    assert len(printed.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "univid: the following arguments are required: COMMAND; `univid --help` shows"),
        (["make"], "univid: argument COMMAND: invalid choice: 'make'"),
        (["generate", "x", "--text-weight", "much"], "univid generate: argument --text-weight: got 'much'"),
        (
            ["generate", "x", "--text-weight", "1=1,1=2"],
            "univid generate: argument --text-weight: got '1=1,1=2'; one weight",
        ),
        (["generate", "x", "--fps", "fast"], "univid generate: argument --fps: invalid float value: 'fast'"),
        (["generate", "x", "two\nlines"], "univid: unrecognized arguments: two\\nlines; `univid --help` shows"),
    ],
)
def test_usage_errors(capsys, arguments, error):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(error)
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("part", ["unet", "image_adapter", "vae", "clip"])
def test_truncated_weights(model, tmp_path, capsys, part):
    shutil.copytree(model, tmp_path / "model")
    path = next((tmp_path / "model" / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["generate", "x", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "x.mp4")]) == 2
    error = capsys.readouterr().err
    assert f"{part}/{path.name} is not a whole safetensors file" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x.mp4").exists()


def test_wrong_keys(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"extra" if name == "conv_in.bias" else name: x for name, x in load_file(path).items()}, path)
    assert main(["generate", "x", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "x.mp4")]) == 2
    assert capsys.readouterr().err == f"univid: path: {path.parent} misses conv_in.bias and has left over extra\n"


def test_no_backend(monkeypatch, tmp_path, capsys):
    """Said before anything is loaded."""
    monkeypatch.setenv("UNIVID_BACKEND", "cudnn")
    assert main(["generate", "x", "-o", str(tmp_path / "x.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("univid: UNIVID_BACKEND: got 'cudnn'") and len(error.splitlines()) == 1


def test_a_configuration_that_is_none(model, tmp_path, capsys):
    """In one line, though PyTorch's own reason has many."""
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text('{"num_train_timesteps": "x"}')
    assert main(["generate", "x", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "x.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"univid: scheduler: {path} is not of a diffusers scheduler: linspace()")
    assert len(error.splitlines()) == 1


def test_what_cannot_run(model, tmp_path, capsys, monkeypatch):
    """A backend that was asked for and refuses, and a GPU that is full."""
    arguments = ["generate", "x", "--model", model, "-o", str(tmp_path / "x.mp4"), "--device", "cpu"]
    monkeypatch.setenv("UNIVID_BACKEND", "cuda")
    assert main(arguments) == 2
    assert "'cuda' cannot run" in capsys.readouterr().err.splitlines()[-1]

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")

    monkeypatch.setattr("univid.model.UNet.forward", full)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "univid: CUDA out of memory. Tried to allocate 2 GiB.; --low-memory needs less"
    for command in ([*arguments, "--low-memory"], ["judge", model, "-o", str(tmp_path / "x.json"), "--device", "cpu"]):
        monkeypatch.setattr("univid.pipeline.UniVidPipeline.from_pretrained", full)
        assert main(command) == 2
        assert capsys.readouterr().err == "univid: CUDA out of memory. Tried to allocate 2 GiB.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "printed"),
    [("Unable to allocate 2 TiB", "Unable to allocate 2 TiB"), ("", "this machine has too little")],
)
def test_a_machine_without_enough_memory(model, tmp_path, capsys, monkeypatch, said, printed):
    def full(*_, **__):
        raise MemoryError(said)

    monkeypatch.setattr("univid.model.UNet.forward", full)
    assert main(["generate", "x", "--model", model, "-o", str(tmp_path / "x.mp4"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"univid: out of memory: {printed}"


def test_standard_output_that_is_full(model, tmp_path):
    """The file is written all the same."""
    arguments = f"generate x --model {model} -o x.png --num-frames 1 --steps 1 --device cpu"
    ran = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m univid.cli {arguments} >/dev/full"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.endswith("univid: warning: standard output: No space left on device; x.png: written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_help_for_which_standard_output_has_no_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    sys.stdout.flush()
    assert b"W,W,\\u2026" in sys.stdout.buffer.getvalue()


def test_a_name_for_which_standard_output_has_no_characters(model, tmp_path, monkeypatch):
    output = tmp_path / "ü.png"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    arguments = ["--model", model, "-o", str(output), "--num-frames", "1", "--steps", "1", "--device", "cpu"]
    assert main(["generate", "x", *arguments]) == 0
    assert sys.stdout.buffer.getvalue() == f"{tmp_path}/\\xfc.png\n".encode()
    assert output.exists()


def test_a_prompt_that_is_too_long(model, tmp_path, capsys):
    arguments = ["--model", model, "-o", str(tmp_path / "x.mp4"), "--steps", "1"]
    assert main(["generate", "cat " * 75 + "dog", *arguments]) == 0
    assert "univid: warning: prompt: 76 tokens, 75 fit; this was cut: 'dog'" in capsys.readouterr().err
    show = warnings.showwarning
    assert main(["generate", "x", "--negative-prompt", "cat " * 75 + "dog", *arguments]) == 0
    assert "univid: warning: negative_prompt: 76 tokens, 75 fit" in capsys.readouterr().err
    assert warnings.showwarning is show


def test_interrupted(model, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("univid.model.UNet.forward", interrupt)
    assert main(["generate", "x", "--model", model, "-o", str(tmp_path / "x.mp4")]) == 130
    assert "nothing is half-written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["info", "judge"])
def test_a_checkpoint_that_is_none(capsys, command):
    assert main([command, "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("univid: checkpoint: got 'nowhere'; a checkpoint's folder")


def test_bench_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "univid: bench: PyTorch finds no GPU here; the benchmarks time one\n"


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [(["bench"], "pytest", "benchmark"), (["judge", "shapes"], "diffusers", "generate")],
)
def test_a_package_that_is_missing(capsys, monkeypatch, command, package, extra):
    monkeypatch.delitem(sys.modules, "univid.pipeline")
    monkeypatch.delitem(sys.modules, "univid.judge", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as import sees one that is not there
    assert main(command) == 2
    error = capsys.readouterr().err
    assert package in error
    assert error.endswith(f"`pip install 'univid[{extra}]'` brings it\n")


def test_a_package_that_is_damaged(capsys, monkeypatch):
    """Installing what is there would not mend it."""

    def damaged(*_):
        raise ImportError("libav.so: cannot open shared object file")

    monkeypatch.setattr("univid.checkpoint.find", damaged)
    assert main(["info", "shapes"]) == 2
    assert capsys.readouterr().err == "univid: libav.so: cannot open shared object file\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["encode"], ["doctor"], ["bench"], ["info"], ["judge"]])
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that nothing is broken in two
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: univid" in printed
    examples = printed.partition("example")[2].splitlines()[1:]
    assert examples
    assert all(line.startswith(" ".join(["  univid", *command])) for line in examples)
    told = "--sweep=-0.5,1" in printed and "--text-weight=-0.5,1" in printed  # without "=" they are taken for options
    assert told == (command == ["generate"])


def test_threads_that_wait_sleep(monkeypatch):
    """Of PyTorch, which reads it when it is imported: not before."""
    code = "import os, sys, univid.cli as cli; assert 'torch' not in sys.modules; "
    code += "cli.main(['info', 'no']); print(os.environ['OMP_WAIT_POLICY'])"
    for given, wanted in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == f"{wanted}\n", done.stderr
