"""``concat``: every backend against torch.cat, bit for bit, over widths and layouts."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import concat, reference

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.concat(inputs["x"], inputs["y"])


CONCAT = Operator("concat", "concat", ("x", "y"), _reference)


@dataclass(frozen=True, kw_only=True)
class ConcatCase(Case):
    B: int = 2
    T: int = 3
    N: int = 5
    C1: int = 40
    C2: int = 24
    layout: str = "contiguous"
    layout_y: str = "contiguous"

    def arguments(self):
        random, shape = Random(), (self.B, self.T, self.N)
        x, y = random(*shape, self.C1, layout=self.layout), random(*shape, self.C2, layout=self.layout_y)
        return {"x": x, "y": y}, {}


BOTH = {"interpreted": (FP16, FP32)}
ONCE = {"interpreted": (FP32,)}

CASES = [
    ConcatCase(id="remainders", compiled=DTYPES, **BOTH),
    ConcatCase(id="one-channel", C1=1, **ONCE),
    ConcatCase(id="odd-channels", C1=37, C2=3, **ONCE),
    ConcatCase(id="wide", C1=1280, C2=640, N=37, compiled=DTYPES),
    ConcatCase(id="many-rows", T=9, N=371, C1=328, C2=320, compiled=DTYPES, **ONCE),
    ConcatCase(id="sliced", layout="sliced", layout_y="odd", **ONCE),
    ConcatCase(id="odd", layout="odd", **ONCE),
    ConcatCase(id="shifted", layout_y="shifted"),
    ConcatCase(id="expanded", layout="expanded0", layout_y="expanded1", **ONCE),
    ConcatCase(id="grad-ones", grad="ones", **ONCE),
    ConcatCase(id="grad-transposed", grad="transposed", **ONCE),
    ConcatCase(id="grad-sliced", grad="sliced"),
    ConcatCase(id="needs-nothing", needs=(), **ONCE),
    ConcatCase(id="needs-x", needs=("x",), **ONCE),
    ConcatCase(id="needs-y", needs=("y",)),
]  # fmt: skip


@every_run(CONCAT, CASES)
def test_like_cat(case: ConcatCase, run: Run):
    tester = Tester.of(CONCAT, case, run)
    for name, result in tester.check(run.backend).items():
        assert torch.equal(result.double(), tester.expected[name])


@drawn_runs(CONCAT, (BF16, 40, 8), (FP32, 24, 3))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    widths = dict(zip(("C1", "C2"), fixed, strict=True))
    sizes = {name: data.draw(st.integers(1, 40), label=name) for name in "BTN"}
    inputs, options = ConcatCase(id="drawn", **widths, **sizes).arguments()
    Tester(CONCAT, inputs, options, dtype=run.dtype, device=run.device, name=str(sizes)).check(run.backend)


def test_another_dtype():
    with pytest.raises(TypeError, match=r"y: got torch.float16, needs x's dtype, torch.float32"):
        concat(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4, dtype=torch.float16))
