"""How fast training steps are: ``torchrun train/bench.py [key=value ...]``, by default of the full-size U-Net.

Random weights, and random latents in the place of clips: two of 24 frames at 320x576 pixels on each GPU. A step is the
trainer's own, with optimizer and average. ``processes=1,2`` measures on so many GPUs, one after the other, and says how it
scales; that is started with python, not torchrun.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that holds univid/ and train/

import torch

from train.config import Config, Model, asks_for_help, load
from train.fsdp import Trainer
from train.processes import processes
from train.stages import plan

FULL_SIZE = (
    "steps=1000000",
    "model.unet=sd21",
    "streams.video.source=random",
    "streams.video.batch_size=2",
    "streams.video.num_frames=24",
    "streams.video.height=320",
    "streams.video.width=576",
    "log.tensorboard=false",
)

WARM_UP = 3  # steps of each kind: compiled and tuned, captured, replayed


def measure(config: Config, seconds: float, out: Path | None) -> dict[str, float]:
    """Print the numbers of a rank, and write them for :func:`scaling`."""
    with processes(config.compute.replicas) as joined:
        started = time.perf_counter()
        on_gpu = joined.device.type == "cuda"
        trainer = Trainer(config, joined)
        trainer.encoder.trial |= config.model == Model(unet=config.model.unet)  # there is no CLIP to ask

        def say(text: str) -> None:
            if joined.first:
                print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)

        count = sum(p.numel() for p in trainer.model.parameters())
        say(f"{count / 1e6:.1f}M parameters on {joined.world_size} ranks")
        seen: Counter[tuple[str, str]] = Counter()
        kinds = sum(stream.share > 0 for stream in config.streams.values()) * len(trainer.stage.tasks)
        while len(seen) < kinds or min(seen.values()) < WARM_UP:
            choice = plan(trainer.stage, config.streams, config.seed, trainer.step)
            seen[choice.stream, choice.task] += 1
            step = trainer.train_step()
            say(f"warm-up step {trainer.step}: {choice.stream}, {step.task}, loss {step.loss.item():.4f}")
        own = {"warm-up": time.perf_counter() - started, "parameters": count}
        if on_gpu:
            own["synchronisations"] = synchronisations(trainer)
            say(f"{own['synchronisations']} synchronisations with the device in a step")
            torch.cuda.empty_cache()  # what the plain steps before the graphs have left
            torch.cuda.reset_peak_memory_stats()
        one = _timed(trainer, 2)
        count = max(3, int(seconds / one))
        trainer.meter.started = time.perf_counter()
        for _ in range(count):
            trainer.meter.steps.append(trainer.train_step())
            trainer.processes.stopping()
        report = trainer.meter.report(trainer.optimizer.skipped) | own
        say(f"{count} steps: " + "  ".join(f"{name} {value:.4g}" for name, value in report.items()))
        trainer.close()
        if out is not None and joined.first:
            out.write_text(json.dumps(report))
        return report


def _timed(trainer: Trainer, count: int) -> float:
    before = time.perf_counter()
    loss = [trainer.train_step().loss for _ in range(count)][-1]
    loss.item()
    return trainer.processes.share((time.perf_counter() - before) / count)


def synchronisations(trainer: Trainer) -> int:
    """How often a step makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    for warning in found[:5]:
        print(f"{warning.filename}:{warning.lineno}: {warning.message}", flush=True)
    return len(found)


def scaling(counts: Sequence[int], arguments: Sequence[str]) -> list[float]:
    """The same command on more and more GPUs, each with the same batch: the clips/s of a GPU."""
    if torch.cuda.is_available():
        subprocess.run(["nvidia-smi", "topo", "-m"], check=False)
    rates: list[float] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            subprocess.run([*command, __file__, *arguments, f"out={out}"], check=True)
            rates.append(json.loads(out.read_text())["clips/s"] / count)
        print(f"{count} GPUs: {rates[-1]:.3f} clips/s each, {rates[-1] / rates[0]:.1%} of {counts[0]}", flush=True)
    return rates


def main(arguments: Sequence[str]) -> int:
    if asks_for_help(arguments, __doc__, Config):
        return 0
    own = dict(a.split("=", 1) for a in arguments if a.startswith(("seconds=", "out=", "processes=")))
    rest = [a for a in arguments if a.split("=", 1)[0] not in own]
    try:
        seconds = _numbers("seconds", own.get("seconds", "20"))[0]
        counts = _numbers("processes", own.get("processes", "1"))
        if "processes" in own:
            scaling([int(n) for n in counts], [a for a in arguments if not a.startswith("processes=")])
            return 0
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as run:
        try:
            config = load(Config, None, [*FULL_SIZE, f"run={run}", *rest])
            measure(config, seconds, Path(own["out"]) if "out" in own else None)
        except (ValueError, OSError, RuntimeError) as error:  # the GPU's memory too
            print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


def _numbers(name: str, text: str) -> list[float]:
    """Of a list such as ``1,2``. Raises ValueError."""
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+)*", text) or not min(numbers := [float(n) for n in text.split(",")]):
        raise ValueError(f"{name}: got {text!r}, needs numbers > 0")
    return numbers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
