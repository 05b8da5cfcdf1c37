"""What an export will be is known at the start, generates what it was trained for, and has its history."""

import dataclasses
import json
import shutil

import pytest
import torch

from tests.small_pipeline import make
from tests.train_worker import configure
from train.config import Config, Model, Stream
from train.export import fold_fps, settings_of, write_history
from train.fsdp import Trainer
from train.processes import processes
from train.sharding import Denoiser
from univid.model import UNetConfig
from univid.pipeline import Settings


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make().save_pretrained(folder)
    return folder


def test_a_validation_or_an_export_that_would_fail_is_refused_at_the_start(start, tmp_path):
    shown = "validation.every=1", "validation.prompts=['a']", f"model.start={start}"
    (tmp_path / "file").write_text("")
    long = tmp_path / "long"
    shutil.copytree(start, long)
    settings = json.loads((long / "generation.json").read_text())
    (long / "generation.json").write_text(json.dumps(settings | {"num_frames": 25}))
    most = "needs at most the U-Net's max_frames = 24$"
    with processes(device="cpu") as joined:
        for overrides, message in (
            ((*shown, "validation.steps=1001"), r"^validation\.steps: got 1001, needs at most the .*timesteps = 1000$"),
            ((*shown, f"model.start={long}"), rf"^model\.start: num_frames of its generation\.json: got 25, {most}"),
            ((f"export={tmp_path / 'file'}",), rf"^export: got '{tmp_path}/file', a file, needs a folder's name$"),
            ((f"export={tmp_path / 'file' / 'out'}",), rf"^export: {tmp_path}/file/out cannot be written: "),
        ):
            with pytest.raises((ValueError, OSError), match=message):
                Trainer(configure(tmp_path / "run", *overrides), joined)


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ({"a": Stream(), "b": Stream(num_frames=8, height=96, width=128, fps=12)}, (8, 96, 128, 12)),
        ({"a": Stream(source="x", sizes=("64x32", "96x64")), "b": Stream(share=0, height=512)}, (16, 96, 64, 8)),
        ({"image": Stream(num_frames=1, height=512, width=512)}, (20, 320, 576, 8)),
    ],
)
def test_an_export_generates_what_it_was_trained_for(streams, expected):
    settings = settings_of(streams, Settings(steps=7), max_frames=20)
    assert (settings.num_frames, settings.height, settings.width, settings.fps, settings.steps) == (*expected, 7)


def test_the_rate_that_all_clips_had_is_folded():
    streams = {"video": Stream(fps=12), "image": Stream(num_frames=1, fps=8)}
    config = dataclasses.replace(UNetConfig.load("tiny"), fps_conditioning=True)
    model = Denoiser(config).eval()
    torch.nn.init.normal_(model.unet.fps_embedding.linear_2.weight)
    x, text = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 5, model.unet.config.context_dim)
    t = torch.tensor([3, 900])
    with torch.no_grad():
        told, untold = (model(x, t, text, None, fps=fps) for fps in (torch.full((2,), 12.0), None))
        fold_fps(model, streams)
        folded = model(x, t, text, None)
    torch.testing.assert_close(folded, told, rtol=1e-4, atol=1e-5)
    assert (told - untold).abs().max() > 0.01  # the test can fail
    assert not any("fps" in name for name in model.state_dict()) and not model.unet.config.fps_conditioning
    with pytest.raises(ValueError, match=r"^fold_fps: got True; the model has no embedding of the rate"):
        fold_fps(model, streams)
    other = Denoiser(config)
    with pytest.raises(ValueError, match=r"this one saw \[8\.0, 12\]$"):
        fold_fps(other, streams | {"more": Stream()})


def test_an_export_onto_its_own_start_is_one_piece_of_its_history(tmp_path):
    (tmp_path / "unet").mkdir()
    config = Config(model=Model(start=str(tmp_path)), streams={"video": Stream(motions=("up",))})
    for piece in ({"steps": 3, "seconds": 1}, {"steps": 3, "seconds": 2}, {"steps": 5}):
        write_history(tmp_path, config, piece)
    write_history(tmp_path, dataclasses.replace(config, seed=1), {"steps": 5})
    history = json.loads((tmp_path / "unet" / "training.json").read_text())
    assert [(piece["steps"], piece["seed"], piece.get("seconds")) for piece in history] == [
        (3, 0, 2), (5, 0, None), (5, 1, None),
    ]  # fmt: skip
