"""What a pipeline writes, and what it is read from: videos, its own folder, Stable Diffusion's."""

import dataclasses
import gzip
import itertools
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.small_pipeline import CLIP, RED, SCHEDULE, SETTINGS, frames, interrupt, make
from tests.test_files import closed
from univid import UniVidPipeline
from univid.data.autoencoder import load_autoencoder
from univid.data.clip import CONFIG, VOCABULARY, WEIGHTS, build_clip
from univid.data.files import read_video
from univid.model import ImageAdapter, UNet, UNetConfig
from univid.schedulers import SCHEDULERS


def tiny(**choices) -> UNet:
    return UNet(dataclasses.replace(UNetConfig.load("tiny"), **choices))


@pytest.fixture(scope="module")
def pipe() -> UniVidPipeline:
    return make()


def test_save(pipe, tmp_path):
    videos = pipe("a cat", fps=12, num_videos=2, progress=False)
    assert videos.fps == 12
    assert [path.name for path in videos.save(tmp_path / "cat.mp4")] == ["cat-0.mp4", "cat-1.mp4"]
    read, fps = read_video(tmp_path / "cat-1.mp4")
    assert (read.shape, fps) == ((3, 16, 32, 3), 12)


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        *("unet", "image_adapter", "vae", "clip", "scheduler", "generation.json")
    }
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = UniVidPipeline.from_pretrained(tmp_path / "model")
    assert again.settings == pipe.settings
    assert np.array_equal(frames(again, "a cat", RED), frames(pipe, "a cat", RED))
    for part, name in itertools.product(("unet", "vae", "clip"), ("config.json", "open_clip_config.json")):
        (tmp_path / "model" / part / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=r"unet/config\.json"):
        UniVidPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("choices", "error"),
    [
        ('{"stepz": 8}', "unknown key 'stepz'"),
        ('{"fps": "8"}', "fps: got '8', needs float"),
        ('{"steps": 2.5}', "steps: got 2.5, needs int"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
    ],
)
def test_bad_settings(pipe, tmp_path, choices, error):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "generation.json").write_text(choices)
    with pytest.raises(ValueError, match=rf"generation\.json.*{error}"):
        UniVidPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "name", "value", "error"),
    [
        (
            "scheduler/scheduler_config",
            "prediction_type",
            "epsilon",
            "got 'epsilon', needs 'v_prediction', as its unet",
        ),
        ("scheduler/scheduler_config", "beta_start", 3, "got 1000 betas, .* to .*; needs 1000, 0 to 1"),
        ("scheduler/scheduler_config", "trained_betas", [], "is not of a diffusers scheduler: index 0"),
        (
            "scheduler/scheduler_config",
            "trained_betas",
            [0.1, 0.2],
            "got 2 betas, .* to .*; needs 1000, 0 to 1",
        ),
        ("scheduler/scheduler_config", "num_train_timesteps", "x", "is not of a diffusers scheduler: linspace"),
        ("image_adapter/config", "image_tokens", "all", "image_tokens: got 'all', needs patch or global"),
        ("vae/config", "norm_num_groups", 0, "is not of diffusers' AutoencoderKL"),
        *(
            ("vae/config", "scaling_factor", x, f"scaling_factor: got {x!r}, needs a number > 0")
            for x in (None, "x", 0)
        ),
        *(("vae/config", name, 0.5, f"{name}: got 0.5, needs null") for name in ("shift_factor", "latents_mean")),
        ("vae/config", "latents_std", [1.0] * 4, r"latents_std: got \[1.0, .*\], needs null"),
        ("unet/config", "univid", [], r"unet/config.json: univid: got \[\], needs an object"),
    ],
)
def test_bad_configurations(pipe, tmp_path, file, name, value, error):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=error):
        UniVidPipeline.from_pretrained(tmp_path)


def test_a_pipelines_folder_comes_before_a_model_that_ships(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes").mkdir()  # of pictures, say
    assert UniVidPipeline.from_pretrained("shapes").settings.num_frames == 16
    pipe.save_pretrained("shapes")
    assert UniVidPipeline.from_pretrained("shapes").settings == pipe.settings


@pytest.mark.parametrize("dtype", ["bfloat16", None, torch.int32])
def test_a_dtype_that_is_none(tmp_path, dtype):
    for load in (UniVidPipeline.from_pretrained, lambda path, **given: UniVidPipeline.from_sd21(path, path, **given)):
        with pytest.raises(TypeError, match=rf"^torch_dtype: got {dtype!r}; torch.float32, .* needed$"):
            load(tmp_path, torch_dtype=dtype)


@pytest.mark.parametrize(
    ("part", "other", "error"),
    [
        (
            "clip",
            lambda: build_clip(CLIP | {"text_cfg": CLIP["text_cfg"] | {"width": 32}}),
            "clip: text_cfg.width: got 32",
        ),
        ("adapter", lambda: ImageAdapter(40, 32), "image_adapter: context_dim: got 32, needs 24, as its unet"),
        ("adapter", lambda: ImageAdapter(32, 24), "image_adapter: image_dim: got 32, needs 40, as its clip"),
        (
            "adapter",
            lambda: ImageAdapter(40, 24, "global"),
            "image_adapter: image_tokens: got 'global', needs 'patch', as its unet",
        ),
        ("unet", lambda: tiny(image_dim=32), "image_adapter: image_dim: got 40, needs 32, as its unet"),
        ("unet", lambda: tiny(out_channels=8), "unet: out_channels: got 8, needs 4, as its in_channels"),
    ],
)
def test_parts_of_other_models(tmp_path, part, other, error):
    mixed = make()
    setattr(mixed, part, other())
    mixed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^path: {tmp_path}: {error}"):
        UniVidPipeline.from_pretrained(tmp_path)


def test_saving_replaces_all_or_nothing(pipe, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    (folder / "unet" / "training.json").write_text("[]")
    (folder / "unet" / "mine.safetensors").write_text("of no model")
    (folder / "README.md").write_text("a card")
    read = lambda: {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}  # noqa: E731
    before = read()
    other = make()
    other.settings = dataclasses.replace(SETTINGS, fps=7)
    torch.nn.init.ones_(other.unet.conv_in.bias)
    with monkeypatch.context() as patch:
        patch.setattr(other.clip, "save", interrupt)  # after the U-Net's weights
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder)
    assert read() == before
    rename = Path.rename
    # The old folder goes away, the new one comes: an interrupt before each, and after the first.
    for number, is_done in ((1, False), (1, True), (2, False)):
        steps = []

        def fail(self, target, *, number=number, is_done=is_done, steps=steps):
            if not self.name == target.name == "model":
                return rename(self, target)
            steps.append(self)
            if len(steps) != number or is_done:
                rename(self, target)
            return interrupt() if len(steps) == number else target

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises(KeyboardInterrupt):
                other.save_pretrained(folder)
        assert len(steps) >= number
        assert read() == before
        assert list(tmp_path.iterdir()) == [folder]
    other.save_pretrained(folder)
    after = read()
    assert after.keys() == before.keys()
    changed = {str(name) for name in after if after[name] != before[name]}
    assert changed == {"generation.json", "unet/diffusion_pytorch_model.safetensors"}
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(FileExistsError, match="is a file; a folder's name needed"):
        pipe.save_pretrained(folder / "README.md")


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "{}"])
def test_the_folder_one_stands_in_is_not_replaced(pipe, tmp_path, monkeypatch, name):
    (tmp_path / "holds" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "holds" / "me")
    with pytest.raises(
        ValueError, match=r"^path: got '.*', which holds the current folder; a folder of its own needed$"
    ):
        pipe.save_pretrained(name.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "holds", tmp_path / "holds" / "me"]


def test_saving_where_nothing_can_be_written(pipe, tmp_path, monkeypatch):
    """Said before it is tried, of the folder that has no room."""
    (tmp_path / "mine").mkdir()
    closed(monkeypatch, tmp_path)
    pipe.save_pretrained(tmp_path / "mine")
    UniVidPipeline.from_pretrained(tmp_path / "mine")
    monkeypatch.setattr(pipe, "_write", lambda *_: pytest.fail("it was written"))
    for name in ("mine", "other"):
        with pytest.raises(
            PermissionError, match=rf"^path: .*{name} cannot be written: {tmp_path}: Permission denied$"
        ):
            pipe.save_pretrained(tmp_path / name)


@pytest.mark.parametrize("links", [True, False])
def test_saving_over_another_model(pipe, tmp_path, monkeypatch, links):
    """What was of that model only goes; other files stay as they are, and are copied where the disk has no links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("nowhere"))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / VOCABULARY).write_bytes(gzip.compress(b"#version\na b</w>\n"))
    save_file({"x": torch.zeros(1)}, tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clips").mkdir()
    large = tmp_path / "clips" / "large.safetensors"
    large.write_bytes(b"large")
    before = large.stat()
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {CONFIG, WEIGHTS}
    assert large.read_bytes() == b"large"
    assert (large.stat().st_ino == before.st_ino) == links
    assert large.stat().st_nlink == 1
    UniVidPipeline.from_pretrained(tmp_path)


def test_from_sd21(pipe, tmp_path):
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    )
    theirs.save_pretrained(tmp_path / "unet")
    pipe.vae.save(tmp_path / "vae")
    DDIMScheduler.from_config(pipe.scheduler).save_pretrained(tmp_path / "scheduler")
    pipe.clip.save(tmp_path / "clip")
    made = UniVidPipeline.from_sd21(tmp_path, tmp_path / "clip")
    assert made.unet.config.prediction_type == "v_prediction"
    assert made.unet.config.image_dim == made.clip.image_dim == 40
    size = {"num_frames": 1, "height": 16, "width": 32, "steps": 2, "guidance_scale": 1.0}
    latents = []
    made("a cat", **size, progress=False, callback=lambda *s: latents.append(s[2]))
    scheduler = DDIMScheduler.from_config(pipe.scheduler)
    scheduler.set_timesteps(2)
    x = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = theirs(x, t, pipe.clip.text(["a cat"])).sample
            x = scheduler.step(noise, t, x).prev_sample
    torch.testing.assert_close(latents[-1][:, 0], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("form", ["file", "diffusers"])
def test_a_schedule_is_saved_as_it_is(pipe, tmp_path, form, scheduler):
    """Not with DDIM's defaults where it is silent, as Stable Diffusion 2.1's on the spacing: others have their own."""
    silent = {name: value for name, value in SCHEDULE.items() if name not in ("timestep_spacing", "clip_sample")}
    schedule = silent if form == "file" else DDIMScheduler(**silent).config
    made = UniVidPipeline(pipe.unet, pipe.adapter, pipe.vae, pipe.clip, schedule, pipe.settings)
    made.save_pretrained(tmp_path)
    again = UniVidPipeline.from_pretrained(tmp_path)
    call = {"scheduler": scheduler, "steps": 4, "num_frames": 1}
    assert np.array_equal(frames(again, "a cat", **call), frames(made, "a cat", **call))
    assert DDIMScheduler.from_pretrained(tmp_path / "scheduler").config.beta_start == SCHEDULE["beta_start"]


def test_latents_are_not_clipped(pipe, tmp_path):
    """As DDIM would where the folder has another scheduler's configuration, which does not speak of it."""
    pipe.save_pretrained(tmp_path)
    EulerDiscreteScheduler.from_config(SCHEDULE).save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({key: x for key, x in json.loads(path.read_text()).items() if key != "clip_sample"}))
    again = UniVidPipeline.from_pretrained(tmp_path)
    assert not SCHEDULERS["ddim"].from_config(again.scheduler).config.clip_sample


@pytest.mark.parametrize("names", ["today's", "Stable Diffusion 2.1's"])
def test_autoencoder(pipe, tmp_path, names):
    pipe.vae.save(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if names != "today's":
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            for name in [name for name in tensors if f".attentions.0.{new}." in name]:
                x = tensors.pop(name)
                tensors[name.replace(new, old)] = x[:, :, None, None] if x.ndim == 2 else x
        assert len([name for name in tensors if "proj_attn" in name]) == 4
        save_file(tensors, path)
    latents = torch.randn(1, 2, 4, 8, 8)
    assert torch.equal(load_autoencoder(tmp_path).decode(latents), pipe.vae.decode(latents))
    name = "decoder.conv_in.bias"
    for change, error in [
        ({n: x for n, x in tensors.items() if n != name}, f"misses {name}$"),
        (tensors | {"extra": torch.zeros(1)}, "has left over extra$"),
        (tensors | {name: torch.zeros(3)}, rf"has other shapes: {name} \(3,\) for \(8,\)$"),
    ]:
        save_file(change, path)
        with pytest.raises(ValueError, match=error):
            load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"block_out_channels": 5}')
    with pytest.raises(ValueError, match="is not of diffusers' AutoencoderKL"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"block_out_channels": [3]}')
    with pytest.raises(ValueError, match=r"config\.json is not of diffusers' AutoencoderKL: num_channels \(3\)"):
        load_autoencoder(tmp_path)
