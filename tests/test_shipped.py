"""The model of the shapes world that ships in the package: its parts do what they were trained for."""

import pytest
import torch
import torch.nn.functional as F

from train.shapes_vae import to_pixels
from univid.checkpoint import find
from univid.data.autoencoder import load_autoencoder
from univid.data.clip import load_clip
from univid.data.judge import judge
from univid.data.shapes import COLOURS, SHAPES, Shapes, held_out
from univid.pipeline import UniVidPipeline

WORLD = Shapes()
CLIPS = 32


@pytest.fixture(scope="module")
def pipe():
    return UniVidPipeline.from_pretrained("shapes")


def test_it_fits():
    files = list(find("shapes").rglob("*.safetensors"))
    assert len(files) == 4
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert round(sum(path.stat().st_size for path in files) / 1e6, 1) <= 24.0  # MB


def test_text_to_video(pipe):
    seen = judge(torch.from_numpy(pipe("a red star moves left", steps=10, seed=0).frames)).names(0)
    assert (seen["colour"], seen["shape"], seen["motion"]) == ("red", "star", "left")


def test_image_and_text_to_video(pipe):
    attributes = WORLD.sample(held_out(1), motion="up")
    picture = WORLD.render(attributes, frames=(0,))[0, 0].numpy()
    seen = judge(torch.from_numpy(pipe("it moves up", image=picture, steps=10, seed=0).frames)).right(attributes)
    assert all(seen[part] for part in ("colour", "shape", "motion"))


def test_autoencoder_keeps_what_is_judged():
    attributes = WORLD.sample(held_out(CLIPS))
    frames = WORLD.render(attributes)
    vae = load_autoencoder(find("shapes") / "vae")
    latents = vae.encode(to_pixels(frames).unflatten(0, frames.shape[:2]))
    assert 0.9 < latents.std().item() < 1.1
    for name, right in judge(vae.decode(latents)).right(attributes).items():
        assert right.float().mean() >= 0.98, name


def test_clip_tells_colours_and_shapes():
    attributes = WORLD.sample(held_out(CLIPS))
    clip = load_clip(find("shapes") / "clip")
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    with torch.no_grad():
        texts = clip.model.encode_text(clip.tokenizer([" ".join(("a", *words)) for words in looks]), normalize=True)
        visual = clip.model.visual
        mean, std = (torch.tensor(x)[:, None, None] for x in (visual.image_mean, visual.image_std))
        pictures = WORLD.render(attributes, frames=(0,))[:, 0].permute(0, 3, 1, 2) / 255
        seen = visual((pictures - mean) / std)
    nearest = (F.normalize(seen, dim=-1) @ texts.T).argmax(1).tolist()
    shown = [(names["colour"], names["shape"]) for names in map(attributes.names, range(CLIPS))]
    assert sum(looks[i] == words for i, words in zip(nearest, shown, strict=True)) >= 0.95 * CLIPS
