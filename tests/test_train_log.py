"""What a training tells: numbers and where they go, and the steps that it watches."""

import itertools
import json
import math
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from train.config import Config, load
from train.flops import datasheet_rate, matrix_rate
from train.log import FILE, Logs, Meter, Step
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


def test_rates_count_all_ranks_and_all_waiting(monkeypatch):
    """Of two steps in four seconds, on two ranks."""
    clock = iter((0.0, 4.0))
    monkeypatch.setattr("train.log.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("train.log.matrix_rate", lambda *_: 100e12)
    alone = SimpleNamespace(device=torch.device("cpu"), world_size=2, mean=lambda x: x, gather=lambda x: [x, x])
    meter = Meter(Config(), alone, torch.float32)
    loss = torch.tensor(1.0)
    meter.steps = [Step("t2v", ["a"], loss, loss, 3, 40e12, 1e-3, waited) for waited in (0.5, 1.5)]
    report = meter.report(torch.tensor(0))
    wanted = {"clips/s": 3.0, "seconds/step": 2.0, "TFLOP/s": 20.0, "of matrix rate": 0.2, "data wait": 0.5}
    assert {name: report[name] for name in wanted} == wanted


def test_the_matrix_rate_is_that_of_a_product(monkeypatch):
    clock = itertools.count()  # a second from one look to the next
    monkeypatch.setattr("train.flops.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    matrix_rate.cache_clear()
    assert matrix_rate(torch.device("cpu"), torch.float32) == 4 * 2 * 512**3
    matrix_rate.cache_clear()


def test_datasheets(monkeypatch):
    """Dense bfloat16, as NVIDIA's have it."""
    for name, rate in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("a toy", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert datasheet_rate(torch.device("cuda")) == rate
