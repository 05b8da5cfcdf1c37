"""``add_layer_norm``: every backend against float64, over widths, layouts, and rows far from 0."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, HALVES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import add_layer_norm, reference

BF16, FP16, FP32 = DTYPES
EPS = 1e-5


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    given = {"branch": None, "offset": None} | inputs | options
    return torch.stack(reference.add_layer_norm(**given, accumulate=accumulate))


ADD_LAYER_NORM = Operator(
    "add_layer_norm", "add_layer_norm", ("x", "weight", "bias"), _reference, together=("x", "branch")
)


@dataclass(frozen=True, kw_only=True)
class AddLayerNormCase(Case):
    B: int = 2
    T: int = 3
    N: int = 5
    C: int = 40
    branch: bool = True
    offset: bool = True
    mean: float = 0.0  # of x's rows
    eps: float = EPS
    layout: str = "contiguous"
    float32: bool = False  # weight, bias and offset

    def arguments(self):
        randn, sizes = Random(), (self.B, self.T, self.N, self.C)
        kept = torch.float32 if self.float32 else torch.float64
        inputs = {"x": self.mean + randn(*sizes, layout=self.layout)}
        inputs |= {name: randn(self.C).to(kept) for name in ("weight", "bias")}
        if self.branch:
            inputs["branch"] = randn(*sizes, layout=self.layout)
        if self.offset:
            inputs["offset"] = randn(self.T, 1, self.C).to(kept)
        return inputs, {"eps": self.eps}


BOTH = {"interpreted": (FP16, FP32)}
ONCE = {"interpreted": (FP32,)}
PLAIN = {"branch": False, "offset": False}

CASES = [
    AddLayerNormCase(id="remainders", compiled=DTYPES, **BOTH),
    AddLayerNormCase(id="no-branch", offset=False, branch=False, compiled=DTYPES, **BOTH),
    AddLayerNormCase(id="no-offset", offset=False, **ONCE),
    AddLayerNormCase(id="only-offset", branch=False, **ONCE),
    AddLayerNormCase(id="float32-weights", float32=True, dtypes=HALVES, compiled=HALVES, interpreted=(FP16,)),
    AddLayerNormCase(id="one-token", N=1, **ONCE),
    AddLayerNormCase(id="one-frame", T=1, offset=False, **ONCE),
    AddLayerNormCase(id="odd-channels", C=37, **ONCE),
    AddLayerNormCase(id="320", C=320, N=37, small={"N": 7}, compiled=DTYPES, **ONCE),
    AddLayerNormCase(id="1280", C=1280, N=37, compiled=DTYPES),
    AddLayerNormCase(id="5000", C=5000, **PLAIN),
    AddLayerNormCase(id="many-rows", B=3, T=24, N=301, C=96),
    AddLayerNormCase(id="large-mean", mean=50.0, compiled=DTYPES, **BOTH),
    AddLayerNormCase(id="large-eps", eps=3.0, **ONCE),
    AddLayerNormCase(id="sliced", layout="sliced", **ONCE),
    AddLayerNormCase(id="odd", layout="odd", **ONCE),
    AddLayerNormCase(id="shifted", layout="shifted"),
    AddLayerNormCase(id="expanded", layout="expanded0", **ONCE),
    AddLayerNormCase(id="grad-ones", grad="ones", **ONCE),
    AddLayerNormCase(id="grad-transposed", grad="transposed", **ONCE),
    AddLayerNormCase(id="grad-sliced", grad="sliced"),
    AddLayerNormCase(id="needs-x", needs=("x", "branch"), **ONCE),
    AddLayerNormCase(id="needs-weight", needs=("weight",), **ONCE),
    AddLayerNormCase(id="needs-bias", needs=("bias",), **PLAIN, **ONCE),
    AddLayerNormCase(id="needs-nothing", needs=(), **ONCE),
]  # fmt: skip


@every_run(ADD_LAYER_NORM, CASES)
def test_like_float64(case: AddLayerNormCase, run: Run):
    Tester.of(ADD_LAYER_NORM, case, run).check(run.backend)


@drawn_runs(ADD_LAYER_NORM, (BF16, 40), (FP32, 24))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (channels,) = fixed
    sizes = {name: data.draw(st.integers(1, 40), label=name) for name in "BTN"}
    inputs, options = AddLayerNormCase(id="drawn", C=channels, **sizes).arguments()
    Tester(ADD_LAYER_NORM, inputs, options, dtype=run.dtype, device=run.device, name=str(sizes)).check(run.backend)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, branch: bool):
    inputs, options = AddLayerNormCase(id="tiny", B=1, T=2, N=2, C=3, branch=branch).arguments()
    leaves = [x.requires_grad_() for x in inputs.values()]
    call = lambda *xs: add_layer_norm(**dict(zip(inputs, xs, strict=True)), **options, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


BACKENDS = [
    "reference",
    "torch",
    pytest.param("triton", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_total(backend: str):
    """The sum has PyTorch's bits; without a branch it is x itself."""
    inputs, _ = AddLayerNormCase(id="total").arguments()
    inputs = {name: x.half() for name, x in inputs.items()}
    total, y = add_layer_norm(**inputs, backend=backend)
    assert torch.equal(total, inputs["x"] + inputs["branch"]) and total.is_contiguous() and y.is_contiguous()
    inputs["branch"] = None
    assert add_layer_norm(**inputs, backend=backend)[0] is inputs["x"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1], ids=["total", "y"])
def test_only_one_output_is_used(used: int, backend: str):
    """Its gradients are those of PyTorch's sum and norm; what it does not depend on has none."""
    results = []
    for ours in (True, False):
        inputs, _ = AddLayerNormCase(id="one output").arguments()
        leaves = {name: x.float().requires_grad_() for name, x in inputs.items()}
        call = partial(add_layer_norm, backend=backend) if ours else partial(reference.add_layer_norm, eps=EPS)
        outputs = call(**leaves)
        grad = Random(1)(*outputs[used].shape).float()
        results.append(torch.autograd.grad(outputs[used], list(leaves.values()), grad, allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_too_many_channels_for_registers():
    """Triton leaves them to PyTorch, and says why."""
    pytest.importorskip("triton")
    from univid.kernels.calls import AddLayerNormCall
    from univid.kernels.triton.add_layer_norm import unsupported

    x, affine = torch.zeros(1, 1, 1, 8193), torch.zeros(8193)
    assert unsupported(AddLayerNormCall(x, affine, affine, EPS, None, None)) == "C = 8193: at most 8192 needed"


def test_a_branch_that_is_expanded():
    x, row = torch.randn(2, 3, 4, 8), torch.randn(8, requires_grad=True)
    total, y = add_layer_norm(x, torch.ones(8), torch.zeros(8), branch=row.expand_as(x))
    torch.testing.assert_close(total, x + row)
    grad = torch.randn_like(y)
    (given,) = torch.autograd.grad(y, row, grad)
    (expected,) = torch.autograd.grad(torch.nn.functional.layer_norm(x + row, (8,)), row, grad)
    torch.testing.assert_close(given, expected)
