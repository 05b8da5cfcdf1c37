"""``python -m univid.demo``: the small model that ships, on this machine: from a text, from a picture, and from both, to video files."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is there, as the command `univid` does

import torch
from PIL import Image

from univid import doctor
from univid.data.files import read_video
from univid.data.judge import judge
from univid.data.shapes import Shapes, held_out
from univid.pipeline import UniVidPipeline

FOLDER = Path("demo")
STEPS = 15  # of 25, the model's own choice: a minute on a small machine has to do


def main() -> int:
    started = time.perf_counter()
    wrong = doctor.main()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = UniVidPipeline.from_pretrained("shapes").to(device)
    FOLDER.mkdir(exist_ok=True)
    picture = _picture()
    picture.save(FOLDER / "picture.png")
    print(f"\nThe small model that ships on {device}, {STEPS} steps, and what is seen in its clips:")
    conditions: dict[str, dict[str, Any]] = {
        "text": {"prompt": "a red star moves left"},
        "image": {"image": picture},
        "text-and-image": {"prompt": "it moves up", "image": picture},
    }
    for name, given in conditions.items():
        before = time.perf_counter()
        videos = pipe(**given, seed=0, steps=STEPS)
        (path,) = videos.save(FOLDER / f"{name}.mp4")
        seconds = time.perf_counter() - before
        frames, fps = read_video(path)
        size = "x".join(map(str, frames.shape[:3]))
        seen = judge(torch.from_numpy(videos.frames)).names(0)
        words = ", ".join(seen[part] for part in ("colour", "shape", "motion"))
        print(f"  {path}: {size} at {fps:g} fps, {seconds:.1f} s: {words}", flush=True)
        wrong |= frames.shape != videos.frames.shape[1:]
    print(f"Done in {time.perf_counter() - started:.0f} s.")
    return int(wrong)


def _picture() -> Image.Image:
    """The first frame of a clip that no training draws, with room to move up."""
    world = Shapes()
    clip = world.sample(held_out(1), motion="up")
    return Image.fromarray(world.render(clip, frames=(0,))[0, 0].numpy())


if __name__ == "__main__":
    sys.exit(main())
