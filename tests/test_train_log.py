"""What a training tells: numbers and where they go, and the steps that it watches."""

import json
import math
import sys
import threading
from types import SimpleNamespace

import pytest

from train.config import Config, load
from train.log import FILE, Logs, Meter
from train.processes import processes


def test_steps_in_a_row_are_watched_one_by_one():
    """A good step at the end of an interval does not hide those before it."""
    meter = object.__new__(Meter)
    meter.bad, meter.max_skipped = [], 2
    meter.processes = SimpleNamespace(gather=lambda keys: [keys])
    steps = [SimpleNamespace(keys=[f"clip {i}"]) for i in range(4)]
    meter._watch(steps, [1.0, math.nan, 1.0, math.nan], [1.0] * 4)  # no two in a row
    with pytest.raises(RuntimeError, match=r"2 steps in a row .*: clip 0$"):
        meter._watch(steps[:2], [math.inf, 1.0], [math.nan, 1.0])


def test_tensorboard_and_wandb_get_the_log_s_numbers(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # is set, and put back here

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (tmp_path / "run" / "tensorboard", 3)

        def add_scalar(self, name, value, step):
            seen.append(("tensorboard", name, value, step))

    run = SimpleNamespace(log=lambda numbers, step: seen.extend(("wandb", *item, step) for item in numbers.items()))
    wandb = SimpleNamespace(init=lambda **options: run if options["project"] == "mine" else None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = load(Config, None, [f"run={tmp_path}/run", "log.wandb=mine"])
    with processes(device="cpu") as joined:
        logs = Logs(config, joined, 2)
        report = {"loss": 0.5, "norm": 2.0, "lr": 1e-3, "clips/s": 3.0, "TFLOP/s": 1.0, "of matrix rate": 0.1}
        report |= {"skipped": 1, "data wait": 0.0, "broken clips": 4, "loss/t2v": math.inf}
        logs.write(3, report)
    assert sorted(seen) == sorted((to, *item, 3) for to in ("tensorboard", "wandb") for item in report.items())
    (line,) = (tmp_path / "run" / FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 3, **report, "loss/t2v": None}
    for error in (OSError("a full disk"), ValueError("anything else")):  # of TensorBoard's thread
        thread = threading.Thread(target=_raise, args=(error,))
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "anything else" in said and "a full disk" not in said


def _raise(error: Exception) -> None:
    raise error


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load(Config, None, [f"run={tmp_path}/run", "log.tensorboard=false", "log.wandb=mine"])
    with pytest.raises(ValueError, match=r"^log\.wandb: got 'mine', needs the package wandb, which is not installed$"):
        Logs(config, SimpleNamespace(first=True), 0)
