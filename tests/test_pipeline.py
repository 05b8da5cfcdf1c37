"""The generator, end to end on the CPU with small random parts."""

import re
import sys
from contextlib import nullcontext
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from tests.small_pipeline import RED, SETTINGS, frames, interrupt, make, make_unet
from univid import UniVidPipeline, pipeline
from univid.graphs import Graphed
from univid.guidance import guide, passes
from univid.schedulers import SCHEDULERS


@pytest.fixture(scope="module")
def pipe() -> UniVidPipeline:
    return make()


@pytest.mark.parametrize(
    "given", [{"prompt": "a cat"}, {"image": RED}, {"prompt": "a cat", "image": RED}], ids="+".join
)
def test_text_image_or_both(pipe, given):
    videos = pipe(**given, progress=False)
    assert videos.frames.shape == (1, 3, 16, 32, 3)
    assert videos.frames.dtype == np.uint8
    assert videos.fps == 4
    assert np.array_equal(videos.frames, frames(pipe, **given))
    assert videos.frames.std() > 0


def test_a_negative_prompt_needs_a_prompt(pipe):
    with pytest.warns(UserWarning, match="negative_prompt: without a prompt"):
        led = frames(pipe, image=RED, negative_prompt="blurry")
    assert np.array_equal(led, frames(pipe, image=RED))


def test_conditions_matter(pipe):
    both = frames(pipe, "a cat", RED)
    assert not np.array_equal(both, frames(pipe, "a dog", RED))
    assert not np.array_equal(both, frames(pipe, "a cat", 255 - RED))
    assert not np.array_equal(both, frames(pipe, "a cat", RED, negative_prompt="blurry"))
    assert not np.array_equal(both, frames(pipe, "a cat", RED, fps=24))


def count_passes(pipe, monkeypatch, *args, **kwargs):
    sizes = []
    forward = pipe.unet.forward

    def counted(x, *rest, **options):
        sizes.append(len(x))
        return forward(x, *rest, **options)

    monkeypatch.setattr(pipe.unet, "forward", counted)
    result = frames(pipe, *args, **kwargs)
    monkeypatch.undo()
    return result, sizes


@pytest.mark.parametrize("zero", [0, {1: 0, 2: 0.0}], ids=["number", "levels"])
def test_weight_0_is_absence(pipe, monkeypatch, zero):
    for alone, weight in [({"prompt": "a cat"}, "image_weight"), ({"image": RED}, "text_weight")]:
        expected, sizes = count_passes(pipe, monkeypatch, **alone)
        assert sizes == [2, 2]
        both = {"prompt": "a cat", "image": RED, weight: zero}
        got, sizes = count_passes(pipe, monkeypatch, **both)
        assert sizes == [2, 2]
        assert np.array_equal(got, expected)
    _, sizes = count_passes(pipe, monkeypatch, "a cat", RED)
    assert sizes == [3, 3]


def test_weights_by_frame_and_level(pipe):
    plain = frames(pipe, "a cat", RED, image_weight=0.5)
    assert np.array_equal(plain, frames(pipe, "a cat", RED, image_weight={1: 0.5, 2: 0.5}))
    each = frames(pipe, "a cat", RED, image_weight=[0.5, 0.5, 0.5])
    assert np.abs(each.astype(int) - plain).max() <= 1
    assert not np.array_equal(plain, frames(pipe, "a cat", RED, image_weight=[0.5, 0.5, 2.0]))
    outer = frames(pipe, "a cat", RED, image_weight={1: 0.5})
    assert not np.array_equal(plain, outer)
    assert np.array_equal(outer, frames(pipe, "a cat", RED, image_weight={1: 0.5, 2: 1.0}))


@pytest.mark.parametrize(
    ("text_weight", "image_weight", "rescale"),
    [(1.0, 1.0, 0.0), (1.0, 1.0, 0.7), ([0.0, 1.0, 3.0], [2.0, 0.5, 0.0], 0.0)],
)
def test_guidance_is_the_formula(pipe, text_weight, image_weight, rescale):
    """A step with all passes at once, against the formula on one U-Net evaluation each."""
    steps = []
    given = {"negative_prompt": "bad", "steps": 1, "guidance_scale": 4.5, "image_guidance_scale": 2.5}
    given |= {"text_weight": text_weight, "image_weight": image_weight, "guidance_rescale": rescale}
    pipe("a cat", RED, **given, progress=False, callback=lambda *s: steps.append(s))
    text = pipe.clip.text(["a cat", "bad"])
    image = pipe.adapter(pipe.clip.image(torch.from_numpy(RED).permute(2, 0, 1)[None] / 255))
    scheduler = DDIMScheduler.from_config(pipe.scheduler)
    scheduler.set_timesteps(1)
    x = torch.randn(1, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        e = lambda text, weight: pipe.unet(  # noqa: E731
            x, scheduler.timesteps, text, image, text_weight=text_weight, image_weight=weight, fps=4
        )
        none, shown, both = e(text[1:], 0), e(text[1:], image_weight), e(text[:1], image_weight)
        guided = none + 2.5 * (shown - none) + 4.5 * (both - shown)
        guided *= 1 - rescale + rescale * both.std() / guided.std()
        expected = scheduler.step(guided, scheduler.timesteps[0], x).prev_sample
    step, total, latents = steps[0]
    assert (step, total) == (1, 1)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text", "image"), [(True, True), (True, False), (False, True)])
def test_guidance_of_any_conditions(text, image):
    e = {(prompted, pictured): torch.randn(1, 3, 4, 8, 8) for prompted in (False, True) for pictured in (False, True)}
    plan = passes(text, image, 7.5, 3.0)
    assert len(plan) == 1 + text + image
    guided = guide([e[one.prompted, one.pictured] for one in plan], plan)
    none, shown, both = e[False, False], e[False, image], e[text, image]
    torch.testing.assert_close(guided, none + 3.0 * (shown - none) + 7.5 * (both - shown))


def test_rescale_keeps_the_conditional_deviation():
    plan = passes(True, True, 7.5, 3.0)
    predictions = [torch.randn(2, 3, 4, 8, 8) for _ in plan]
    deviation = guide(predictions, plan, 1.0).std((1, 2, 3, 4))
    torch.testing.assert_close(deviation, predictions[-1].std((1, 2, 3, 4)))
    half = guide(predictions, plan, 0.5)
    torch.testing.assert_close(half, (guide(predictions, plan) + guide(predictions, plan, 1.0)) / 2)


def test_scale_1_needs_no_guidance(pipe, monkeypatch):
    _, sizes = count_passes(pipe, monkeypatch, "a cat", guidance_scale=1.0)
    assert sizes == [1, 1]


def test_low_memory_agrees(pipe, monkeypatch):
    """Passes one by one, and frames."""
    slow = make().enable_low_memory()
    assert slow.vae.chunk == 1
    a, (b, sizes) = frames(pipe, "a cat", RED).astype(int), count_passes(slow, monkeypatch, "a cat", RED)
    assert sizes == [1] * 3 * 2
    assert np.abs(a - b).max() <= 1
    assert np.array_equal(frames(slow, "a cat", RED), b)  # CLIP came back whole


def test_keys_and_values_are_computed_once(pipe):
    """For all steps, of text and of image."""
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *_: calls.append(1))
        for transformer in pipe.unet.transformers()
        for layer in (transformer.cross_attention.to_k, transformer.cross_attention.to_v_image)
    ]
    frames(pipe, "a cat", RED, steps=3)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(hooks)


def test_frames_are_decoded_in_chunks(pipe):
    """And with channels last."""
    seen = []
    hook = pipe.vae.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    frames(pipe, "a cat", num_videos=2)
    hook.remove()
    assert max(len(x) for x in seen) <= pipe.vae.chunk < sum(len(x) for x in seen)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    weight = pipe.vae.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_same_seed_same_video_whatever_the_batch(pipe):
    pair = frames(pipe, "a cat", seed=5, num_videos=2)
    for i in range(2):
        alone = frames(pipe, "a cat", seed=5 + i)[0]
        assert np.abs(pair[i].astype(int) - alone).max() <= 1
    assert not np.array_equal(pair[0], pair[1])
    drawn = [frames(pipe, "a cat", generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert np.array_equal(*drawn)
    assert np.array_equal(drawn[0][0], frames(pipe, "a cat", seed=5)[0])
    each = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    assert np.array_equal(frames(pipe, "a cat", generator=each, num_videos=2), pair)


def test_same_seed_same_video_whatever_the_default_dtype(pipe):
    given = {"text_weight": 0.5, "image_weight": [1, 0.5, 2]}
    expected = frames(pipe, "a cat", RED, **given)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.abs(frames(pipe, "a cat", RED, **given).astype(int) - expected).max() <= 1
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("weight", [1.0, [0.5, 1.0, 3.0]])
def test_lists(pipe, weight):
    """Every video is the one made alone."""
    given = {"image_weight": weight, "image_guidance_scale": 2.5}  # by which no two passes count the same
    videos = frames(pipe, ["a cat", "a dog"], [RED, 255 - RED], num_videos=2, **given)
    assert len(videos) == 4
    for i, video in enumerate(videos.astype(int)):
        alone = frames(pipe, *[("a cat", RED), ("a dog", 255 - RED)][i // 2], seed=i, **given)[0]
        assert np.abs(video - alone).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_schedulers(pipe, monkeypatch, scheduler, spacing):
    """The bits of the plain loop, for time steps that are whole and, euler's, that are not."""
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler | {"timestep_spacing": spacing})
    latents = []
    got = frames(pipe, "a cat", scheduler=scheduler, steps=4, callback=lambda *s: latents.append(s[2]))
    text = pipe.clip.text(["", "a cat"])
    sampler = SCHEDULERS[scheduler].from_config(pipe.scheduler)
    sampler.set_timesteps(4, device="cpu")
    x = torch.randn(1, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0)) * sampler.init_noise_sigma
    plan = passes(True, False, SETTINGS.guidance_scale, 0.0)
    with torch.no_grad():
        for step, t in enumerate(sampler.timesteps):
            batch = sampler.scale_model_input(x, t).repeat(2, 1, 1, 1, 1)
            predictions = pipe.unet(batch, t.expand(2), text, text_weight=1.0, image_weight=0.0, fps=4.0).chunk(2)
            x = sampler.step(guide(predictions, plan), t, x).prev_sample
            assert torch.equal(latents[step], x)
    assert np.array_equal(got, pipe.vae.decode(x).numpy())


@pytest.mark.parametrize("part", ["unet", "vae.vae.decoder"])
def test_weights_that_are_not_finite(part):
    broken = make()
    next(attrgetter(part)(broken).parameters()).data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"^frames: got numbers that are not finite; .* guidance scales .*needed$"
    ):
        frames(broken, "a cat")


@pytest.mark.parametrize("shown", [True, False])
def test_progress(pipe, capsys, shown):
    """Shown where nothing is said of it."""
    pipe("a cat", **{} if shown else {"progress": False})
    assert ("Sampling: 100%" in capsys.readouterr().err) == shown


def test_without_standard_error_there_is_no_progress(pipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as of a service, or closed
        pipe("a cat")


def test_a_picture_from_a_file_or_from_pillow(pipe, tmp_path):
    """Turned, and over white where it is transparent, either way."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    half = np.full((20, 30, 4), (255, 0, 0, 255), np.uint8)
    half[:10, ..., 3] = 0
    Image.fromarray(half).save(tmp_path / "half.png", exif=exif)
    white = np.rot90(np.where(half[..., 3:] > 0, RED, 255).astype(np.uint8), -1)
    expected = frames(pipe, image=white)
    for image in (tmp_path / "half.png", Image.open(tmp_path / "half.png")):
        assert np.array_equal(frames(pipe, image=image), expected)


def test_a_picture(pipe, tmp_path):
    picture = pipe("a cat", num_frames=1, progress=False)
    assert picture.frames.shape == (1, 1, 16, 32, 3)
    picture.save(tmp_path / "cat.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "cat.png")), picture.frames[0, 0])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, "both are absent"),
        ({"prompt": "a cat", "text_weight": 0}, "both are absent"),
        ({"prompt": 3}, "prompt: got 3"),
        ({"prompt": []}, "prompt: got"),
        ({"prompt": "x", "num_frames": 0}, "num_frames: got 0"),
        ({"prompt": "x", "num_frames": 25}, "num_frames: got 25; at most 24 needed"),
        ({"prompt": "x", "height": 18}, "got 18x32; multiples of 4 needed, of which the nearest is 16x32"),
        ({"prompt": "x", "scheduler": "magic"}, "scheduler: got 'magic'; one of ddim"),
        ({"prompt": "x", "steps": 0}, "steps: got 0"),
        ({"prompt": "x", "fps": 0}, "fps: got 0"),
        ({"prompt": "x", "fps": float("nan")}, "fps: got nan; a number from 0.01 to 240 needed"),
        ({"prompt": "x", "fps": float("inf")}, "fps: got inf; a number from 0.01 to 240 needed"),
        ({"prompt": "x", "fps": 1e9}, "fps: got 1000000000.0; a number from"),
        ({"prompt": "x", "fps": -8}, "fps: got -8; a number from"),
        ({"prompt": "x", "fps": "8"}, "fps: got '8'; a number needed"),
        ({"prompt": "x", "guidance_scale": "7"}, "guidance_scale: got '7'; a number needed"),
        ({"prompt": "x", "image_guidance_scale": [5.0]}, r"image_guidance_scale: got \[5.0\]; a number needed"),
        ({"prompt": "x", "guidance_rescale": 1j}, "guidance_rescale: got 1j; a number needed"),
        ({"prompt": "x", "scheduler": ["ddim"]}, r"scheduler: got \['ddim'\]; one of ddim"),
        (
            {"prompt": "x", "generator": 3},
            "generator: got 3; a torch.Generator on the CPU, or one for each video, needed",
        ),
        ({"prompt": "x", "generator": [None]}, r"generator: got \[None\]; a torch.Generator on the CPU"),
        ({"prompt": "x", "generator": []}, "generator: got 0 of them for 1 videos; one, or one for each, needed"),
        ({"prompt": "x", "callback": "print"}, "callback: got 'print'; a function needed"),
        ({"prompt": "x", "num_videos": 10**8}, "num_videos: got 100000000; at most 10000 needed"),
        ({"prompt": "x", "steps": 1001}, "steps: got 1001; at most 1000 needed"),
        ({"prompt": "x", "steps": 2000, "scheduler": "dpm++"}, "steps: got 2000; at most 1000 needed"),
        ({"prompt": "x", "steps": 2000, "scheduler": "euler"}, "steps: got 2000; at most 1000 needed"),
        ({"prompt": "x", "text_weight": float("nan")}, "text_weight: got nan; finite numbers needed"),
        ({"prompt": "x", "text_weight": [0, float("nan"), 1]}, r"text_weight: got \[0, nan, 1\]; finite"),
        ({"prompt": "x", "text_weight": {1: float("inf")}}, "text_weight: got {1: inf}; finite"),
        ({"prompt": "x", "image_weight": float("nan")}, "image_weight: got nan; finite"),
        ({"prompt": "x", "guidance_scale": float("inf")}, "guidance_scale: got inf; a finite number needed"),
        ({"prompt": "x", "num_videos": 0}, "num_videos: got 0"),
        ({"prompt": "x", "guidance_rescale": 2}, "guidance_rescale: got 2"),
        ({"prompt": "x", "text_weight": [1, 2]}, "text_weight: got 2 weights, 3 needed"),
        ({"prompt": "x", "text_weight": {3: 1}}, "text_weight: got weights of level 3"),
        ({"prompt": "x", "text_weight": None}, "text_weight: got None; a number, or one for every frame, needed"),
        ({"prompt": "x", "text_weight": "123"}, "text_weight: got '123'; a number, or one for every frame, needed"),
        ({"prompt": "x", "text_weight": ["1"] * 3}, r"text_weight: got \['1', .*\]; a number, or one for every frame"),
        ({"prompt": "x", "image_weight": "all"}, "image_weight: got 'all'; a number, or one for every frame, needed"),
        (
            {"prompt": "x", "image_weight": {1: None}},
            "image_weight: got None; a number, or one for every frame, needed",
        ),
        ({"prompt": "x", "text_weight": {"1": 1, 3: 1}}, "text_weight: got weights of level '1'; levels are"),
        ({"prompt": "x", "seed": 1.5}, "seed: got 1.5; a whole number of 64 bits needed"),
        ({"prompt": "x", "num_frames": True}, "num_frames: got True; a whole number >= 1 needed"),
        ({"prompt": "x", "num_videos": 1.5}, "num_videos: got 1.5; a whole number >= 1 needed"),
        ({"prompt": "x", "negative_prompt": ["y"]}, r"negative_prompt: got \['y'\]; a text needed"),
        ({"prompt": "x", "seed": 2**64}, "seed: got 18446744073709551616; a whole number of 64 bits needed"),
        ({"prompt": ["x", "y"], "image": [RED] * 3}, "image: got 3 images for 2 prompts"),
        ({"image": []}, r"image: got \[\]; a picture, or a list of pictures, needed"),
        ({"image": RED.astype(float)}, "image: got float64"),
        ({"image": RED[:0]}, r"image: got uint8 \(0, 30, 3\); at least one pixel needed"),
        ({"image": Image.new("RGB", (0, 4))}, r"image: got uint8 \(4, 0, 3\); at least one pixel needed"),
        ({"image": torch.full((3, 4, 4), 255.0)}, "image: got numbers from 255 to 255; from 0 to 1 needed"),
        ({"image": torch.full((3, 4, 4), float("nan"))}, "image: got numbers from nan to nan; from 0 to 1 needed"),
        ({"image": "nowhere.png"}, "image: nowhere.png does not exist"),
    ],
)
def test_bad_input(pipe, monkeypatch, given, error):
    monkeypatch.setattr(pipe.clip, "text", lambda *_: pytest.fail("it was computed"))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=error):
        frames(pipe, **given)


@pytest.mark.parametrize(
    ("spacing", "offset", "steps", "schedulers"),
    [
        ("leading", 1, 1000, ("ddim", "dpm++", "euler")),
        ("leading", 0, 1000, ("dpm++",)),
        ("linspace", 0, 1000, ("dpm++",)),
        ("trailing", 0, 61, ("ddim", "dpm++", "euler")),  # of 62, the last -1
    ],
)
def test_steps_that_a_schedule_does_not_have(pipe, monkeypatch, spacing, offset, steps, schedulers):
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("it was sampled"))
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler | {"timestep_spacing": spacing, "steps_offset": offset})
    for scheduler in schedulers:
        with pytest.raises(
            ValueError, match=rf"^steps: got {steps}; {re.escape(scheduler)} finds no .*{spacing} spacing"
        ):
            frames(pipe, "a cat", steps=steps, scheduler=scheduler)


@pytest.mark.parametrize(
    ("schedule", "scheduler", "error"),
    [
        (
            {"algorithm_type": "sde-dpmsolver++"},
            "dpm++",
            "scheduler: algorithm_type: got 'sde-dpmsolver.*; one that draws no noise needed",
        ),
        (
            {"prediction_type": "epsilon"},
            "ddim",
            "scheduler: got ddim, with prediction_type epsilon and rescale_betas_zero_snr; .*another schedule needed",
        ),
    ],
)
def test_schedules_that_a_scheduler_cannot_sample_by(pipe, monkeypatch, schedule, scheduler, error):
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler | schedule)
    for other in SCHEDULERS.keys() - {scheduler}:
        frames(pipe, "a cat", scheduler=other)
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("it was sampled"))
    with pytest.raises(ValueError, match=f"^{error}"):
        frames(pipe, "a cat", scheduler=scheduler)


def test_a_value_that_diffusers_does_not_know_is_named_with_its_scheduler(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler | {"timestep_spacing": "foo"})
    with pytest.raises(ValueError, match=r"^scheduler: dpm\+\+: foo is not supported[^\n]*$"):
        frames(pipe, "a cat", scheduler="dpm++")
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler | {"algorithm_type": "foo"})
    with pytest.raises(ValueError, match=r"^scheduler: dpm\+\+: [^\n]*foo[^\n]*$"):
        frames(pipe, "a cat", scheduler="dpm++")


@pytest.mark.parametrize("device", ["phone", "meta:x", torch.float16, None])
def test_a_device_that_is_none_changes_nothing(pipe, device):
    with pytest.raises((RuntimeError, TypeError)) as error:
        pipe.to(device)
    assert len(str(error.value).splitlines()) == 1
    assert pipe.device == torch.device("cpu")


def test_a_device_that_is_full_changes_nothing(monkeypatch):
    pipe = make()
    monkeypatch.setattr(pipe.unet, "to", lambda device: interrupt())
    with pytest.raises(KeyboardInterrupt):
        pipe.to("meta")
    assert pipe.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"seed": None, "negative_prompt": None}, {}),
        ({"seed": None, "generator": torch.Generator().manual_seed(3)}, {"seed": 3}),
        ({"seed": np.int64(3), "num_frames": np.int64(2)}, {"seed": 3, "num_frames": 2}),
        ({"num_videos": torch.tensor(2), "fps": np.float32(8)}, {"num_videos": 2, "fps": 8}),
        ({"text_weight": np.float32(0.5)}, {"text_weight": 0.5}),
        ({"text_weight": {1: torch.tensor(0.5)}}, {"text_weight": {1: 0.5}}),
    ],
)
def test_numbers_of_other_kinds_and_none(pipe, given, plain):
    assert np.array_equal(frames(pipe, "a cat", **given), frames(pipe, "a cat", **plain))


class Recomputed(Graphed):
    """What a graph does, without a card: a replay reads what the capture read, and writes where it wrote."""

    def _capture(self, inputs):
        self.inputs = [x.clone() for x in inputs]
        again = lambda: self.function(*self.inputs, self.conditions)  # noqa: E731
        self.outputs = again()
        return SimpleNamespace(replay=lambda: [own.copy_(x) for own, x in zip(self.outputs, again(), strict=True)])


def test_a_kept_graph_takes_other_conditions(pipe, monkeypatch):
    kept = make()
    monkeypatch.setattr(pipeline, "Graphed", Recomputed)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(kept, "_predictor", kept._graphed)

    def graph_after(*args, **kwargs):
        options = {"steps": 3} | kwargs
        assert np.array_equal(frames(kept, *args, **options), frames(pipe, *args, **options))
        return kept._kept.graph

    first = graph_after("a cat", RED)
    for args, kwargs in [
        (("a dog", 255 - RED), {"seed": 3, "negative_prompt": "blurry", "fps": 24}),
        (("a cat", RED), {"image_weight": {1: 0.5}, "guidance_scale": 5.0, "scheduler": "euler", "steps": 4}),
    ]:
        assert graph_after(*args, **kwargs) is first
    for change in ({"num_frames": 2}, {"text_weight": 0.5}, {"num_videos": 2}, {"image_guidance_scale": 1.0}):
        assert graph_after("a cat", RED, **change) is not first, change
    assert graph_after("a cat", text_weight=[1, 2, 3]) is graph_after("a cat", text_weight=[3, 2, 1])
    with pytest.raises(KeyboardInterrupt):
        frames(kept, "a cat", text_weight=[3, 2, 1], callback=interrupt)
    assert kept._kept is None
    graph_after("a cat")
    kept.to("cpu")
    assert kept._kept is None


def test_decoding_takes_the_graphs_memory(monkeypatch):
    pipe = make()
    decode, latents = pipe.vae.decode, torch.randn(1, 2, 4, 8, 8)
    enough = True

    def short(latents):
        if pipe._kept is not None or not enough:
            raise torch.OutOfMemoryError
        return decode(latents)

    monkeypatch.setattr(pipe.vae, "decode", short)
    for enough in (True, False):
        pipe._kept = Graphed(list, ())
        with nullcontext() if enough else pytest.raises(torch.OutOfMemoryError):
            assert torch.equal(pipe._decode(latents), decode(latents))
        assert pipe._kept is None


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{"prompt": "a cat"}, {"prompt": "a cat", "image": RED}], ids="+".join)
def test_on_a_card(given):
    """The kernels, and CUDA graphs from the second step on, against the CPU; in float32."""
    cards = make()
    cards.unet = make_unet(backend=None)
    cards.to("cuda")
    expected = frames(make(), **given, steps=4).astype(int)
    got = frames(cards, **given, steps=4).astype(int)
    assert np.abs(got - expected).mean() < 0.5
    assert np.abs(got - expected).max() <= 4
    low = make().enable_low_memory().to("cuda")
    assert np.abs(frames(low, **given, steps=4).astype(int) - expected).mean() < 0.5
    assert [{x.device.type for x in part.state_dict().values()} for part in (low.unet, low.clip)] == [{"cuda"}, {"cpu"}]


@pytest.mark.gpu
def test_graph_is_kept(monkeypatch):
    """For other words, pictures, seeds and schedulers at the same sizes, with the same results; not for other sizes."""
    captures = []
    capture = Graphed._capture
    monkeypatch.setattr(Graphed, "_capture", lambda self, inputs: captures.append(self) or capture(self, inputs))
    spacing = {"timestep_spacing": "linspace"}  # by which euler's time steps are not whole
    pipe, fresh = make().to("cuda"), make().to("cuda")
    for one in (pipe, fresh):
        one.scheduler |= spacing

    def captured(*args, **kwargs):
        """How many graphs a call makes whose result is that of a pipeline that has none."""
        captures.clear()
        got = frames(pipe, *args, steps=4, **kwargs)
        made = len(captures)
        assert np.array_equal(got, frames(fresh.to("cuda"), *args, steps=4, **kwargs))
        return made

    assert captured("a cat", RED) == 1
    assert captured("a dog", 255 - RED, seed=3, fps=24) == 0
    assert captured("a dog", RED, scheduler="euler", guidance_scale=5.0) == 0
    for other in ({"num_frames": 2}, {"height": 32}, {"text_weight": 0.5}, {"num_videos": 2}):
        assert captured("a cat", RED, **other) == 1, other
    assert captured("a cat", RED) == 1  # only the last one is kept
    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", RED, steps=4, progress=False, callback=interrupt)
    assert captured("a cat", RED) == 1
    pipe.to("cuda")
    assert pipe._kept is None
    pipe.enable_low_memory()
    frames(pipe, "a cat", RED, steps=4)
    assert pipe._kept is None
