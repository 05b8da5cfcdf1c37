"""Train the small model's CLIP on the shapes world: ``python train/shapes_clip.py [config.toml] [key=value ...]``.

An image tower that sees one frame cannot be asked about motion. So captions are contrasted with a linear map of four frames in their
order, and captions of looks with one frame. A third task, a linear map from each patch's token back to its pixels, keeps where
things are, which a clip that starts from the picture must know. Both maps are dropped at the end. What is written is read by
``univid.data.clip.load_clip``.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that holds univid/ and train/

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from train.config import command, device_of, need, until_stopped
from train.export import check_out
from univid.data.clip import VOCABULARY, Clip, build_clip
from univid.data.shapes import Shapes, held_out
from univid.data.shapes_captions import KINDS

FRAMES = (0, 3, 6, 9)  # near enough that no shape turns by half its symmetry from one to the next


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str = "runs/shapes_clip"
    steps: int = 2400
    batch_size: int = 512  # clips
    lr: float = 1e-3  # after a warm-up, then a cosine to zero
    weight_decay: float = 0.05
    pixels: float = 2.0  # weight of the pixels' squared error
    width: int = 128  # of both towers, and of the space in which they meet
    layers: tuple[int, ...] = (6, 4)  # of the image tower, and of the text tower
    workers: int = 8  # that write captions
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        need("steps", self.steps, self.steps >= 2, "a number >= 2")
        need("lr", self.lr, self.lr > 0, "a number > 0")
        need("batch_size", self.batch_size, self.batch_size >= 2, "a number >= 2")
        need("layers", self.layers, len(self.layers) == 2, "two numbers, of the image and of the text tower")


def merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., 2016): the ``count`` pairs that are merged, or as many as leave no pair."""
    words = {
        (*word[:-1], word[-1] + "</w>"): n for word, n in Counter(w for text in texts for w in text.split()).items()
    }
    result: list[tuple[str, str]] = []
    while len(result) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # no chance in ties
        result.append(best)
        words = {_merged(word, best): n for word, n in words.items()}
    return result


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for part in word:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return tuple(result)


def write_vocabulary(path: Path, world: Shapes, count: int = 486) -> int:
    """The merges of captions, in open_clip's format; the number of tokens (1,000 at most: 512 bytes, merges, start and end)."""
    attributes = world.sample(torch.arange(20_000))
    captions = [caption for kind in KINDS for caption in world.captions(attributes, kind)]
    words = (caption.replace("-", " - ").replace(",", " , ").replace(";", " ; ") for caption in captions)
    found = merges(words, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["#version: shapes", *(" ".join(pair) for pair in found)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return 512 + len(found) + 2


def build(config: Config, world: Shapes, vocabulary: Path) -> Clip:
    width, (image_layers, text_layers) = config.width, config.layers
    tower = {"width": width, "layers": image_layers, "head_width": 32, "patch_size": 8, "image_size": world.size}
    text = {"context_length": 77, "vocab_size": write_vocabulary(vocabulary, world), "width": width}
    text |= {"heads": width // 32, "layers": text_layers}
    return build_clip({"embed_dim": width, "vision_cfg": tower, "text_cfg": text}, vocabulary)


class Captions(Dataset):
    """Of each step: the tokens of full captions and of captions of looks, ``(B, 77)`` each."""

    def __init__(self, world: Shapes, tokenizer, config: Config):
        self.world, self.tokenizer, self.config = world, tokenizer, config

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        attributes = self.world.sample(batch(step, self.config.batch_size))
        full, looks = (self.tokenizer(self.world.captions(attributes, kind)) for kind in ("full", "appearance"))
        return full, looks


def batch(step: int, size: int) -> Tensor:
    return torch.arange(step * size, (step + 1) * size)


class Tasks(nn.Module):
    """The towers with the maps that only training needs."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Clip, config: Config):
        super().__init__()
        self.model = clip.model.requires_grad_(True)
        self.model.visual.output_tokens = True
        self.ordered = nn.Linear(len(FRAMES) * config.width, config.width)
        self.scale = nn.Parameter(torch.tensor(log(1 / 0.07)))  # of full captions; looks have the model's own
        patch = self.model.visual.patch_size[0]
        self.patch = patch
        self.pixels = nn.Linear(config.width, 3 * patch * patch)
        mean, std = (
            torch.tensor(x)[:, None, None] for x in (self.model.visual.image_mean, self.model.visual.image_std)
        )
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, frames: Tensor, full: Tensor, looks: Tensor) -> dict[str, Tensor]:
        """Losses of uint8 frames ``(B, 4, H, W, 3)`` and tokens ``(B, 77)``; and how often the nearest caption is the right one."""
        images = rearrange(frames, "b t h w c -> (b t) c h w") / 255
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            pooled, tokens = self.model.visual((images - self.mean) / self.std)
            texts = self.model.encode_text(torch.cat((full, looks)))
            pooled = pooled.unflatten(0, frames.shape[:2])
            clips = self.ordered(pooled.flatten(1))
            drawn = self.pixels(tokens)
        patches = rearrange(images, "m c (h p) (w q) -> m (h w) (p q c)", p=self.patch, q=self.patch)
        full_loss, right = contrast(clips, texts[: len(full)], full, self.scale)
        looks_loss, _ = contrast(pooled[:, 0], texts[len(full) :], looks, self.model.logit_scale)
        return {"full": full_loss, "looks": looks_loss, "pixels": F.mse_loss(drawn.float(), patches), "right": right}


def contrast(a: Tensor, b: Tensor, tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss (Radford et al., 2021) in which equal captions are all right, and the share of rows whose best is right."""
    logits = scale.exp().clamp(max=100) * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
    same = (tokens[:, None] == tokens[None]).all(-1)
    target = same / same.sum(1, keepdim=True)
    result = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return result, same.gather(1, logits.argmax(1, keepdim=True)).float().mean()


def train(config: Config) -> Clip:
    device = device_of(config.device)
    check_out(Path(config.out), "out")
    torch.manual_seed(config.seed)
    world, out = Shapes(), Path(config.out)
    clip = build(config, world, out / VOCABULARY)
    tasks = Tasks(clip, config).to(device)
    vectors = [p for p in tasks.parameters() if p.ndim < 2]
    matrices = [p for p in tasks.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, config.steps, pct_start=0.05, cycle_momentum=False
    )
    captions = DataLoader(Captions(world, clip.tokenizer, config), batch_size=None, num_workers=config.workers)
    start = time.perf_counter()
    for step, (full, looks) in zip(until_stopped(config.steps), captions, strict=False):
        frames = world.render(world.sample(batch(step, config.batch_size)), device, FRAMES)
        parts = tasks(frames, full.to(device), looks.to(device))
        optimizer.zero_grad()
        (parts["full"] + parts["looks"] + config.pixels * parts["pixels"]).backward()
        torch.nn.utils.clip_grad_norm_(tasks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == config.steps - 1:
            shown = "  ".join(f"{name} {part.item():.4f}" for name, part in parts.items())
            print(f"step {step:5}  {shown}  {time.perf_counter() - start:6.1f} s", flush=True)
    report = {
        **{
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("out", "device", "workers")
        },
        "steps": step + 1,
        "seconds": round(time.perf_counter() - start, 1),
        "on": torch.cuda.get_device_name() if device == "cuda" else device,
        "held_out": held_out_scores(tasks, clip, world, config.batch_size),
    }
    print(json.dumps(report), flush=True)
    clip.model.visual.output_tokens = False
    clip.half().save(out)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return clip


@torch.no_grad()
def held_out_scores(tasks: Tasks, clip: Clip, world: Shapes, size: int) -> dict[str, float]:
    """The tasks' losses and the share of right captions, on clips that were not trained on."""
    attributes = world.sample(held_out(size))
    device = tasks.mean.device
    full, looks = (clip.tokenizer(world.captions(attributes, kind)).to(device) for kind in ("full", "appearance"))
    parts = tasks.eval()(world.render(attributes, device, FRAMES), full, looks)
    return {name: round(part.item(), 4) for name, part in parts.items()}


def main(arguments: Sequence[str]) -> int:
    return command("shapes_clip", train, Config, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
