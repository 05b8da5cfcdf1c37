"""The rows of the full set."""

from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

from benchmarks import (
    bench_add_bias,
    bench_add_layer_norm,
    bench_concat,
    bench_dual_stream,
    bench_geglu,
    bench_group_norm,
    bench_linear_geglu,
    bench_pyramid,
    bench_scaling,
    bench_temporal,
    bench_temporal_conv,
)
from benchmarks.harness import Implementation, Problem

BENCHES = (
    bench_temporal_conv,
    bench_group_norm,
    bench_geglu,
    bench_linear_geglu,
    bench_concat,
    bench_add_bias,
    bench_add_layer_norm,
    bench_temporal,
    bench_dual_stream,
    bench_pyramid,
    bench_scaling,
)


class Case(NamedTuple):
    """One row to be measured."""

    bench: ModuleType
    level: str
    batch: int
    variant: str  # a table or an epilogue; "" where the operator has none
    name: str
    implementation: Implementation
    direction: str

    @property
    def shape(self) -> tuple[str, str, int, str]:
        """Whose problem it is."""
        return (self.file, self.level, self.batch, self.variant)

    @property
    def file(self) -> str:
        return getattr(self.bench, "FILE", self.bench.OP)

    @property
    def head(self) -> dict:
        """What the row is of."""
        row = {"op": self.bench.OP, "level": self.level, "direction": self.direction, "batch": self.batch}
        row["implementation"] = self.implementation.backend or self.name
        row |= dict.fromkeys(variants(self.bench), self.variant)
        return row | ({"deterministic": self.implementation.deterministic} if self.direction == "bwd" else {})

    @property
    def group(self) -> str:
        return " ".join(filter(None, (self.file, self.level, f"B{self.batch}", self.variant, self.direction)))

    def problem(self) -> Problem:
        return _problem(self.bench, *_size(self.bench, self.level, self.batch, self.variant))


def cases() -> Iterator[Case]:
    """Every row of the full set."""
    for bench in BENCHES:
        for level in bench.SHAPES:
            for batch in bench.BATCHES:
                for variant in next(iter(variants(bench).values()), ("",)):
                    size = _size(bench, level, batch, variant)
                    for name, implementation in bench.implementations(*size).items():
                        for direction in implementation.directions:
                            yield Case(bench, level, batch, variant, name, implementation, direction)


def variants(bench: ModuleType) -> dict[str, tuple[str, ...]]:
    """What a row says beside its shape, and its values; the first is the ordinary one."""
    return getattr(bench, "VARIANTS", {})


def _size(bench: ModuleType, level: str, batch: int, variant: str) -> tuple:
    return (bench.SHAPES[level], batch, *([variant] if variant else []))


@lru_cache(maxsize=1)
def _problem(bench: ModuleType, *size) -> Problem:
    return bench.problem(*size)
