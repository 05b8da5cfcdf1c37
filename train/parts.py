"""What a training starts from: the weights of U-Net and adapter, and the parts that stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.config import Model
from train.sharding import Denoiser
from univid.checkpoint import find
from univid.data.cache import fingerprint
from univid.data.tensors import clip_source, read_json
from univid.model import ImageAdapter, UNet, UNetConfig

if TYPE_CHECKING:  # diffusers and open_clip take seconds to import, and training from a cache needs neither
    from univid.data.autoencoder import Autoencoder
    from univid.data.clip import Clip
    from univid.pipeline import Settings, UniVidPipeline

# The shapes model's, and of whatever has random weights and no scheduler: zero-terminal SNR, predicting v.
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline, of which the frozen ones are read when they are asked for."""

    model: Model
    dtype: torch.dtype  # of the frozen parts
    device: torch.device

    def whole(self) -> Denoiser:
        """The trained part with its first weights, on the CPU; on the meta device where they are to be random.

        Raises:
            FileNotFoundError, ValueError: weights that are missing, or do not fit.
        """
        if self.model.sd21:
            from univid.pipeline import UniVidPipeline

            pipe = UniVidPipeline.from_sd21(self.model.sd21, self.model.clip)
            return _denoiser(pipe.unet, pipe.adapter)
        if self.model.start:
            folder = find(self.model.start, "model.start")
            unet = UNet.from_pretrained(folder / "unet")
            return _denoiser(unet, ImageAdapter.from_pretrained(folder / "image_adapter"))
        with torch.device("meta"):
            return Denoiser(UNetConfig.load(self.model.unet))

    @property
    def folder(self) -> Path | None:
        """Of the frozen parts; None: untrained ones."""
        if self.model.sd21:
            return Path(self.model.sd21)
        if self.model.start:
            return find(self.model.start, "model.start")
        return find(self.model.frozen, "model.frozen") if self.model.frozen else None

    @property
    def clip_source(self) -> str | Path:
        """What ``load_clip`` takes, where there is a folder."""
        assert self.folder is not None
        return self.model.clip if self.model.sd21 else self.folder / "clip"

    @property
    def choice(self) -> str:
        """The argument that names the folder, or would."""
        return "model.sd21" if self.model.sd21 else "model.start" if self.model.start else "model.frozen"

    def unet(self) -> UNetConfig:
        """The U-Net's sizes, before its weights are read."""
        if not self.model.sd21 and not self.model.start:
            return UNetConfig.load(self.model.unet)
        assert self.folder is not None
        path = self.folder / "unet" / "config.json"
        config = UNetConfig.from_diffusers(read_json(path), str(path))
        if not self.model.sd21:
            return config
        # Stable Diffusion's U-Net does not say what it predicts; its scheduler does.
        return replace(config, prediction_type=self.scheduler.get("prediction_type", "epsilon"))

    @cached_property
    def factor(self) -> int:
        """Pixels along the side of a latent."""
        if self.folder is None:
            return self._untrained.vae.factor
        return 2 ** (len(read_json(self.folder / "vae" / "config.json").get("block_out_channels", [0])) - 1)

    def check_fits(self, unet: UNetConfig) -> None:
        """Raises ValueError: the frozen parts are of another size than this U-Net was built for."""
        choice = "model.clip" if self.model.sd21 else self.choice
        if self.folder is None:
            shapes = UNetConfig.load("shapes")
            have = {name: getattr(shapes, name) for name in ("in_channels", "context_dim", "image_dim")}
            whose = "none, and untrained ones with"
        else:
            towers = _towers(self.clip_source)
            have = {
                "in_channels": read_json(self.folder / "vae" / "config.json").get("latent_channels", 4),
                "context_dim": towers.get("text_cfg", {}).get("width"),
                "image_dim": towers.get("vision_cfg", {}).get("width"),
                "prediction_type": self.scheduler.get("prediction_type", "epsilon"),  # diffusers' default
            }
            whose = f"{getattr(self.model, choice.removeprefix('model.'))!r} with"
        for name, got in have.items():
            if got != (needed := getattr(unet, name)):
                raise ValueError(f"{choice}: got {whose} {name} = {got}, needs {needed}, as the U-Net")

    @cached_property
    def fingerprint(self) -> dict[str, str] | None:
        """Of the frozen encoders, by which a cache knows them; None: untrained ones, which have no files."""
        if self.folder is None:
            return None
        return fingerprint(self.folder / "vae", self.clip_source)

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        if self.folder is None:
            return SCHEDULE | {"prediction_type": UNetConfig.load(self.model.unet).prediction_type}
        from univid.schedulers import read_schedule

        return read_schedule(self.folder / "scheduler")

    @cached_property
    def settings(self) -> Settings:
        from univid.pipeline import SETTINGS, Settings, read_settings

        if self.folder is None:
            return self._untrained.settings
        return Settings() if self.model.sd21 else read_settings(self.folder / SETTINGS)

    @cached_property
    def vae(self) -> Autoencoder:
        from univid.data.autoencoder import load_autoencoder

        vae = self._untrained.vae if self.folder is None else load_autoencoder(self.folder / "vae")
        return vae.to(self.device, self.dtype)

    @cached_property
    def clip(self) -> Clip:
        from univid.data.clip import load_clip

        if self.folder is None:
            return self._untrained.clip.to(self.device, self.dtype)
        return load_clip(self.clip_source).to(self.device, self.dtype)

    @cached_property
    def _untrained(self) -> UniVidPipeline:
        from train.untrained import untrained

        return untrained()

    def pipeline(self, denoiser: Denoiser) -> UniVidPipeline:
        """All parts together, to generate or to save."""
        from univid.pipeline import UniVidPipeline

        return UniVidPipeline(denoiser.unet, denoiser.adapter, self.vae, self.clip, self.scheduler, self.settings)


def _denoiser(unet: UNet, adapter: ImageAdapter) -> Denoiser:
    with torch.device("meta"):
        denoiser = Denoiser(unet.config)
    denoiser.unet, denoiser.adapter = unet, adapter
    return denoiser


def _towers(clip: str | Path) -> dict[str, Any]:
    """The configuration of a CLIP, as ``load_clip`` finds it."""
    name, folder = clip_source(clip)
    if name:
        import open_clip

        return open_clip.get_model_config(name) or {}
    return read_json(folder / "open_clip_config.json").get("model_cfg") or {}
