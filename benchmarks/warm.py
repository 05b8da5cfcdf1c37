"""Compiling before the clock starts: on all cores, into the caches that Triton and PyTorch keep on disk.

One kernel after the other, the configurations of all Triton kernels take longer to compile than all rows to measure.
"""

import os
import warnings
from multiprocessing import TimeoutError, get_context

FEW = 3  # problems, for which processes do not pay
MOST = 16  # processes: each holds a problem on the GPU
LONGEST = 150  # seconds, after which it goes on without


def compile_kernels(selected: list) -> None:
    """Run, in processes of their own, all that compiles once on each problem of ``selected``, a list of cases."""
    problems = dict.fromkeys(case.shape for case in selected if case.implementation.compiles)
    if len(problems) <= FEW:
        return
    # By level: neighbours in time are of different operators, so that few compile the same kernel.
    tasks = sorted(problems, key=lambda shape: shape[1:])
    workers = min(MOST, max(1, (os.cpu_count() or 1) - 1), len(tasks))
    # Spawned: what peers do to the GPU as they are imported, a forked process could not use.
    with get_context("spawn").Pool(workers, _alone) as pool:
        try:
            pool.map_async(_compile, tasks, chunksize=1).get(LONGEST)
        except TimeoutError:
            warnings.warn("not all was compiled beforehand: the rest is compiled as it is met", stacklevel=1)


def _alone() -> None:
    """One thread for one process; and every configuration runs once: to measure them takes the GPU for oneself."""
    import torch

    from univid.kernels.triton.launch import Tuned

    torch._inductor.config.compile_threads = 1
    Tuned._measure = _run_each


def _compile(shape: tuple) -> None:
    import torch

    from benchmarks.cases import cases
    from benchmarks.harness import Prepared

    for case in cases():
        if case.implementation.compiles and case.shape == shape:
            try:
                problem = case.problem()
                Prepared(problem, case.implementation, case.direction, problem.tensors)()
            except Exception:  # the row will say why
                torch.cuda.empty_cache()
    torch.cuda.empty_cache()


def _run_each(self, device, key, configs, run):
    import triton

    for config in configs:
        try:
            run(config)
        except triton.runtime.errors.OutOfResources:
            continue
    return configs[0]
