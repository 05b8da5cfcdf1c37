"""``geglu``: every backend against float64, over widths, layouts and the tails of the distribution."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import geglu, reference

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.geglu(inputs["x"], accumulate)


GEGLU = Operator("geglu", "geglu", ("x",), _reference)


@dataclass(frozen=True, kw_only=True)
class GegluCase(Case):
    B: int = 2
    T: int = 3
    N: int = 5
    C: int = 40
    scale: float = 1.0
    layout: str = "contiguous"

    def arguments(self):
        return {"x": self.scale * Random()(self.B, self.T, self.N, 2 * self.C, layout=self.layout)}, {}


BOTH = {"interpreted": (FP16, FP32)}
ONCE = {"interpreted": (FP32,)}

CASES = [
    GegluCase(id="remainders", compiled=DTYPES, **BOTH),
    GegluCase(id="one-channel", C=1, **ONCE),
    GegluCase(id="odd-channels", C=37, **ONCE),
    GegluCase(id="wide", C=1280, N=37, compiled=DTYPES),
    GegluCase(id="wide-remainder", C=328, N=37),
    GegluCase(id="tails", scale=8.0, compiled=DTYPES, **BOTH),  # where Φ is 0 or 1
    GegluCase(id="sliced", layout="sliced", **ONCE),
    GegluCase(id="odd", layout="odd", **ONCE),
    GegluCase(id="shifted", layout="shifted"),
    GegluCase(id="expanded", layout="expanded0", **ONCE),
    GegluCase(id="grad-ones", grad="ones", **ONCE),
    GegluCase(id="grad-transposed", grad="transposed", **ONCE),
    GegluCase(id="grad-sliced", grad="sliced"),
    GegluCase(id="needs-nothing", needs=(), **ONCE),
]  # fmt: skip


@every_run(GEGLU, CASES)
def test_like_float64(case: GegluCase, run: Run):
    Tester.of(GEGLU, case, run).check(run.backend)


@drawn_runs(GEGLU, (BF16, 40), (FP32, 24))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (channels,) = fixed
    sizes = {name: data.draw(st.integers(1, 40), label=name) for name in "BTN"}
    inputs, options = GegluCase(id="drawn", C=channels, **sizes).arguments()
    Tester(GEGLU, inputs, options, dtype=run.dtype, device=run.device, name=str(sizes)).check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str):
    inputs, _ = GegluCase(id="tiny", B=1, T=2, N=2, C=3).arguments()
    assert torch.autograd.gradcheck(lambda x: geglu(x, backend=backend), inputs["x"].requires_grad_())


def test_odd_halves():
    with pytest.raises(ValueError, match=r"x: got shape \(1, 2, 3, 5\), needs .* an even last dimension"):
        geglu(torch.randn(1, 2, 3, 5))
