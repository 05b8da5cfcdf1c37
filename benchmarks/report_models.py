"""What ``python -m benchmarks.report`` makes of ``bench_unet`` and ``bench_pipeline``: a page with a plot, and README's table of memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.record import ROOT

if TYPE_CHECKING:
    from benchmarks.report import Result

PAGE = ROOT / "docs" / "benchmarks-models.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- memory -->", "<!-- /memory -->"

DIRECTIONS = {"fwd": "forward", "fwd_bwd": "forward and backward"}
TASKS = {"t2v": "text to video", "i2v": "image to video", "ti2v": "text and image to video"}
# What one forward of two clips would take of kernels at the rates measured for each kind of layer alone (docs/kernel-notes.md).
BUDGET_MS = {
    "convolution": 21.0,
    "linear": 17.0,
    "attention": 20.0,
    "temporal convolution": 8.5,
    "norm, pointwise": 9.0,
}

INTRODUCTION = """\
# Whole models, measured

Written by `python -m benchmarks.report` from what `python -m benchmarks.bench_unet` and `python -m benchmarks.bench_pipeline`
measure, on one GPU, in bfloat16 with random weights. FLOPs are counted by PyTorch's counter, ours by the operators' formulas;
three forwards make a forward and backward. No activation checkpointing. Memory is the most that tensors took, weights included;
held is the most that PyTorch kept of the GPU for them, what a CUDA graph keeps for its replays included.
"""


def write(results: Sequence[Result]) -> list[Path]:
    """The page, its plots, and README's table; nothing without results."""
    if not results:
        return []
    plots, lines = [], [INTRODUCTION]
    for result in results:
        env = result.environment
        versions = (
            f"{env['date']}, torch {env['torch']}, Triton {env['triton']}, cuDNN {env['cudnn']}, driver {env['driver']}"
        )
        limits = f"an 8192³ bfloat16 product {env['gemm_tflops']:.0f} TFLOP/s, a copy {env['copy_gbs']} GB/s"
        title, table = _TITLES[result.operator], {"unet": _unet, "pipeline": _pipeline}[result.operator]
        lines += [f"## {title} on {env['gpu']}", "", f"{versions}. In the same run: {limits}.", ""]
        if result.stale:
            lines += ["**The model, or the way it is timed, has changed since: to be measured again.**", ""]
        lines += [*table(result), ""]
        if result.operator == "unet":
            plots.append(_draw(result))
            lines += [f"![{title}]({plots[-1].name})", ""]
    PAGE.write_text("\n".join(lines[:-1]) + "\n")
    pipeline = next((result for result in results if result.operator == "pipeline"), None)
    if pipeline is not None:
        before, _, rest = README.read_text().partition(BEGIN)
        text = before + "\n".join([BEGIN, "", *_memory(results, pipeline), "", END]) + rest.partition(END)[2]
        README.write_text(text)
    return [PAGE, *plots]


_TITLES = {
    "unet": "The U-Net: two clips of 24 frames, 40x72 latents",
    "pipeline": "From prompt to mp4: 24 frames of 320x576, 50 steps",
}


_FORWARD_ONLY = {
    "univid, backend reference": "for what its backward keeps, every probability, is reckoned at more than the GPU's memory",
    "Stable Video Diffusion, compiled": "which takes two minutes to compile",
}


def _unet(result: Result) -> list[str]:
    lines = [
        "| | TFLOP | forward, ms | TFLOP/s | forward and backward, ms | TFLOP/s | memory of each, GB | held of each, GB |"
    ]
    lines.append("|---" * 8 + "|")
    names = dict.fromkeys(row["implementation"] for row in result.rows)
    for name in names:
        by = {row["direction"]: row for row in result.rows if row["implementation"] == name and "ms" in row}
        fwd, both = by.get("fwd"), by.get("fwd_bwd")
        if not by:
            continue
        cells = [f"{fwd['tflop']:.1f}" if fwd else "–"]
        for row in (fwd, both):
            cells += [f"{row['ms']:.1f}", f"{row['tflops']}"] if row else ["–", "–"]
        for key in ("peak_mb", "reserved_mb"):
            shown = [_gigabytes(row, key) if row else "–" for row in (fwd, both)]
            cells.append("–" if key == "peak_mb" and "CUDA graph" in name else "; ".join(shown))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    forward_only = [name for name in _FORWARD_ONLY if name in names]
    lines += (
        ["", *(f"{name}: the forward alone, {_FORWARD_ONLY[name]}." for name in forward_only)] if forward_only else []
    )
    failures = [row for row in result.rows if "failure" in row]
    lines += ["", *(f"{row['implementation']}: {row['failure']}." for row in failures)] if failures else []
    for row in result.rows:
        if "breakdown_ms" in row:
            lines += ["", f"Where the time of the forward goes ({row['implementation']}, kernels alone):", ""]
            lines += ["| | " + " | ".join(row["breakdown_ms"]) + " |", "|---" * (len(row["breakdown_ms"]) + 1) + "|"]
            lines.append("| measured, ms | " + " | ".join(f"{ms:.1f}" for ms in row["breakdown_ms"].values()) + " |")
            lines.append("| budget, ms | " + " | ".join(f"{BUDGET_MS[kind]:g}" for kind in row["breakdown_ms"]) + " |")
    return lines


def _gigabytes(row: dict, key: str) -> str:
    return f"{row[key] / 1e3:.1f}" if key in row else "–"


def _pipeline(result: Result) -> list[str]:
    lines = ["| | " + " | ".join(TASKS.values()) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for name in dict.fromkeys(row["implementation"] for row in result.rows):
        rows = {row["level"]: row for row in result.rows if row["implementation"] == name}
        cells = (
            f"{rows[t]['ms'] / 1e3:.2f} s, {_gigabytes(rows[t], 'peak_mb')} GB, {_gigabytes(rows[t], 'reserved_mb')} held"
            if t in rows
            else "–"
            for t in TASKS
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _memory(results: Sequence[Result], pipeline: Result) -> list[str]:
    """README's table: what PyTorch holds of a GPU in a task."""
    lines = ["| task | GPU memory, GB | with `enable_low_memory()` |", "|---|---|---|"]
    held = {(row["implementation"], row["level"]): _gigabytes(row, "reserved_mb") for row in pipeline.rows}
    for task, words in TASKS.items():
        low = held.get(("univid, low memory", task), "–")
        lines.append(f"| {words}, 24 frames of 320x576 | {held['univid', task]} | {low} |")
    unet = next((result for result in results if result.operator == "unet"), None)
    for row in unet.rows if unet else ():
        if (row["implementation"], row["direction"]) == ("univid", "fwd_bwd") and "ms" in row:
            words = "forward and backward of the U-Net, two such clips, bfloat16 weights"
            lines.append(f"| {words} | {_gigabytes(row, 'reserved_mb')} | – |")
    env = pipeline.environment
    note = ["", "The pipeline has changed since: to be measured again."] if pipeline.stale else []
    return [
        f"Measured on {env['gpu']}, {env['date']}, bfloat16 ([more](docs/benchmarks-models.md)):",
        "",
        *lines,
        *note,
    ]


def _draw(result: Result) -> Path:
    """Bars: milliseconds of every implementation, forward and with its backward."""
    from matplotlib.figure import Figure

    # The reference is slower by so much that the others could not be told apart.
    rows = [row for row in result.rows if "ms" in row and "reference" not in row["implementation"]]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure = Figure(figsize=(11, 0.32 * len(names) + 1), layout="constrained")
    for axes, (direction, title) in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS.items(), strict=True):
        here = {row["implementation"]: row["ms"] for row in rows if row["direction"] == direction}
        colours = ["C0" if name.startswith("univid") else "0.6" for name in here]
        axes.barh([names.index(name) for name in here], list(here.values()), color=colours)
        for name, ms in here.items():
            axes.text(ms, names.index(name), f" {ms:.0f}", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 1.12 * max(here.values(), default=1))
        axes.set_title(f"{title}, ms")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    path = PAGE.with_name(f"benchmarks-{result.path.parent.name}-unet.svg")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path
