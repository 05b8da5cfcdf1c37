"""One row of results: check an implementation against float64, then time its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.timing import MAYBE_SHORT_MS, SHORT_MS, eager_ms, graph_ms, input_sets

Tensors = dict[str, Tensor]


@dataclass
class Problem:
    """One operator on one shape: its inputs, what it costs, and how its result is checked."""

    op: str
    level: str
    batch: int
    tensors: Tensors  # the differentiable inputs, by name
    reference: Callable[..., Tensor]  # reference(tensors, accumulate) on the inputs of `part`
    part: Callable[[Tensors], Tensors]  # the inputs of a part of the problem small enough for float64
    part_of: Callable[[str, Tensor], Tensor]  # the same part of the output ("out") or of an input's gradient
    flops: dict[str, float]  # by direction
    bytes: dict[str, float]
    fields: dict[str, object] = field(default_factory=dict)  # what else a row carries
    _expected: dict[str, tuple[Tensors, Tensors]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.reference(self.part(self.tensors)).shape
        self.grad_part = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def expected(self, direction: str) -> tuple[Tensors, Tensors]:
        """What float64 says of the part, and what bfloat16 does with every operation rounded: the yardstick of the
        error."""
        if direction not in self._expected:
            exact = self._reference(direction, torch.float64, None)
            rounded = self._reference(direction, torch.bfloat16, torch.bfloat16)
            self._expected[direction] = (exact, rounded)
        return self._expected[direction]

    def _reference(self, direction: str, dtype: torch.dtype, accumulate: torch.dtype | None) -> Tensors:
        leaves = {
            n: x.detach().to(dtype).requires_grad_(direction == "bwd") for n, x in self.part(self.tensors).items()
        }
        out = self.reference(leaves, accumulate)
        if direction == "fwd":
            return {"out": out.detach()}
        return dict(
            zip(leaves, torch.autograd.grad(out, list(leaves.values()), self.grad_part.to(out.dtype)), strict=True)
        )


def measure(problem: Problem, implementation: str, function: Callable[[Tensors], Tensor], **fields) -> list[dict]:
    """The rows of one implementation, forward and backward; a wrong result or a failure is a row without a time, with
    its reason."""
    rows = []
    for direction in ("fwd", "bwd"):
        row = {
            "op": problem.op,
            "level": problem.level,
            "direction": direction,
            "batch": problem.batch,
            "implementation": implementation,
            **problem.fields,
        }
        row |= fields if direction == "bwd" else {}
        try:
            row |= _measure(problem, function, direction)
        except torch.OutOfMemoryError:
            row["failure"] = "out of memory"
        except Exception as failure:
            row["failure"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"
        torch.cuda.empty_cache()
        rows.append(row)
    return rows


def _measure(problem: Problem, function: Callable[[Tensors], Tensor], direction: str) -> dict:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = _Run(problem, function, direction, problem.tensors)
        error = first.check()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first()
        peak = torch.cuda.max_memory_allocated() - before
        eager = eager_ms(first)
        ms = eager
        if eager < MAYBE_SHORT_MS:
            count = input_sets(sum(x.numel() * x.element_size() for x in problem.tensors.values()))
            clones = [{n: torch.randn_like(x) for n, x in problem.tensors.items()} for _ in range(count - 1)]
            replay = graph_ms([first, *(_Run(problem, function, direction, c) for c in clones)], stream)
            ms = replay if replay < SHORT_MS else eager
    torch.cuda.current_stream().wait_stream(stream)
    return {
        "ms": round(ms, 5),
        "eager_ms": round(eager, 5),
        "tflops": round(problem.flops[direction] / ms / 1e9, 1),
        "gbs": round(problem.bytes[direction] / ms / 1e6),
        "peak_mb": round(peak / 1e6, 1),
        "error": error,
    }


class _Run:
    """One implementation on one input set: calling it runs its forward or its backward."""

    def __init__(self, problem: Problem, function: Callable[[Tensors], Tensor], direction: str, tensors: Tensors):
        self.problem, self.function, self.direction = problem, function, direction
        self.tensors = tensors
        if direction == "bwd":
            self.tensors = {n: x.detach().requires_grad_() for n, x in tensors.items()}
            self.out = function(self.tensors)
            self.grad = torch.randn_like(self.out)
            problem.part_of("out", self.grad).copy_(problem.grad_part)

    def __call__(self):
        if self.direction == "fwd":
            with torch.no_grad():
                return {"out": self.function(self.tensors)}
        grads = torch.autograd.grad(self.out, list(self.tensors.values()), self.grad, retain_graph=True)
        return dict(zip(self.tensors, grads, strict=True))

    def check(self) -> float:
        """The largest relative L2 error; raises where it passes twice the yardstick's."""
        exact, rounded = self.problem.expected(self.direction)
        worst = 0.0
        for name, result in self().items():
            error, allowed = (
                ((x.double() - exact[name]).norm() / exact[name].norm()).item()
                for x in (self.problem.part_of(name, result), rounded[name])
            )
            if not error <= 2 * allowed + 2**-8:
                raise AssertionError(f"{name}: relative error {error:.2e}, allowed {2 * allowed + 2**-8:.2e}")
            worst = max(worst, error)
        return float(f"{worst:.2e}")
