"""The commands that train the small model's autoencoder and CLIP: a step or two on the CPU, and what they write is read back."""

import json
import os
import signal

import pytest
import torch

from train import shapes_clip, shapes_vae
from train.config import until_stopped
from univid.data.autoencoder import load_autoencoder
from univid.data.clip import VOCABULARY, load_clip
from univid.data.shapes import Shapes, held_out

WORLD = Shapes()


def test_autoencoder(tmp_path, capsys):
    arguments = ["steps=2", "batch_size=2", "channels=[16, 32]", "device=cpu"]
    assert shapes_vae.main([*arguments, f"out={tmp_path / 'a'}"]) == 0
    assert "psnr_held_out" in capsys.readouterr().out
    assert shapes_vae.main([*arguments, f"out={tmp_path / 'b'}"]) == 0
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]  # the same seed
    vae = load_autoencoder(tmp_path / "a")
    assert vae.factor == 2
    frames = WORLD.render(WORLD.sample(held_out(8)), frames=(0, 8))
    latents = vae.encode(shapes_vae.to_pixels(frames).unflatten(0, (8, 2)))
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.3
    assert vae.decode(latents).shape == frames.shape

    assert shapes_vae.main([*arguments, f"start={tmp_path / 'a'}", f"out={tmp_path / 'c'}"]) == 0
    went_on = load_autoencoder(tmp_path / "c").vae
    moved = [(x - y).abs().max().item() for x, y in zip(vae.vae.parameters(), went_on.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1  # a few steps from where it was, not from random weights


def test_sigterm_ends_a_training_early(capsys):
    steps = []
    for step in until_stopped(5):
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert steps == [0, 1]
    assert "stopped at step 2 of 5" in capsys.readouterr().out
    assert list(until_stopped(3)) == [0, 1, 2]


@pytest.mark.parametrize("module", [shapes_clip, shapes_vae])
def test_ctrl_c_ends_a_training_in_one_line(module, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt  # what Python makes of the signal, where it is not ignored

    monkeypatch.setattr(module, "train", interrupted)
    assert module.main([]) == 130
    assert capsys.readouterr().err == f"{module.__name__.partition('.')[2]}: interrupted\n"


def test_standardised_latents_draw_the_same_pixels():
    torch.manual_seed(0)
    vae = shapes_vae.build((16, 32)).eval()
    pixels = shapes_vae.to_pixels(WORLD.render(WORLD.sample(torch.arange(2)), frames=(0,)))
    torch.nn.init.normal_(vae.quant_conv.bias)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        shapes_vae.standardise(vae, [pixels])
        latents = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert vae.config.scaling_factor * latents.std().item() == pytest.approx(1, rel=1e-4)


def test_clip(tmp_path, capsys):
    arguments = ["steps=2", "batch_size=4", "width=32", "layers=[2, 2]", "workers=0", "device=cpu"]
    assert shapes_clip.main([*arguments, f"out={tmp_path}"]) == 0
    assert "held_out" in capsys.readouterr().out
    clip = load_clip(tmp_path)
    assert clip.text(["a red star moves left"]).shape == (1, 77, 32)
    assert clip.image(torch.rand(1, 3, 64, 64)).shape == (1, 65, 32)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 2


def test_vocabulary_has_a_token_for_every_word(tmp_path):
    from open_clip import SimpleTokenizer

    tokens = shapes_clip.write_vocabulary(tmp_path / VOCABULARY, WORLD)
    assert tokens <= 1000
    tokenizer = SimpleTokenizer(str(tmp_path / VOCABULARY))
    assert tokenizer.vocab_size == tokens
    captions = WORLD.captions(WORLD.sample(held_out(300)))
    for caption in captions:
        words = caption.replace("-", " - ").replace(",", " ,").replace(";", " ;").split()
        assert len(tokenizer.encode(caption)) == len(words)
        assert tokenizer.decode(tokenizer.encode(caption)).split() == words
    other = "a quick brown fox"  # in bytes and pieces
    assert tokenizer.decode(tokenizer.encode(other)).strip() == other


def test_merges():
    assert shapes_clip.merges(["ab ab abc"], 10) == [("a", "b</w>"), ("b", "c</w>"), ("a", "bc</w>")]
    assert shapes_clip.merges(["ab ab abc"], 1) == [("a", "b</w>")]


def test_contrast_counts_equal_captions_as_right():
    a = torch.eye(3)
    tokens = torch.tensor([[1], [1], [2]])
    loss, right = shapes_clip.contrast(a[[0, 0, 1]], a[[0, 0, 1]], tokens, torch.tensor(4.0))
    assert right == 1 and loss.item() == pytest.approx(torch.tensor(2.0).log().item() * 2 / 3, abs=1e-3)
    loss, right = shapes_clip.contrast(a[[0, 1, 2]], a[[1, 2, 0]], torch.tensor([[1], [2], [3]]), torch.tensor(4.0))
    assert right == 0 and loss > 10


@pytest.mark.parametrize("command", [shapes_vae, shapes_clip])
def test_bad_input(command, monkeypatch, capsys):
    assert command.main(["step=3"]) == 2
    assert "step: unknown key; the nearest is steps" in capsys.readouterr().err
    assert command.main(["steps=1"]) == 2
    assert "steps: got 1, needs a number >= 2" in capsys.readouterr().err
    assert command.main(["device=foo"]) == 2
    assert "device: got 'foo', needs 'auto' or 'cpu' or 'cuda'" in capsys.readouterr().err
    assert command.main(["lr=-1"]) == 2
    assert "lr: got -1.0, needs a number > 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["device=cuda"]) == 2
    assert "device: got 'cuda', needs a GPU that PyTorch finds, or cpu" in capsys.readouterr().err


@pytest.mark.parametrize("command", [shapes_vae, shapes_clip])
def test_a_place_that_cannot_be_written_is_named_before_the_first_step(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "until_stopped", lambda steps: pytest.fail("trained"))
    (tmp_path / "file").touch()
    assert command.main([f"out={tmp_path / 'file'}", "device=cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.partition(": ")[2] == f"out: got '{tmp_path / 'file'}', a file, needs a folder's name\n"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("channels=[]", "channels: got (), needs numbers > 0, one a level"),
        ("start=nope", "start: got 'nope', needs a folder that holds an autoencoder's config.json"),
    ],
)
def test_bad_autoencoders(argument, message, capsys):
    assert shapes_vae.main([argument]) == 2
    assert capsys.readouterr().err == f"shapes_vae: {message}\n"
