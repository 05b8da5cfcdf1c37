"""A function of fixed shapes as a CUDA graph, one launch in place of thousands; and a host that stays beside the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from univid.ops.dispatch import wanted_by_environment


class Graphed:
    """A function of CUDA tensors, replayed.

    The first call runs as it is, so that kernels are compiled and measured; the second is captured, and what follows are replays on
    copies of the inputs. Shapes must not change, and a result holds until the next call.

    Args:
        function: called as ``function(*inputs, conditions)``. conditions: nested lists, tuples and dicts of tensors, which become the
            graph's own, and of constants. :meth:`load` replaces the tensors. key: what the caller knows it by, its
            :func:`graph_key`.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], conditions: Any, key: object = None):
        self.function, self.conditions, self.key = function, conditions, key
        self.ran = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.outputs: Sequence[Tensor] = ()

    def load(self, conditions: Any) -> None:
        """Other conditions, of the same :func:`signature`."""
        for own, x in zip(leaves(self.conditions), leaves(conditions), strict=True):
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
    return (module, weights, _modes(), signature(arguments))


def signature(value: Any) -> tuple[object, ...]:
    """Of tensors the shape, dtype and device, of anything else itself."""
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves(value))


def leaves(value: Any) -> Iterator[Any]:
    """What is in nested lists, tuples and dicts, the dicts' keys too."""
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        yield value
        return
    for part in value:
        yield from leaves(part)


def _modes() -> tuple[object, ...]:
    """What besides the arguments decides which kernels run; and inference mode, whose tensors cannot be written outside of it."""
    return (
        wanted_by_environment(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
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
