"""The speed and memory of training on this GPU: ``python train/record.py [CASE ...]`` measures, for docs/training.md.

Figures go to ``train/results/<gpu>.json``, the cases that are not named keep theirs; ``--page`` writes the page's table alone.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that holds univid/ and train/

from train.config import Config, asks_for_help, load

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
CACHED_CLIPS = 64
SCALING = "scaling"  # the case of two GPUs
SECONDS = 6.0  # of each case, after its warm-up


@dataclass(frozen=True)
class Case:
    title: str
    overrides: tuple[str, ...]
    full_size: bool = True  # two clips of 24 frames, 320x576 pixels; else the small model on shapes
    cached: bool = False  # latents and tokens from a cache on disk


def _shapes(*overrides: str) -> tuple[str, ...]:
    own = ("steps=1000000", "model.frozen=shapes", "log.tensorboard=false", "streams.video.batch_size=128")
    return (*own, *overrides)


POOL = "streams.video.pool=8192"
CASES = {
    "full": Case("full size", ("stage=t2v",)),
    "checkpointing": Case(
        "full size, activation checkpointing", ("stage=t2v", "compute.activation_checkpointing=true")
    ),
    "cache": Case("full size, from a cache on disk", ("stage=t2v",), cached=True),
    "joint": Case("full size, text and images (`joint`)", ("stage=joint",)),
    "compiled": Case("full size, compiled blocks", ("stage=t2v", "compute.compile=inductor")),
    "shapes": Case("shapes, a pool of clips", _shapes("stage=t2v", POOL), full_size=False),
    "shapes-joint": Case("shapes, a pool of clips, `joint`", _shapes("stage=joint", POOL), full_size=False),
    "shapes-live": Case("shapes, each clip rendered and encoded", _shapes("stage=t2v"), full_size=False),
}


def measure(case: Case) -> dict[str, Any]:
    import torch

    from train import bench

    with tempfile.TemporaryDirectory() as folder:
        overrides = [*(bench.FULL_SIZE if case.full_size else ()), *case.overrides, f"run={folder}/run"]
        if case.cached:
            write_cache(Path(folder), load(Config, None, overrides))
            overrides.append(f"streams.video.source={folder}/*.tar")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        config = load(Config, None, overrides)
        report = bench.measure(config, SECONDS, None)
    stream = config.streams["video"]
    return {
        "title": case.title,
        "batch": stream.batch_size,
        "clip": [stream.num_frames, stream.height, stream.width],
    } | {name: round(value, 6) for name, value in report.items() if not name.startswith(("loss", "lr", "norm"))}


def write_cache(folder: Path, config: Config) -> None:
    """Random latents and tokens, as ``univid encode`` writes those of clips."""
    import torch
    from safetensors.torch import save

    from univid.data.encode import _Writer
    from univid.model import UNetConfig

    stream, unet = config.streams["video"], UNetConfig.load(config.model.unet)
    header = {"vae": "random", "clip": "random", "num_frames": stream.num_frames}
    shapes = {
        "latents": (stream.num_frames, unet.in_channels, stream.height // 8, stream.width // 8),
        "text": (77, unet.context_dim),
        "image": (257, unet.image_dim),
    }
    with _Writer(folder / "000000.tar", header) as shard:
        for index in range(CACHED_CLIPS):
            tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
            about = {"key": str(index), "caption": "random", "fps": 8, "height": stream.height, "width": stream.width}
            shard.add(f"{index:09}.safetensors", save(tensors))
            shard.add(f"{index:09}.json", json.dumps(about).encode())


def scaling() -> dict[str, Any]:
    """Full size from cached latents, on one GPU and on two."""
    from train import bench

    topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True).stdout
    link = next(line.split()[2] for line in topology.splitlines() if line.startswith("GPU0"))
    one, two = bench.scaling((1, 2), ["stage=t2v", f"seconds={2 * SECONDS}"])
    return {"link": link, "clips/s of one": round(one, 4), "clips/s of two, each": round(two, 4)}


def record(names: Sequence[str]) -> Path:
    """Measure cases and put them into the file of this GPU."""
    from benchmarks.record import environment

    limits = environment()
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', limits['gpu'].lower()).strip('-')}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    for name in names:
        print(f"--- {name}", flush=True)
        rows[name] = (scaling() if name == SCALING else measure(CASES[name])) | {"date": limits["date"]}
        path.parent.mkdir(exist_ok=True)
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in (*CASES, SCALING) if name in rows
        )
        path.write_text(json.dumps({"environment": limits}, indent=1)[:-2] + f',\n "rows": {{\n{lines}\n}}}}\n')
    return path


def table(path: Path) -> list[str]:
    """What the page says of a GPU."""
    found = json.loads(path.read_text())
    env, rows = found["environment"], found["rows"]
    columns = (
        "steps of | ms | clips/s | TFLOP/s | of the matrix rate | memory, GiB | waiting for data | looks at the device"
    )
    rates = [row["TFLOP/s"] / row["of matrix rate"] for row in rows.values() if "of matrix rate" in row]
    lines = [
        f"{env['gpu']}, torch {env['torch']}, Triton {env['triton']}; a product of large matrices {env['gemm_tflops']:.0f} TFLOP/s, and"
        f" {min(rates):.0f} to {max(rates):.0f} at the start of each row's run, which is its matrix rate:",
        "",
        f"| | {columns} |",
        "|---" * 9 + "|",
    ]
    for name in CASES:
        if name not in rows:
            continue
        row = rows[name]
        frames, height, width = row["clip"]
        cells = [
            f"{row['batch']} clips, {frames}x{height}x{width}",
            f"{row['seconds/step'] * 1e3:.1f}",
            f"{row['clips/s']:,.{1 if row['clips/s'] < 100 else 0}f}",
            f"{row['TFLOP/s']:.0f}",
            f"{row['of matrix rate']:.0%}",
            f"{row['memory GiB']:.1f}",
            f"{row['data wait']:.1%}",
            f"{row['synchronisations']}",
        ]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    if row := rows.get(SCALING):
        one, two = row["clips/s of one"], row["clips/s of two, each"]
        lines += [
            "",
            f"Two GPUs (link {row['link']}), full size: {two:.2f} clips/s each, {two / one:.1%} of the {one:.2f} of one.",
        ]
    return lines


def write_page() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    tables = [line for path in sorted(RESULTS.glob("*.json")) for line in (*table(path), "")]
    PAGE.write_text("\n".join([before + BEGIN, "", *tables, END]) + rest.partition(END)[2])


def main(arguments: Sequence[str]) -> int:
    if asks_for_help(arguments, f"{__doc__}\nCases: {', '.join(CASES)}; {SCALING}, on two GPUs"):
        return 0
    names = [name for name in arguments if name != "--page"]
    known = (*CASES, SCALING)
    if unknown := [name for name in names if name not in known]:
        print(f"record: got case {unknown[0]!r}, needs one of {', '.join(known)}", file=sys.stderr)
        return 2
    if "--page" not in arguments:
        print(record(names or list(CASES)))
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
