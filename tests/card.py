"""Calls of the operators on a GPU: which kernels take them, and what a second run may differ in.

One type and one head dimension, so that every kernel is compiled once.
"""

import importlib.util
import time

import pytest
import torch

from tests.calls import OPERATOR, arguments
from univid.ops.explain import _OPERATORS, backends_for

CARD = {"device": "cuda", "dtype": torch.bfloat16, "H": 2, "N": 37, "D": 64}


def with_kernels(cases, *others):
    """Parametrises by ``case`` and ``backend``: those that have compiled kernels, and ``others``."""
    cuda = {c for c in cases if importlib.util.find_spec(f"univid.kernels.cuda.{_OPERATORS[OPERATOR[c]].module}")}
    rows = [
        (case, backend)
        for case in cases
        for backend in ("cuda", "triton", *others)
        if backend != "cuda" or case in cuda
    ]
    return pytest.mark.parametrize(("case", "backend"), rows)


def refusal(case, inputs, backend):
    """Why the backend does not take the call and its backward, or None."""
    directions = (backends_for(OPERATOR[case], **inputs, direction=d)[1][backend] for d in ("forward", "backward"))
    return next((reason for reason in directions if reason), None)


def need(case, inputs, backend):
    """A CUDA kernel may refuse a call, for it says why; the other backends take it."""
    if reason := refusal(case, inputs, backend):
        (pytest.skip if backend == "cuda" else pytest.fail)(f"{backend}: {reason}")


def need_memory(gigabytes):
    """That much is free, or becomes so as other processes end their tests."""
    until = time.monotonic() + 120
    while (free := torch.cuda.mem_get_info()[0] / 1e9) < gigabytes:
        if torch.cuda.mem_get_info()[1] / 1e9 < gigabytes:
            pytest.skip(f"{gigabytes} GB needed, and the card has no more than {free:.0f} GB free")
        assert time.monotonic() < until, (
            f"{gigabytes} GB needed, {free:.0f} GB free: what else holds the card's memory?"
        )
        time.sleep(0.5)


def on_card(case, seed=0, backend=None, **sizes):
    inputs = arguments(case, seed, **(CARD | sizes))
    if backend:
        need(case, inputs, backend)
    return inputs


def assert_equal(results, expected):
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


def assert_repeated(case, backend, results, expected):
    """The same bits; but the CUDA backward of pyramid_st_attn adds in any order, unless it is to be deterministic."""
    ordered = not (backend == "cuda" and "pyramid" in case)
    for name, x in expected.items():
        within = 0.0 if ordered or name == "out" else 0.02 * x.abs().max().item()
        torch.testing.assert_close(results[name], x, rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}")
