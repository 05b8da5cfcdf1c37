"""A pipeline of small random parts, for the CPU."""

import dataclasses

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from univid import UniVidPipeline
from univid.data.autoencoder import Autoencoder
from univid.data.clip import build_clip
from univid.model import ImageAdapter, UNet, UNetConfig
from univid.pipeline import Settings

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
SETTINGS = Settings(num_frames=3, height=16, width=32, fps=4, steps=2, guidance_scale=3.0, image_guidance_scale=2.0)
RED = np.full((20, 30, 3), (255, 0, 0), np.uint8)


def make_unet(backend: str | None) -> UNet:
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(UNetConfig.load("tiny"), backend=backend))
    for parameter in unet.parameters():  # the temporal modules too: nothing stays the identity
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval()


def make() -> UniVidPipeline:
    unet = make_unet("torch")
    config = unet.config
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.18215,
    )
    schedule = dict(DDIMScheduler(**SCHEDULE).config)
    return UniVidPipeline(
        unet,
        ImageAdapter(40, config.context_dim),
        Autoencoder(vae),
        build_clip(CLIP),
        {key: value for key, value in schedule.items() if not key.startswith("_")},
        SETTINGS,
    )


def frames(pipe, *args, **kwargs):
    return pipe(*args, progress=False, **kwargs).frames


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
