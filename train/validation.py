"""Clips of fixed prompts and seeds from the averaged weights, as one grid of videos."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.config import Config, Validation, need
from train.log import writing
from train.parts import Parts
from train.sharding import Denoiser, local_shards
from univid.data.files import read_image, write_frames
from univid.model import UNetConfig

if TYPE_CHECKING:
    from train.fsdp import Trainer
    from univid.data.files import Frames
    from univid.pipeline import UniVidPipeline


def check_validation(config: Config, unet: UNetConfig, parts: Parts) -> None:
    """Raises ValueError, OSError: clips that :func:`validate` could not draw."""
    levels = parts.scheduler.get("num_train_timesteps", 1000)  # diffusers' default
    steps, frames = config.validation.steps, parts.settings.num_frames
    need("validation.steps", steps, steps <= levels, f"at most the scheduler's num_train_timesteps = {levels}")
    most = f"at most the U-Net's max_frames = {unet.max_frames}"
    need(f"{parts.choice}: num_frames of its generation.json", frames, frames <= unet.max_frames, most)
    for image in filter(None, config.validation.images):
        read_image(image)


def validate(trainer: Trainer) -> None:
    """Write ``validation/step-00001000.mp4`` on rank 0, while the others wait."""
    whole = averaged(trainer, trainer.dtype)
    if whole is not None:
        pipe = trainer.parts.pipeline(whole).to(trainer.processes.device)
        try:
            _write(trainer, sample(pipe, trainer.config.validation), pipe.settings.fps)
        except FloatingPointError as error:  # training goes on, and tells of steps that are not finite itself
            print(f"validation of step {trainer.step}: {error}", flush=True)
    trainer.processes.barrier()


def _write(trainer: Trainer, videos: Frames, fps: float) -> None:
    path = Path(trainer.config.run) / "validation" / f"step-{trainer.step:08}.mp4"
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
        write_frames(grid(videos), path, fps)


@torch.no_grad()
def averaged(trainer: Trainer, dtype: torch.dtype) -> Denoiser | None:
    """The model with the averaged weights, whole, on rank 0; None on the others."""
    average = {shard.name: local for shard, local in trainer.optimizer.tensors()["ema"]}
    values = {}
    for shard in local_shards(trainer.model):
        local = average.get(shard.name, shard.local)
        value = shard.whole(local, trainer.processes.mesh).full_tensor()  # a collective
        if trainer.processes.first:
            values[shard.name] = value.to(dtype)
    return assemble(trainer.model.unet.config, values) if trainer.processes.first else None


def assemble(config: UNetConfig, values: dict[str, torch.Tensor]) -> Denoiser:
    """A model that is not sharded, with these values."""
    with torch.device("meta"):
        model = Denoiser(config)
    model.load_state_dict(values, assign=True)
    return model.requires_grad_(False).eval()


def sample(pipe: UniVidPipeline, config: Validation) -> Frames:
    """``(V, T, H, W, 3)``, one by one: prompt i from seed i."""
    images = config.images or ("",) * len(config.prompts)
    videos = [
        pipe(prompt or None, image or None, steps=config.steps, seed=seed, progress=False).frames
        for seed, (prompt, image) in enumerate(zip(config.prompts, images, strict=True))
    ]
    return np.concatenate(videos)


def grid(videos: Frames) -> Frames:
    """``(V, T, H, W, 3)`` as one video, about as many columns as rows."""
    count, frames, height, width, _ = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((frames, rows * height, columns * width, 3), np.uint8)
    for index, video in enumerate(videos):
        row, column = divmod(index, columns)
        sheet[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = video
    return sheet
