"""The one tester that every backend of every operator passes through.

An operator's output, and its gradient in every input, are compared with the reference formula in float64 on the same, already rounded
inputs. With ``e`` the error, and ``y`` that of the yardstick ``reference(..., accumulate=dtype)``, where every operation is rounded:

    max|e| <= 2 · max|y| + eps · max|expected|        ‖e‖ <= 2 · ‖y‖ + eps · ‖expected‖

In float32 the order of the sums decides an error of a few ulp, and no order is the right one: there ``y`` counts as at
least 16 eps of what is expected, a hundredth of what products in TF32 would err. The yardstick's gradients take their
probabilities from the float32 logsumexp there, as every fused backward does, so that its rounding counts. A sum that may
cancel has no such yardstick (the gradient of a gate; a softmax over one key, whose gradient is 0): there
``|e| <= 4 · eps · Σ|terms|``, element by element.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.calls import one_tensor
from univid import ops
from univid.ops import reference
from univid.ops.explain import backends_for, directions_of

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


# --- what is tested --------------------------------------------------------------------------------------------------------------


class Operator(NamedTuple):
    """An operator as the tester calls it: tensors by name (``inputs``), and all its other arguments (``options``)."""

    name: str  # univid.ops.<name>
    module: str  # its files' name, on every floor
    differentiable: tuple[str, ...]  # in the order of the ``needs`` of its registered backward
    reference: Callable[[dict, dict, torch.dtype | None], Tensor]  # (inputs, options, accumulate) -> out
    # (inputs, options, grad), all in float64 -> for gradients that may cancel: Σ|terms|, and the dtype in which they are added
    terms: Callable[[dict, dict, Tensor], dict[str, tuple[Tensor, torch.dtype | None]]] = lambda *_: {}
    repeatable: tuple[tuple[str, Any], ...] = ()  # options under which gradients have the same bits from run to run
    together: tuple[str, ...] = ()  # the inputs of a sum, whose gradients are one tensor
    passed_on: tuple[str, ...] = ()  # those whose gradient is the incoming one as it is
    alike: tuple[str, ...] = ()  # those whose gradient lies as they do; the others' are contiguous
    arguments: Callable[[dict], dict] = dict  # inputs -> the operator's own arguments


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of an operator's table. Subclasses add sizes, and ``arguments() -> (inputs, options)``.

    Inputs come as float64, to be rounded to the dtype of a run; those of another dtype keep it.
    """

    id: str
    needs: tuple[str, ...] | None = None  # the inputs that ask for a gradient: all, by default
    grad: str = "contiguous"  # the incoming gradient's layout
    dtypes: tuple[torch.dtype, ...] = DTYPES
    compiled: tuple[torch.dtype, ...] = (torch.bfloat16,)  # with compiled kernels; every combination costs seconds
    interpreted: tuple[torch.dtype, ...] = ()  # in Triton's interpreter, which is slow, and cannot multiply bfloat16
    small: dict[str, int] = field(default_factory=dict)  # other sizes there
    large: bool = False  # a GPU's blocks compute one tile after another; on a GPU alone

    def arguments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise NotImplementedError


class Run(NamedTuple):
    """How a case is run: ``place`` is "cpu", "gpu" or "interpreter"."""

    backend: str
    place: str
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.backend}-{self.place}-{SHORT[self.dtype]}"

    @property
    def device(self) -> str:
        return "cuda" if self.place == "gpu" else "cpu"

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        return [] if self.place == "cpu" else [getattr(pytest.mark, self.place)]

    def takes(self, case: Case) -> bool:
        if self.dtype not in case.dtypes or (case.large and self.place != "gpu"):
            return False
        if self.place == "interpreter":
            return self.dtype in case.interpreted
        return self.backend not in ("cuda", "triton") or self.dtype in case.compiled


def runs(operator: Operator) -> list[Run]:
    """Every backend of an operator, wherever it runs."""
    compiled = ["triton"]
    if importlib.util.find_spec(f"univid.kernels.cuda.{operator.module}"):
        compiled.append("cuda")
    return [
        *(Run(backend, "cpu", dtype) for backend in ("reference", "torch") for dtype in DTYPES),
        *(Run("triton", "interpreter", dtype) for dtype in (torch.float16, torch.float32)),
        *(Run(backend, "gpu", dtype) for backend in ("torch", *compiled) for dtype in DTYPES),
    ]


def every_run(operator: Operator, cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises a test by ``case`` and ``run``: every case on every backend that takes it."""
    rows = [
        pytest.param(case, run, id=f"{case.id}-{run.id}", marks=run.marks)
        for case in cases
        for run in runs(operator)
        if run.takes(case)
    ]
    return pytest.mark.parametrize(("case", "run"), rows)


def drawn_runs(operator: Operator, *configurations: tuple) -> pytest.MarkDecorator:
    """Parametrises a hypothesis test by ``run`` and a configuration ``(dtype, *fixed)``: ``fixed`` is what kernels are compiled for."""
    rows = [
        pytest.param(run, fixed, id=f"{run.id}-{'-'.join(map(str, fixed))}", marks=run.marks)
        for run in runs(operator)
        for dtype, *fixed in configurations
        if run.dtype == dtype and run.place != "interpreter" and run.backend != "reference"
    ]
    return pytest.mark.parametrize(("run", "fixed"), rows)


# --- inputs ----------------------------------------------------------------------------------------------------------------------


class Random:
    """Normal float64 numbers, the same at every run."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, layout: str = "contiguous") -> Tensor:
        return lay_out(torch.randn(shape, generator=self.generator, dtype=torch.float64), layout)

    def table(self, *shape: int, frames: int, padding: bool = False) -> Tensor:
        return torch.randint(-1 if padding else 0, frames, shape, generator=self.generator)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in a layout, in the middle of memory that holds NaN, so that reading elsewhere does not go unseen.

    * contiguous
    * packed: the second of three slices of a projection (..., 3, H, D)
    * shifted: contiguous, at an odd multiple of an element
    * sliced: a part of a larger tensor, every second frame (dimension 1)
    * odd: the address and all strides but the last are odd multiples of an element
    * transposed: the last dimension is the slowest in memory
    * expanded0 to expanded3: stride 0 along that dimension (whose first element is kept)
    * expanded12: stride 0 along two dimensions, the second of size 1
    * ones: a number 1 with stride 0 everywhere, as ``out.sum().backward()`` gives
    """
    shape, last = x.shape, x.shape[-1]
    match layout:
        case "contiguous":
            room = _nan(x.numel() + 128)[64:-64].view(shape)
        case "shifted":
            room = _nan(x.numel() + 128)[63:-65].view(shape)
        case "packed":
            room = _nan(*shape[:-2], 3, *shape[-2:])[..., 1, :, :]
        case "sliced":
            steps = [2 if i == 1 else 1 for i in range(x.ndim - 1)]
            room = _nan(*(1 + s * step for s, step in zip(shape, steps, strict=False)), last)
            room = room[(*(slice(1, None, step) for step in steps), slice(None))]
        case "odd":
            rows = [s | 1 for s in shape[1:-1]]
            room = _nan(shape[0], *rows, (last + 2) | 1)[
                (slice(None), *(slice(s) for s in shape[1:-1]), slice(1, last + 1))
            ]
        case "transposed":
            room = _nan(last, *shape[:-1]).movedim(0, -1)
        case "expanded0" | "expanded1" | "expanded2" | "expanded3":
            dim = int(layout[-1])
            return lay_out(x.narrow(dim, 0, 1), "contiguous").expand(shape)
        case "expanded12":
            return lay_out(x[:, :1, :1], "contiguous").expand(*shape[:2], 2, *shape[3:])[:, :, :1]
        case "ones":
            return x.new_ones(()).expand(shape)
    return room.copy_(x)


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def rounded(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """``x`` in ``dtype``, if it is float64, with its strides and offset and with what lies around it."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    memory = memory.to(device, dtype if x.dtype == torch.float64 else x.dtype, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


# --- the tester ------------------------------------------------------------------------------------------------------------------


class Tester:
    """The float64 results and the yardstick of one call, with which :meth:`check` compares a backend.

    Args:
        operator: what is tested. inputs, options: its arguments, as :class:`Case` gives them.
        dtype, device: what float64 inputs are rounded to, and where everything runs.
        needs: the inputs that ask for a gradient; all by default.
        grad: the layout of the incoming gradient.
        name: what messages call the case.
    """

    __test__ = False  # for pytest: no test, whatever its name

    def __init__(
        self,
        operator: Operator,
        inputs: dict[str, Tensor],
        options: dict[str, Any],
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        needs: Iterable[str] | None = None,
        grad: str = "contiguous",
        name: str = "",
    ):
        self.operator = operator
        self.dtype = dtype
        self.name = f"{name} {SHORT[dtype]} {device}".strip()
        self.needs = tuple(inputs if needs is None else needs)
        self.inputs = {key: rounded(x, dtype, device) for key, x in inputs.items()}
        self.options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}

        wide = {key: x.double() for key, x in self.inputs.items()}
        shape = operator.reference(wide, self.options, None).shape
        self.grad = rounded(Random(1)(*shape, layout=grad), dtype, device)
        self.expected = self._differentiate(wide, self.grad.double(), self._formula(None))
        self.yardstick = self._differentiate(self.inputs, self.grad, self._formula(dtype))
        if dtype == torch.float32:
            with patch.object(reference, "_softmax", _softmax_from_logsumexp):
                gradients = self._differentiate(self.inputs, self.grad, self._formula(dtype))
            self.yardstick = gradients | {"out": self.yardstick["out"]}
        self.terms = operator.terms(wide, self.options, self.grad.double())

    @classmethod
    def of(cls, operator: Operator, case: Case, run: Run) -> Tester:
        case = replace(case, **case.small) if run.place == "interpreter" else case
        inputs, options = case.arguments()
        return cls(
            *(operator, inputs, options),
            dtype=run.dtype,
            device=run.device,
            needs=case.needs,
            grad=case.grad,
            name=case.id,
        )

    def check(self, backend: str) -> dict[str, Tensor]:
        """Run a backend and compare; returns ``out`` and the gradients, by the names of their inputs.

        Skips what the CUDA kernels refuse, for they say why; the other backends take every valid call.
        """
        forward_only = self._may_refuse(backend)
        if forward_only:
            self.needs = ()
        results = self._run(backend)
        for key, result in results.items():
            self._compare(self._title(backend, key), key, result)
        if self.grad.is_cuda and backend in ("cuda", "triton"):
            options = dict(self.operator.repeatable)
            first = self._run(backend, options) if options else results
            for key, again in self._run(backend, options).items():
                assert torch.equal(again, first[key]), f"{self._title(backend, key)} differs from run to run"
                if options:
                    self._compare(f"{self._title(backend, key)}, {options}", key, again)
        apart = {
            key: x for key, x in results.items() if key not in (*self.operator.together[1:], *self.operator.passed_on)
        }
        owners = [x.untyped_storage().data_ptr() for x in (*apart.values(), *self.inputs.values(), self.grad)]
        for key, result in apart.items():
            shared = result.numel() and owners.count(result.untyped_storage().data_ptr()) > 1
            assert not shared, f"{self._title(backend, key)} shares memory with another tensor"
        return results

    def _may_refuse(self, backend: str) -> bool:
        """Skips a call that the CUDA kernels refuse; returns whether they have no backward at all."""
        directions = directions_of(self.operator.name)
        for direction in directions:
            arguments = self.operator.arguments(self.inputs) | self.options
            _, refusals = backends_for(self.operator.name, **arguments, direction=direction)
            refusal = refusals[backend]
            if refusal is not None and refusal.endswith("has no cuda backward yet"):
                return True
            if refusal is not None:
                refuse = pytest.skip if backend == "cuda" else pytest.fail
                refuse(f"{self.operator.name} {direction}, {self.name}: {backend} refuses: {refusal}")
        return backend == "cuda" and "backward" not in directions  # others differentiate its parts

    def _run(self, backend: str, more: dict[str, Any] | None = None) -> dict[str, Tensor]:
        public = getattr(ops, self.operator.name)
        options = self.options | (more or {})
        call = lambda inputs: one_tensor(  # noqa: E731
            public(**self.operator.arguments(inputs), **options, backend=backend)
        )
        if set(self.needs) == set(self.inputs):
            return self._differentiate(self.inputs, self.grad, call)
        with _Asked(self.operator, self.needs):
            return self._differentiate(self.inputs, self.grad, call)

    def _formula(self, accumulate: torch.dtype | None) -> Callable[[dict], Tensor]:
        return lambda inputs: self.operator.reference(inputs, self.options, accumulate)

    def _differentiate(
        self, inputs: dict[str, Tensor], grad: Tensor, function: Callable[[dict], Tensor]
    ) -> dict[str, Tensor]:
        """``out``, and the gradient in every input that asks for one.

        An expanded or sliced input is a leaf as it is: its gradient is compared element by element, as the operator gives it, before
        autograd would add up what an expanded dimension shares (in a sum errors could cancel).
        """
        leaves = {key: x.detach().requires_grad_(key in self.needs) for key, x in inputs.items()}
        out = function(leaves)
        if not self.needs:
            return {"out": out}
        asked = [leaves[key] for key in self.needs]
        gradients = torch.autograd.grad(out, asked, grad, allow_unused=True, materialize_grads=True)
        return {"out": out.detach(), **dict(zip(self.needs, gradients, strict=True))}

    def _title(self, backend: str, key: str) -> str:
        return f"{self.operator.name} on {backend}, {self.name}: {key if key == 'out' else f'gradient of {key}'}"

    def _compare(self, title: str, key: str, result: Tensor) -> None:
        expected = self.expected[key]
        dtype = self.dtype if key == "out" else self.inputs[key].dtype
        assert result.dtype == dtype, f"{title} is {result.dtype}, needs {dtype}"
        assert result.shape == expected.shape, f"{title} has shape {tuple(result.shape)}, needs {tuple(expected.shape)}"
        if key in self.operator.passed_on:
            assert result.data_ptr() == self.grad.data_ptr(), f"{title} is not the incoming one"
        else:
            alike = key in self.operator.alike
            layout = (torch.empty_like(self.inputs[key]) if alike else torch.empty(expected.shape)).stride()
            as_needed = all(
                s == n or size == 1 for s, n, size in zip(result.stride(), layout, result.shape, strict=True)
            )
            assert as_needed, f"{title} has strides {result.stride()}, needs {layout}"
        if result.numel() == 0:
            return
        fits = expected.to(dtype).isfinite()  # others are sums that the dtype cannot hold
        assert torch.equal(result[~fits], expected[~fits].to(dtype)), (
            f"{title}: not infinite, expected {expected[~fits]}"
        )
        result, expected = (torch.where(fits, x, torch.zeros_like(x)) for x in (result, expected))
        assert result.isfinite().all(), f"{title} holds {int((~result.isfinite()).sum())} numbers that are not finite"
        error = result.double() - expected
        if key in self.terms:
            terms, accumulate = self.terms[key]
            eps = max(torch.finfo(d).eps for d in ((accumulate,) if accumulate else (dtype, self.dtype)))
            _within(title, "error", result, expected, error.abs(), 4 * eps * terms, "4 · eps · Σ|terms|")
            return
        eps = torch.finfo(dtype).eps
        least = 16 * eps if self.dtype == torch.float32 else 0.0
        yard = torch.where(fits, self.yardstick[key].double() - expected, 0.0)
        yard_max = torch.maximum(yard.abs().max(), least * expected.abs().max())
        yard_norm = torch.maximum(yard.norm(), least * expected.norm())
        bound = 2 * yard_max + eps * expected.abs().max()
        _within(title, "error", result, expected, error.abs(), bound, f"2 · {yard_max:.3g} + 1 ulp")
        norm, limit = error.norm(), 2 * yard_norm + eps * expected.norm()
        size = expected.norm().clamp(min=torch.finfo(torch.float64).tiny)
        assert norm <= limit, (
            f"{title}: relative L2 error {norm / size:.3g}, bound {limit / size:.3g} (2 · {yard_norm / size:.3g} + 1 ulp)"
        )


# A float32 logsumexp of 1e4 is rounded to 1e-3, which is then the relative error of P, and more of a gradient than is left
# of it: in float32, test_bad_input.py sees that no NaN comes of such logits.
LARGE_LOGITS = {"logits": 1e4, "dtypes": HALVES, "compiled": HALVES}
# Where a key has all of a row, what is left of its gradient is the rounding of Σ out · dout, which fused kernels subtract and
# the formula does not have: no gradients in float32.
STEEP_LOGITS = {"dtypes": HALVES, "compiled": HALVES}
STEEP_LOGITS_FLOAT32 = {"dtypes": (torch.float32,), "compiled": (torch.float32,), "needs": ()}


def _within(title: str, what: str, result: Tensor, expected: Tensor, error: Tensor, bound: Tensor, rule: str) -> None:
    """Element by element; the message shows the worst one."""
    if bool((error <= bound).all()):
        return
    flat = int((error - bound).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    limit = float(bound.expand_as(error).flatten()[flat])
    raise AssertionError(
        f"{title}: {what} {error[at]:.3g} at {at}, bound {limit:.3g} ({rule}); got {result[at]:.6g}, expected {expected[at]:.6g}, "
        f"max|expected| {expected.abs().max():.3g}"
    )


def _softmax_from_logsumexp(scores: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference._softmax``, by way of the rounded logsumexp and in powers of two (a GPU has no other exponential)."""
    scores = scores / math.log(2)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    total = (scores - peak).exp2().sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    logsumexp = (peak + total.log2()) * math.log(2)
    return (scores - logsumexp / math.log(2)).exp2(), logsumexp.squeeze(-1)


class _Asked(TorchDispatchMode):
    """Sees that a backward is asked for just the gradients that are needed, and makes no other."""

    def __init__(self, operator: Operator, needs: Iterable[str]):
        super().__init__()
        self.needs = [name in needs for name in operator.differentiable]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if function.namespace == "univid" and function._opname.endswith("_backward"):
            asked = next((a for a in args if isinstance(a, list)), None)
            if asked is None:  # a backward of one gradient, which is asked for or not called
                return results
            assert asked == self.needs, f"the backward is asked for {asked}, needs {self.needs}"
            made = [result.shape != (0,) for result in results]
            assert made == self.needs, f"the backward made gradients {made}, needs {self.needs}"
        return results


def one_key_terms(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> dict[str, tuple[Tensor, torch.dtype]]:
    """Attention to a single key: P = 1, so dS = dP - D = 0. What rounding leaves of it is of the float32 sums dP and D."""
    sums = 2 * scale * (grad * v).abs().sum(-1, keepdim=True)
    return {"q": (sums * k.abs(), torch.float32), "k": (sums * q.abs(), torch.float32)}
