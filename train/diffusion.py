"""Noise and the loss, by the schedule of the pipeline's scheduler config."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

DECISIVE = (  # of a scheduler's config; the rest is about sampling
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
)


class Diffusion:
    """``x_t = √ᾱ_t · x_0 + √(1 - ᾱ_t) · noise``, and what the model is to make of it.

    Args:
        scheduler: a diffusers scheduler's config: betas, zero-terminal SNR, prediction type.
        min_snr: gamma of the min-SNR weights (Hang et al.), min(SNR, gamma) on the error of x_0; 0: the error of the prediction.

    Raises:
        ValueError: a model of the noise with zero-terminal SNR, where there is nothing to see but noise.
    """

    def __init__(self, scheduler: dict[str, Any], device: torch.device, min_snr: float = 0.0):
        schedule = DDIMScheduler.from_config(scheduler)
        alphas = schedule.alphas_cumprod.double()
        self.prediction = schedule.config.prediction_type
        self.schedule = {name: np.asarray(schedule.config[name]).tolist() for name in DECISIVE}  # betas may be an array
        if self.prediction == "epsilon" and alphas[-1] < 1e-12:
            raise ValueError(
                "scheduler: rescale_betas_zero_snr with prediction_type epsilon; needs v_prediction or sample"
            )
        self.steps = len(alphas)
        self.signal = alphas.sqrt().float().to(device)
        self.noise = (1 - alphas).sqrt().float().to(device)
        snr = alphas / (1 - alphas)
        per_x0 = {"v_prediction": 1 / (snr + 1), "epsilon": 1 / snr.clamp(min=1e-12), "sample": torch.ones_like(snr)}
        weight = snr.clamp(max=min_snr) * per_x0[self.prediction] if min_snr else torch.ones_like(snr)
        self.weight = weight.float().to(device)

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``x_t`` and the target, for ``(B, T, C, h, w)`` and t ``(B,)``, in float32."""
        x, noise = x.float(), noise.float()
        signal, sigma = (table[t].view(-1, 1, 1, 1, 1) for table in (self.signal, self.noise))
        target = {"v_prediction": signal * noise - sigma * x, "epsilon": noise, "sample": x}[self.prediction]
        return signal * x + sigma * noise, target

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The mean squared error, in float32."""
        error = (prediction.float() - target).square().flatten(1).mean(1)
        return (self.weight[t] * error).mean()
