"""The schedulers of diffusers by name, and the noise schedule, which is kept as their config: what a checkpoint chose, no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from univid.data.tensors import read_json, reason

SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
CONFIG = "scheduler_config.json"


def sampler_of(name: str, config: dict[str, Any], steps: int) -> Any:
    """The scheduler with its time steps, on the CPU: it reads them, and a number on a GPU has to be waited for.

    Raises:
        ValueError: the schedule has no so many different steps, or is one that the scheduler cannot sample by.
    """
    try:
        sampler = SCHEDULERS[name].from_config(config)
        sampler.set_timesteps(steps)
    except Exception as error:  # diffusers checks some of the values late, and no others
        raise ValueError(f"scheduler: {name}: {reason(error)}") from None
    if name == "dpm++" and sampler.config.algorithm_type.startswith("sde"):  # its noise would be of no seed
        got = sampler.config.algorithm_type
        raise ValueError(f"scheduler: algorithm_type: got {got!r}; one that draws no noise needed, as dpmsolver++")
    times, most = sampler.timesteps, sampler.config.num_train_timesteps - 1
    levels = getattr(sampler, "sigmas", times)[:steps]
    # Rounded and shifted, they may be too many, beyond the ends, or twice the same.
    if len(times) != steps or times.min() < 0 or times.max() > most or len(levels.unique()) < steps:
        raise ValueError(
            f"steps: got {steps}; {name} finds no {steps} different time steps from 0 to {most} with the"
            f" checkpoint's {sampler.config.timestep_spacing} spacing; another number needed"
        )
    if name == "ddim" and sampler.config.prediction_type == "epsilon" and sampler.alphas_cumprod[times[0]] == 0:
        raise ValueError(
            "scheduler: got ddim, with prediction_type epsilon and rescale_betas_zero_snr; it starts from noise alone, of"
            " which the noise tells it nothing; dpm++, euler, or another schedule needed"
        )
    return sampler


def read_schedule(folder: Path) -> dict[str, Any]:
    """Of diffusers' folder.

    Raises:
        FileNotFoundError, ValueError: none there, or not of a scheduler.
    """
    path = folder / CONFIG
    config = chosen(read_json(path))
    try:
        schedule = DDIMScheduler.from_config(config)
    except Exception as error:  # diffusers checks few of the values
        raise ValueError(f"scheduler: {path} is not of a diffusers scheduler: {reason(error)}") from None
    betas, steps = schedule.betas, schedule.config.num_train_timesteps
    if len(betas) != steps or not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(
            f"scheduler: {path}: got {len(betas)} betas, {betas.min():g} to {betas.max():g}; needs {steps}, 0 to 1"
        )
    return config


def write_schedule(config: dict[str, Any], folder: Path) -> None:
    """As diffusers reads it, into a new folder."""
    folder.mkdir()
    whole = {"_class_name": "DDIMScheduler"} | config
    text = json.dumps(whole, indent=2, default=np.ndarray.tolist)  # betas may be an array
    (folder / CONFIG).write_text(f"{text}\n")


def chosen(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config without what diffusers notes in it and fills in: every scheduler has defaults of its own."""
    filled = config.get("_use_default_values", ())
    # DDIM clips by default what it takes for pixels; the configuration of another scheduler says nothing of it.
    return {"clip_sample": False} | {
        key: value for key, value in config.items() if not key.startswith("_") and key not in filled
    }
