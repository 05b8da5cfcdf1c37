"""How a time is taken: the median of cold-cache runs; under 10 ms as a CUDA graph, free of launch gaps.

A Python operator costs some tens of microseconds of CPU time, its backward by autograd up to a millisecond where the
CPU is slow, which hides a short kernel: what counts for it is the replay of a graph in which the call stands once for
each of several input sets, so that no replay finds its inputs in the L2 cache.
"""

from collections.abc import Callable, Sequence

import torch
from triton.testing import do_bench

SHORT_MS = 10.0  # what a replay is reported for
MAYBE_SHORT_MS = 12.0  # an eager time under which the kernels may be as short, the rest being the host's
_REPLAYED_MS = 200.0  # in all, of one measurement
_GRAPH_BYTES = 200 << 20  # inputs of one graph replay: more than three times the L2 of an H200


def eager_ms(run: Callable[[], object], rep_ms: int = 20) -> list[float]:
    """Milliseconds of each of several ``run()``, the L2 cache being flushed before each (triton.testing.do_bench)."""
    return do_bench(run, warmup=5, rep=rep_ms, return_mode="all")


def graph_ms(runs: Sequence[Callable[[], object]], stream: torch.cuda.Stream, replays: int = 15) -> list[float]:
    """Milliseconds of one of ``runs`` in each of several replays of a CUDA graph that holds them all; fewer where they
    are long.

    Whatever autograd needs must have been recorded on ``stream``: a backward runs where its forward ran.
    """
    with torch.cuda.stream(stream):
        for run in runs:
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in runs:
                run()
        graph.replay()
        times: list[float] = []
        while len(times) < replays and (len(times) < 5 or sum(times) * len(runs) < _REPLAYED_MS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / len(runs))
    return times


def input_sets(bytes_per_set: int) -> int:
    """How many input sets one graph rotates through."""
    return max(2, min(12, -(-_GRAPH_BYTES // max(bytes_per_set, 1))))
