"""``pytest benchmarks/``: which rows run, and where they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

from benchmarks import record, warm
from benchmarks.levels import QUICK

if TYPE_CHECKING:
    from benchmarks.cases import Case


class Clock:
    """What pytest-benchmark reads instead of the host's clock: it moves by the GPU times that are put on it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, ms: float) -> None:
        self.seconds += ms / 1e3


CLOCK = Clock()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of the operators")
    group.addoption("--quick", action="store_true", help="f1 and f4, B = 2, per-frame tables, what compiles fast")
    for option, of in (
        ("op", "operator, or scaling"),
        ("level", "level"),
        ("batch", "batch"),
        ("table", "table of reference frames, or epilogue of the convolution"),
        ("implementation", "implementation, or part of a peer's name"),
    ):
        group.addoption(f"--{option}", action="append", help=f"only this {of} (may be repeated)")
    group.addoption(
        "--without", action="append", default=[], help="not this peer (or part of its name), nor wait for it"
    )


def pytest_configure(config):
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    from benchmarks.cases import cases

    selected = [case for case in cases() if _wanted(case, metafunc.config)]
    metafunc.parametrize(
        "case",
        [pytest.param(c, marks=pytest.mark.benchmark(group=c.group, timer=CLOCK)) for c in selected],
        ids=[f"{c.group} {c.name}".replace(" ", "-") for c in selected],
    )


def _wanted(case: Case, config) -> bool:
    from benchmarks.cases import variants

    asked = config.getoption
    ordinary = next(iter(variants(case.bench).values()), ("",))[0]
    if asked("quick") and not (
        case.implementation.quick and case.level in QUICK and case.batch == 2 and case.variant == ordinary
    ):
        return False
    return (
        (not asked("op") or case.file in asked("op"))
        and (not asked("level") or case.level in asked("level"))
        and (not asked("batch") or str(case.batch) in asked("batch"))
        and (not asked("table") or not case.variant or case.variant in asked("table"))
        and (not asked("implementation") or any(name in case.name for name in asked("implementation")))
        and not _without(case, config)
    )


def _without(case: Case, config) -> bool:
    return any(name in case.name for name in config.getoption("without"))


class Results:
    """The rows as they come. An operator's file is written once every row of its full set has been measured: rows of
    different runs are not to be compared."""

    def __init__(self, full: Iterable[Case]):
        self.rows: dict[str, list[dict]] = {}
        self.missing = {}
        for case in full:
            self.missing.setdefault(case.file, set()).add((case.group, case.name))

    def add(self, case: Case, row: dict) -> None:
        self.rows.setdefault(case.file, []).append(row)
        self.missing[case.file].discard((case.group, case.name))
        if not self.missing[case.file]:
            record.write(case.file, self.rows[case.file])


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


@pytest.fixture(scope="session")
def results(request) -> Results:
    from benchmarks.cases import cases

    if not _has_gpu():
        pytest.skip("the benchmarks need an NVIDIA GPU")
    warm.compile_kernels([item.callspec.params["case"] for item in request.session.items if hasattr(item, "callspec")])
    record.environment()  # the card's limits
    return Results(case for case in cases() if not _without(case, request.config))


@pytest.fixture
def clock() -> Clock:
    return CLOCK
