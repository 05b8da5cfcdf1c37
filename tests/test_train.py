"""The trainer, on the CPU: one process here, two under torchrun."""

import dataclasses
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.small_pipeline import make
from tests.train_worker import TINY, configure, state_of, train
from train import checkpoint, fsdp
from train.checkpoint import checkpoints, read_state
from train.export import main as export
from train.fsdp import Trainer
from train.log import FILE, Logs
from train.processes import processes

ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def alone():
    with processes(device="cpu") as joined:
        yield joined


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / FILE).read_text().splitlines()]


# --- going on -----------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed_equals_one_that_was_not(alone, tmp_path):
    whole = train(configure(tmp_path / "whole", "steps=6"), alone)
    train(configure(tmp_path / "parts", "steps=6", "checkpoints.every=3"), alone)
    (last,) = [path for path in checkpoints(tmp_path / "parts" / "checkpoints") if path.name.endswith("6")]
    shutil.rmtree(last)  # as if it had been killed after step 3
    resumed = train(configure(tmp_path / "parts", "steps=6"), alone)
    assert equal(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_after_a_kill_at_any_moment_the_loss_curve_continues(alone, tmp_path):
    overrides = ("steps=8", "checkpoints.every=2", "checkpoints.keep=2")
    killed, whole = configure(tmp_path / "killed", *overrides), configure(tmp_path / "whole", *overrides)
    arguments = [*TINY, f"run={killed.run}", *overrides]
    arguments += [f"streams.{name}.batch_size=4" for name in ("video", "image")]
    process = subprocess.Popen([sys.executable, "train/fsdp.py", *arguments], cwd=ROOT, env=ENVIRONMENT)
    wait_for(lambda: (tmp_path / "killed" / FILE).is_file() and losses(tmp_path / "killed"), process)
    time.sleep(random.Random(os.getpid()).uniform(0, 0.5))
    process.kill()
    process.wait()
    resumed = train(killed, alone)
    assert equal(resumed, train(whole, alone))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2


# --- two ranks ----------------------------------------------------------------------------------------------------------------

# Some gradients are nothing but rounding, of which Adam makes whole steps unless eps is larger.
CALM = ("optimizer.eps=1e-5",)
IMAGES_ONLY = ("streams.video.share=0",)
CASES = {
    "compiled": ["steps=2", "compute.compile=aot_eager", "stage=t2v", "streams.image.share=0", *CALM],
    "replicated": ["steps=3", "compute.replicas=2", "compute.activation_checkpointing=true", *CALM],
    "unclipped": [
        "steps=1",
        "optimizer.accumulate=2",
        "optimizer.clip_norm=1e9",
        "compute.activation_checkpointing=true",
    ],
    "bfloat16": ["steps=1", "compute.dtype=bfloat16", "optimizer.beta1=0", "optimizer.clip_norm=1e9"],
    "resumed": ["steps=4", *CALM],
    "stopped": ["steps=1000"],
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """A folder with the results of all cases, from one start of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with processes(device="cpu") as joined:
        train(configure(folder / "resumed", "steps=2", *IMAGES_ONLY, *CALM), joined)
        shutil.copytree(folder / "resumed", folder / "continued")
    (folder / "cases.json").write_text(json.dumps(CASES))
    command = [*TORCHRUN, "tests/train_worker.py", str(folder)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=120)
    return folder


@pytest.mark.parametrize("case", ["compiled", "replicated"])
def test_two_ranks_equal_one_process(two_ranks, alone, tmp_path, case):
    one = train(configure(tmp_path, *CASES[case], "compute.compile=none"), alone)
    close(torch.load(two_ranks / f"{case}.pt"), one)


def test_two_ranks_have_the_gradients_of_one_process(two_ranks, alone, tmp_path):
    """Their size too, which clipping and Adam would hide: after one step the first moments are a tenth of the gradients."""
    plain = configure(tmp_path, *CASES["unclipped"], "compute.activation_checkpointing=false")
    two, one = torch.load(two_ranks / "unclipped.pt"), train(plain, alone)
    for kind in ("exp_avg.", "exp_avg_sq."):
        names = [name for name in one if name.startswith(kind)]
        a, b = (torch.cat([x[name].flatten() for name in names]).double() for x in (two, one))
        assert b.norm() > 0 and (a - b).norm() < 1e-5 * b.norm()


def test_what_ranks_compute_in_bfloat16_is_added_up_and_kept_in_float32(two_ranks):
    """Without clipping and momentum the first moments of a first step are the gradients: of two ranks, and so between bfloat16's."""
    state = torch.load(two_ranks / "bfloat16.pt")
    for kind in ("model.", "ema.", "exp_avg.", "exp_avg_sq."):
        values = [x.flatten() for name, x in state.items() if name.startswith(kind) and x.ndim > 1]
        rounded = torch.cat(values).bfloat16().float()
        assert (rounded != torch.cat(values)).float().mean() > 0.1, kind


def test_a_run_goes_on_with_another_number_of_ranks_after_image_steps_only(two_ranks, alone):
    close(torch.load(two_ranks / "resumed.pt"), train(configure(two_ranks / "continued", "steps=4", *CALM), alone))


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(two_ranks):
    (last,) = checkpoints(two_ranks / "stopped" / "checkpoints")
    assert read_state(last)["step"] == 3  # signalled in its second step, agreed on in the next


def close(two: dict, one: dict) -> None:
    assert two.keys() == one.keys()
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# --- what moves, and what does not ---------------------------------------------------------------------------------------------


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, x in before.items() if not torch.equal(x, after[name])}


TEMPORAL = ("temporal_conv", "attn_temporal", "fps_embedding")


def test_steps_of_images_leave_what_is_temporal_alone(alone, tmp_path):
    train(configure(tmp_path, "steps=3", "streams.image.share=0"), alone)  # momentum is there
    trainer = Trainer(configure(tmp_path, "steps=5", *IMAGES_ONLY), alone)
    before = state_of(trainer)
    trainer.run()
    moved = changed(before, state_of(trainer))
    assert not [name for name in moved if any(part in name for part in TEMPORAL)]
    assert all(f"{kind}.unet.conv_in.weight" in moved for kind in ("model", "ema", "exp_avg", "exp_avg_sq", "steps"))


@pytest.mark.parametrize("stage", ["t2v", "adapters"])
def test_frozen_parameters_do_not_move_by_a_bit(alone, tmp_path, stage):
    trainer = Trainer(configure(tmp_path, "steps=4", f"stage={stage}", "streams.image.share=0"), alone)
    before = state_of(trainer)
    trainer.run()
    moved = {name.removeprefix("model.") for name in changed(before, state_of(trainer)) if name.startswith("model.")}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    image = {name for name in dict(trainer.model.named_parameters()) if "_image." in name or "adapter." in name}
    if stage == "t2v":
        assert not image & trained
    else:
        assert image <= trained
        assert all("adapter." in name or ".attn2." in name for name in trained)


def test_the_average_is_one(alone, tmp_path):
    trainer = Trainer(configure(tmp_path, "steps=5", "optimizer.ema=0.5", "streams.image.share=0"), alone)
    name = "unet.conv_in.weight"
    expected = state_of(trainer)[f"model.{name}"]
    for step in range(5):
        trainer.train_step()
        weights, decay = state_of(trainer)[f"model.{name}"], min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    assert trainer.step == 5
    torch.testing.assert_close(state_of(trainer)[f"ema.{name}"], expected)
    assert not torch.equal(expected, weights)


def test_checkpointed_gradients_equal_plain_ones(alone, tmp_path):
    plain, again = (
        gradients_of(Trainer(configure(tmp_path, f"compute.activation_checkpointing={on}"), alone))
        for on in ("false", "true")
    )
    assert equal(plain, again)


def gradients_of(trainer: Trainer) -> dict:
    """Of one step, which then does nothing else."""
    trainer.optimizer.step = lambda lr, step: torch.zeros(())
    trainer.train_step()
    return {n: p.grad.full_tensor() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_two_parts_of_a_step_are_one_of_twice_the_size(alone, tmp_path):
    parts = Trainer(configure(tmp_path, "optimizer.accumulate=2"), alone)
    whole = Trainer(configure(tmp_path, batch_size=8), alone)
    for name, source in parts.sources.items():
        for tensor in ("latents", "text", "image"):
            setattr(whole.sources[name], tensor, torch.cat([getattr(source, tensor)] * 2))
    a, b = gradients_of(parts), gradients_of(whole)
    assert a.keys() == b.keys()
    a, b = (torch.cat([x[name].flatten() for name in sorted(x)]).double() for x in (a, b))
    assert (a - b).norm() < 1e-5 * b.norm()


def test_weights_decay_and_vectors_do_not(alone, tmp_path):
    states = []
    for decay in (0.0, 0.5):
        trainer = Trainer(configure(tmp_path / str(decay), "steps=1", f"optimizer.weight_decay={decay}"), alone)
        first = state_of(trainer)
        trainer.train_step()
        states.append(state_of(trainer))
    rate = 1e-3 / 2  # the first step of a warm-up of two
    stepped = [name for name in first if name.startswith("model.") and states[0][f"steps.{name[6:]}"] == 1]
    assert {first[name].ndim > 1 for name in stepped} == {True, False}
    for name in stepped:
        lost = states[0][name] - states[1][name]
        expected = rate * 0.5 * first[name] if first[name].ndim > 1 else torch.zeros_like(lost)
        torch.testing.assert_close(lost, expected, rtol=1e-3, atol=1e-7)


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(alone, tmp_path, monkeypatch):
    """What is written is the state of its step."""
    go = threading.Event()
    write = checkpoint.dcp.save
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *given, **named: (go.wait(30), write(*given, **named)))
    trainer = Trainer(configure(tmp_path), alone)
    trainer.train_step()
    saved = state_of(trainer)
    trainer.save()
    for _ in range(2):
        trainer.train_step()
    assert not checkpoints(tmp_path / "checkpoints")
    go.set()
    trainer.checkpoints.wait()
    again = Trainer(configure(tmp_path), alone)
    assert again.step == 1
    assert equal(saved, state_of(again))
    assert not equal(saved, state_of(trainer))


def test_a_kill_before_the_rename_leaves_the_last_checkpoint(alone, tmp_path, monkeypatch):
    train(configure(tmp_path, "steps=2"), alone)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "rename", lambda *_: sys.exit("killed"))  # of the writing thread
        patched.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # what is killed tidies nothing up
        with pytest.raises(OSError, match="killed"):
            train(configure(tmp_path, "steps=4"), alone)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "step-00000004.partial"}
    trainer = Trainer(configure(tmp_path, "steps=4"), alone)
    assert trainer.step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("damage", ["no metadata", "no shard", "a cut shard", "a cut state", "an empty state"])
def test_a_damaged_checkpoint_is_named_and_left_as_it_is(alone, tmp_path, capsys, caplog, damage):
    config = configure(tmp_path, "steps=1")
    train(config, alone)
    (last,) = checkpoints(tmp_path / "checkpoints")
    (shard,) = last.glob("*.distcp")
    if damage.startswith("no"):
        ((last / ".metadata") if damage == "no metadata" else shard).unlink()
    elif damage == "an empty state":
        (last / "state.json").write_text("{}")
    else:
        path = shard if damage == "a cut shard" else last / "state.json"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    named = re.escape(str(last))
    capsys.readouterr()
    with pytest.raises(ValueError, match=rf"^(run: the checkpoint|path:) {named}[^\n]*$"):
        Trainer(config, alone)
    seen = [one for one in caplog.records if one.levelno >= logging.WARNING and "NullHandler" not in one.name]
    assert not seen and not capsys.readouterr().err  # PyTorch would log a traceback
    assert {path.name: path.read_bytes() for path in last.iterdir()} == files
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert export([str(tmp_path), str(tmp_path / "out")]) == 1
    assert str(last) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_the_one_before_it_to_export(alone, tmp_path, monkeypatch, capsys):
    """Of a run that started from a relative folder, from anywhere; what is no checkpoint does not count."""
    monkeypatch.chdir(tmp_path)
    make().save_pretrained(Path("start"))
    config = configure(Path("run"), "steps=2", "checkpoints.every=1", "model.start=start")
    train(config, alone)
    fsdp.write_config(config)
    assert json.loads(Path("run/config.json").read_text())["model"] == {
        "start": str(tmp_path / "start"), "sd21": "", "clip": "", "unet": "tiny", "frozen": "",
    }  # fmt: skip
    (tmp_path / "run/checkpoints/step-00000002/state.json").write_text("{")
    shutil.copytree("run/checkpoints/step-00000001", "run/checkpoints/step-old")
    monkeypatch.chdir("/")
    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "step=1"]) == 0
    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "step-00000002" in capsys.readouterr().err


# --- what goes wrong ----------------------------------------------------------------------------------------------------------


def poison(trainer: Trainer, steps: set[int]) -> None:
    for source in trainer.sources.values():

        def bad(plain=source.next):
            batch = plain()
            if trainer.step in steps:
                batch.latents = batch.latents * torch.nan
            return batch

        source.next = bad


def test_a_step_that_is_not_finite_does_nothing_but_count(alone, tmp_path):
    trainer = Trainer(configure(tmp_path), alone)
    poison(trainer, {1})
    trainer.train_step()
    before = state_of(trainer)
    trainer.train_step()
    assert changed(before, state_of(trainer)) == {"skipped"}
    assert trainer.optimizer.skipped == 1
    trainer.train_step()
    assert changed(before, state_of(trainer)) > {"skipped"}


def test_training_stops_after_some_steps_in_a_row_that_are_not_finite(alone, tmp_path):
    trainer = Trainer(configure(tmp_path, "optimizer.max_skipped=2", "steps=9", "streams.image.share=0"), alone)
    poison(trainer, {1, 3, 4, 5, 6})
    with pytest.raises(
        RuntimeError,
        match=r"2 steps in a row .*: random/12, random/13, .*, random/19$",
    ):
        trainer.run()
    assert trainer.step == 5


@contextmanager
def no_file_beyond(size: int):
    """As on a disk that is full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(alone, tmp_path):
    train(configure(tmp_path, "steps=2"), alone)
    message = r"^checkpoint: cannot write to .*File too large$"
    with no_file_beyond(100_000), pytest.raises(OSError, match=message):
        train(configure(tmp_path, "steps=4"), alone)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train(configure(tmp_path, "steps=4"), alone)


def test_a_disk_that_is_full_leaves_log_and_configuration(alone, tmp_path):
    """Without the latter no checkpoint can be exported."""
    config = configure(tmp_path, "steps=2")
    train(config, alone)
    fsdp.write_config(config)
    files = {name: (tmp_path / name).read_bytes() for name in (FILE, "config.json")}
    for write in (partial(Logs, config, alone, 2), partial(fsdp.write_config, config)):
        with no_file_beyond(100), pytest.raises(OSError, match=rf"^run: cannot write to {tmp_path}: File too large$"):
            write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files
    assert {path.name for path in tmp_path.iterdir()} == {*files, "checkpoints"}


def test_a_checkpoint_of_another_architecture_is_refused(alone, tmp_path):
    train(configure(tmp_path, "steps=1"), alone)
    with pytest.raises(
        ValueError, match=r"channels = .32, 64., this configuration .64, 96, 128.; another run's folder"
    ):
        Trainer(configure(tmp_path, "model.unet=shapes"), alone)
    with pytest.raises(ValueError, match="stage = 'joint', this configuration 't2v'"):
        Trainer(configure(tmp_path, "stage=t2v"), alone)
    config = configure(tmp_path)
    more = dataclasses.replace(config, streams=config.streams | {"more": config.streams["video"]})
    with pytest.raises(ValueError, match=r"streams\.more = None, this configuration 'RandomLatents'"):
        Trainer(more, alone)
    path = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    path.write_text(path.read_text().replace("RandomLatents", "Loader"))  # as if they had been of files
    with pytest.raises(ValueError, match=r"streams\.video = 'Loader', this configuration 'RandomLatents'"):
        Trainer(configure(tmp_path), alone)
    path.write_text(path.read_text().replace('"image"', '"picture"'))
    with pytest.raises(ValueError, match=r"has streams\.\w+ = .*; another run's folder needed$"):
        Trainer(configure(tmp_path), alone)


def test_what_does_not_fit_the_model_is_refused_before_the_first_step(alone, tmp_path):
    for override, message in (
        ("streams.video.num_frames=25", r"streams\.video\.num_frames: got 25, needs at most .* max_frames = "),
        ("streams.image.height=40", r"streams\.image: got 40x32, needs multiples of 16, of which 32x32 is the nearest"),
        (
            "streams.video.source=shapes",
            r"model\.frozen: got none, and untrained ones with context_dim = 128, needs 24",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            Trainer(configure(tmp_path, override), alone)
    shown = ("validation.every=1", "validation.prompts=['a']", "model.frozen=shapes")
    with pytest.raises(
        ValueError, match=r"^model\.frozen: got 'shapes' with context_dim = 128, needs 24, as the U-Net"
    ):
        Trainer(configure(tmp_path, *shown), alone)
    with pytest.raises(FileNotFoundError, match=r"^image: nope\.png does not exist$"):
        Trainer(configure(tmp_path, *shown, "validation.images=['nope.png']"), alone)


# --- signals ------------------------------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def ranks(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "fsdp.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_ctrl_c_ends_a_run_in_one_line(tmp_path):
    command = [sys.executable, "train/fsdp.py", *TINY, f"run={tmp_path}", "steps=1000000"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which what runs in a shell's background ignores
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        wait_for(lambda: (tmp_path / FILE).is_file() and losses(tmp_path), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "interrupted: the run goes on from its last checkpoint"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_sigterm_writes_a_checkpoint_and_a_lost_rank_ends_the_run(tmp_path):
    """Two starts of the same command: SIGTERM to torchrun, SIGKILL to one rank."""
    command = [*TORCHRUN, "train/fsdp.py", *TINY, f"run={tmp_path}", "steps=1000000"]

    def last() -> int:
        found = checkpoints(tmp_path / "checkpoints")
        return read_state(found[-1])["step"] if found else 0

    def start() -> subprocess.Popen:
        before = last()
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        log = tmp_path / FILE
        wait_for(lambda: log.is_file() and f'"step": {before + 2},' in log.read_text(), process)
        return process

    process = start()
    process.terminate()
    output = process.communicate(timeout=30)[0]
    stopped = last()
    assert stopped > 0
    assert f"stopped at step {stopped}" in output

    process = start()  # goes on
    os.kill(ranks(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=55)[0]
    assert process.returncode != 0
    assert "rank 0: another rank has ended" in output
    assert last() == stopped
