"""``temporal_conv``: every backend against float64, over kernel widths, layouts of the weight, bias and residual."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import reference, temporal_conv

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.temporal_conv(
        inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual"), accumulate
    )


CONV = Operator("temporal_conv", "temporal_conv", ("x", "weight", "bias"), _reference)


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    B: int = 2
    T: int = 5
    N: int = 37
    C: int = 40
    C_out: int = 24
    K: int = 3
    bias: bool = True
    residual: bool = True
    layout: str = "contiguous"  # of x and the residual
    channels_first: bool = False  # the weight lies as (C_out, C, K); by default as (C_out, K, C), viewed transposed

    def arguments(self):
        random = Random()
        inputs = {"x": random(self.B, self.T, self.N, self.C, layout=self.layout)}
        if self.channels_first:
            inputs["weight"] = random(self.C_out, self.C, self.K)
        else:
            inputs["weight"] = random(self.C_out, self.K, self.C).transpose(1, 2)
        if self.bias:
            inputs["bias"] = random(self.C_out)
        if self.residual:
            inputs["residual"] = random(self.B, self.T, self.N, self.C_out, layout=self.layout)
        return inputs, {}


SMALL = {"B": 1, "N": 7}
ONCE = {"interpreted": (FP32,), "small": SMALL}
TWICE = {"interpreted": (FP16, FP32), "small": SMALL}

CASES = [
    ConvCase(id="remainders", compiled=DTYPES, **TWICE),
    ConvCase(id="K1", K=1, **ONCE),
    ConvCase(id="K5", K=5, compiled=(BF16, FP32)),
    ConvCase(id="K7", K=7, T=12),
    ConvCase(id="K9", K=9, T=3, **ONCE),  # most taps lie outside
    ConvCase(id="T1", T=1, **ONCE),
    ConvCase(id="one-token", N=1),
    ConvCase(id="one-channel", C=1, C_out=1),
    ConvCase(id="square", C=64, C_out=64, N=64, T=8, compiled=DTYPES),
    ConvCase(id="no-bias", bias=False, **ONCE),
    ConvCase(id="no-residual", residual=False, **ONCE),
    ConvCase(id="alone", bias=False, residual=False),
    ConvCase(id="channels-first", channels_first=True, compiled=(BF16, FP32), **ONCE),
    ConvCase(id="sliced", layout="sliced", **ONCE),
    ConvCase(id="odd", layout="odd"),
    ConvCase(id="expanded-clips", layout="expanded0"),
    ConvCase(id="grad-ones", grad="ones"),
    ConvCase(id="grad-transposed", grad="transposed", **ONCE),
    ConvCase(id="needs-nothing", needs=()),
    ConvCase(id="needs-x", needs=("x",), **ONCE),
    ConvCase(id="needs-weight", needs=("weight",)),
    ConvCase(id="needs-bias", needs=("bias",), **ONCE),
]  # fmt: skip


@every_run(CONV, CASES)
def test_like_float64(case: ConvCase, run: Run):
    Tester.of(CONV, case, run).check(run.backend)


@drawn_runs(CONV, (BF16, 3), (FP32, 5))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (taps,) = fixed
    draw = lambda name, low, high: data.draw(st.integers(low, high), label=name)  # noqa: E731
    sizes = {name: draw(name, 1, high) for name, high in (("B", 3), ("T", 9), ("N", 200))}  # kernels know C and C_out
    inputs, options = ConvCase(id="drawn", K=taps, **sizes).arguments()
    Tester(CONV, inputs, options, dtype=run.dtype, device=run.device, name=str(sizes)).check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_gradcheck(backend: str, channels_first: bool):
    inputs, _ = ConvCase(id="tiny", T=3, N=2, C=3, C_out=2, channels_first=channels_first).arguments()
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda x, w, b, r: temporal_conv(x, w, b, residual=r, backend=backend), leaves)


@every_run(CONV, [Case(id="empty")])
@pytest.mark.parametrize(("clips", "tokens"), [(0, 3), (2, 0)], ids=["B0", "N0"])
def test_empty(case: Case, run: Run, clips: int, tokens: int):
    made = {"dtype": run.dtype, "device": run.device, "requires_grad": True}
    x, weight, bias = torch.randn(clips, 4, tokens, 8, **made), torch.randn(6, 8, 3, **made), torch.randn(6, **made)
    out = temporal_conv(x, weight, bias, backend=run.backend)
    assert out.shape == (clips, 4, tokens, 6)
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()
