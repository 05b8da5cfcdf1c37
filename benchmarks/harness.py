"""One row of results: check an implementation against float64, then time it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from univid.ops import BACKENDS, dispatch

Tensors = dict[str, Tensor]

# As a rule; PyTorch's kernels may add in any order, unless told otherwise.
ALWAYS_DETERMINISTIC = ("cuda", "triton")


class Implementation(NamedTuple):
    """A way to compute an operator: one of our backends or a peer.

    A peer is given its inputs as its users hold them (``prepare``) and may leave its output as it lies (``finish``):
    neither is timed, both are checked.
    """

    run: Callable[[Tensors], Tensor | tuple[Tensor, ...]]
    directions: tuple[str, ...] = ("fwd", "bwd")
    prepare: Callable[[Tensors], Tensors] = dict  # the problem's inputs -> what ``run`` takes, differentiable
    finish: Callable = lambda out: out  # what ``run`` returns -> the problem's output, differentiable
    deterministic: bool = False  # its gradients have the same bits in every run
    backend: str | None = None  # ours
    quick: bool = True  # belongs to the quick set
    compiles: bool = False  # at its first calls, and keeps what it compiled on disk


def ours(operator: str, run: Callable[[Tensors, str], Tensor]) -> dict[str, Implementation]:
    """The backends that have a kernel for ``operator`` (a module's name), each in the directions that it has."""
    names = {"forward": "fwd", "backward": "bwd"}
    return {
        backend: Implementation(
            lambda t, backend=backend: run(t, backend),
            tuple(names[direction] for direction in directions),
            deterministic=backend in ALWAYS_DETERMINISTIC,
            backend=backend,
            quick=backend != "reference",
            compiles=backend == "triton",
        )
        for backend in BACKENDS
        if (directions := dispatch.directions(backend, operator))
    }


@dataclass
class Problem:
    """One operator on one shape: its inputs, what it costs, and how its result is checked."""

    tensors: Tensors  # the differentiable inputs, by name
    reference: Callable[..., Tensor]  # reference(tensors, accumulate) on the inputs of `part`
    part: Callable[[Tensors], Tensors]  # the inputs of a part of the problem small enough for float64
    part_of: Callable[[str, Tensor], Tensor]  # the same part of the output ("out") or of an input's gradient
    flops: dict[str, float]  # by direction
    bytes: dict[str, float]
    _expected: dict[str, tuple[Tensors, Tensors]] = field(default_factory=dict)

    @cached_property
    def grad(self) -> Tensor:
        """The incoming gradient of the part."""
        out = self.reference(self.part(self.tensors))
        return torch.randn(out.shape, device=out.device, dtype=torch.bfloat16)

    @cached_property
    def rotation(self) -> list[Tensors]:
        """Inputs enough that a CUDA graph over all of them finds none in the L2 cache."""
        count = timing.input_sets(sum(x.numel() * x.element_size() for x in self.tensors.values()))
        fresh = ({n: torch.randn_like(x) for n, x in self.tensors.items()} for _ in range(count - 1))
        return [self.tensors, *fresh]

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
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype))
        return dict(zip(leaves, grads, strict=True))


class WrongResultError(Exception):
    """An output or a gradient is further from float64 than the tolerance."""


class Prepared:
    """One implementation on one input set: calling it runs its forward or its backward."""

    def __init__(self, problem: Problem, implementation: Implementation, direction: str, tensors: Tensors):
        self.problem, self.implementation, self.direction = problem, implementation, direction
        backward = direction == "bwd"
        self.leaves = {n: x.detach().requires_grad_(backward) for n, x in tensors.items()}
        self.inputs = implementation.prepare(self.leaves)
        self.tensors = {n: x.detach().requires_grad_(backward) for n, x in self.inputs.items()}
        if backward:
            out = implementation.run(self.tensors)
            self.outs = _tuple(out)
            out = implementation.finish(out)
            grad = torch.randn_like(out)
            problem.part_of("out", grad).copy_(problem.grad)
            # As it reaches the outputs as they lie.
            self.grads = torch.autograd.grad(out, self.outs, grad, retain_graph=True)

    def __call__(self):
        if self.direction == "fwd":
            with torch.no_grad():
                return self.implementation.run(self.tensors)
        return torch.autograd.grad(self.outs, list(self.tensors.values()), self.grads, retain_graph=True)

    def peak(self) -> int:
        """Bytes that are held beside the inputs at the most, of a backward with its forward."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if self.direction == "fwd":
            self()
        else:
            outs = _tuple(self.implementation.run(self.tensors))
            torch.autograd.grad(outs, list(self.tensors.values()), self.grads)
        return torch.cuda.max_memory_allocated() - before

    def check(self) -> float:
        """The largest relative L2 error; WrongResultError where it passes twice the yardstick's and half an ulp."""
        result = self()
        if self.direction == "fwd":
            results = {"out": self.implementation.finish(result)}
        else:
            grads = torch.autograd.grad(list(self.inputs.values()), list(self.leaves.values()), result)
            results = dict(zip(self.leaves, grads, strict=True))
        exact, rounded = self.problem.expected(self.direction)
        worst = 0.0
        for name, result in results.items():
            error, allowed = (
                ((x.double() - exact[name]).norm() / exact[name].norm()).item()
                for x in (self.problem.part_of(name, result), rounded[name])
            )
            if not error <= 2 * allowed + 2**-8:
                raise WrongResultError(f"{name}: relative error {error:.2e}, allowed {2 * allowed + 2**-8:.2e}")
            worst = max(worst, error)
        return float(f"{worst:.2e}")


def measure(problem: Problem, implementation: Implementation, direction: str) -> tuple[dict, list[float]]:
    """What a row says of an implementation, and the milliseconds it is the median of. Raises what it raises, and
    WrongResultError."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = Prepared(problem, implementation, direction, problem.tensors)
        error = first.check()
        peak = first.peak()
        samples = eager = timing.eager_ms(first)
        if median(eager) < timing.MAYBE_SHORT_MS:
            others = (Prepared(problem, implementation, direction, tensors) for tensors in problem.rotation[1:])
            replays = timing.graph_ms([first, *others], stream)
            if median(replays) < timing.SHORT_MS:
                samples = replays
    torch.cuda.current_stream().wait_stream(stream)
    ms = median(samples)
    return {
        "ms": round(ms, 5),
        "eager_ms": round(median(eager), 5),
        "tflops": round(problem.flops[direction] / ms / 1e9, 1),
        "gbs": round(problem.bytes[direction] / ms / 1e6),
        "peak_mb": round(peak / 1e6, 1),
        "error": error,
    }, samples


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
