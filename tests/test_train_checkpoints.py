"""Which checkpoints a run leaves behind, whatever ends it, which it goes on from, and that it has its folder to itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.small_pipeline import make
from tests.test_train import ENVIRONMENT, ROOT, TORCHRUN
from tests.train_worker import TINY, configure, train
from train import checkpoint, fsdp
from train.fsdp import Trainer, main
from train.processes import PATIENCE, processes

EACH = ("checkpoints.every=1",)


@pytest.fixture
def alone():
    with processes(device="cpu") as joined:
        yield joined


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08}" for number in numbers]


def slowly(monkeypatch, seconds: float = 1.0, seen=lambda: None) -> None:
    write = checkpoint.dcp.save
    monkeypatch.setattr(
        checkpoint.dcp, "save", lambda *given, **named: (seen(), time.sleep(seconds), write(*given, **named))
    )


# --- what a run leaves behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_checkpoint_that_was_being_written(alone, tmp_path, monkeypatch, error):
    slowly(monkeypatch)
    trainer = Trainer(configure(tmp_path, "steps=9", *EACH), alone)
    step = trainer.train_step

    def failing():
        if trainer.step == 1:
            raise error("a clip")
        return step()

    trainer.train_step = failing
    with pytest.raises(error, match="a clip"):
        trainer.run()
    assert names(tmp_path) == steps(1)


FAILING = """
import os, sys, time
from train import checkpoint, fsdp

rename, step = os.rename, fsdp.Trainer.train_step

def failing(trainer):
    if trainer.step == trainer.processes.rank == 1:
        raise ValueError("a clip")
    return step(trainer)

checkpoint.os.rename = lambda *paths: (time.sleep(1), rename(*paths))
fsdp.Trainer.train_step = failing
os._exit(fsdp.main(sys.argv[1:]))
"""


def test_a_rank_that_fails_leaves_the_checkpoint_that_all_were_writing(tmp_path):
    """Once it has ended the others end at once: until then the checkpoint has its name."""
    (tmp_path / "failing.py").write_text(FAILING)
    command = [*TORCHRUN, str(tmp_path / "failing.py"), *TINY, f"run={tmp_path}", "steps=9", *EACH]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert "rank 1: ValueError: a clip" in done.stderr
    assert names(tmp_path) == steps(1)


def test_a_lost_rank_is_not_waited_for(alone, tmp_path, monkeypatch):
    waited = []
    trainer = Trainer(configure(tmp_path, "steps=9"), alone)
    monkeypatch.setattr(trainer.checkpoints, "finish", waited.append)
    for error in (dist.DistBackendError("gone"), RuntimeError("Connection closed by peer"), RuntimeError("mine")):
        monkeypatch.setattr(trainer, "train_step", lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(RuntimeError, match=str(error)):
            trainer.run()
    assert len(waited) == 1


def test_a_validation_begins_with_its_steps_checkpoint_on_disk(alone, tmp_path, monkeypatch):
    slowly(monkeypatch)
    found = []
    monkeypatch.setattr(fsdp, "validate", lambda trainer: found.append(names(tmp_path)))
    monkeypatch.setattr(fsdp, "check_validation", lambda *_: None)
    shown = "validation.every=2", "validation.prompts=['a']"
    monkeypatch.setattr(fsdp.Parts, "check_fits", lambda *_: None)
    train(configure(tmp_path, "steps=2", *shown, *EACH), alone)
    assert found == [steps(1, 2)]


def test_fewer_to_keep_make_room_before_the_next_is_written(alone, tmp_path, monkeypatch):
    train(configure(tmp_path, "steps=3", *EACH), alone)
    assert names(tmp_path) == steps(1, 2, 3)
    there = []
    slowly(monkeypatch, 0, lambda: there.append(names(tmp_path)))
    train(configure(tmp_path, "steps=4", "checkpoints.keep=1", *EACH), alone)
    assert there == [[*steps(3), "step-00000004.partial"]]
    assert names(tmp_path) == steps(4)


def test_weights_that_are_not_finite_push_no_good_checkpoint_out(alone, tmp_path):
    train(configure(tmp_path, "steps=2", "checkpoints.keep=1", *EACH), alone)
    trainer = Trainer(configure(tmp_path, "steps=4", "checkpoints.keep=1", *EACH), alone)
    with torch.no_grad():
        trainer.optimizer.shards[0].local.fill_(torch.inf)
    trainer.run()
    assert names(tmp_path) == steps(2, 3, 4)


def test_the_state_is_written_last_and_all_is_on_disk_before_the_rename(alone, tmp_path, monkeypatch):
    partial, happened = tmp_path / "checkpoints" / "step-00000001.partial", []
    slowly(monkeypatch, 0, lambda: happened.append((partial / "state.json").exists()))
    sync, rename = os.fsync, os.rename

    def synced(file):
        happened.append(Path(os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")).name)
        sync(file)

    monkeypatch.setattr(checkpoint.os, "fsync", synced)
    monkeypatch.setattr(checkpoint.os, "rename", lambda *paths: (happened.append("renamed"), rename(*paths)))
    train(configure(tmp_path, "steps=1"), alone)
    assert happened[0] is False
    assert happened[-4:] == ["state.json", partial.name, "renamed", "checkpoints"]


# --- what a run goes on from ----------------------------------------------------------------------------------------------


def test_a_checkpoint_without_its_state_is_damaged(alone, tmp_path):
    train(configure(tmp_path, "steps=2", *EACH), alone)
    last = tmp_path / "checkpoints" / "step-00000002"
    (last / "state.json").unlink()
    message = (
        rf"^run: the checkpoint {last} is damaged \(path: .*state\.json does not exist\); without that folder the one"
    )
    with pytest.raises(ValueError, match=message):
        Trainer(configure(tmp_path, "steps=2", *EACH), alone)
    last.rename(tmp_path / "moved")
    train(configure(tmp_path, "steps=2", *EACH), alone)
    assert names(tmp_path) == steps(1, 2)


def test_other_encoders_and_another_noise_schedule_are_refused(alone, tmp_path):
    """Where the checkpoint says them."""
    make().save_pretrained(tmp_path / "start")
    shown = "streams.video.source=shapes", "streams.image.share=0", f"model.start={tmp_path / 'start'}"
    config = configure(tmp_path, "steps=1", *shown)
    train(config, alone)
    path = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    state = json.loads(path.read_text())
    for key, name, there in (("encoders", "clip", "0123"), ("schedule", "beta_end", 0.02)):
        here = state[key][name]
        path.write_text(json.dumps(state | {key: state[key] | {name: there}}))
        message = rf"has {key}\.{name} = {there!r}, this configuration {here!r}; another run's folder needed$"
        with pytest.raises(ValueError, match=message):
            Trainer(config, alone)
    path.write_text(json.dumps({key: x for key, x in state.items() if key not in ("encoders", "schedule")}))
    assert Trainer(config, alone).step == 1


# --- one run in a folder --------------------------------------------------------------------------------------------------

HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)


@pytest.fixture
def held(tmp_path):
    """Another process that trains in the folder, and is amid a checkpoint; killed at the end."""
    (tmp_path / "checkpoints" / "step-00000007.partial").mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        yield holder
        holder.kill()


def test_two_runs_do_not_share_a_folder(held, tmp_path, capsys):
    arguments = [*TINY, f"run={tmp_path}", "steps=1"]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"ValueError: run: another process writes to {tmp_path}; another folder needed\n"
    assert names(tmp_path) == ["step-00000007.partial"]
    held.kill()
    held.wait()
    assert main(arguments) == 0
    assert main([*arguments[:-1], "steps=2"]) == 0  # it was given back
    assert names(tmp_path) == steps(1, 2)


def test_a_run_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*TINY, f"run={tmp_path}/file/run", "steps=1"]) == 1
    assert capsys.readouterr().err == f"OSError: run: {tmp_path}/file/run cannot be written: Not a directory\n"


def test_all_ranks_say_that_the_folder_is_taken(held, tmp_path):
    command = [*TORCHRUN, "train/fsdp.py", *TINY, f"run={tmp_path}", "steps=1"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if f"run: another process writes to {tmp_path}; " in line]
    assert said and all(line.startswith("rank ") for line in said)
    assert "Connection closed" not in done.stderr


def test_hosts_wait_for_rank_0_for_longer_than_gloo_would(alone, tmp_path):
    trainer = Trainer(configure(tmp_path), alone)
    for group in (alone.host_group, trainer.checkpoints.group):
        assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
