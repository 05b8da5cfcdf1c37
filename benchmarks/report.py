"""``python -m benchmarks.report``: from the committed results, ``docs/benchmarks.md`` with its plots, README's summary, and
the table by which ``backend=None`` picks. ``--check``: whose results are stale."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import NamedTuple

from benchmarks import report_models
from benchmarks.levels import LEVELS, SMALL, UNET
from benchmarks.record import MODELS, MODULES, RESULTS, ROOT, sources_sha256
from univid.kernels import measured

PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

OURS = ("cuda", "triton", "torch", "reference")
LIMITS = ("cuBLAS product, im2col not counted",)  # no peer does without what it leaves out
ORDINARY = {"pyramid_st_attn": "per_frame", "temporal_conv": "none"}  # of several tables or epilogues
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
MARGIN = 0.03  # by which a backend must be faster to be picked before its turn

# What an operator's rows are shown in: matrix work in TFLOP/s, streams of bytes in GB/s, the rest in milliseconds.
UNITS = {
    "pyramid_st_attn": ("tflops", "TFLOP/s", "{:.0f}"),
    "dual_stream_attn": ("ms", "ms", "{:.3f}"),
    "temporal_attn": ("ms", "ms", "{:.3f}"),
    "temporal_conv": ("tflops", "TFLOP/s", "{:.0f}"),
    "group_norm_silu": ("gbs", "GB/s", "{:.0f}"),
    "add_bias": ("gbs", "GB/s", "{:.0f}"),
    "concat": ("gbs", "GB/s", "{:.0f}"),
    "geglu": ("gbs", "GB/s", "{:.0f}"),
    "linear_geglu": ("tflops", "TFLOP/s", "{:.0f}"),
    "add_layer_norm": ("gbs", "GB/s", "{:.0f}"),
}

# Operators whose torch forward keeps no logsumexp, which the other backends' backwards read.
NO_TORCH_FORWARD = ("pyramid", "dual_stream", "temporal")

INTRODUCTION = """\
# Measured

Written by `python -m benchmarks.report` from the files in `benchmarks/results/`, which `pytest benchmarks/` measures.

- A time is the median of runs with a cold L2 cache, ours and the peers' in the same process. Under 10 ms it is that of a
  CUDA graph over up to 12 sets of inputs in turn, free of launch gaps; the result files hold the eager time beside it. (The
  sets of the smallest calls, f8 at B = 1, fit the L2 cache in part.)
- Every output and gradient was first compared with float64, on one clip and head of attention, two frames of `geglu` and
  `linear_geglu`, and on all of the others.
- TFLOP/s and GB/s count useful work: K taps, keys that are read, each input and output once. The limit is the larger of the
  time of the arithmetic at the rate of an 8192³ bfloat16 product and that of the bytes at the rate of a copy, both of the
  same run.
- *Ours*, where one row stands for all, is the backend that runs where none is asked for.
- A dash: it cannot run this, or ran out of memory; the result file says why. In *times as fast*: a peer that runs at
  all levels of the U-Net, and is the fastest at one of them, was left out here (below), and none of the others is ahead of ours.
  **Bold**: the fastest. Shapes are in `benchmarks/levels.py`.

How the peers are treated: what their users would have at hand is not counted. That is, for frames as batch in
`dual_stream_attn`, prompts repeated for every frame; for block-sparse attention, frames padded to 128 tokens; for temporal
attention by clip, the stacking of its outputs; for cuDNN's convolution, any change of layout. A product of the size of
`temporal_conv`, whose operand is the input with its K shifts side by side, is a limit, not a peer.

What is left out, so that the full set takes minutes: `reference` beyond per-frame tables, whose arithmetic is the same;
flash and mem-efficient SDPA behind `index_select` beyond per-frame tables at B = 2, and as dense attention at B = 1, being
slower than cuDNN's; compiled peers and FlexAttention beyond the U-Net's levels (f1 to f8) at B = 2, and any `max-autotune`;
the convolution's bias and residual at B = 1 and in `reference`. Paged attention has no backward.
"""


class Result(NamedTuple):
    """A result file."""

    path: Path
    environment: dict
    rows: list[dict]
    sources_sha256: str

    @property
    def operator(self) -> str:
        return self.rows[0]["op"]

    @property
    def stale(self) -> bool:
        """Whether the operator, or how it is timed, has changed since."""
        return self.sources_sha256 != sources_sha256(self.operator)


class Pair(NamedTuple):
    """What is compared in a cell."""

    mine: dict | None  # the row of ours that runs where no backend is asked for
    peer: dict | None  # of the fastest peer
    is_whole: bool  # whether no peer is left out that runs at all levels of the U-Net and is the fastest at one

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is. None where a peer that may be the best was not measured, but for a loss."""
        if self.mine is None or self.peer is None:
            return None
        ratio = self.peer["ms"] / self.mine["ms"]
        return ratio if self.is_whole or ratio < 1 else None


class Cell(NamedTuple):
    """What one cell of a table or plot is about."""

    level: str
    direction: str
    batch: int
    variant: str  # a table or an epilogue; "" where the operator has none


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="say whose sources have changed since its results, write nothing"
    )
    options = parser.parse_args(arguments)
    everything = read()
    results, models = ([r for r in everything if (r.operator in MODELS) == whole] for whole in (False, True))
    if options.check:
        stale = [result for result in everything if result.stale]
        for result in stale:
            name = result.path.stem
            how = f"python -m benchmarks.bench_{name}" if name in MODELS else f"pytest benchmarks/ --op {name}"
            print(f"{_relative(result.path)}: sources changed since; run: {how}")
        return len(stale) > 0
    measured.PATH.write_text(json.dumps(choices(results), indent=1) + "\n")
    plots = draw(results, PAGE.parent)
    PAGE.write_text("\n".join(_page(results, plots)) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + "\n".join([BEGIN, "", *_summary(results), "", END]) + rest.partition(END)[2])
    print(*map(_relative, (measured.PATH, *plots.values(), PAGE, README, *report_models.write(models))))
    return 0


def read() -> list[Result]:
    files = ((path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/*.json")))
    return [Result(path, x["environment"], x["rows"], x["sources_sha256"]) for path, x in files]


def timed(result: Result) -> dict[Cell, dict[str, dict]]:
    """The rows that have a time, by cell and name. Where an implementation has a deterministic path beside another one,
    that is its own name."""
    fast_paths = {row["implementation"] for row in result.rows if row.get("deterministic") is False}
    cells: dict[Cell, dict[str, dict]] = defaultdict(dict)
    for row in result.rows:
        name = row["implementation"]
        name += ", deterministic" if row.get("deterministic") and name in fast_paths else ""
        if "ms" in row:
            cells[_cell(row)][name] = row
    return cells


def _cell(row: dict) -> Cell:
    return Cell(row["level"], row["direction"], row["batch"], row.get("table") or row.get("epilogue", ""))


def compared(result: Result) -> dict[Cell, Pair]:
    module = MODULES[result.operator]
    chosen = choices([result]).get(result.environment.get("architecture"), {}).get(module, {})
    tried: dict[Cell, set[str]] = defaultdict(set)  # what was run, or could not run
    for row in result.rows:
        tried[_cell(row)].add(row["implementation"])
    cells = timed(result)
    best = {cell: _fastest_peer(rows) for cell, rows in cells.items()}
    rivals: dict[tuple[str, str], set[str]] = defaultdict(set)  # by direction and variant
    for cell, peer in best.items():
        everywhere = (tried[cell._replace(level=level, batch=2)] for level in UNET)  # not only where it applies
        if (
            peer
            and cell.level in UNET
            and cell.batch == 2
            and all(peer["implementation"] in names for names in everywhere)
        ):
            rivals[cell.direction, cell.variant].add(peer["implementation"])
    pairs = {}
    for cell, rows in cells.items():
        winner = chosen.get(DIRECTIONS[cell.direction], {}).get(_shape_class(module, cell))
        mine = next((rows[name] for name in (winner, *OURS) if name in rows), None)
        pairs[cell] = Pair(mine, best[cell], rivals[cell.direction, cell.variant] <= tried[cell])
    return pairs


def _ordinary(result: Result, levels: Sequence[str]) -> dict[str, list[Pair]]:
    """By title of a direction that was measured, B = 2, per-frame tables: a pair for each level."""
    cells, variant = compared(result), ORDINARY.get(result.operator, "")
    pairs = {
        title: [cells.get(Cell(level, direction, 2, variant), Pair(None, None, False)) for level in levels]
        for direction, title in DIRECTIONS.items()
    }
    return {title: of for title, of in pairs.items() if any(pair.mine for pair in of)}


def _fastest_peer(rows: dict[str, dict]) -> dict | None:
    peers = (row for name, row in rows.items() if row["implementation"] not in OURS and name not in LIMITS)
    return min(peers, key=lambda row: row["ms"], default=None)


def _shape_class(module: str, cell: Cell) -> str | None:
    """What a cell's choice of a backend is filed by; None of the sizes that only show how time grows."""
    levels = LEVELS | SMALL
    if cell.level not in levels:
        return None
    sizes = levels[cell.level]._asdict() | {"epilogue": cell.variant != "none"}
    return measured.shape_class(module, **{name: sizes[name] for name in measured.SIZES[module]})


def share(row: dict, environment: dict) -> float:
    """Of the limit: the larger of the shares of the product's rate and of the copy's."""
    return max(row["tflops"] / environment["gemm_tflops"], row["gbs"] / environment["copy_gbs"])


# --- the choice of a backend ------------------------------------------------------------------------------------------


def choices(results: list[Result]) -> dict:
    """The content of ``univid/kernels/measured.json``."""
    table: dict = {}
    for result in results:
        if result.operator in MODELS:
            continue
        architecture = result.environment.get("architecture")
        module = MODULES[result.operator]
        groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
        for cell, rows in timed(result).items():
            if architecture and (kind := _shape_class(module, cell)):
                groups[DIRECTIONS[cell.direction], kind].append(rows)
        for (direction, kind), group in groups.items():
            if winner := _winner(module, direction, group):
                about = table.setdefault(architecture, {"gpu": result.environment["gpu"]})
                about.setdefault(module, {}).setdefault(direction, {})[kind] = winner
    return table


def _winner(module: str, direction: str, group: list[dict[str, dict]]) -> str | None:
    """The backend that is faster than the first, all rows of a class taken together. One that runs some of them only is
    no candidate, and keeps its turn."""
    # The reference runs where nothing else does.
    names = [name for name in OURS if name != "reference" and any(name in rows for rows in group)]
    names = [name for name in names if name != "torch" or direction == "backward" or module not in NO_TORCH_FORWARD]
    complete = [name for name in names if all(name in rows for rows in group)]
    if not complete or complete[0] != names[0]:
        return None
    means = {name: sum(log(rows[name]["ms"]) for rows in group) / len(group) for name in complete}
    winner = min(complete, key=means.__getitem__)
    return winner if means[winner] < means[names[0]] - MARGIN else None


# --- plots ------------------------------------------------------------------------------------------------------------


def draw(results: list[Result], folder: Path) -> dict[str, Path]:
    """The plots of every GPU: {its name and the plot's: file}."""
    import matplotlib

    matplotlib.use("svg")
    # The same results give the same bytes; text stays text.
    matplotlib.rcParams |= {"svg.hashsalt": "univid", "svg.fonttype": "none", "font.size": 9}
    paths = {}
    for gpu in dict.fromkeys(result.path.parent.name for result in results):
        mine = [result for result in results if result.path.parent.name == gpu]
        figures = {"ratios": _draw_ratios([r for r in mine if r.path.stem in UNITS])}
        if growth := next((r for r in mine if r.path.stem == "scaling"), None):
            figures["growth"] = _draw_growth(growth)
        for name, figure in figures.items():
            paths[f"{gpu} {name}"] = path = folder / f"benchmarks-{gpu}-{name}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            # Matplotlib ends lines with blanks.
            path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return paths


def _draw_ratios(results: list[Result]):
    """Two maps, an operator and direction a row, a shape a column: how much faster than the best peer, and the share of
    the limit. B = 2, per-frame tables."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names, ratios, shares = [], [], []
    for result in results:
        for title, pairs in _ordinary(result, LEVELS).items():
            names.append(f"{result.operator} {title}")
            ratios.append([pair.ratio or float("nan") for pair in pairs])
            shares.append([share(pair.mine, result.environment) if pair.mine else float("nan") for pair in pairs])
    figure = Figure(figsize=(11, 0.34 * len(names) + 0.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, title, style in (
        (left, ratios, "times as fast as the best peer", {"cmap": "RdYlGn", "norm": LogNorm(1 / 3, 3)}),
        (right, shares, "share of the limit", {"cmap": "Blues", "vmin": 0, "vmax": 1.2}),
    ):
        axes.imshow(values, aspect="auto", **style)
        axes.set_title(title)
        axes.set_xticks(range(len(LEVELS)), LEVELS, rotation=20)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                # White where the colour under it is dark.
                dark = value > 0.75 if axes is right else not 0.4 < value < 2.5
                text = "–" if value != value else f"{value:.2f}"
                axes.text(x, y, text, ha="center", va="center", color="white" if dark and value == value else "black")
    return figure


def _draw_growth(result: Result):
    """Time forward and backward, and memory of both together, over frames, tokens and references."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from benchmarks.levels import GROWTH, SCALING

    cells = timed(result)
    names = list(dict.fromkeys(row["implementation"] for row in result.rows if "ms" in row))
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots(3, 3, sharex="col", sharey="row")
    quantities = (("fwd", "ms", "forward, ms"), ("bwd", "ms", "backward, ms"), ("bwd", "peak_mb", "both, MB"))
    for (direction, key, label), line in zip(quantities, axes, strict=True):
        line[0].set_ylabel(label)
        for (axis, sizes), plot in zip(GROWTH.items(), line, strict=True):
            base = LEVELS["n1024_t16"]
            levels = [next(n for n, x in SCALING.items() if x == base._replace(**{axis: size})) for size in sizes]
            for number, name in enumerate(names):
                rows = [cells.get(Cell(level, direction, 1, "per_frame"), {}).get(name) for level in levels]
                points = [(size, row[key]) for size, row in zip(sizes, rows, strict=True) if row]
                plot.plot(*zip(*points, strict=True), "o-", ms=3, color=f"C{number}", label=name) if points else None
            plot.set(xscale="log", yscale="log")
            plot.set_xticks(sizes, map(str, sizes))
            plot.minorticks_off()
            plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            plot.grid(alpha=0.3)
    for plot, title in zip(axes[-1], ("frames T", "tokens N", "references R"), strict=True):
        plot.set_xlabel(title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


# --- pages ------------------------------------------------------------------------------------------------------------


def _page(results: list[Result], plots: dict[str, Path]) -> list[str]:
    lines = [INTRODUCTION]
    for name, path in plots.items():
        gpu, kind = name.split()
        about = {
            "ratios": "What runs by default at B = 2, with per-frame tables, over the best peer (green: ours is faster) and "
            "over the limit:",
            "growth": "How `pyramid_st_attn` grows from T = 16, N = 1024, R = 4 (B = 1, H = 8; memory beside "
            "the inputs):",
        }[kind]
        lines += [about, "", f"![{kind} on {gpu}]({path.name})", ""]
    lines += _losses(results)
    for result in results:
        if result.path.stem not in UNITS:
            continue
        env = result.environment
        _, unit, _ = UNITS[result.operator]
        versions = f"torch {env['torch']}, Triton {env['triton']}, cuDNN {env['cudnn']}"
        versions += f", flash-attn-4 {env['flash_attn_4']}" if env.get("flash_attn_4") else ""
        versions += f", driver {env['driver']}"
        limits = f"an 8192³ bfloat16 product {env['gemm_tflops']:.0f} TFLOP/s, a copy {env['copy_gbs']} GB/s"
        lines += [f"## `{result.operator}` on {env['gpu']} ({unit})", ""]
        lines += [f"{env['date']}, {versions}. In the same run: {limits}.", ""]
        if result.stale:
            lines += [
                "**The operator, or the way it or its peers are timed, has changed since: to be measured again.**",
                "",
            ]
        cells, pairs = timed(result), compared(result)
        groups = dict.fromkeys((cell.batch, cell.variant, cell.direction) for cell in cells)
        for batch, variant, direction in sorted(groups, key=lambda g: (-g[0], g[1], g[2] != "fwd")):
            title = f"B = {batch}, {variant + ', ' if variant else ''}{DIRECTIONS[direction]}"
            here = {cell: rows for cell, rows in cells.items() if cell[1:] == (direction, batch, variant)}
            lines += [*_table(title, here, [pairs[cell] for cell in here], result), ""]
    return [line.rstrip("\n") for line in lines[:-1]]


def _table(title: str, cells: dict[Cell, dict[str, dict]], pairs: list[Pair], result: Result) -> list[str]:
    """One implementation a row, the fastest of each column in bold, and below them ours over the best peer and over the
    limit."""
    key, _, form = UNITS[result.operator]
    lines = [f"| {title} | {' | '.join(cell.level for cell in cells)} |", "|---" * (len(cells) + 1) + "|"]
    names = dict.fromkeys(name for rows in cells.values() for name in rows)
    fastest = [min((row["ms"], name) for name, row in rows.items() if name not in LIMITS)[1] for rows in cells.values()]
    for name in names:
        texts = (form.format(rows[name][key]) if name in rows else "–" for rows in cells.values())
        bold = (f"**{text}**" if name == first else text for text, first in zip(texts, fastest, strict=True))
        lines.append(f"| {name} | {' | '.join(bold)} |")
    ratios = (f"{pair.ratio:.2f}" if pair.ratio else "–" for pair in pairs)
    shares = (f"{share(pair.mine, result.environment):.2f}" if pair.mine else "–" for pair in pairs)
    lines.append(f"| *ours: times as fast as the best peer* | {' | '.join(ratios)} |")
    lines.append(f"| *ours: share of the limit* | {' | '.join(shares)} |")
    return lines


def _losses(results: list[Result]) -> list[str]:
    """Every row where a peer is faster than what runs by default."""
    lines = ["## Where a peer is faster", ""]
    head = ["| operator | | shape | B | variant | ours, ms | best peer, ms | ours is slower by |", "|---" * 8 + "|"]
    rows = []
    for result in results:
        for cell, (mine, peer, _) in compared(result).items():
            if mine and peer and peer["ms"] < mine["ms"]:
                ours, theirs = (f"{row['implementation']} {row['ms']:.3f}" for row in (mine, peer))
                slower = f"{100 * (mine['ms'] / peer['ms'] - 1):.0f}%"
                where = f"{DIRECTIONS[cell.direction]} | {cell.level} | {cell.batch} | {cell.variant}"
                rows.append(f"| `{result.operator}` | {where} | {ours} | {theirs} | {slower} |")
    return [*lines, *(head + rows if rows else ["Nowhere, among the rows measured."]), ""]


def _summary(results: list[Result]) -> list[str]:
    """README's table: at each level of the U-Net, the backend that runs by default and the fastest of the peers."""
    lines = [f"| ours / best peer | {' | '.join(UNET)} |", "|---" * 5 + "|"]
    results = [result for result in results if result.path.stem in UNITS]
    for result in results:
        key, unit, form = UNITS[result.operator]
        for title, pairs in _ordinary(result, UNET).items():
            texts = (" / ".join(form.format(row[key]) if row else "–" for row in pair[:2]) for pair in pairs)
            lines.append(f"| `{result.operator}` {title}, {unit} | {' | '.join(texts)} |")
    dates = [result.environment["date"] for result in results]
    when = " to ".join(sorted({min(dates), max(dates)}))
    stale = [f"`{result.operator}`" for result in results if result.stale]
    note = ["", f"Changed since, to be measured again: {', '.join(stale)}."] if stale else []
    return [f"{results[0].environment['gpu']}, {when}, bfloat16, two clips of 24 frames, D = 64:", "", *lines, *note]


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    sys.exit(main())
