"""Settings of the process that operators hold for a moment: whatever they find, they put back."""

import threading
from types import SimpleNamespace

import pytest
import torch

from univid.ops.settings import deterministic_algorithms, ieee_convolutions


def test_the_deterministic_flag_is_restored():
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True), deterministic_algorithms(False):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # the user's setting stands
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_deterministic_flag_in_threads():
    """As long as one backward needs it, it is on, whoever leaves first."""
    entered, leave = threading.Event(), threading.Event()

    def first():
        with deterministic_algorithms(True):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with deterministic_algorithms(True):
        leave.set()
        thread.join()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_memory_is_not_filled():
    """What deterministic=True asks for is the operator's; a process that asks for both has both."""
    with deterministic_algorithms(True):
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_algorithms(True):
            assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def precisions():
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


def test_tf32_outlives_threads():
    """Convolutions in float32 put PyTorch's setting back, whichever of them ends last."""
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    before = precisions()
    first, second = ieee_convolutions(x), ieee_convolutions(x)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert precisions() == before and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("given", [("ieee", "tf32"), ("tf32", "ieee")])
def test_tf32_by_operator(given):
    """As PyTorch's newer setting has it, beside which the older one cannot be read."""
    cudnn = torch.backends.cudnn
    before = precisions()
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = given
    try:
        with ieee_convolutions(SimpleNamespace(is_cuda=True, dtype=torch.float32)):
            assert precisions() == ("ieee", given[1])
        assert precisions() == given
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def test_tf32_is_of_no_other_tensors():
    for x in (torch.zeros(1), SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)):
        with ieee_convolutions(x):
            assert torch.backends.cudnn.allow_tf32
