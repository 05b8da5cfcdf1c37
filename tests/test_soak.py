"""``python -m tests.soak``, a few calls of it: that what it draws are calls, and that it sees what is wrong."""

import pytest
import torch

from tests import soak
from univid.ops import eager


@pytest.mark.parametrize("operator", soak.OPERATORS)
def test_random_calls(operator):
    assert [soak.run([operator], "torch", index) for index in range(8)] == [None] * 8


@pytest.mark.parametrize("operator", soak.OPERATORS)
def test_a_wrong_result_is_seen(operator, monkeypatch):
    backend = eager.BACKENDS["torch"][operator]
    forward = backend.forward

    def wrong(call):
        out, *others = forward(call)
        out.view(-1)[0] += 1
        return out, *others

    monkeypatch.setattr(backend, "forward", wrong)
    said = soak.run([operator], "torch", 3)
    assert "call 3" in said and "refused" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="the calls would run")
def test_a_backend_that_takes_none():
    assert "50 calls refused, the last one: " in soak.run(["temporal"], "cuda", 0)
