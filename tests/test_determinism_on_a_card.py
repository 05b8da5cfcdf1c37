"""The operators on a GPU: the same bits from run to run, all of every result is written, and tables that only the device reads."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.calls import OPERATORS, B, T, apply, differentiate
from tests.card import assert_equal, assert_repeated, need, on_card, with_kernels
from univid.ops import ReferenceFrames


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-raw"], "torch", "reference")
def test_bit_equal_from_run_to_run(case, backend, monkeypatch):
    """With the flag set at the forward, and with ``deterministic=True``."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    inputs = on_card(case, backend=backend, T=8, N=150)

    def flagged(inputs):
        torch.use_deterministic_algorithms(True)
        try:
            return apply(case, inputs, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)

    first = differentiate(case, inputs, flagged)
    assert_equal(differentiate(case, inputs, flagged), first)
    if "pyramid" in case:
        first = differentiate(case, inputs, backend=backend, deterministic=True)
        assert_equal(differentiate(case, inputs, backend=backend, deterministic=True), first)


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-window", "pyramid-raw"])
def test_everything_is_written(case, backend):
    """Memory that operators ask for comes as NaN. (So it does while PyTorch is deterministic, but then the backward of
    pyramid_st_attn is another.)"""
    inputs = on_card(case, backend=backend)
    expected = differentiate(case, inputs, backend=backend)
    filled = []

    def with_nan(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point() or x.dtype == torch.uint8:  # bytes that are all ones are NaN, too
                filled.append(x.fill_(torch.nan if x.is_floating_point() else 255))
            return x

        return made

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, with_nan(getattr(owner, name))))
        results = differentiate(case, inputs, backend=backend)
    outputs = 2 if case == "sum" else 1
    assert any(x.numel() * outputs == results["out"].numel() for x in filled), "the output is other memory"
    assert_repeated(case, backend, results, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(4,), (T, 4), (B, T, 4)], ids=str)
@with_kernels(["pyramid"], "torch", "reference")
def test_raw_entries_out_of_range(case, backend, shape, dtype, monkeypatch):
    """In a raw table on a card they are skipped like -1, also those beyond 32 bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    clean = torch.randint(T, shape, generator=torch.Generator().manual_seed(0))
    junk = clean.clone()
    wide = [2**40, 2**32, -(2**32) + 1, 2**62] if dtype == torch.int64 else [2**31 - 1, -(2**31)]
    for i, entry in enumerate([T, -2, 10**6, *wide] * 2):
        clean.view(-1)[3 * i % clean.numel()] = -1
        junk.view(-1)[3 * i % clean.numel()] = entry
    inputs = on_card(case) | {"refs": junk.to("cuda", dtype)}
    need(case, inputs, backend)
    results = differentiate(case, inputs, backend=backend, deterministic=True)
    padded = inputs | {"refs": clean.to("cuda", dtype)}
    assert_equal(results, differentiate(case, padded, backend=backend, deterministic=True))
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.gpu
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@with_kernels(["pyramid"], "torch", "reference")
def test_unreferenced_frames(case, backend, equal, raw):
    """Their gradients are exactly zero, those of the others are not."""
    table = torch.tensor([[1, 3]] * T if equal else [[1, 3], [3, 3], [1, 1], [3, 1], [1, 3]])
    inputs = on_card(case) | {"refs": table.cuda() if raw else ReferenceFrames.from_table(table, T)}
    need(case, inputs, backend)
    results = differentiate(case, inputs, backend=backend)
    for name in "kv":
        assert results[name][:, [1, 3]].any() and not results[name][:, [0, 2, 4]].any()
