"""What test_train.py and test_train_gpu.py run on two ranks, under one torchrun: ``train_worker.py FOLDER``, on the GPUs if there are
two. Writes ``FOLDER/NAME.pt`` for each case."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from train.config import CONFIGS, Config, load
from train.fsdp import Trainer
from train.log import Step
from train.processes import Processes, mesh_of, processes

TINY = (
    "model.unet=tiny",
    "model.frozen=",
    "log.every=1",
    "validation.every=0",
    "log.tensorboard=false",
    "optimizer.warmup=2",
    "optimizer.lr=1e-3",
    "streams.video.source=random",
    "streams.video.num_frames=3",
    "streams.image.source=random",
    "streams.image.share=1",
    "streams.image.num_frames=1",
    *(f"streams.{name}.{side}=32" for name in ("video", "image") for side in ("height", "width")),
)


def configure(run: Path, *overrides: str, batch_size: int = 4) -> Config:
    sizes = (f"streams.{name}.batch_size={batch_size}" for name in ("video", "image"))
    return load(Config, CONFIGS / "shapes.toml", [*TINY, f"run={run}", *sizes, *overrides])


def train(config: Config, joined: Processes, signalled_at: int | None = None) -> dict[str, torch.Tensor]:
    """Everything a training leaves behind, whole. The last rank gets a SIGTERM in the step ``signalled_at``."""
    trainer = Trainer(config, joined)
    step = trainer.train_step

    def signalled() -> Step:
        if trainer.step == signalled_at and joined.rank == joined.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.train_step = signalled  # type: ignore[method-assign]
    trainer.run()
    return state_of(trainer)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    mesh = trainer.processes.mesh
    state = {
        f"{kind}.{shard.name}": shard.whole(local, mesh).full_tensor().clone()
        for kind, shards in trainer.checkpoints.shards.items()
        for shard, local in shards
    }
    skipped, *steps = trainer.optimizer.counts()
    state |= {f"steps.{shard.name}": count for shard, count in zip(trainer.optimizer.shards, steps, strict=True)}
    return state | {"skipped": skipped}


def main(folder: Path) -> None:
    cases: dict[str, Any] = json.loads((folder / "cases.json").read_text())
    with processes() as joined:
        for name, overrides in cases.items():
            config = configure(folder / name, *overrides, batch_size=2)
            replicas = max(1, config.compute.replicas)
            joined.mesh, joined.host_mesh = mesh_of(joined.device.type, 2, replicas), mesh_of("cpu", 2, replicas)
            state = train(config, joined, 1 if name == "stopped" else None)
            if joined.first:
                torch.save({name: x.cpu() for name, x in state.items()}, folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared
    main(Path(sys.argv[1]))
