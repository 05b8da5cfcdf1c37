"""The trainer's parts by themselves: configuration, export."""

import dataclasses
import importlib
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.small_pipeline import make
from tests.test_data import mp4, shards  # noqa: F401 - fixtures
from tests.train_worker import configure, state_of, train
from train import validation
from train.bench import main as bench
from train.config import CONFIGS, Config, Model, Stream, Validation, load
from train.data import Conditioned, Encoder, RenderedShapes
from train.export import Export, export
from train.export import main as export_main
from train.fsdp import Inputs, Trainer, check_beside, main, write_config
from train.log import FILE
from train.parts import Parts
from train.processes import processes
from train.stages import Draw
from train.validation import grid, sample
from univid import UniVidPipeline
from univid.cli import main as univid
from univid.data.judge import judge
from univid.data.shapes import MOTIONS
from univid.graphs import cloned, leaves, signature
from univid.ops import ReferenceFrames

CPU = torch.device("cpu")


# --- configuration ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_configurations_are_read(path):
    config = load(Config, path)
    assert config.run == f"runs/{path.stem}"
    assert config.stage == path.stem.rpartition("_")[2].replace("shapes", "joint")


def test_a_run_from_a_folder_with_the_name_of_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    config = configure(Path("run"), "model.start=shapes", "model.unet=shapes")
    written = lambda: write_config(config) or json.loads(Path("run/config.json").read_text())["model"]  # noqa: E731
    assert (written()["start"], written()["unet"]) == ("shapes", "shapes")
    make().save_pretrained("shapes")
    assert (written()["start"], written()["unet"]) == (str(tmp_path / "shapes"), "shapes")


def test_arguments_count_over_the_file(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('steps = 7\n[optimizer]\nlr = 1\n[streams.a]\nsource = "random"\n')
    overrides = ["optimizer.lr=3e-4", "streams.a.batch_size=3", "streams.a.num_frames=1", 'validation.prompts=["x"]']
    config = load(Config, path, overrides)
    assert (config.steps, config.optimizer.lr, config.optimizer.beta1) == (7, 3e-4, 0.9)
    assert config.streams == {"a": Stream(source="random", batch_size=3, num_frames=1)}
    with pytest.raises(ValueError, match=r"^streams\.video: unknown key; there are a$"):
        load(Config, path, ["streams.video.batch_size=3"])
    assert config.validation.prompts == ("x",)
    json_path = tmp_path / "own.json"
    json_path.write_text(json.dumps({"steps": 8}))
    assert load(Config, json_path).steps == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=1", "optimzer: unknown key; the nearest is optimizer"),
        ("optimizer.lrate=1", "optimizer.lrate: unknown key; the nearest is optimizer.lr"),
        ("streams.video.batch=1", "streams.video.batch: unknown key; the nearest is streams.video.batch_size"),
        ("streams.vidoe.batch_size=1", "streams.vidoe: unknown key; the nearest is streams.video"),
        ("streams.vidoe={batch_size=1}", "streams.vidoe: unknown key; the nearest is streams.video"),
        ("zzz=1", "zzz: unknown key; there are run, stage, steps"),
        ("steps=many", "steps: got 'many', needs int"),
        ("steps=1.5", "steps: got 1.5, needs int"),
        ("stage=both", "stage: got 'both', needs 't2v' or 'adapters' or 'joint'"),
        ("optimizer=3", "optimizer: got 3, needs a table"),
        ("optimizer.lr=0", "optimizer.lr: got 0.0, needs a number > 0"),
        ("optimizer.lr", "arguments: got 'optimizer.lr', needs key=value"),
        ("optimizer.lr=nan", "optimizer.lr: got nan, needs a finite number"),
        ("seconds=inf", "seconds: got inf, needs a finite number"),
        ("steps=-3", "steps: got -3, needs a number >= 1"),
        ("log.every=0", "log.every: got 0, needs a number >= 1"),
        ("validation.every=-1", "validation.every: got -1, needs a number >= 0"),
        ("optimizer.warmup=-3", "optimizer.warmup: got -3, needs a number >= 0"),
        ("optimizer.eps=0", "optimizer.eps: got 0.0, needs a number > 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: got -1.0, needs a number >= 0"),
        ("optimizer.min_snr=-1", "optimizer.min_snr: got -1.0, needs a number >= 0"),
        ("optimizer.beta1=-0.1", r"optimizer.beta1: got -0.1, needs a number in \[0, 1\)"),
        ("validation.steps=0", "validation.steps: got 0, needs a number >= 1"),
        ("streams.video.share=nan", "streams.video.share: got nan, needs a finite number"),
        ("streams.video.fps=inf", "streams.video.fps: got inf, needs a finite number"),
        ("streams.video.min_score.score=nan", "streams.video.min_score.score: got nan, needs a finite number"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm: got 0.0, needs a number > 0"),
        ("optimizer.beta2=1", r"optimizer.beta2: got 1.0, needs a number in \[0, 1\)"),
        ("optimizer.final=2", r"optimizer.final: got 2.0, needs a number in \[0, 1\]"),
        ("compute.compile=foo", "compute.compile: got 'foo', needs none or one of .*inductor"),
        ("compute.replicas=-1", "compute.replicas: got -1, needs a number >= 0"),
        ("streams.video=3", "streams.video: got 3, needs a table"),
        ("streams.video.fps=0", "streams.video.fps: got 0.0, needs a number from 0.01 to 240"),
        ("streams.video.workers=-1", "streams.video.workers: got -1, needs a number >= 0"),
        ("streams.video.max_skipped=2", r"streams.video.max_skipped: got 2.0, needs a number in \[0, 1\]"),
        ("streams.video.sizes=['32x64']", r"streams.video.sizes: got \('32x64',\), needs files as the source"),
        (
            "streams.video={source='random', motions=['up']}",
            r"streams.video.motions: got \('up',\), needs shapes as the source",
        ),
        (
            "streams.video={source='random', min_score={score=1}}",
            r"streams.video.min_score: got {'score': 1.0}, needs files as the source",
        ),
        ("streams.video={source='x.tar', pool=3}", "streams.video.pool: got 3, needs shapes as the source"),
        ("streams.video.sizes=['32']", "streams.video.sizes: got '32', needs HEIGHTxWIDTH"),
        ("validation.every=5", r"validation.prompts: got \(\), needs one or more, for every = 5"),
        ("validation.images=['a.png']", "validation.images: got .* needs none, or one for each of 0 prompts"),
        (
            "validation={every=5, prompts=['a', '', ''], images=['', 'a.png', '']}",
            r"validation.prompts: got \('a', '', ''\), needs a text, or an image beside it, in each$",
        ),
        ("validation={every=5, prompts=['']}", r"validation.prompts: got \('',\), needs a text, or an image"),
        ("run=a\0b", r"run: got 'a\\x00b', needs a folder's name$"),
        ("export=\0", r"export: got '\\x00', needs a folder's name$"),
    ],
)
def test_a_wrong_argument_is_named(override, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load(Config, None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3", "model: got 3, needs a table"),
        ("streams = 3", "streams: got 3, needs a table"),
        ("[streams]\nvideo = 3", "streams.video: got 3, needs a table"),
        ("[optimizer]\nlr = 'x'", "optimizer.lr: got 'x', needs float"),
        ("steps = ", "config: .* is not TOML: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ValueError, match=f"^{message}"):
        load(Config, tmp_path / "own.toml")
    (tmp_path / "own.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"^config: .*own\.json holds a list, needs a table$"):
        load(Config, tmp_path / "own.json")


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    assert main(["optimizer.lrate=1"]) == 1
    assert main([str(tmp_path / "no.toml")]) == 1
    assert main([f"run={tmp_path}", f"model.start={tmp_path / 'no'}"]) == 1
    assert main([f"run={tmp_path}", f"model.frozen={tmp_path / 'no'}"]) == 1
    assert main([f"run={tmp_path}", "streams.video.source=clips/*.tar"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ValueError", *["FileNotFoundError"] * 4]


def test_an_error_of_many_lines_is_said_in_one(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("backend='inductor' raised:\nno compiler: 'c++'\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr("train.fsdp.Trainer", fails)
    assert main([f"run={tmp_path}"]) == 1
    assert capsys.readouterr().err == "RuntimeError: backend='inductor' raised: no compiler: 'c++'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.start=shapes", "model.frozen=a"], "model.frozen: got 'a', needs no model.start beside it"),
        (["model.start=shapes", "model.unet=tiny"], "model.unet: got 'tiny', needs no model.start beside it"),
        (["model.sd21=a", "model.start=shapes"], "model.start: got 'shapes', needs no model.sd21 beside it"),
        (["model.clip=a"], "model.clip: got 'a', needs model.sd21 beside it; other folders have their own"),
        (
            ["streams.video.source=a.tar", "streams.video.sizes=['32x64']", "streams.video.height=32"],
            "streams.video.height: got 32, needs no streams.video.sizes beside it, which say both",
        ),
        (
            ["streams.image.width=48", "streams.image.source=a", "streams.image.sizes=['32x64']"],
            "streams.image.width: got 48, needs no streams.image.sizes beside it",
        ),
    ],
)
def test_what_others_make_void_is_not_chosen_beside_them(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.fsdp.Trainer", lambda *_: sys.exit("it trains"))
    assert main([f"run={tmp_path}", *arguments]) == 1
    assert f"ValueError: {message}" in capsys.readouterr().err


def test_a_file_may_have_what_an_argument_makes_void():
    for path, arguments in (
        (CONFIGS / "sd21_t2v.toml", ["model.sd21=", "model.start=shapes"]),  # and has a clip
        (CONFIGS / "sd21_t2v.toml", ["streams.video.sizes=['320x576']"]),  # and has height and width
        (None, []),
    ):
        check_beside(load(Config, path, arguments), [argument.partition("=")[0] for argument in arguments])


@pytest.mark.parametrize(
    ("kind", "arguments", "sizes"),
    [
        ("cuda", [], (64, 256)),
        ("cpu", [], (4, 16)),
        ("cpu", ["streams.image.batch_size=7"], (4, 7)),
        ("cpu", [str(CONFIGS / "shapes.toml")], (64, 256)),
    ],
)
def test_without_a_gpu_the_default_steps_are_small(kind, arguments, sizes, tmp_path, monkeypatch, capsys):
    """So that a SIGTERM to torchrun, which then waits for 30 s, finds the end of one."""

    def trainer(config, *_):
        assert tuple(stream.batch_size for stream in config.streams.values()) == sizes
        raise ValueError("seen")

    monkeypatch.setattr("train.fsdp.device_kind", lambda: kind)
    monkeypatch.setattr("train.fsdp.Trainer", trainer)
    assert main([*arguments, f"run={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert said.err == "ValueError: seen\n"
    assert said.out.startswith("no GPU for each process: streams.video.batch_size=4, ") == (4 in sizes)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("processes=a", "bench: processes: got 'a', needs numbers > 0"),
        ("seconds=0", "bench: seconds: got '0', needs numbers > 0"),
        ("seconds=x", "bench: seconds: got 'x', needs numbers > 0"),
        ("optimizer.lrate=1", "bench: optimizer.lrate: unknown key; the nearest is optimizer.lr"),
        (
            "streams.video.num_frames=25",
            "bench: streams.video.num_frames: got 25, needs at most the U-Net's max_frames = 24",
        ),
    ],
)
def test_the_benchmark_says_what_is_wrong_in_one_line(argument, message, capsys):
    assert bench([argument]) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_a_measurement_that_fails_is_one_line(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def failed(command, check):
        if check:
            raise subprocess.CalledProcessError(3, "torchrun")

    monkeypatch.setattr("train.bench.measure", full)
    monkeypatch.setattr("train.bench.subprocess.run", failed)
    assert bench([]) == bench(["processes=2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench: CUDA out of memory. Tried to allocate",
        "bench: Command 'torchrun' returned non-zero exit status 3.",
    ]


@pytest.mark.parametrize("name", ["fsdp", "bench", "record", "export", "shapes_vae", "shapes_clip"])
def test_every_command_helps(name, capsys):
    module = importlib.import_module(f"train.{name}")
    assert module.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert f"train/{name}.py" in printed
    if name in ("fsdp", "bench"):
        assert "  optimizer.lr=0.0001\n" in printed and "  streams.video.batch_size=8\n" in printed


# --- a run, and what comes out ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    make().save_pretrained(folder)
    return folder


def test_a_stage_starts_from_what_another_one_exported(start, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    with processes(device="cpu") as joined:
        config = configure(run, "steps=2", "stage=t2v", f"model.start={start}")
        (run / "config.json").parent.mkdir()
        trained = train(config, joined)
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        assert export(run, out, Export()).name == "step-00000002"
        pipe = UniVidPipeline.from_pretrained(out)
        first = UniVidPipeline.from_pretrained(start)
        for name, parameter in pipe.unet.named_parameters():
            untrained = "_image." in name  # becomes the text's
            expected = trained[f"ema.unet.{name.replace('_image', '') if untrained else name}"]
            assert torch.equal(parameter, expected), name
        assert torch.equal(pipe.adapter.norm.weight, first.adapter.norm.weight)
        assert pipe.scheduler == first.scheduler
        assert pipe.settings == dataclasses.replace(first.settings, height=32, width=32, fps=8)  # as trained

        second = configure(tmp_path / "second", "steps=1", "stage=adapters", f"model.start={out}")
        moved = train(second, joined)
        assert torch.equal(moved["model.unet.conv_in.weight"], pipe.unet.conv_in.weight)
        assert moved["skipped"] == 0


def test_what_does_not_fit_is_refused_before_weights_are_read(start, tmp_path):
    shutil.copytree(start, tmp_path / "start", ignore=shutil.ignore_patterns("*.safetensors"))
    towers = tmp_path / "start" / "clip" / "open_clip_config.json"
    schedule = tmp_path / "start" / "scheduler" / "scheduler_config.json"
    with processes(device="cpu") as joined:
        before = schedule.read_text()
        schedule.write_text(json.dumps(json.loads(before) | {"prediction_type": "epsilon"}))
        with pytest.raises(ValueError, match=r"with prediction_type = epsilon, needs v_prediction, as the U-Net$"):
            Trainer(
                configure(tmp_path / "run", f"model.start={tmp_path / 'start'}", "streams.video.source=shapes"), joined
            )
        schedule.write_text(before)
        for override, message in (
            ("streams.video.num_frames=25", r"streams\.video\.num_frames: got 25, needs at most "),
            ("streams.video.width=20", r"streams\.video: got 32x20, needs multiples of \d+, of which "),
            ("streams.video.source=shapes", r"model\.start: got '.*' with context_dim = 40, needs \d+, as the U-Net$"),
        ):
            config = json.loads(towers.read_text())
            if override == "streams.video.source=shapes":
                config["model_cfg"]["text_cfg"]["width"] = 40
                towers.write_text(json.dumps(config))
            with pytest.raises(ValueError, match=f"^{message}"):
                Trainer(configure(tmp_path / "run", f"model.start={tmp_path / 'start'}", override), joined)


def test_what_stable_diffusion_predicts_is_its_schedulers_to_say(start, tmp_path):
    shutil.copytree(start, tmp_path / "sd")
    schedule = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"prediction_type": "epsilon"}))
    model = Model(sd21=str(tmp_path / "sd"), clip=str(tmp_path / "sd" / "clip"))
    parts = Parts(model, torch.float32, torch.device("cpu"))
    assert parts.unet().prediction_type == "epsilon"
    parts.check_fits(parts.unet())


def test_a_validation_that_is_not_finite_does_not_end_training(monkeypatch, tmp_path, capsys):
    def overflow(pipe, config):
        raise FloatingPointError("frames: got numbers that are not finite")

    met = []
    pipe = SimpleNamespace(to=lambda device: pipe, settings=SimpleNamespace(fps=8))
    trainer = SimpleNamespace(
        parts=SimpleNamespace(pipeline=lambda whole: pipe),
        processes=SimpleNamespace(device="cpu", barrier=lambda: met.append("others")),
        config=SimpleNamespace(validation=None, run=str(tmp_path)),
        dtype=torch.float32,
        step=7,
    )
    monkeypatch.setattr(validation, "averaged", lambda trainer, dtype: "a model")
    monkeypatch.setattr(validation, "sample", overflow)
    validation.validate(trainer)
    assert met and "validation of step 7: frames: got numbers" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_export_says_what_is_missing(tmp_path, capsys):
    assert export_main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert export_main([str(tmp_path)]) == 1
    assert "has no checkpoint of step 0; there is none" in capsys.readouterr().err


def test_the_command_trains_on_shapes_and_shows_clips(start, tmp_path):
    """All that a run writes, with frames that are rendered and encoded, and a pool of them."""
    from univid.data.files import read_video

    arguments = [
        f"run={tmp_path}", f"model.start={start}", "steps=2", "log.every=1", "validation.every=2", "validation.steps=1",
        'validation.prompts=["a red star", "a blue ring", "a square"]', "log.tensorboard=false",
        "streams.video.batch_size=2", "streams.video.num_frames=3", "streams.video.height=32", "streams.video.width=32",
        "streams.image.share=0", "streams.video.pool=5",
    ]  # fmt: skip
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "clips/s", "TFLOP/s", "of matrix rate", "data wait", "skipped", "norm", "lr"} <= lines[0].keys()
    frames, fps = read_video(tmp_path / "validation" / "step-00000002.mp4")
    assert (frames.shape, fps) == ((3, 32, 64, 3), 4)
    assert export_main([str(tmp_path), str(tmp_path / "out"), "dtype=float16"]) == 0
    assert UniVidPipeline.from_pretrained(tmp_path / "out").unet.config.channels == (32, 64)


def test_a_piece_of_a_run_is_timed_and_exported_and_the_next_one_starts_from_it(start, tmp_path, capsys):
    arguments = [
        f"run={tmp_path / 'one'}", f"model.start={start}", "steps=1000", "stage=t2v", "seconds=0.01", f"export={tmp_path / 'out'}",
        "streams.video.batch_size=2", "streams.video.num_frames=3", "streams.video.height=32", "streams.video.width=32",
        "streams.image.share=0", "streams.video.pool=3", "log.tensorboard=false",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "stopped at step 2" in capsys.readouterr().out  # over in its first step, agreed on in the next
    assert export_main([str(tmp_path / "one"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "unet" / "training.json").is_file()
    for part in ("unet", "image_adapter"):
        files = [tmp_path / out / part / "diffusion_pytorch_model.safetensors" for out in ("out", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    history = json.loads((tmp_path / "out" / "unet" / "training.json").read_text())
    assert [(piece["stage"], piece["steps"], piece["streams"]["video"]["pool"]) for piece in history] == [("t2v", 2, 3)]
    arguments[:5] = [f"run={tmp_path / 'two'}", f"model.start={tmp_path / 'out'}", "steps=1", "stage=joint", "seed=2"]
    with processes(device="cpu") as joined:
        trainer = Trainer(load(Config, CONFIGS / "shapes.toml", [*arguments, "streams.video.first=7"]), joined)
        assert sorted(trainer.sources["video"].pool.keys) == ["shapes/7", "shapes/8", "shapes/9"]
        started = UniVidPipeline.from_pretrained(tmp_path / "out").unet
        assert torch.equal(state_of(trainer)["model.unet.conv_in.weight"], started.conv_in.weight)


@pytest.mark.parametrize("cached", [False, True], ids=["clips", "cache"])
def test_clips_from_files(start, shards, tmp_path, capsys, cached):  # noqa: F811
    """Trained on as they are, and as latents and tokens; what is resumed equals what was not."""
    source, run = shards, tmp_path / "run"
    if cached:
        source = tmp_path / "latents"
        shown = ["--device", "cpu", "--workers", "0", "--size", "32x48", "--num-frames", "3", "--fps", "4"]
        assert univid(["encode", str(shards), "-o", str(source), "--model", str(start), *shown]) == 0
    overrides = [
        f"model.start={start}", "steps=4", "checkpoints.every=2", "streams.image.share=0", f"streams.video.source={source}",
        "streams.video.width=48", "streams.video.fps=4", "streams.video.workers=0",
    ]  # fmt: skip
    with processes(device="cpu") as joined:
        whole = train(configure(tmp_path / "whole", *overrides), joined)
        train(configure(run, *overrides), joined)
        shutil.rmtree(run / "checkpoints" / "step-00000004")  # as if it had been killed after step 2
        resumed = train(configure(run, *overrides), joined)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main([f"run={tmp_path / 'no'}", f"model.start={start}", f"streams.video.source={tmp_path}/no/*.tar"]) == 1
    assert f"{tmp_path}/no/*.tar" in capsys.readouterr().err


def test_a_pool_comes_in_another_order_each_time_round(start, tmp_path):
    overrides = [f"model.start={start}", "streams.video.source=shapes", "streams.video.pool=8", "streams.image.share=0"]
    with processes(device="cpu") as joined:
        trainer = Trainer(configure(tmp_path, *overrides), joined)
        source = trainer.sources["video"]
        keys = [source.next().keys for _ in range(4)]
        rounds = [[*keys[0], *keys[1]], [*keys[2], *keys[3]]]
        assert all(sorted(one) == [f"shapes/{i}" for i in range(8)] for one in rounds)
        assert rounds[0] != rounds[1]
        source.load_state_dict({"position": 4})
        assert source.next().keys == keys[1]
        assert state_of(trainer)


def test_a_stream_of_shapes_draws_the_motions_it_is_told(start):
    stream = Stream(batch_size=12, motions=("clockwise", "up"))
    parts = Parts(Model(start=str(start)), torch.float32, CPU)
    with processes(device="cpu") as joined:
        source = RenderedShapes("video", stream, Encoder(parts, CPU, 8), joined, 0)
        batch = source.next()
        for wrong, message in (
            ({"motions": ("north",)}, ".motions: got 'north', needs some of "),
            ({"first": 10**21}, f".first: got {10**21}, needs a number < {2**40}, where held-out clips begin$"),
            ({"width": 32}, ": got shapes of 64x32, needs squares$"),
        ):
            with pytest.raises(ValueError, match=f"^streams.video{message}"):
                RenderedShapes("video", dataclasses.replace(stream, **wrong), Encoder(parts, CPU, 8), joined, 0)
    assert Counter(judge(batch.frames).motion.tolist()) == {MOTIONS.index("clockwise"): 6, MOTIONS.index("up"): 6}


def test_pictures_of_shapes_have_captions_without_motion(start):
    stream = Stream(batch_size=60, num_frames=1)
    parts = Parts(Model(start=str(start)), torch.float32, CPU)
    with processes(device="cpu") as joined:
        source = RenderedShapes("image", stream, Encoder(parts, CPU, 8), joined, 0)
        captions = source.next().captions
    assert captions == source.world.captions(source.world.sample(torch.arange(60)), "appearance")
    assert captions != source.world.captions(source.world.sample(torch.arange(60)), "random")


def test_validation_draws_the_same_from_step_to_step():
    seen = []

    def pipe(prompt, image, steps, seed, progress):
        seen.append((prompt, image, steps, seed))
        return SimpleNamespace(frames=torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8).numpy())

    config = Validation(prompts=("a", "", "c"), images=("", "b.png", "c.png"), steps=7)
    for _ in range(2):
        assert len(sample(pipe, config)) == 3
    assert seen == [("a", None, 7, 0), (None, "b.png", 7, 1), ("c", "c.png", 7, 2)] * 2


def test_a_grid_has_every_video_once():
    videos = torch.arange(5)[:, None, None, None, None].expand(5, 2, 4, 6, 3).numpy().astype("uint8")
    sheet = grid(videos)
    assert sheet.shape == (2, 8, 18, 3)
    cells = [sheet[0, 4 * r, 6 * c, 0] for r, c in itertools.product(range(2), range(3))]
    assert cells == [0, 1, 2, 3, 4, 0]


def test_the_inputs_of_a_graph_are_its_own():
    frames = {f: ReferenceFrames.pyramid(4, 2) for f in (1, 2)}
    inputs = Inputs(Conditioned(torch.ones(2), torch.ones(1).expand(3), None, torch.ones(1)), _draw(1.0), frames)
    own = cloned(inputs)
    assert signature(own) == signature(inputs)
    assert signature(own) != signature(dataclasses.replace(inputs, own=_draw(0.0)))
    tensors = [(a, b) for a, b in zip(leaves(own), leaves(inputs), strict=True) if isinstance(a, torch.Tensor)]
    assert len(tensors) == 3 + 4 + 2 * 3
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.is_contiguous() for a, b in tensors)


def _draw(image_weight: float) -> Draw:
    return Draw(torch.zeros(2, dtype=torch.long), torch.zeros(2), torch.zeros(2), torch.ones(2), image_weight)
