"""``layer_norm``: every backend against float64, over widths, layouts, large means, and with an offset for each frame."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import layer_norm, reference

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    x, weight, bias, offset = (inputs.get(name) for name in ("x", "weight", "bias", "offset"))
    return reference.layer_norm(x.flatten(0, 2), weight, bias, options["eps"], offset, x.shape[2], accumulate).view_as(
        x
    )


NORM = Operator("layer_norm", "layer_norm", ("x", "weight", "bias"), _reference)


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    B: int = 2
    T: int = 3
    N: int = 5
    C: int = 40
    offset: bool = False
    wide_affine: bool = False  # float32 weight, bias and offset, whatever x is
    mean: float = 0.0
    std: float = 1.0
    layout: str = "contiguous"
    needs: tuple[str, ...] | None = ("x", "weight", "bias")

    def arguments(self):
        random = Random()
        x = random(self.B, self.T, self.N, self.C, layout=self.layout)
        if self.mean or self.std != 1:
            x.mul_(self.std).add_(self.mean)
        others = {"weight": random(self.C), "bias": random(self.C)}
        if self.offset:
            others["offset"] = random(self.T, self.C)
        if self.wide_affine:
            others = {name: tensor.float() for name, tensor in others.items()}
        return {"x": x} | others, {"eps": 1e-5}


ONCE = {"interpreted": (FP32,)}
TWICE = {"interpreted": (FP16, FP32)}

CASES = [
    NormCase(id="remainders", compiled=DTYPES, **TWICE),
    NormCase(id="offset", offset=True, compiled=DTYPES, **TWICE),
    NormCase(id="odd-channels", C=37, offset=True, **ONCE),
    NormCase(id="few-channels", C=6, **ONCE),
    NormCase(id="one-token", B=1, T=1, N=1, offset=True),
    NormCase(id="stable-diffusion", C=320, N=37, T=8, offset=True, compiled=DTYPES),
    NormCase(id="wide", C=1280, N=37),
    NormCase(id="widest", C=8192, B=1, T=2, offset=True, compiled=(BF16, FP32)),
    NormCase(id="many-rows", B=1, T=4, N=600, C=20, compiled=(BF16, FP32), interpreted=(FP32,), small={"N": 300}),
    NormCase(id="float32-affine", wide_affine=True, offset=True, interpreted=(FP16,)),
    NormCase(id="large-mean", mean=100.0, std=0.1, compiled=(FP32,), **ONCE),
    NormCase(id="sliced", layout="sliced", offset=True, **ONCE),
    NormCase(id="odd", layout="odd", **ONCE),
    NormCase(id="shifted", layout="shifted"),
    NormCase(id="expanded", layout="expanded0", **ONCE),
    NormCase(id="grad-ones", grad="ones", **ONCE),
    NormCase(id="grad-transposed", grad="transposed", **ONCE),
    NormCase(id="needs-nothing", needs=()),
    NormCase(id="needs-x", needs=("x",), **ONCE),
    NormCase(id="needs-weight", needs=("weight",)),
    NormCase(id="needs-bias", needs=("bias",), **ONCE),
]  # fmt: skip


@every_run(NORM, CASES)
def test_like_float64(case: NormCase, run: Run):
    Tester.of(NORM, case, run).check(run.backend)


@drawn_runs(NORM, (BF16, 40), (FP32, 24))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (channels,) = fixed
    sizes = {name: data.draw(st.integers(1, 40), label=name) for name in "BTN"}
    inputs, options = NormCase(id="drawn", C=channels, **sizes, offset=data.draw(st.booleans())).arguments()
    needs = ("x", "weight", "bias")
    tester = Tester(NORM, inputs, options, needs=needs, dtype=run.dtype, device=run.device, name=str(sizes))
    tester.check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("offset", [False, True])
def test_gradcheck(backend: str, offset: bool):
    inputs, _ = NormCase(id="tiny", T=2, N=2, C=3, offset=offset).arguments()
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b, o=None: layer_norm(x, w, b, 1e-5, offset=o, backend=backend), leaves
    )


def test_only_the_offset_asks():
    inputs, _ = NormCase(id="tiny", offset=True).arguments()
    inputs["offset"].requires_grad_()
    grad = torch.randn_like(inputs["x"])
    (doffset,) = torch.autograd.grad(layer_norm(**inputs, eps=1e-5), inputs["offset"], grad)
    torch.testing.assert_close(doffset, grad.sum((0, 2)))


@every_run(NORM, [Case(id="empty")])
@pytest.mark.parametrize(("clips", "tokens"), [(0, 3), (2, 0)], ids=["B0", "N0"])
def test_empty(case: Case, run: Run, clips: int, tokens: int):
    made = {"dtype": run.dtype, "device": run.device, "requires_grad": True}
    x, weight, bias = torch.randn(clips, 2, tokens, 8, **made), torch.randn(8, **made), torch.randn(8, **made)
    out = layer_norm(x, weight, bias, 1e-5, backend=run.backend)
    assert out.shape == x.shape
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()
