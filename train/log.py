"""What a run tells: a line each interval, the same as JSON lines and for TensorBoard (or Weights & Biases)."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import Config
from train.flops import datasheet_rate, matrix_rate
from train.processes import Processes
from univid.data.files import beside

FILE = "log.jsonl"


@dataclass(frozen=True)
class Step:
    """What a step leaves behind: numbers that the host knows, and tensors that it has not looked at."""

    task: str
    keys: list[str]
    loss: Tensor
    norm: Tensor
    clips: int  # of this rank
    flops: int
    lr: float
    waited: float  # seconds for data


class Meter:
    """Collects steps, and looks at the device's numbers once an interval."""

    def __init__(self, config: Config, processes: Processes, dtype: torch.dtype):
        self.processes, self.max_skipped = processes, config.optimizer.max_skipped
        self.datasheet = datasheet_rate(processes.device)
        self.matrix = matrix_rate(processes.device, dtype)
        self.steps: list[Step] = []
        self.bad: list[tuple[Step, float]] = []  # the last ones in a row, with this rank's loss
        self.started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self.started += seconds

    def report(self, skipped: Tensor) -> dict[str, float]:
        """The interval's numbers, the same on all ranks but for the memory.

        Raises:
            RuntimeError: too many steps in a row had a gradient that is not finite.
        """
        steps, self.steps = self.steps, []
        here, norms_ = (torch.stack(x) for x in ([step.loss for step in steps], [step.norm for step in steps]))
        everywhere = self.processes.mean(here.clone())
        losses, local, norms = torch.stack([everywhere, here, norms_]).tolist()  # the one wait for the device
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        self._watch(steps, norms, local)
        by_task = defaultdict(list)
        for step, loss in zip(steps, losses, strict=True):
            by_task[step.task].append(loss)
        rate = sum(step.flops for step in steps) / seconds
        report = {
            "loss": _mean(losses),
            **{f"loss/{task}": _mean(by_task[task]) for task in sorted(by_task)},
            "lr": steps[-1].lr,
            "norm": _mean(norms),
            "clips/s": sum(step.clips for step in steps) * self.processes.world_size / seconds,
            "seconds/step": seconds / len(steps),
            "TFLOP/s": rate / 1e12,
            "of matrix rate": rate / self.matrix,
            "data wait": sum(step.waited for step in steps) / seconds,
            "skipped": skipped.item(),
        }
        if self.datasheet:
            report["MFU"] = rate / self.datasheet
        if self.processes.device.type == "cuda":
            report["memory GiB"] = torch.cuda.max_memory_reserved() / 2**30  # the graphs' too
        return report

    def _watch(self, steps: list[Step], norms: list[float], losses: list[float]) -> None:
        for step, norm, loss in zip(steps, norms, losses, strict=True):
            self.bad = [] if math.isfinite(norm) else [*self.bad, (step, loss)]
            if len(self.bad) == self.max_skipped:
                break
        else:
            return
        keys = [key for step, loss in self.bad if not math.isfinite(loss) for key in step.keys]
        everyone = [key for keys in self.processes.gather(keys) for key in keys]
        shown = ", ".join(dict.fromkeys(everyone)) or "none; the loss is finite, its gradient is not"
        raise RuntimeError(
            f"{len(self.bad)} steps in a row had a gradient that is not finite; samples with such a loss: {shown}"
        )


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def line(step: int, report: Mapping[str, float]) -> str:
    """For people."""
    tasks = ", ".join(f"{key[5:]} {value:.4f}" for key, value in report.items() if key.startswith("loss/"))
    speed = f"{report['TFLOP/s']:.3g} TFLOP/s a rank ({report['of matrix rate']:.0%} of its matrix rate"
    speed += f", MFU {report['MFU']:.1%})" if "MFU" in report else ")"
    memory = f"  {report['memory GiB']:.1f} GiB" if "memory GiB" in report else ""
    skipped = f"  skipped {report['skipped']:.0f}" if report["skipped"] else ""
    skipped += f"  broken clips {report['broken clips']:.0f}" if "broken clips" in report else ""
    return (
        f"step {step}  loss {report['loss']:.4f} ({tasks})  norm {report['norm']:.3f}  lr {report['lr']:.2e}  "
        f"{report['clips/s']:.1f} clips/s  {speed}{memory}  data {report['data wait']:.1%}{skipped}"
    )


class Logs:
    """Where rank 0 writes. A run that goes on from an earlier step forgets what it had written of later ones."""

    def __init__(self, config: Config, processes: Processes, step: int):
        self.writers: list[Any] = []
        self.file: Any = None
        self.folder = folder = Path(config.run)
        if not processes.first:
            return
        path = folder / FILE
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines() if path.is_file() else []
            earlier = "".join(f"{text}\n" for text in lines if _step(text) <= step)
            beside(path, lambda partial: partial.write_text(earlier))
            self.file = path.open("a", buffering=1)
        if config.log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                threading.excepthook = _without_os_errors
                with writing(folder):
                    self.writers.append(SummaryWriter(folder / "tensorboard", purge_step=step + 1).add_scalar)
            except ImportError:
                print(f"tensorboard is not installed: numbers go to {path} only", flush=True)
        if config.log.wandb:
            try:
                import wandb  # type: ignore[import-not-found,unused-ignore]
            except ModuleNotFoundError:
                raise ValueError(
                    f"log.wandb: got {config.log.wandb!r}, needs the package wandb, which is not installed"
                ) from None

            run = wandb.init(project=config.log.wandb, id=folder.name, resume="allow", dir=folder)
            self.writers.append(lambda name, value, step: run.log({name: value}, step=step))

    def write(self, step: int, report: Mapping[str, float]) -> None:
        if self.file is None:
            return
        print(line(step, report), flush=True)
        finite = {name: value if math.isfinite(value) else None for name, value in report.items()}  # JSON has no NaN
        with writing(self.folder):
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            for writer in self.writers:
                for name, value in report.items():
                    writer(name, value, step)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Of a disk that is full the system says no name."""
    try:
        yield
    except OSError as error:
        raise OSError(f"run: cannot write to {folder}: {error.strerror or error}") from None


def _without_os_errors(thread: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands them to the next call, and is not to print them as well."""
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def _step(text: str) -> int:
    try:
        return json.loads(text)["step"]
    except (ValueError, KeyError, TypeError):  # a line that was cut by a kill
        return 2**63
