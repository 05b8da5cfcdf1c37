"""The shapes world: the same clips everywhere, objects inside, captions that tell what is drawn, and shards of real videos."""

import json
import tarfile
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

from univid.data.files import read_video
from univid.data.shapes import (
    COLOURS,
    HELD_OUT,
    MOTIONS,
    NAMES,
    ROUND,
    SHAPES,
    Shapes,
    _draws,
    held_out,
    signed_distance,
)
from univid.data.shapes_files import write_shards

WORLD = Shapes()


def test_a_clip_depends_on_its_index_alone():
    together = WORLD.sample(torch.arange(40))
    alone = WORLD.sample(torch.tensor([17]))
    for field in fields(together):
        assert torch.equal(getattr(together, field.name)[17:18], getattr(alone, field.name)), field.name
    assert torch.equal(WORLD.render(together)[17:18], WORLD.render(alone))
    assert WORLD.captions(together)[17:18] == WORLD.captions(alone)
    assert torch.equal(WORLD.render(together, frames=(3, 9)), WORLD.render(together)[:, [3, 9]])
    other = Shapes(seed=1).sample(torch.arange(40))
    assert not torch.equal(other.center, together.center)


def test_draws_are_splitmix64():
    """Against whole numbers of Python: a trained model's data must not change with a machine or a version."""

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    gamma, index, seed = 0x9E3779B97F4A7C15, HELD_OUT + 3, 5
    state = mix((mix((seed * gamma + 1) % 2**64) + index) % 2**64)
    draws = _draws(seed, torch.tensor([index]))
    for _ in range(8):
        state = (state + gamma) % 2**64
        assert next(draws).item() == (mix(state) >> 33) / 2**31


def test_everything_is_drawn_about_equally_often():
    a = WORLD.sample(torch.arange(20_000))
    for name, table in NAMES.items():
        counts = torch.bincount(getattr(a, name), minlength=len(table)) / len(a) * len(table)
        assert counts.min() > 0.6 and counts.max() < 1.25, (name, counts)
    turning = a.turn != 0
    assert turning.any() and (a.shape[turning] >= ROUND).all()
    symmetries = torch.tensor([1, 1, 4, 3, 5, 4])[a.shape]
    assert (a.turn.abs() / (WORLD.num_frames - 1) < 0.5 / symmetries).all()


@pytest.mark.parametrize(("num_frames", "size"), [(16, 64), (5, 48), (1, 128)])
def test_objects_stay_inside_and_differ_from_the_background(num_frames, size):
    world = Shapes(num_frames, size)
    frames = world.render(world.sample(torch.arange(300))).float()
    assert frames.shape == (300, num_frames, size, size, 3)
    chroma = (frames.amax(-1) - frames.amin(-1)).flatten(0, 1)
    assert (chroma.flatten(1).amax(1) > 100).all()  # the object
    border = torch.cat([chroma[:, 0], chroma[:, -1], chroma[:, :, 0], chroma[:, :, -1]], 1)
    assert border.max() <= 23


def test_held_out_clips_are_others():
    assert not set(held_out(1000).tolist()) & set(range(2_000_000))
    assert torch.equal(held_out(3, 2), HELD_OUT + torch.tensor([2, 3, 4]))


def test_given_attributes():
    indices = torch.arange(200)
    a = WORLD.sample(indices, shape="star", colour="red", motion="left")
    assert {(n["shape"], n["colour"], n["motion"]) for n in map(a.names, range(200))} == {("star", "red", "left")}
    assert (a.travel[:, 0] < -10).all()
    turning = WORLD.sample(indices, motion="clockwise")
    assert (turning.shape >= ROUND).all() and (turning.turn > 0).all()
    assert set(WORLD.sample(indices, shape="ring").motion.tolist()) == {
        i for i, name in enumerate(MOTIONS) if "clock" not in name
    }
    with pytest.raises(ValueError, match="motion: a circle or a ring"):
        WORLD.sample(indices, shape="ring", motion="clockwise")
    with pytest.raises(ValueError, match="colour: got 'beige', needs one of red"):
        WORLD.sample(indices, colour="beige")
    with pytest.raises(ValueError, match="color: got an unknown attribute"):
        WORLD.sample(indices, color="red")


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_signed_distances_are_distances(shape):
    """Near the edge the gradient has length 1, so that edges are one pixel wide at any size."""
    line = torch.linspace(-1.5, 1.5, 601, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    distance = signed_distance(torch.tensor(shape), x, y)
    dy, dx = torch.gradient(distance, spacing=0.005)
    near = distance.abs() < 0.02
    slopes = (dx**2 + dy**2).sqrt()[near]
    assert (slopes - 1).abs().median() < 0.01
    assert slopes.max() < 1.05
    area = (distance < 0).double().mean() * 9
    assert 2.2 < area < 3.5  # all look about as large as a circle, of which it is pi


def test_captions_say_what_is_drawn():
    a = WORLD.sample(torch.arange(500))
    kinds = {kind: WORLD.captions(a, kind) for kind in ("full", "appearance", "motion", "random")}
    for row in range(len(a)):
        names = a.names(row)
        for kind in ("full", "appearance"):
            assert f"{names['colour']} {names['shape']}" in kinds[kind][row]
        assert not set(kinds["motion"][row].split()) & {*SHAPES, *COLOURS}
        if names["motion"] in ("left", "down-right", "clockwise"):
            for kind in ("full", "motion"):
                assert set(names["motion"].split("-")) <= set(kinds[kind][row].replace("-", " ").split())
        assert "an orange" in kinds["full"][row] or " a orange" not in kinds["full"][row]
    assert len(set(kinds["full"])) > 400
    forms = Counter("motion" if c in set(kinds["motion"]) else "other" for c in kinds["random"])
    assert 20 < forms["motion"] < 120
    with pytest.raises(ValueError, match="kind: got 'short'"):
        WORLD.captions(a, "short")


def test_shards_of_videos(tmp_path):
    world = Shapes(num_frames=4)
    shards = write_shards(tmp_path / "clips", world, held_out(5), clips_per_shard=3)
    assert [path.name for path in shards] == ["00000.tar", "00001.tar"]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open(shards[1]) as tar:
        tar.extractall(tmp_path, filter="data")
    assert sorted(p.name for p in tmp_path.glob("00001*")) == [
        f"00001000{i}.{suffix}" for i in range(2) for suffix in ("json", "mp4", "txt")
    ]
    a = world.sample(held_out(2, 3))
    frames, fps = read_video(tmp_path / "000010001.mp4")
    assert fps == 8
    assert np.abs(frames.astype(int) - world.render(a)[1].numpy()).mean() < 6  # of H.264, whose chroma is halved
    known = json.loads((tmp_path / "000010001.json").read_text())
    assert known["caption"] == (tmp_path / "000010001.txt").read_text() == world.captions(a)[1]
    assert known["shape"] == a.names(1)["shape"] and known["num_frames"] == 4
