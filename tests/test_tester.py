"""What every operator is compared by."""

import math

import pytest
import torch

from tests.test_dual_stream import DUAL, DualCase
from tests.tester import Run, Tester


def test_what_a_dtype_cannot_hold():
    """A sum beyond float16 is infinite, and nothing else is."""
    run = Run("torch", "cpu", torch.float16)
    tester = Tester.of(DUAL, DualCase(id="small", queries=(3,), H=1, D=8), run)
    out = tester.check(run.backend)["out"]
    tester.expected["out"].view(-1)[0] = -1e6
    with pytest.raises(AssertionError, match="not infinite"):
        tester._compare("out", "out", out)
    out.view(-1)[0] = math.inf
    with pytest.raises(AssertionError, match="not infinite"):
        tester._compare("out", "out", out)
    out.view(-1)[0] = -math.inf
    tester._compare("out", "out", out)
    out.view(-1)[1] = math.inf
    with pytest.raises(AssertionError, match="1 numbers that are not finite"):
        tester._compare("out", "out", out)
