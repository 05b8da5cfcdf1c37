"""Streams of files in the trainer: sizes, broken clips, and caches that it can or cannot know."""

import json
import shutil
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.small_pipeline import make
from tests.test_data import mp4, shard, shards  # noqa: F401 - fixtures
from tests.test_train import ENVIRONMENT, ROOT, TORCHRUN
from tests.train_worker import TINY, configure
from train.config import Model
from train.data import Encoder, open_source
from train.fsdp import Trainer
from train.log import FILE
from train.parts import Parts
from train.processes import processes
from univid.cli import main as univid

WIDE, TALL = (32, 48), (48, 32)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path, mp4):  # noqa: F811
    """Six wide ones and three tall ones, of which one each is cut off."""
    members = {f"{i}.txt": f"clip {i}" for i in range(9)}
    members |= {f"{i}.mp4": mp4(20 * i, size=TALL if i % 3 == 2 else WIDE) for i in range(9)}
    members |= {f"{i}.mp4": members[f"{i}.mp4"][:400] for i in (4, 5)}
    members |= {f"{i}.json": dict(zip(("height", "width"), TALL if i % 3 == 2 else WIDE, strict=True)) for i in (4, 5)}
    return shard(tmp_path / "clips.tar", members)


def stream(source, *more):
    files = f"source={source}", "fps=8", "workers=0", "max_skipped=1", 'sizes=["32x48", "48x32"]', *more
    return ["stage=t2v", "streams.image.share=0", *(f"streams.video.{one}" for one in files)]


def test_two_ranks_take_clips_of_two_sizes_and_say_which_are_broken(start, clips, tmp_path, monkeypatch):
    """Each step's batches are of one size on all ranks, and each size may be compiled."""
    shown = [f"model.start={start}", "steps=6", "optimizer.eps=1e-5", *stream(clips)]
    with processes(device="cpu") as joined:
        variants, sizes = [], []
        monkeypatch.setattr("train.fsdp.compile_blocks", lambda model, backend, count: variants.append(count))
        trainer = Trainer(configure(tmp_path / "one", *shown, "compute.compile=eager"), joined)
        plain = trainer.sources["video"].next
        trainer.sources["video"].next = lambda: sizes.append(plain()) or sizes[-1]
        trainer.run()
    assert variants == [2]  # sizes of clips; images have no share
    assert {tuple(batch.frames.shape) for batch in sizes} == {(4, 3, *WIDE, 3), (4, 3, *TALL, 3)}
    assert not {key for batch in sizes for key in batch.keys} & {"4", "5"}
    tiny = [one for one in TINY if not one.startswith(("model.", "streams.video.height", "streams.video.width"))]
    two = [*tiny, f"run={tmp_path / 'two'}", *shown, "streams.video.batch_size=2"]
    done = subprocess.run(
        [*TORCHRUN, "train/fsdp.py", *two], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / run / FILE).read_text().splitlines()] for run in ("one", "two")
    )
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)
    assert two[-1]["broken clips"] == one[-1]["broken clips"] == trainer.sources["video"].skipped >= 2
    assert f"  broken clips {two[-1]['broken clips']}\n" in done.stdout
    named = [line.rpartition("/")[2] for line in done.stderr.splitlines() if line.startswith("data: left out")]
    assert {line.partition(":")[0] for line in named} == {"4", "5"}
    assert len(named) <= 2 * 2  # once on each rank, however often they are met


def test_how_many_clips_may_be_broken_can_be_chosen(start, clips, tmp_path):
    with processes(device="cpu") as joined:
        trainer = Trainer(configure(tmp_path, f"model.start={start}", *stream(clips, "max_skipped=0.05")), joined)
        with pytest.raises(ValueError, match=r"could not be read, more than max_skipped=0\.05 of them"):
            for _ in range(40):
                trainer.sources["video"].next()


def test_clips_are_refused_where_nothing_fits_that_would_encode_them(clips, tmp_path):
    with (
        processes(device="cpu") as joined,
        pytest.raises(
            ValueError, match=r"^model\.frozen: got none, and untrained ones with context_dim = 128, needs 24"
        ),
    ):
        Trainer(configure(tmp_path, *stream(clips)), joined)


def test_two_ranks_have_each_clip_that_passes_once_in_an_epoch(start, shards, tmp_path):  # noqa: F811
    shown = stream(shards, "min_score.score=2", "batch_size=1", "sizes=[]", "width=48")
    with processes(device="cpu") as joined:
        config = configure(tmp_path, f"model.start={start}", *shown).streams["video"]
        parts = Parts(Model(start=str(start)), torch.float32, joined.device)
        ranks = [SimpleNamespace(rank=rank, world_size=2, first_before_others=nullcontext) for rank in range(2)]
        sources = [
            open_source("video", config, parts.unet(), Encoder(parts, joined.device, 8), one, 0) for one in ranks
        ]
        epochs = [[source.next().keys[0] for _ in range(2) for source in sources] for _ in range(3)]
    assert all(sorted(epoch) == ["00002", "00003", "00004", "00005"] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_a_caches_rate_is_its_own(start, shards, tmp_path):  # noqa: F811
    latents = tmp_path / "latents"
    shown = ["--device", "cpu", "--workers", "0", "--size", "32x48", "--num-frames", "3", "--fps", "4"]
    assert univid(["encode", str(shards), "-o", str(latents), "--model", str(start), *shown]) == 0
    with processes(device="cpu") as joined:
        for fps, wrong in ((4, False), (8, False), (6, True)):  # 8: not chosen
            config = configure(tmp_path / "run", f"model.start={start}", *stream(latents, f"fps={fps}"))
            if not wrong:
                trainer = Trainer(config, joined)
                assert trainer.sources["video"].next().fps.tolist() == [4] * 4
                assert trainer.config.streams["video"].fps == 4  # as an export will have it
                continue
            message = r"^streams\.video\.fps: got 6\.0, needs 4, as the cache that is its source$"
            with pytest.raises(ValueError, match=message):
                Trainer(config, joined)


def test_a_cache_is_of_a_model(start, shards, tmp_path):  # noqa: F811
    """Random weights learn from one with the frozen parts that made it, or as exported. Others are refused."""
    latents, half, other = tmp_path / "latents", tmp_path / "half", make()
    shutil.copytree(start, half)
    make().vae.half().save(half / "vae")
    shown = ["--device", "cpu", "--workers", "0", "--size", "32x48", "--num-frames", "3", "--fps", "8"]
    assert univid(["encode", str(shards), "-o", str(latents), "--model", str(half), *shown]) == 0
    with torch.no_grad():
        next(other.vae.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with processes(device="cpu") as joined:
        for frozen, error in (
            (half, None),
            (tmp_path / "out", None),
            (tmp_path / "other", "made with another VAE or text encoder"),
            (
                "",
                r"^streams\.video\.source: .*latents is a cache, needs the folder of the VAE and CLIP that made it: model\.frozen$",
            ),
        ):
            shown = [f"model.frozen={frozen}", f"export={tmp_path / 'out'}", "steps=1", *stream(latents)]
            config = configure(tmp_path / "run", *shown)
            if error is None:
                Trainer(config, joined).run()
                continue
            with pytest.raises(ValueError, match=error):
                Trainer(config, joined)


def test_a_stream_without_a_share_is_not_opened_and_goes_on_where_it_stopped(tmp_path):
    """Its files need not be there; a run may give it a share, or take it away, and comes back to where it was."""
    with processes(device="cpu") as joined:
        absent = ("streams.image.share=0", "streams.image.source=images/*.tar")
        trainer = Trainer(configure(tmp_path / "absent", *absent), joined)
        assert set(trainer.sources) == {"video"}
        assert "image" in trainer.config.streams

        run = tmp_path / "run"
        positions = []
        for steps, share in ((4, 1e9), (6, 0), (7, 1e9)):  # of images almost all, then none
            trainer = Trainer(configure(run, f"steps={steps}", f"streams.image.share={share}"), joined)
            if share:
                positions.append(trainer.sources["image"].state_dict()["position"])
            trainer.run()
            if share:
                positions.append(trainer.sources["image"].state_dict()["position"])
        assert positions == [0, 16, 16, 20]
