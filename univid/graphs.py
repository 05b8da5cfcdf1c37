"""A function of fixed shapes as a CUDA graph, one launch in place of thousands; and a host that stays beside the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from univid.ops import ReferenceFrames
from univid.ops.dispatch import wanted_by_environment

# What a sampler's conditions have in common with others: a graph depends on which one it is, and never writes to it.
SHARED = ReferenceFrames


class Graphed:
    """A function of CUDA tensors, replayed.

    The first call runs as it is, so that kernels are compiled and measured; the second is captured, and what follows are replays on
    copies of the inputs. Shapes must not change, and a result holds until the next call.

    Args:
        function: called as ``function(*inputs, conditions)``. conditions: nested tensors, which become the graph's own, and
            constants (:func:`leaves`); :data:`SHARED` ones are constants. :meth:`load` replaces the tensors. key: what the caller knows
            it by, its :func:`graph_key`.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], conditions: Any, key: object = None):
        self.function, self.conditions, self.key = function, conditions, key
        self.ran = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.outputs: Sequence[Tensor] = ()

    def load(self, conditions: Any) -> None:
        """Other conditions, of the same :func:`signature`."""
        for own, x in zip(leaves(self.conditions, SHARED), leaves(conditions, SHARED), strict=True):
            if isinstance(own, Tensor):
                own.copy_(x)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if not self.ran:
            outputs = self.function(*inputs, self.conditions)
            self.ran = True
            return outputs
        with torch.cuda.device(inputs[0].device):  # captures and replays go to the current one
            if self.graph is None:
                self.graph = self._capture(inputs)
            for own, x in zip(self.inputs, inputs, strict=True):
                own.copy_(x)
            self.graph.replay()
        return self.outputs

    def _capture(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self.inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_capture_stream(inputs[0].device)):
            self.outputs = self.function(*self.inputs, self.conditions)
        return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for a device, as PyTorch has one for the first: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


def graph_key(module: torch.nn.Module, *arguments: Any) -> tuple[object, ...]:
    """What a graph of ``module`` on ``arguments`` depends on: while it is the same, the graph may be replayed."""
    # New weights in the old storage are read by a replay; weights that were moved, cast or replaced lie elsewhere.
    weights = tuple(parameter.data_ptr() for parameter in module.parameters())
    return (module, module.training, weights, _modes(), signature(arguments, SHARED))


def _modes() -> tuple[object, ...]:
    """What besides the arguments decides which kernels run; and inference mode, whose tensors cannot be written outside of it."""
    return (
        wanted_by_environment(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.is_inference_mode_enabled(),
    )


class Pace:
    """Keeps the host at most a step ahead of the device.

    The device never waits for the host, yet a progress bar says what is done, and Ctrl-C ends it. On the CPU there is nothing to do.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.last: torch.cuda.Event | None = None

    def step(self) -> None:
        """All of a step has been launched: wait for the one before it."""
        if self.device.type != "cuda":
            return
        launched = torch.cuda.Event(blocking=True)  # the host sleeps
        launched.record(torch.cuda.current_stream(self.device))
        if self.last is not None:
            self.last.synchronize()
        self.last = launched


# --- nested inputs ----------------------------------------------------------------------------------------------------


def signature(value: Any, whole: type | tuple[type, ...] = ()) -> tuple[object, ...]:
    """Of tensors the shape, dtype and device, of any other of the :func:`leaves` itself."""
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves(value, whole))


def leaves(value: Any, whole: type | tuple[type, ...] = ()) -> Iterator[Any]:
    """What is in nested lists, tuples, dicts (their keys too) and dataclasses, but for the classes ``whole``."""
    parts = None if isinstance(value, whole) else _parts(value)
    if parts is None:
        yield value
        return
    for part in parts:
        yield from leaves(part, whole)


def cloned(value: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: cloned(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(cloned, value))
    fields = _fields(value)
    return dataclasses.replace(value, **{name: cloned(part) for name, part in fields.items()}) if fields else value


def _parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Mapping):
        return value.items()
    return value if isinstance(value, (list, tuple)) else _fields(value).values() or None


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass, by name: those that tell one from another."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}
