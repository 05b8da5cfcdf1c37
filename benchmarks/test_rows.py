"""Every row: an implementation of an operator on one shape, checked, then timed."""

import pytest
import torch

from benchmarks.harness import measure


def test_row(case, benchmark, clock, results):
    """Ours must be right wherever they can run. What a peer cannot do is noted, and no failure of ours."""
    failure = None
    try:
        row, samples = measure(case.problem(), case.implementation, case.direction)
    except Exception as error:
        failure = error
    if failure is not None:
        reason = _reason(failure)
        if "CUDA error" in reason:  # of this process nothing more can be measured
            pytest.exit(f"{case.group} {case.name}: {reason}", returncode=1)
        results.add(case, case.head | {"failure": reason})
        if case.implementation.backend is None or isinstance(failure, torch.OutOfMemoryError):
            del failure  # and with its traceback the tensors
            torch.cuda.empty_cache()
            pytest.xfail(reason)
        if reason.startswith("RuntimeError: backend: "):  # it says that it cannot run the call
            pytest.skip(reason)
        raise failure
    results.add(case, case.head | row)
    benchmark.extra_info.update(row)
    # The samples are the GPU's times: pytest-benchmark reads them off a clock that moves by each in turn.
    times = iter(samples)
    benchmark.pedantic(clock.advance, setup=lambda: ((next(times),), {}), rounds=len(samples))


def _reason(failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
