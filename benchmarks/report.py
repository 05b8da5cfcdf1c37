"""``python -m benchmarks.report``: the committed results as tables in ``docs/benchmarks.md``; ``--check``: whose
results are stale."""

import argparse
import json
import sys

from benchmarks.record import RESULTS, ROOT, sources_sha256

PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

# What a row is judged by, and how it reads: matrix work in TFLOP/s, streams of bytes in GB/s, the rest in milliseconds.
UNITS = {
    "pyramid_st_attn": ("tflops", "TFLOP/s", "{:.0f}"),
    "dual_stream_attn": ("ms", "ms", "{:.3f}"),
    "temporal_attn": ("ms", "ms", "{:.3f}"),
    "temporal_conv": ("tflops", "TFLOP/s", "{:.0f}"),
    "group_norm_silu": ("gbs", "GB/s", "{:.0f}"),
}
OURS = ("cuda", "triton", "torch", "reference")
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="say whose sources have changed since its results, write nothing"
    )
    options = parser.parse_args()
    results = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/*.json"))}
    if options.check:
        stale = [path for path, result in results.items() if result["sources_sha256"] != sources_sha256(path.stem)]
        for path in stale:
            print(f"{path.relative_to(ROOT)}: sources changed since; run: python -m benchmarks --op {path.stem}")
        return len(stale) > 0
    PAGE.write_text("\n".join(_page(results)) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + "\n".join([BEGIN, "", *_summary(results), "", END]) + rest.partition(END)[2])
    print(PAGE.relative_to(ROOT), README.relative_to(ROOT))
    return 0


def _page(results: dict) -> list[str]:
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.report` from the files in `benchmarks/results/`, which",
        "`python -m benchmarks` measures: median of cold-cache runs; rows under 0.2 ms are replays of a CUDA graph",
        "over rotated inputs. Every output and gradient was checked against float64 before its time was taken.",
        "A dash: not supported, or out of memory (the result file says which). **Bold**: the fastest.",
    ]
    for path, result in results.items():
        env = result["environment"]
        key, unit, form = UNITS[path.stem]
        lines += ["", f"## `{path.stem}` on {env['gpu']} ({unit})", ""]
        versions = f"torch {env['torch']}, Triton {env['triton']}, cuDNN {env['cudnn']}, driver {env['driver']}"
        limits = f"an 8192³ bfloat16 product {env['gemm_tflops']:.0f} TFLOP/s, a copy {env['copy_gbs']} GB/s"
        lines.append(f"{env['date']}, {versions}. In the same run: {limits}.")
        groups = sorted(
            {(r["batch"], r.get("table", "")) for r in result["rows"]}, key=lambda g: (g[1] != "per_frame", g)
        )
        for batch, table in groups:
            rows = [r for r in result["rows"] if (r["batch"], r.get("table", "")) == (batch, table)]
            lines += ["", *_table(f"B = {batch}" + (f", table {table}" if table else ""), rows, key, form)]
    return lines


def _summary(results: dict) -> list[str]:
    """The README's table: at each level of the U-Net, our fastest backend and the fastest of all others."""
    levels = ("f1", "f2", "f4", "f8")
    lines = [f"| ours / best peer | {' | '.join(levels)} |", "|---" * 5 + "|"]
    for path, result in results.items():
        key, unit, form = UNITS[path.stem]
        for direction, name in DIRECTIONS.items():
            cells = []
            for level in levels:
                rows = [r for r in result["rows"] if (r["level"], r["direction"], r["batch"]) == (level, direction, 2)]
                rows = [r for r in rows if key in r and r.get("table", "per_frame") == "per_frame"]
                best = min if key == "ms" else max
                ours, peers = (
                    [r[key] for r in rows if (r["implementation"] in OURS) == mine] for mine in (True, False)
                )
                cells.append(" / ".join(form.format(best(values)) if values else "–" for values in (ours, peers)))
            lines.append(f"| `{path.stem}` {name}, {unit} | {' | '.join(cells)} |")
    first = next(iter(results.values()))["environment"]
    return [f"{first['gpu']}, {first['date']}, bfloat16, two clips of 24 frames, D = 64:", "", *lines]


def _table(title: str, rows: list[dict], key: str, form: str) -> list[str]:
    columns = list(
        dict.fromkeys((r["direction"], r["level"]) for r in sorted(rows, key=lambda r: r["direction"] != "fwd"))
    )
    best = {}
    for column in columns:
        values = [
            r[key]
            for r in rows
            if (r["direction"], r["level"]) == column and key in r and r["implementation"] != "cuBLAS product"
        ]
        best[column] = (min if key == "ms" else max)(values, default=None)
    head = [f"{level} {DIRECTIONS[direction]}" for direction, level in columns]
    lines = [f"| {title} | " + " | ".join(head) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in sorted(
        {r["implementation"] for r in rows}, key=lambda n: (n not in OURS, OURS.index(n) if n in OURS else n)
    ):
        cells = []
        for column in columns:
            values = [
                r[key]
                for r in rows
                if r["implementation"] == name and (r["direction"], r["level"]) == column and key in r
            ]
            text = form.format(values[0]) if values else "–"
            cells.append(f"**{text}**" if values and values[0] == best[column] else text)
        if any(cell != "–" for cell in cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
