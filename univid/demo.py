"""``python -m univid.demo``: a small pipeline on this machine, from a text, from a picture, and from both, to video files.

Its weights are random: it shows that every part runs and fits the next one, and how long it takes; not what training gives.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from univid import doctor
from univid.data.autoencoder import Autoencoder
from univid.data.clip import build_clip
from univid.data.files import read_video
from univid.model import ImageAdapter, UNet, UNetConfig
from univid.pipeline import Settings, UniVidPipeline

PROMPT = "a red circle moves to the right"
FOLDER = Path("demo")


def main() -> int:
    started = time.perf_counter()
    wrong = doctor.main()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = untrained().to(device)
    FOLDER.mkdir(exist_ok=True)
    picture = _picture()
    picture.save(FOLDER / "picture.png")
    print(f"\nThe whole pipeline on {device}, a small U-Net with random weights (so what it shows is noise):")
    conditions: dict[str, dict[str, Any]] = {
        "text": {"prompt": PROMPT},
        "image": {"image": picture},
        "text-and-image": {"prompt": PROMPT, "image": picture},
    }
    for name, given in conditions.items():
        before = time.perf_counter()
        videos = pipe(**given, seed=0)
        (path,) = videos.save(FOLDER / f"{name}.mp4")
        frames, fps = read_video(path)
        size = "x".join(map(str, frames.shape[:3]))
        print(f"  {path}: {size} at {fps:g} fps, {time.perf_counter() - before:.1f} s")
        wrong |= frames.shape != videos.frames.shape[1:]
    print(f"Done in {time.perf_counter() - started:.0f} s.")
    return int(wrong)


def untrained(seed: int = 0) -> UniVidPipeline:
    """A pipeline of the size of the ``shapes`` configuration, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = UNetConfig.load("shapes")
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=config.in_channels,
            norm_num_groups=16,
            sample_size=64,
        )
        clip: dict[str, Any] = {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "layers": 4, "width": config.image_dim, "head_width": 32, "patch_size": 8},
            "text_cfg": {"vocab_size": 49408, "width": config.context_dim, "heads": 4, "layers": 4},
        }
        schedule = {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "prediction_type": config.prediction_type,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
        settings = Settings(num_frames=config.max_frames, height=64, width=64, fps=8, steps=10)
        adapter = ImageAdapter(config.image_dim, config.context_dim)
        return UniVidPipeline(UNet(config), adapter, Autoencoder(vae), build_clip(clip), schedule, settings)


def _picture() -> Image.Image:
    image = Image.fromarray(np.full((64, 64, 3), 235, np.uint8))
    ImageDraw.Draw(image).ellipse((8, 22, 28, 42), fill="red")
    return image


if __name__ == "__main__":
    sys.exit(main())
