"""Train the small model's autoencoder on the shapes world: ``python train/shapes_vae.py [config.toml] [key=value ...]``.

diffusers' AutoencoderKL of factor 4, for frames of 64x64 pixels; some minutes on a GPU, from nothing. What it writes is read by
``univid.data.autoencoder.load_autoencoder``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that holds univid/ and train/

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from train.config import command, device_of, need, until_stopped
from train.export import check_out
from univid.data.autoencoder import Autoencoder
from univid.data.shapes import Shapes, held_out

FRAMES = (0, 5, 10, 15)  # of each clip


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str = "runs/shapes_vae"
    start: str = ""  # an autoencoder that this wrote before, to go on from; "": random weights
    steps: int = 6000
    batch_size: int = 32  # clips, four frames of each
    lr: float = 1e-3  # after a warm-up, then a cosine to zero
    squares: float = 2.0  # weight of the squared error, beside the absolute one: a small object is a large error
    kl: float = 3e-5  # weight of the latents' divergence from a unit normal, a mean over their numbers
    edges: float = 0.5  # weight of the L1 of differences between neighbouring pixels
    channels: tuple[int, ...] = (32, 64, 96)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        need("steps", self.steps, self.steps >= 2, "a number >= 2")
        need("lr", self.lr, self.lr > 0, "a number > 0")
        need("batch_size", self.batch_size, self.batch_size >= 1, "a number >= 1")
        need("channels", self.channels, bool(self.channels) and min(self.channels) > 0, "numbers > 0, one a level")
        is_one = not self.start or (Path(self.start) / "config.json").is_file()
        need("start", self.start, is_one, "a folder that holds an autoencoder's config.json")


def build(channels: Sequence[int]) -> Any:  # an AutoencoderKL: diffusers leaves its types open
    levels = len(channels)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )
    # Little noise in the first latents: in unit noise nothing is worth encoding, and training starts late.
    torch.nn.init.constant_(vae.quant_conv.bias.data[4:], -6.0)
    return vae


def loss(vae: Any, pixels: Tensor, config: Config) -> dict[str, Tensor]:
    """The parts of the loss, of pixels ``(M, 3, H, W)`` in [-1, 1]."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - pixels
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return {
        "l1": error.abs().mean(),
        "squares": config.squares * error.square().mean(),
        "edges": config.edges * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()),
        "kl": config.kl * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(),
    }


@torch.no_grad()
def standardise(vae: Any, pixels: Sequence[Tensor]) -> None:
    """Latents of mean zero, by the biases on both sides of them, and 1/std as the scaling factor."""
    latents = torch.cat([vae.encode(part).latent_dist.mode().float() for part in pixels])
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    # diffusers would keep the path of what it went on from.
    vae.register_to_config(scaling_factor=1 / (latents - mean[:, None, None]).std().item(), _name_or_path=None)


@torch.no_grad()
def psnr(vae: Autoencoder, frames: Tensor) -> float:
    """In dB, of reconstructed uint8 frames ``(B, T, H, W, 3)``."""
    again = vae.decode(vae.encode(to_pixels(frames).unflatten(0, frames.shape[:2])))
    return (10 * torch.log10(255**2 / (again.float() - frames.cpu().float()).square().mean((1, 2, 3, 4))).mean()).item()


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 ``(B, T, H, W, 3)`` to ``(B T, 3, H, W)`` in [-1, 1], channels last."""
    return (frames.flatten(0, 1).float() / 127.5 - 1).permute(0, 3, 1, 2)


def train(config: Config) -> Autoencoder:
    device = device_of(config.device)
    check_out(Path(config.out), "out")
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    world = Shapes()
    vae = AutoencoderKL.from_pretrained(config.start, local_files_only=True) if config.start else build(config.channels)
    vae = vae.to(device, torch.float32, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, config.steps, pct_start=0.05, cycle_momentum=False
    )

    def draw(step: int) -> Tensor:
        indices = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        return to_pixels(world.render(world.sample(indices), device, FRAMES))

    start = time.perf_counter()
    for step in until_stopped(config.steps):
        parts = loss(vae, draw(step), config)
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == config.steps - 1:
            shown = "  ".join(f"{name} {part.item():.4f}" for name, part in parts.items())
            print(f"step {step:5}  {shown}  {time.perf_counter() - start:6.1f} s", flush=True)
    vae.eval()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        standardise(vae, [draw(step + 1 + i).contiguous(memory_format=torch.channels_last) for i in range(4)])
    result = Autoencoder(vae.half().float(), chunk=128)  # judged as it is saved
    report = {
        **{name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "device")},
        "steps": step + 1,
        "seconds": round(time.perf_counter() - start, 1),
        "on": torch.cuda.get_device_name() if device == "cuda" else device,
        "psnr_held_out": round(psnr(result, world.render(world.sample(held_out(64)), device, FRAMES)), 2),
    }
    print(json.dumps(report), flush=True)
    result.half().save(Path(config.out))
    (Path(config.out) / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return result


def main(arguments: Sequence[str]) -> int:
    return command("shapes_vae", train, Config, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
