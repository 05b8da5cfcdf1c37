"""Compiling before the clock starts: on all cores, into the caches that Triton and PyTorch keep on disk.

One kernel after the other, the configurations of all Triton kernels take longer to compile than all rows to measure.
"""

import os
import warnings
from itertools import product
from multiprocessing import TimeoutError, get_context

FEW = 3  # problems, for which processes do not pay
SHARES = 64  # of the work, or more: the longest of them decides when all is done
MOST = 16  # processes: each holds a problem on the GPU
DIRECTIONS = ("fwd", "bwd")
LONGEST = 150  # seconds, after which it goes on without


def compile_kernels(selected: list) -> None:
    """Run, in processes of their own, all that compiles once on each problem of ``selected``, a list of cases."""
    problems = dict.fromkeys(case.shape for case in selected if case.implementation.compiles)
    if len(problems) <= FEW:
        return
    parts = max(1, SHARES // (len(DIRECTIONS) * len(problems)))
    # By level: neighbours in time are of different operators, so that few compile the same kernel.
    each = product(sorted(problems, key=lambda shape: shape[1:]), DIRECTIONS, range(parts))
    tasks = [(*task, parts) for task in each]
    workers = min(MOST, max(1, (os.cpu_count() or 1) - 1), len(tasks))
    # Spawned: what peers do to the GPU as they are imported, a forked process could not use.
    with get_context("spawn").Pool(workers, _alone) as pool:
        try:
            pool.starmap_async(_compile, tasks, chunksize=1).get(LONGEST)
        except TimeoutError:
            warnings.warn("not all was compiled beforehand: the rest is compiled as it is met", stacklevel=1)


def _alone() -> None:
    """One thread for one process."""
    import torch

    torch._inductor.config.compile_threads = 1


def _compile(shape: tuple, direction: str, part: int, parts: int) -> None:
    """The part ``part`` of the configurations of each kernel that runs in a direction of a problem."""
    import torch

    from benchmarks.cases import cases
    from benchmarks.harness import Prepared
    from univid.kernels.triton.launch import Tuned

    def first(self, device, key, run):
        return self.configs(key)[0]

    def each_of_part(self, device, key, run):  # measures none: that takes the GPU for oneself
        import triton

        configs = self.configs(key)
        if (winner := self.remembered(device, key, configs)) is not None:
            configs = [winner]
        for config in configs[part::parts]:
            try:
                run(config)
            except triton.runtime.errors.OutOfResources:
                continue
        return configs[0]

    for case in cases():
        if case.implementation.compiles and case.shape == shape and case.direction == direction:
            try:
                problem = case.problem()
                Tuned._choose = first  # a backward's forward is another task's
                prepared = Prepared(problem, case.implementation, direction, problem.tensors)
                Tuned._choose = each_of_part
                prepared()
            except Exception:  # the row will say why
                torch.cuda.empty_cache()
    torch.cuda.empty_cache()
