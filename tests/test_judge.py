"""The judge: it reads back what clips show, as they are and as a generator would blur them; and the command that uses it."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from tests.small_pipeline import make
from univid.cli import main
from univid.data.judge import JUDGED, judge
from univid.data.shapes import Shapes, held_out

WORLD = Shapes()
ATTRIBUTES = WORLD.sample(held_out(120))


@pytest.fixture(scope="module")
def clips():
    return WORLD.render(ATTRIBUTES)


def degraded(clips, faded=1.0, noise=0.0, blur=True):
    x = clips.float().permute(0, 1, 4, 2, 3).flatten(0, 1)
    if blur:
        line = torch.tensor([1.0, 4, 6, 4, 1]) / 16
        x = F.conv2d(F.pad(x, (2,) * 4, mode="replicate"), (line[:, None] * line).expand(3, 1, 5, 5), groups=3)
    x = (x - 128) * faded + 128 + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x.clamp(0, 255).to(torch.uint8).unflatten(0, clips.shape[:2]).permute(0, 1, 3, 4, 2)


def wrong(verdicts, attributes=ATTRIBUTES):
    return {name: (~right).nonzero().flatten().tolist() for name, right in verdicts.right(attributes).items()}


def test_true_clips(clips):
    verdicts = judge(clips)
    assert wrong(verdicts) == {name: [] for name in JUDGED}
    assert verdicts.fit.min() > 0.9
    assert all(sure.min() >= 0 and sure.max() <= 1 for sure in verdicts.confidence.values())
    assert verdicts.names(3) == {name: ATTRIBUTES.names(3)[name] for name in JUDGED}


@pytest.mark.parametrize("kind", [{"noise": 8.0}, {"noise": 12.0, "blur": False}, {"faded": 0.75}])
def test_degraded_clips(clips, kind):
    verdicts = judge(degraded(clips, **kind))
    assert sum(map(len, wrong(verdicts).values())) <= 2, wrong(verdicts)


def test_a_stray_patch_does_not_move_the_object(clips):
    clips = clips.clone()
    clips[:, 5:9, 2:6, 2:6] = torch.tensor([222, 38, 38], dtype=torch.uint8)
    assert sum(map(len, wrong(judge(clips)).values())) <= 2


def test_wrong_clips_are_told():
    """What a clip shows is read from it: changed pixels change the verdict, and that verdict only."""
    still = WORLD.sample(held_out(40), motion="still")
    frames = WORLD.render(still)
    assert wrong(judge(frames), still)["motion"] == []
    moved = torch.stack([frames[:, t].roll(-t, 2) for t in range(16)], 1)  # the background too
    inside = still.center[:, 0] - 1.4 * still.radius > 16
    verdicts = judge(moved[inside])
    assert {verdicts.names(i)["motion"] for i in range(int(inside.sum()))} == {"left"}
    assert wrong(verdicts, still[inside])["shape"] == []
    backwards = judge(WORLD.render(WORLD.sample(held_out(30), motion="grow")).flip(1))
    assert {backwards.names(i)["motion"] for i in range(30)} == {"shrink"}
    mirrored = judge(WORLD.render(WORLD.sample(held_out(30), motion="clockwise")).flip(3))
    assert {mirrored.names(i)["motion"] for i in range(30)} == {"counterclockwise"}


def test_nothing_to_see():
    grey = torch.randint(100, 130, (3, 16, 64, 64, 1), dtype=torch.uint8).expand(-1, -1, -1, -1, 3)
    verdicts = judge(grey)
    assert all((getattr(verdicts, name) == -1).all() for name in JUDGED)
    assert verdicts.names(0)["shape"] == "nothing" and verdicts.fit.max() == 0


def test_other_sizes_and_single_frames():
    world = Shapes(num_frames=9, size=96)
    attributes = world.sample(held_out(40))
    assert wrong(judge(world.render(attributes)), attributes) == {name: [] for name in JUDGED}
    picture = wrong(judge(world.render(attributes, frames=(0,))), attributes)
    assert picture["colour"] == picture["shape"] == picture["size"] == []


def test_bad_input():
    with pytest.raises(ValueError, match=r"frames: got torch.float32 \(1, 4, 64, 64, 3\), needs uint8"):
        judge(torch.zeros(1, 4, 64, 64, 3))
    with pytest.raises(ValueError, match="frames: got no clip"):
        judge(torch.zeros(0, 4, 64, 64, 3, dtype=torch.uint8))


# --- univid judge -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    pipe = make()
    pipe.settings = dataclasses.replace(pipe.settings, height=32, width=32)
    pipe.save_pretrained(folder)
    return str(folder)


def test_command(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "torch")
    output = tmp_path / "judge.json"
    sizes = ["--count", "3", "--pairs", "2", "--batch", "2", "--steps", "1", "-o", str(output)]
    assert main(["judge", checkpoint, *sizes]) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["t2v"].keys() == {"colour", "shape", "motion"}
    assert found["ti2v"].keys() == {"appearance", "motion"}
    assert [row["s"] for row in found["sweep"]["1-s, s"]] == [0, 0.25, 0.5, 0.75, 1]
    for title in ("T2V", "I2V", "(T+I)2V", "sweep (1-s, s), 2 pairs", "sweep (1, s), 2 pairs", "s=0.25"):
        assert title in printed


def test_command_judges_what_the_pipeline_makes(checkpoint, tmp_path, monkeypatch):
    """A model that paints what it is asked for gets full marks; one that always paints the picture fails the text's part."""
    from univid.judge import Examination
    from univid.pipeline import UniVidPipeline, Videos

    pipe = UniVidPipeline.from_pretrained(checkpoint)
    pipe.settings = dataclasses.replace(pipe.settings, height=64, width=64, num_frames=16)
    examination = Examination(pipe, count=6, pairs=6, batch=4)
    told = {}
    for indices in (held_out(6), held_out(6, 1 << 20)):
        attributes = examination.world.sample(indices)
        for kind in ("full", "motion"):
            texts, frames = examination.world.captions(attributes, kind), examination.world.render(attributes)
            told |= {(text, kind): clip for text, clip in zip(texts, frames.numpy(), strict=True)}

    def paint(self, prompt, image, text_weight=1.0, image_weight=1.0, **_):
        if image is not None and image_weight >= 0.5:
            clips = torch.stack([torch.from_numpy(one).expand(16, -1, -1, -1) for one in image]).numpy()
        else:
            clips = torch.stack([torch.from_numpy(told[text, "full"]) for text in prompt]).numpy()
        return Videos(clips, 8)

    monkeypatch.setattr(UniVidPipeline, "__call__", paint)
    assert examination.t2v() == {"colour": 100, "shape": 100, "motion": 100}
    assert examination.i2v()["appearance"] == 100
    assert examination.ti2v()["appearance"] == 100 and examination.ti2v()["motion"] < 50
    for rows in examination.sweep().values():
        assert [row["image's"] for row in rows] == [0, 0, 100, 100, 100]
        assert [row["text's"] for row in rows] == [100, 100, 0, 0, 0]


def test_command_asks_for_what_was_held_out(checkpoint, monkeypatch):
    """From seeds of its own in training's place, and the same noise for clip i whatever the weights."""
    from univid.data.shapes import Shapes
    from univid.judge import Examination
    from univid.pipeline import UniVidPipeline, Videos

    pipe = UniVidPipeline.from_pretrained(checkpoint)
    pipe.settings = dataclasses.replace(pipe.settings, height=64, width=64, num_frames=16)
    examination = Examination(pipe, count=3, pairs=3, batch=2, seed=5)
    sampled, seeds = [], []
    sample = Shapes.sample
    monkeypatch.setattr(
        Shapes, "sample", lambda self, indices, **given: sampled.append(indices) or sample(self, indices, **given)
    )

    def make(self, prompts, pictures, seed, **_):
        seeds.append(seed)
        return Videos(torch.zeros(len(prompts or pictures), 16, 64, 64, 3, dtype=torch.uint8).numpy(), 8)

    monkeypatch.setattr(UniVidPipeline, "__call__", make)
    for name in ("t2v", "i2v", "ti2v", "sweep"):
        sampled.clear(), seeds.clear()
        getattr(examination, name)()
        assert sampled and all(int(indices.min()) >= int(held_out(1)) for indices in sampled), name
        assert seeds == [5, 7] * (10 if name == "sweep" else 1), name


def test_command_judges_the_judge(checkpoint, tmp_path, capsys, monkeypatch):
    """True clips are read right, and nothing from an autoencoder that keeps nothing of them."""
    from univid.data.autoencoder import Autoencoder

    clips = []

    def encode(self, frames):
        clips.append((127.5 * (frames + 1)).round().to(torch.uint8).movedim(2, -1))
        return frames

    monkeypatch.setattr(Autoencoder, "encode", encode)
    for decode, share in ((lambda _: clips[-1], 100), (lambda _: torch.full_like(clips[-1], 128), 0)):
        monkeypatch.setattr(Autoencoder, "decode", lambda self, latents, decode=decode: decode(latents))
        output = tmp_path / f"{share}.json"
        arguments = ["--sets", "true", "--count", "7", "--batch", "3", "-o", str(output)]
        clips.clear()
        assert main(["judge", checkpoint, *arguments]) == 0
        world = Shapes(3, 32)
        assert torch.equal(torch.cat(clips), world.render(world.sample(held_out(7))))
        found = json.loads(output.read_text())["true"]
        assert set(found["true clips"]) == set(found["decoded from latents"]) == set(JUDGED)
        assert {found["true clips"][name] for name in ("colour", "shape", "size")} == {100}
        assert found["decoded from latents"] == (found["true clips"] if share else dict.fromkeys(JUDGED, 0))
    printed = capsys.readouterr().out
    assert "true clips              colour  100.0" in printed and "decoded from latents    colour    0.0" in printed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--count", "0"], "--count: got 0"),
        (["--sets", "t2v,x2v"], "--sets: got 'x2v', needs some of t2v,i2v,ti2v,sweep,true"),
        (["-o", "nowhere/judge.json"], "nowhere does not exist"),
        (["-o", "folder"], "output: folder is a folder; a file's name needed"),
        (["-o", "/proc/judge.json"], "output: /proc/judge.json cannot be written: "),
    ],
)
def test_command_bad_input(checkpoint, tmp_path, capsys, monkeypatch, arguments, error):
    """Before anything is generated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("univid.judge.Examination.t2v", lambda _: pytest.fail("it generates"))
    assert main(["judge", checkpoint, *arguments]) == 2
    assert error in capsys.readouterr().err
