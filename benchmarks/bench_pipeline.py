"""``python -m benchmarks.bench_pipeline``: from a prompt, an image, or both, to an mp4 of 24 frames of 320x576.

The pipeline is of full size (the U-Net, Stable Diffusion's autoencoder, both towers of OpenCLIP ViT-H-14) with random weights in
bfloat16: what it shows is noise, what it takes is not. A time is that of a second call, 50 steps, the file's writing included;
memory is the most that tensors held. Rows are written as they come: ``op`` "pipeline", ``level`` the task.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL

from benchmarks import record
from univid.data.autoencoder import Autoencoder
from univid.data.clip import build_clip
from univid.model import ImageAdapter, UNet, UNetConfig
from univid.pipeline import UniVidPipeline

TASKS = {"t2v": ("prompt",), "i2v": ("image",), "ti2v": ("prompt", "image")}
CONDITIONS = {
    "prompt": "a red balloon over a harbour at dawn",
    "image": np.random.default_rng(0).integers(0, 256, (320, 576, 3), np.uint8),
}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_pipeline", description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="other than 50: nothing is written")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed")
    record.environment()
    pipe = untrained().to("cuda")
    rows: list[dict] = []

    def run(name: str, tasks: Iterable[str]) -> None:
        for task in tasks:
            rows.append(measure(pipe, task, name, asked.steps))
            if asked.steps == 50:
                record.write("pipeline", rows)

    run("univid", TASKS)
    pipe.enable_low_memory()
    run("univid, low memory", ("t2v", "ti2v"))
    return 0


def untrained() -> UniVidPipeline:
    """A pipeline of the size of Stable Diffusion 2.1's."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            unet = UNet(UNetConfig.load("sd21"))
            adapter = ImageAdapter()
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=768,
            )
            clip = build_clip(open_clip.get_model_config("ViT-H-14"))
    finally:
        torch.set_default_dtype(default)
    parts = (part.to(torch.bfloat16) for part in (unet, adapter))
    clip.model.to(torch.bfloat16)
    return UniVidPipeline(*parts, Autoencoder(vae.to(torch.bfloat16)), clip, SCHEDULE)


def measure(pipe: UniVidPipeline, task: str, name: str, steps: int) -> dict:
    given = {condition: CONDITIONS[condition] for condition in TASKS[task]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        pipe(**given, steps=3, progress=False).save(path)  # compiles, and measures configurations
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = time.perf_counter()
        pipe(**given, steps=steps, progress=False).save(path)
        ms = (time.perf_counter() - before) * 1e3
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    row = {"op": "pipeline", "level": task, "direction": "fwd", "batch": 1, "implementation": name}
    row |= {"steps": steps, "ms": round(ms), "peak_mb": round(peak / 1e6), "reserved_mb": round(reserved / 1e6)}
    print(f"{name:<20} {task:<5} {ms / 1e3:6.2f} s {peak / 1e9:6.1f} GB", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
