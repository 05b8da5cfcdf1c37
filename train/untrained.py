"""A pipeline with random weights, of the size of the one that ships: what a trial run trains on and shows clips with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

from univid.data.autoencoder import Autoencoder
from univid.data.clip import build_clip
from univid.model import ImageAdapter, UNet, UNetConfig
from univid.pipeline import Settings, UniVidPipeline


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
