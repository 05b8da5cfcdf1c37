"""``add_bias``: every backend against float64, over widths and layouts."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import add_bias, reference

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.add_bias(inputs["x"], inputs["bias"], accumulate)


def _terms(inputs: dict, options: dict, grad: Tensor) -> dict[str, tuple[Tensor, torch.dtype | None]]:
    """The bias's gradient is a plain sum, added in float32."""
    return {"bias": (grad.abs().sum((0, 1, 2)), None)}


ADD_BIAS = Operator("add_bias", "add_bias", ("x", "bias"), _reference, terms=_terms, passed_on=("x",))


@dataclass(frozen=True, kw_only=True)
class BiasCase(Case):
    B: int = 2
    T: int = 3
    N: int = 5
    C: int = 40
    layout: str = "contiguous"
    wide: bool = False  # a float32 bias

    def arguments(self):
        random = Random()
        bias = random(self.C)
        return {
            "x": random(self.B, self.T, self.N, self.C, layout=self.layout),
            "bias": bias.float() if self.wide else bias,
        }, {}


BOTH = {"interpreted": (FP16, FP32)}
ONCE = {"interpreted": (FP32,)}

CASES = [
    BiasCase(id="remainders", compiled=DTYPES, **BOTH),
    BiasCase(id="one-channel", C=1, **ONCE),
    BiasCase(id="odd-channels", C=37, **ONCE),
    BiasCase(id="wide", C=1280, N=37, compiled=DTYPES),
    BiasCase(id="many-rows", T=9, N=371, C=328, compiled=DTYPES, **ONCE),
    BiasCase(id="float32-bias", wide=True, dtypes=(BF16, FP16), interpreted=(FP16,)),
    BiasCase(id="sliced", layout="sliced", **ONCE),
    BiasCase(id="odd", layout="odd", **ONCE),
    BiasCase(id="shifted", layout="shifted"),
    BiasCase(id="expanded", layout="expanded0", **ONCE),
    BiasCase(id="grad-ones", grad="ones", needs=("bias",), **ONCE),
    BiasCase(id="grad-sliced", grad="sliced", needs=("bias",)),
    BiasCase(id="needs-nothing", needs=(), **ONCE),
    BiasCase(id="needs-bias", needs=("bias",), **ONCE),
]  # fmt: skip


@every_run(ADD_BIAS, CASES)
def test_like_float64(case: BiasCase, run: Run):
    Tester.of(ADD_BIAS, case, run).check(run.backend)


@drawn_runs(ADD_BIAS, (BF16, 40), (FP32, 24))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (channels,) = fixed
    sizes = {name: data.draw(st.integers(1, 40), label=name) for name in "BTN"}
    inputs, options = BiasCase(id="drawn", C=channels, **sizes).arguments()
    Tester(ADD_BIAS, inputs, options, dtype=run.dtype, device=run.device, name=str(sizes)).check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str):
    inputs, _ = BiasCase(id="tiny", B=1, T=2, N=2, C=3).arguments()
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda x, bias: add_bias(x, bias, backend=backend), leaves)


def test_bias_of_another_dtype():
    with pytest.raises(TypeError, match=r"bias: got torch.float16, needs x's dtype, torch.bfloat16, or torch.float32"):
        add_bias(torch.randn(1, 2, 3, 4, dtype=torch.bfloat16), torch.randn(4, dtype=torch.float16))
