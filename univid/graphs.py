"""A function of fixed shapes as a CUDA graph: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graphed:
    """A function of CUDA tensors, replayed.

    The first call runs as it is, so that kernels are compiled and measured; the second is captured, and what follows are replays on
    copies of the arguments. Shapes must not change, and a result holds until the next call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]):
        self.function = function
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: list[Tensor] = []
        self.outputs: Sequence[Tensor] = ()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        self.calls += 1
        if self.calls == 1:
            return self.function(*inputs)
        if self.calls == 2:
            self.inputs = [x.clone() for x in inputs]
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x)
        self.graph.replay()
        return self.outputs
