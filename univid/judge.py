"""How well a checkpoint of the shapes world does what it is told: clips of held-out prompts and pictures, judged by their pixels."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from univid.data.files import beside, check_place
from univid.data.judge import Verdicts, judge
from univid.data.shapes import COLOURS, SHAPES, Attributes, Shapes, held_out
from univid.pipeline import UniVidPipeline

SETS = ("t2v", "i2v", "ti2v", "sweep", "true")
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a sweep: image weights, the text's being 1 - s, or 1
_SWEEP_START = 1 << 20  # pairs are drawn from held-out clips of their own


@dataclass
class Examination:
    """The sets of clips that a checkpoint generates, and what the judge finds in them.

    Args:
        count: clips of each set. pairs: of a text and a picture of something else, generated at every step of both sweeps.
        batch: clips that are generated together. steps, scheduler: of sampling.
    """

    pipe: UniVidPipeline
    count: int = 500
    pairs: int = 200
    batch: int = 50
    steps: int = 25
    scheduler: str = "dpm++"
    seed: int = 0
    world: Shapes = field(init=False)

    def __post_init__(self) -> None:
        for name in ("count", "pairs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, needs >= 1")
        s = self.pipe.settings
        if s.height != s.width:
            raise ValueError(f"checkpoint: it makes {s.height}x{s.width} clips; squares of the shapes world are needed")
        self.world = Shapes(s.num_frames, s.height)

    def t2v(self) -> dict[str, float]:
        """From full captions."""
        attributes = self.world.sample(held_out(self.count))
        prompts = self.world.captions(attributes, "full")
        right = self._judged("T2V", prompts, None).right(attributes)
        return _shares({name: right[name] for name in ("colour", "shape", "motion")})

    def i2v(self) -> dict[str, float]:
        """From first frames alone: what they show is kept; how it moves is free."""
        attributes = self.world.sample(held_out(self.count))
        right = self._judged("I2V", None, self._pictures(attributes)).right(attributes)
        return _shares({"colour": right["colour"], "shape": right["shape"], **_appearance(right)})

    def ti2v(self) -> dict[str, float]:
        """From first frames, and captions that tell the motion alone."""
        attributes = self.world.sample(held_out(self.count))
        prompts = self.world.captions(attributes, "motion")
        right = self._judged("(T+I)2V", prompts, self._pictures(attributes)).right(attributes)
        return _shares({**_appearance(right), "motion": right["motion"]})

    def true(self) -> dict[str, dict[str, float]]:
        """The judge itself: what it reads from the true clips, and from what the autoencoder makes of them."""
        attributes = self.world.sample(held_out(self.count))
        rows = torch.arange(self.count).split(self.batch)
        clips = torch.cat([self.world.render(attributes[part], "cpu") for part in rows])
        decoded = torch.cat([self._decoded(part) for part in tqdm(clips.split(self.batch), "Autoencoder")])
        seen = {"true clips": clips, "decoded from latents": decoded}
        return {name: _shares(judge(frames).right(attributes)) for name, frames in seen.items()}

    def sweep(self) -> dict[str, list[dict[str, float]]]:
        """Text of one object, picture of another: whose the clip is, as the weights go from the text to the picture."""
        drawn = held_out(self.pairs, _SWEEP_START)
        texts = self.world.sample(drawn)
        shift = torch.arange(self.pairs)
        pictured = self.world.sample(
            drawn + self.pairs,  # another shape and another colour, each as often as any
            shape=(texts.shape + 1 + shift % (len(SHAPES) - 1)) % len(SHAPES),
            colour=(texts.colour + 1 + shift % (len(COLOURS) - 1)) % len(COLOURS),
        )
        prompts, pictures = self.world.captions(texts, "full"), self._pictures(pictured)
        found: dict[str, list[dict[str, float]]] = {}
        for name, text_weight in (("1-s, s", None), ("1, s", 1.0)):
            found[name] = []
            for s in STEPS:
                weights = {"text_weight": 1 - s if text_weight is None else text_weight, "image_weight": s}
                verdicts = self._judged(f"Sweep ({name}), s = {s:g}", prompts, pictures, **weights)
                shares = {
                    "image's": _appearance(verdicts.right(pictured))["appearance"],
                    "text's": _appearance(verdicts.right(texts))["appearance"],
                }
                found[name].append({"s": s, **_shares(shares)})
        return found

    def _judged(self, title: str, prompts: list[str] | None, pictures: list[np.ndarray] | None, **weights) -> Verdicts:
        count = len(prompts if prompts is not None else pictures or [])
        frames = torch.cat(list(self._generated(title, count, prompts, pictures, weights)))
        return judge(frames)

    def _generated(
        self,
        title: str,
        count: int,
        prompts: list[str] | None,
        pictures: list[np.ndarray] | None,
        weights: dict[str, Any],
    ) -> Iterator[Tensor]:
        """Clip i is drawn from seed + i, in whatever batch it is."""
        for start in tqdm(range(0, count, self.batch), title):
            part = slice(start, start + self.batch)
            made = self.pipe(
                prompts and prompts[part],
                pictures and pictures[part],
                steps=self.steps,
                scheduler=self.scheduler,
                seed=self.seed + start,
                progress=False,
                **weights,
            )
            yield torch.from_numpy(made.frames)

    def _decoded(self, clips: Tensor) -> Tensor:
        return self.pipe.vae.decode(self.pipe.vae.encode(clips.movedim(-1, 2) / 127.5 - 1))

    def _pictures(self, attributes: Attributes) -> list[np.ndarray]:
        return list(self.world.render(attributes, "cpu", (0,))[:, 0].numpy())


def examine(examination: Examination, sets: Sequence[str], output: Path) -> str:
    """Generate and judge the sets, write what was found as JSON after each of them, and give all of it as a table."""
    if unknown := set(sets) - set(SETS):
        raise ValueError(f"--sets: got {min(unknown)!r}, needs some of {','.join(SETS)}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: the folder {output.parent} does not exist")
    if output.is_dir():
        raise FileExistsError(f"output: {output} is a folder; a file's name needed")
    check_place("output", output)
    start = time.perf_counter()
    found: dict[str, Any] = {
        name: getattr(examination, name) for name in ("count", "pairs", "steps", "scheduler", "seed")
    }
    for name in sets:
        found[name] = getattr(examination, name)()
        found["seconds"] = round(time.perf_counter() - start, 1)
        beside(output, partial(_write, found))
    return table(found)


def _write(found: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, Any]) -> str:
    """What :func:`examine` found, for a person, in percent."""
    lines = [f"{found['count']} held-out clips of each, {found['scheduler']} {found['steps']} steps, in percent", ""]
    for name, title in (("t2v", "T2V"), ("i2v", "I2V"), ("ti2v", "(T+I)2V, motion told")):
        if name in found:
            lines.append(_line(title, found[name]))
    for title, shares in found.get("true", {}).items():
        lines.append(_line(title, shares))
    for name, rows in found.get("sweep", {}).items():
        lines += [
            "",
            f"sweep ({name}), {found['pairs']} pairs" + "".join(f"{'s=' + format(row['s'], 'g'):>8}" for row in rows),
        ]
        for whose in ("image's", "text's"):
            lines.append(f"{whose:<{len(lines[-1]) - 8 * len(rows)}}" + "".join(f"{row[whose]:8.1f}" for row in rows))
    return "\n".join(line.rstrip() for line in lines)


def _line(title: str, shares: dict[str, float]) -> str:
    return f"{title:<24}" + "".join(f"{what} {share:6.1f}   " for what, share in shares.items())


def _appearance(right: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"appearance": right["colour"] & right["shape"]}


def _shares(right: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(100 * rows.float().mean().item(), 2) for name, rows in right.items()}
