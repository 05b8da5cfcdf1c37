"""``group_norm_silu``: every backend against float64, over widths of groups, dtypes of the affine parameters and large means."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import group_norm_silu, reference

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    o = options
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return reference.group_norm_silu(x, o["num_groups"], weight, bias, o["eps"], o["silu"], accumulate)[0]


NORM = Operator("group_norm_silu", "group_norm", ("x", "weight", "bias"), _reference)


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    M: int = 3
    N: int = 37
    groups: int = 4
    width: int = 10  # channels of a group
    silu: bool = True
    wide_affine: bool = False  # float32 weight and bias, whatever x is
    mean: float = 0.0
    std: float = 1.0
    layout: str = "contiguous"

    def arguments(self):
        random = Random()
        channels = self.groups * self.width
        x = random(self.M, self.N, channels, layout=self.layout)
        if self.mean or self.std != 1:
            x.mul_(self.std).add_(self.mean)
        weight, bias = random(channels), random(channels)
        if self.wide_affine:
            weight, bias = weight.float(), bias.float()
        options = {"num_groups": self.groups, "eps": 1e-5, "silu": self.silu}
        return {"x": x, "weight": weight, "bias": bias}, options


ONCE = {"interpreted": (FP32,)}
TWICE = {"interpreted": (FP16, FP32)}

CASES = [
    NormCase(id="remainders", compiled=DTYPES, **TWICE),
    NormCase(id="no-silu", silu=False, compiled=(BF16, FP32), **ONCE),
    NormCase(id="width1", width=1, groups=7),
    NormCase(id="width20", width=20, groups=32, N=21, compiled=(BF16, FP32)),
    NormCase(id="width40", width=40, groups=3, **ONCE),
    NormCase(id="one-group", groups=1, width=24, **ONCE),
    NormCase(id="one-token", N=1, width=20),
    NormCase(id="long", M=2, N=1500, groups=8, compiled=DTYPES),
    NormCase(id="wide", M=2, N=300, groups=32, width=40),
    NormCase(id="float32-affine", wide_affine=True, interpreted=(FP16,)),
    NormCase(id="large-mean", mean=100.0, std=0.1, compiled=DTYPES, **ONCE),
    NormCase(id="large-mean-long", M=1, N=3000, mean=100.0, std=0.1, compiled=DTYPES),
    # the CUDA kernels': groups that begin anywhere in 16 bytes, blocks of unequal rows, a backward that reads some twice
    NormCase(id="width3", width=3, groups=8, compiled=(BF16, FP16)),
    NormCase(id="width80", M=1, N=45, width=80, groups=2),
    NormCase(id="unequal-blocks", M=5, N=501, width=20, grad="transposed", compiled=(BF16, FP16)),
    NormCase(id="very-long", M=1, N=20011, groups=2, width=20, compiled=(FP16,)),
    NormCase(id="sliced", layout="sliced", **ONCE),
    NormCase(id="odd", layout="odd"),
    NormCase(id="expanded", layout="expanded0"),
    NormCase(id="grad-ones", grad="ones"),
    NormCase(id="grad-transposed", grad="transposed", **ONCE),
    NormCase(id="needs-nothing", needs=()),
    NormCase(id="needs-x", needs=("x",), **ONCE),
    NormCase(id="needs-weight", needs=("weight",)),
    NormCase(id="needs-bias", needs=("bias",), **ONCE),
]  # fmt: skip


@every_run(NORM, CASES)
def test_like_float64(case: NormCase, run: Run):
    Tester.of(NORM, case, run).check(run.backend)


@drawn_runs(NORM, (BF16, 10), (FP32, 20))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (width,) = fixed
    draw = lambda name, low, high: data.draw(st.integers(low, high), label=name)  # noqa: E731
    sizes = {"M": draw("M", 1, 4), "N": draw("N", 2, 400)}
    inputs, options = NormCase(id="drawn", width=width, **sizes).arguments()
    Tester(NORM, inputs, options, dtype=run.dtype, device=run.device, name=str(sizes)).check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck(backend: str, silu: bool):
    inputs, _ = NormCase(id="tiny", M=2, N=3, groups=2, width=2).arguments()
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b: group_norm_silu(x, 2, w, b, 1e-5, silu=silu, backend=backend), leaves
    )


@every_run(NORM, [Case(id="empty")])
@pytest.mark.parametrize(("samples", "tokens"), [(0, 3), (2, 0)], ids=["M0", "N0"])
def test_empty(case: Case, run: Run, samples: int, tokens: int):
    made = {"dtype": run.dtype, "device": run.device, "requires_grad": True}
    x, weight, bias = torch.randn(samples, tokens, 8, **made), torch.randn(8, **made), torch.randn(8, **made)
    out = group_norm_silu(x, 2, weight, bias, 1e-5, backend=run.backend)
    assert out.shape == x.shape
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()
