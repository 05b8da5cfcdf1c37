"""Forward and backward of a training step as CUDA graphs: one launch where the host would need longer than the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.sharding import Shard
from univid.graphs import cloned, leaves, signature


@dataclass
class _Kind:
    """Steps that differ in nothing but the numbers in tensors."""

    trained: list[int]  # the parameters that get a gradient
    graph: torch.cuda.CUDAGraph | None = None
    inputs: Any = None  # the graph's own
    loss: Tensor | None = None


class StepGraphs:
    """A function that leaves gradients, replayed; gradients are added to what is there, as by ``backward``.

    The first call of a kind runs as it is, so that kernels are compiled and measured; the second is captured, and what follows
    are replays on copies of the inputs. The kinds share their memory, and one set of gradients.

    Args:
        function: computes a loss of nested tensors and constants (:func:`univid.graphs.leaves`), and its gradients. Whatever
            tensors it reads beside these stay where they are.
        shards: of the parameters that are trained.
    """

    def __init__(self, function: Callable[[Any], Tensor], shards: Sequence[Shard], mesh: DeviceMesh):
        self.function, self.shards, self.mesh = function, shards, mesh
        self.kinds: dict[Hashable, _Kind] = {}
        self.gradients: list[Any] = []  # where graphs write: one for each shard
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, inputs: Any) -> Tensor:
        key = signature(inputs)
        kind = self.kinds.get(key)
        if kind is None:
            loss = self._run(inputs)
            self.kinds[key] = _Kind([i for i, shard in enumerate(self.shards) if shard.parameter.grad is not None])
            return loss
        self._hand_over(kind.trained)
        if kind.graph is None:
            kind.inputs = cloned(inputs)
            self._capture(kind)
        for own, x in zip(leaves(kind.inputs), leaves(inputs), strict=True):
            if isinstance(own, Tensor):
                own.copy_(x, non_blocking=True)
        assert kind.graph is not None and kind.loss is not None
        kind.graph.replay()
        return kind.loss.clone()

    def _run(self, inputs: Any) -> Tensor:
        """As it is, but on the stream of the captures: what autograd keeps of a parameter belongs to a stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.function(inputs)
        current.wait_stream(self.stream)
        return loss

    def _capture(self, kind: _Kind) -> None:
        kind.graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's and those that read data, may go on calling CUDA.
        with torch.cuda.graph(kind.graph, self.pool, self.stream, capture_error_mode="thread_local"):
            kind.loss = self.function(kind.inputs)

    @torch.no_grad()
    def _hand_over(self, trained: Sequence[int]) -> None:
        """Put the gradients so far where the graphs add theirs."""
        if not self.gradients:
            self.gradients = [shard.whole(torch.zeros_like(shard.local), self.mesh) for shard in self.shards]
        fresh = []
        for index in trained:
            parameter, own = self.shards[index].parameter, self.gradients[index]
            if parameter.grad is None:
                fresh.append(own.to_local())
            elif parameter.grad is not own:
                gradient: Any = parameter.grad
                own.to_local().copy_(gradient.to_local())
            parameter.grad = own
        if fresh:
            torch._foreach_zero_(fresh)
