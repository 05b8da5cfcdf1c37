"""The benchmarks without a GPU: what is timed, what is refused, and what a report makes of results."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import (
    bench_dual_stream,
    bench_pyramid,
    bench_temporal,
    bench_temporal_conv,
    cases,
    conftest,
    peers,
    record,
    report,
    report_models,
)
from benchmarks.harness import Prepared, WrongResultError
from benchmarks.levels import LEVELS, SCALING, Level
from univid.kernels import measured
from univid.kernels.calls import TemporalConvCall
from univid.ops import dispatch

ROOT = Path(__file__).parent.parent
TINY = Level(frames=4, tokens=5, heads=2, refs=2, channels=8, taps=3, dim=8)
ENVIRONMENT = {
    "date": "2026-11-23",
    "gpu": "NVIDIA H200",
    "architecture": "sm_90",
    "driver": "1",
    "torch": "2.11",
    "triton": "3.6",
    "cudnn": 9,
    "gemm_tflops": 700.0,
    "copy_gbs": 4000,
}

# --- what is timed ----------------------------------------------------------------------------------------------------


def test_the_full_set_has_every_row_of_ours():
    full = list(cases.cases())
    keys = [json.dumps([case.file, case.head], sort_keys=True) for case in full]
    assert len(keys) == len(set(keys))
    for bench in cases.BENCHES:
        for level in bench.SHAPES:
            for variant in next(iter(cases.variants(bench).values()), ("",)):
                for batch in bench.BATCHES:
                    here = {
                        (case.name, case.direction)
                        for case in full
                        if case[:4] == (bench, level, batch, variant) and case.implementation.backend
                    }
                    left_out = (variant, batch) == ("bias + residual", 1)
                    directions = ("fwd",) if bench.OP == "linear_geglu" else ("fwd", "bwd")
                    assert left_out or here >= {("triton", direction) for direction in directions}
    assert {bench.OP for bench in cases.BENCHES} == set(report.UNITS) == set(record.MODULES)


def test_a_backend_without_a_kernel_has_no_row():
    for case in cases.cases():
        if backend := case.implementation.backend:
            direction = report.DIRECTIONS[case.direction]
            assert direction in dispatch.directions(backend, record.MODULES[case.bench.OP])


def test_a_file_is_written_when_it_is_complete(monkeypatch):
    written = []
    monkeypatch.setattr(record, "write", lambda name, rows: written.append((name, len(rows))))
    results = conftest.Results(cases.cases())
    norms = [case for case in cases.cases() if case.file == "group_norm_silu"]
    for case in norms:
        assert not written
        results.add(case, case.head)
    assert written == [("group_norm_silu", len(norms))]


@pytest.mark.skipif(find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_without_a_gpu_it_is_skipped():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/", "--quick", "--op", "temporal_conv", "-q"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" in done.stdout and " passed" not in done.stdout


# --- what is refused --------------------------------------------------------------------------------------------------


def test_shared_sources_are_those_imported():
    for operator, module in record.MODULES.items():
        paths = [path for path in record.sources(operator) if path.parent.name == "triton"]
        used = {
            name for name in ("column_sums", "rows") for path in paths if f"triton.{name} import" in path.read_text()
        }
        assert used == set(record.SHARED.get(module, ())), module
        assert used <= {path.stem for path in paths}


def check(problem, implementation):
    return [Prepared(problem, implementation, direction, problem.tensors).check() for direction in ("fwd", "bwd")]


def test_a_right_result_is_taken_and_a_wrong_one_is_not():
    problem = bench_temporal.problem(TINY, 2, "cpu")
    right = bench_temporal.implementations(TINY, 2)["torch"]
    assert all(0 < error < 0.01 for error in check(problem, right))
    wrong = right._replace(run=lambda t: right.run(t) * 1.05)
    for direction in ("fwd", "bwd"):
        with pytest.raises(WrongResultError, match=r"^\w+: relative error [45]\.\d+e-02, allowed "):
            Prepared(problem, wrong, direction, problem.tensors).check()
    nan = right._replace(run=lambda t: right.run(t) * torch.nan)
    with pytest.raises(WrongResultError):
        Prepared(problem, nan, "fwd", problem.tensors).check()
    # Right in its output, wrong in one gradient.
    detached = right._replace(run=lambda t: right.run(t | {"k": t["k"].detach()}) + 0 * t["k"])
    with pytest.raises(WrongResultError, match=r"^k: "):
        Prepared(problem, detached, "bwd", problem.tensors).check()


def test_what_peers_prepare_and_leave_undone_is_checked_too(monkeypatch):
    """The peers whose kernels the host has: their inputs or outputs may be of another shape than the operator's."""
    for module in (peers, bench_temporal):
        monkeypatch.setattr(module, "sdpa_kernel", lambda backend: nullcontext())
    sizes = [(bench_temporal_conv, epilogue) for epilogue in bench_temporal_conv.VARIANTS["epilogue"]]
    sizes += [(bench_pyramid, kind) for kind in bench_pyramid.VARIANTS["table"]]
    for bench, *variant in [*sizes, (bench_dual_stream,), (bench_temporal,)]:
        problem = bench.problem(TINY, 2, *variant, "cpu")
        for name, peer in bench.implementations(TINY, 2, *variant).items():
            if peer.backend is None and "Flash" not in name:
                assert max(check(problem, peer)) < 0.01, (bench.OP, variant, name)


# --- the report -------------------------------------------------------------------------------------------------------


def row(op, level, direction, implementation, ms, **more):
    row = {"op": op, "level": level, "direction": direction, "batch": 2, "implementation": implementation}
    row |= {"deterministic": implementation == "triton"} if direction == "bwd" else {}
    if ms is None:
        return row | more | {"failure": "out of memory"}
    values = {"ms": ms, "eager_ms": 2 * ms, "tflops": 100 / ms, "gbs": 1000 / ms, "peak_mb": 10.0, "error": 0.002}
    return row | more | values


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place of its own for all that a report reads and writes."""
    for module in (record, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report_models, "PAGE", tmp_path / "docs" / "benchmarks-models.md")
    monkeypatch.setattr(report_models, "README", tmp_path / "README.md")
    monkeypatch.setattr(measured, "PATH", tmp_path / "measured.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for op, variant in (("temporal_conv", {"epilogue": "none"}), ("pyramid_st_attn", {"table": "per_frame"})):
        rows = []
        for level, peer in (("f1", 1.25), ("f2", 0.5)):
            for direction in ("fwd", "bwd"):
                rows += [
                    row(op, level, direction, "triton", 1.0, **variant),
                    row(op, level, direction, "torch", 0.75, **variant),
                    row(op, level, direction, "a peer", peer, **variant),
                ]
        rows.append(row(op, "f1", "bwd", "torch", 0.9, **variant) | {"deterministic": True})
        rows.append(row(op, "f1", "fwd", "reference", None, **variant))
        record.write(op, rows, tmp_path / "results")
    growth = [
        row("pyramid_st_attn", level, direction, name, size.frames * size.refs / 64, table="per_frame") | {"batch": 1}
        for level, size in SCALING.items()
        for direction in ("fwd", "bwd")
        for name in ("triton", "a peer")
    ]
    record.write("scaling", growth, tmp_path / "results")
    return tmp_path


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_report(folder):
    assert report.main([]) == 0
    page = (folder / "docs" / "benchmarks.md").read_text()
    assert (
        "| B = 2, none, forward | f1 | f2 |\n|---|---|---|\n| triton | 100 | 100 |\n| torch | **133** | 133 |" in page
    )
    assert "| a peer | 80 | **200** |" in page
    assert "| *ours: times as fast as the best peer* | 1.67 | 0.67 |" in page
    assert "| torch, deterministic | 111 | – |" in page
    lost = "| `temporal_conv` | backward | f2 | 2 | none | torch 0.750 | a peer 0.500 | 50% |"
    assert lost in page and lost.replace("f2", "f1") not in page
    for kind in ("ratios", "growth"):
        name = f"benchmarks-nvidia-h200-{kind}.svg"
        assert f"]({name})" in page
        plot = (folder / "docs" / name).read_text()
        assert plot.count("<text") > 10 and len(plot) < 200_000
    readme = (folder / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    # Triton runs by default there: the faster torch leaves nothing for a backward.
    assert "| `pyramid_st_attn` forward, TFLOP/s | 100 / 80 | 100 / 200 | – / – | – / – |" in readme
    assert "| `temporal_conv` forward, TFLOP/s | 133 / 80 | 133 / 200 | – / – | – / – |" in readme
    # The same results, the same bytes.
    before = {path: path.read_bytes() for path in folder.glob("docs/*")}
    report.main([])
    assert before == {path: path.read_bytes() for path in folder.glob("docs/*")}


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_readme_names_the_first_day_and_the_last(folder):
    report.main([])
    assert "NVIDIA H200, 2026-11-23, bfloat16" in (folder / "README.md").read_text()
    [path] = folder.glob("results/*/pyramid_st_attn.json")
    path.write_text(path.read_text().replace("2026-11-23", "2026-12-01"))
    report.main([])
    assert "NVIDIA H200, 2026-11-23 to 2026-12-01, bfloat16" in (folder / "README.md").read_text()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_report_of_models(folder):
    def timed(implementation, direction, ms, **more):
        head = {"op": "unet", "level": "24x40x72", "batch": 2, "implementation": implementation, "direction": direction}
        return (
            head | {"ms": ms, "tflop": 40.0, "tflops": round(40_000 / ms), "peak_mb": 4600, "reserved_mb": 4800} | more
        )

    unet = [
        timed("univid", "fwd", 100.0, breakdown_ms=dict.fromkeys(report_models.BUDGET_MS, 20.0)),
        timed("univid", "fwd_bwd", 300.0),
        timed("a peer", "fwd", 200.0),
        timed("another", "fwd", 1.0) | {"failure": "out of memory"},
    ]
    unet[-1].pop("ms")
    record.write("unet", unet, folder / "results")
    tasks = [("univid", "t2v", 5000, 9000), ("univid", "i2v", 5000, 9000), ("univid", "ti2v", 8000, 9500)]
    rows = [
        {"op": "pipeline", "level": task, "direction": "fwd", "implementation": name, "ms": ms, "peak_mb": mb}
        | {"reserved_mb": mb + 1000}
        for name, task, ms, mb in [*tasks, ("univid, low memory", "t2v", 6000, 5000)]
    ]
    record.write("pipeline", rows, folder / "results")
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + f"{report_models.BEGIN}\nold\n{report_models.END}\nend\n")
    assert report.main([]) == 0
    page = (folder / "docs" / "benchmarks-models.md").read_text()
    assert "| univid | 40.0 | 100.0 | 400 | 300.0 | 133 | 4.6; 4.6 | 4.8; 4.8 |" in page
    assert "| a peer | 40.0 | 200.0 | 200 | – | – | 4.6; – | 4.8; – |" in page
    assert "another: out of memory." in page
    assert "| univid, low memory | 6.00 s, 5.0 GB, 6.0 held | – | – |" in page
    assert (folder / "docs" / "benchmarks-nvidia-h200-unet.svg").exists()
    assert "| text to video, 24 frames of 320x576 | 10.0 | 6.0 |" in readme.read_text()
    assert readme.read_text().endswith("\nend\n") and readme.read_text().count("old") == 0
    assert report.main(["--check"]) == 0


def test_check(folder, capsys):
    assert report.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    path = folder / "results" / "nvidia-h200" / "temporal_conv.json"
    path.write_text(path.read_text().replace('"sources_sha256": "', '"sources_sha256": "0'))
    assert report.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("temporal_conv.json: sources changed since; run: pytest benchmarks/ --op temporal_conv\n")
    assert out.count("\n") == 1
    assert not (folder / "docs" / "benchmarks.md").exists()


def test_comments_of_kernels_make_no_result_stale():
    code = '// of 3\n#include "a//b.h"\n\nchar c = \'"\'; /* two\nlines */ int n = 2; // "n"\n'
    bare = '#include "a//b.h"\nchar c = \'"\'; int n = 2;\n'
    assert record.without_comments(code) == record.without_comments(bare) == bare
    assert record.without_comments(bare.replace("2", "3")) != bare


def test_an_operators_sources_are_its_own():
    names = {op: {path.name for path in record.sources(op)} for op in record.MODULES}
    assert {"temporal.py", "temporal_fwd.cu", "temporal_bwd.cu"} <= names["temporal_attn"]
    assert {"temporal_conv.py", "bench_temporal_conv.py"} <= names["temporal_conv"]
    how_it_is_timed = {"harness.py", "peers.py", "timing.py"}
    assert names["temporal_conv"] & names["temporal_attn"] == how_it_is_timed | {"common.h"}
    assert {"tma.cuh", "wgmma.cuh"} <= names["temporal_conv"] & names["pyramid_st_attn"]
    assert not any(name.endswith((".cuh", ".h")) for name in names["geglu"])


# --- the choice of a backend ------------------------------------------------------------------------------------------


def test_choices(folder):
    """Torch was the fastest in both directions; but for attention its forward does not leave what a backward needs."""
    classes = ("channels <= 384, taps = 3, no epilogue", "channels <= 768, taps = 5, no epilogue")
    faster = {"gpu": "NVIDIA H200", "temporal_conv": {d: dict.fromkeys(classes, "torch") for d in dispatch.DIRECTIONS}}
    faster |= {"pyramid": {"backward": dict.fromkeys(("tokens <= 4096", "tokens <= 1024"), "torch")}}
    assert report.choices(report.read()) == {"sm_90": faster}


def test_what_is_compared_with_the_peers_runs_by_default():
    """Not the fastest of ours, which only its name would bring."""

    def rows(level, **ms):
        about = {"op": "temporal_conv", "level": level, "direction": "fwd", "batch": 2, "epilogue": "none"}
        return [about | {"implementation": name.replace("_", " "), "ms": value} for name, value in ms.items()]

    measured_rows = rows("f1", cuda=1.0, triton=0.99, a_peer=0.9, another=2.0) + rows("f2", cuda=1.0, triton=0.9)
    result = report.Result(Path("temporal_conv.json"), {"architecture": "sm_90", "gpu": "one"}, measured_rows, "")
    (f1, f2) = (pair[:2] for pair in report.compared(result).values())
    assert [row["implementation"] for row in f1] == ["cuda", "a peer"]
    assert f2[0]["implementation"] == "triton" and f2[1] is None


def test_no_ratio_where_the_best_peer_was_left_out():
    """But where it does not apply, and where another peer is ahead."""

    def row(level, implementation, ms, batch=2):
        about = {"op": "geglu", "level": level, "direction": "fwd", "batch": batch}
        return about | {"implementation": implementation} | ({"ms": ms} if ms else {"failure": "no"})

    rows = [
        row(level, name, ms) for level in report.UNET for name, ms in (("triton", 1.0), ("all", 1.5), ("slow", 3.0))
    ]
    rows += [row("f8", "at f8 alone", 1.2)]
    rows += [row("f1", "triton", 1.0, 1), row("f1", "slow", 2.0, 1)]
    rows += [row("f2", "triton", 1.0, 1), row("f2", "slow", 0.5, 1)]
    rows += [row("f4", "triton", 1.0, 1), row("f4", "slow", 2.0, 1), row("f4", "all", None, 1)]
    pairs = report.compared(report.Result(Path("geglu.json"), {"architecture": "sm_90", "gpu": "one"}, rows, ""))
    ratios = {(cell.level, cell.batch): pair.ratio for cell, pair in pairs.items()}
    assert ratios == {
        ("f1", 2): 1.5,
        ("f2", 2): 1.5,
        ("f4", 2): 1.5,
        ("f8", 2): 1.2,
        ("f1", 1): None,
        ("f2", 1): 0.5,
        ("f4", 1): 2.0,
    }


def times(**ms):
    return {name: {"ms": value} for name, value in ms.items()}


def test_a_backend_must_be_faster_by_a_margin_and_over_the_class():
    def winner(*group):
        return report._winner("temporal_conv", "forward", group)

    assert winner(times(cuda=1.0, triton=0.9)) == "triton"
    assert winner(times(cuda=1.0, triton=0.98)) is None
    assert winner(times(cuda=1.0, triton=0.9), times(cuda=1.0, triton=1.3)) is None
    # The first backend runs only some of them: where it runs, it was not measured against.
    assert winner(times(cuda=1.0, triton=2.0, torch=1.5), times(triton=2.0, torch=1.5)) is None
    # Another one that runs only some is passed over.
    assert winner(times(cuda=1.0, triton=0.5, torch=0.8), times(cuda=1.0, torch=0.8)) == "torch"


def test_a_call_and_a_level_are_of_the_same_class():
    level = LEVELS["f2"]
    x = torch.empty(1, 2, 3, level.channels)
    weight = torch.empty(8, level.channels, level.taps)
    for bias, epilogue in ((None, False), (torch.empty(8), True)):
        sizes = dispatch._SIZES["temporal_conv"](TemporalConvCall(x, weight, bias, None))
        expected = measured.shape_class("temporal_conv", channels=640, taps=5, epilogue=epilogue)
        assert measured.shape_class("temporal_conv", **sizes) == expected
    assert [measured.shape_class("pyramid", tokens=n) for n in (1, 2, 45, 64, 65)] == [
        f"tokens <= {bound}" for bound in (1, 2, 64, 64, 128)
    ]
    assert [measured.shape_class("geglu", channels=n) for n in (1, 2, 48, 49, 64, 320, 1280)] == [
        f"channels <= {bound}" for bound in (1, 2, 48, 64, 64, 384, 1536)
    ]


def test_committed_choices_follow_from_committed_results():
    assert json.loads(measured.PATH.read_text()) == report.choices(report.read())
