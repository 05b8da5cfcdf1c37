"""``temporal_conv``: every backend against float64, over kernel widths, layouts of the weight, bias and residual."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import DTYPES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import reference, temporal_conv
from univid.ops.eager import TorchConvolution

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.temporal_conv(
        inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual"), accumulate
    )


CONV = Operator(
    *("temporal_conv", "temporal_conv", ("x", "weight", "bias"), _reference),
    passed_on=("residual",),
    alike=("weight",),
)


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    B: int = 2
    T: int = 5
    N: int = 37
    C: int = 40
    C_out: int = 24
    K: int = 3
    bias: str | None = "all"  # of all clips, or of "each"
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
            inputs["bias"] = random(*([self.B] if self.bias == "each" else []), self.C_out)
        if self.residual:
            inputs["residual"] = random(self.B, self.T, self.N, self.C_out, layout=self.layout)
        return inputs, {}


SMALL = {"B": 1, "N": 7}
ONCE = {"interpreted": (FP32,), "small": SMALL}
TWICE = {"interpreted": (FP16, FP32), "small": SMALL}

CASES = [
    ConvCase(id="remainders", compiled=DTYPES, **TWICE),
    ConvCase(id="K1", K=1, **ONCE),
    ConvCase(id="K1-wide", K=1, T=3, N=180, C=640, C_out=320),  # a linear layer
    ConvCase(id="K5", K=5, compiled=(BF16, FP32)),
    ConvCase(id="K7", K=7, T=12),
    ConvCase(id="K9", K=9, T=3, **ONCE),  # most taps lie outside
    ConvCase(id="T1", T=1, **ONCE),
    ConvCase(id="one-token", N=1),
    ConvCase(id="one-channel", C=1, C_out=1),
    ConvCase(id="square", C=64, C_out=64, N=64, T=8, compiled=DTYPES),
    ConvCase(id="no-bias", bias=None, **ONCE),
    ConvCase(id="bias-of-each-clip", bias="each", compiled=DTYPES, **(TWICE | {"small": {"N": 7}})),
    ConvCase(id="bias-of-each-clip-long", bias="each", T=16, N=180, C_out=320, C=64),
    ConvCase(id="tiles-cut", T=12, N=45, C=320, C_out=320, K=9, bias="each", compiled=(BF16, FP16)),  # by the CUDA kernel
    ConvCase(id="tiles-cut-odd", B=3, T=12, N=45, C=328, C_out=136, K=9),
    ConvCase(id="many-pieces", T=16, N=180, C=160, C_out=64, needs=("weight",), compiled=(BF16, FP16)),  # of few tiles
    ConvCase(id="weight-cut", T=16, N=180, C=264, C_out=320, needs=("weight",), compiled=(BF16, FP16)),
    ConvCase(id="high-cut", T=12, N=180, C=640, C_out=640, K=7),
    ConvCase(id="short-clips", B=40, T=3, N=9, C=64, C_out=328, K=5, bias="each", needs=("x",)),  # a tile holds several
    ConvCase(id="no-residual", residual=False, **ONCE),
    ConvCase(id="alone", bias=None, residual=False),
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
    ConvCase(id="needs-bias-of-each-clip", needs=("bias",), bias="each"),
]  # fmt: skip


@every_run(CONV, CASES)
def test_like_float64(case: ConvCase, run: Run):
    Tester.of(CONV, case, run).check(run.backend)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", range(-1, 5))
def test_whole_tiles_and_cut_ones(tiling, monkeypatch: pytest.MonkeyPatch):
    """By the same workers: the first tile of each is stored in turn, the last one may be a piece."""
    from univid.kernels.cuda import temporal_conv as kernel

    monkeypatch.setattr(kernel, "_CHOSEN", tiling)
    inputs, _ = ConvCase(id="mixed", B=4, T=12, N=400, C=128, C_out=640, K=9).arguments()
    Tester(CONV, inputs, {}, dtype=BF16, device="cuda", name="mixed").check("cuda")


def _around_itself(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.temporal_conv(inputs["x"], inputs["weight"], inputs["bias"], inputs["x"], accumulate)


AROUND_ITSELF = ("square", "remainders", "sliced", "expanded-clips", "grad-transposed", "needs-x")


@every_run(CONV, [case for case in CASES if case.id in AROUND_ITSELF])
def test_residual_that_is_x(case: ConvCase, run: Run):
    """Its gradient is part of x's, whose kernel adds it."""
    case = replace(case, **case.small) if run.place == "interpreter" else case
    inputs, _ = replace(case, C_out=case.C, residual=False).arguments()
    operator = CONV._replace(reference=_around_itself, arguments=lambda inputs: inputs | {"residual": inputs["x"]})
    options = {"dtype": run.dtype, "device": run.device, "needs": case.needs, "grad": case.grad, "name": case.id}
    Tester(operator, inputs, {}, **options).check(run.backend)


def test_residual_that_is_x_compiled(monkeypatch: pytest.MonkeyPatch):
    """A graph knows it too."""
    added = []
    differentiate = TorchConvolution.backward
    monkeypatch.setattr(
        *(TorchConvolution, "backward"),
        lambda self, call, *rest: (added.append(call.residual is not None), differentiate(self, call, *rest)),
    )
    inputs, _ = replace(ConvCase(id="square", C=8, C_out=8, bias="each", residual=False)).arguments()
    leaves = [x.float().requires_grad_() for x in inputs.values()]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = 1.5 * x
        return temporal_conv(x, weight, bias, residual=x, backend="torch")

    torch._dynamo.reset()
    results = [
        torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True))
    ]
    torch.testing.assert_close(*results)
    assert added == [True, True]


def test_gradients_are_not_copied():
    """The residual's is the incoming one, and the weight's lies as the weight does."""
    inputs, _ = ConvCase(id="small").arguments()
    leaves = {name: x.float().requires_grad_() for name, x in inputs.items()}
    weight = leaves["weight"] = inputs["weight"].transpose(1, 2).float().contiguous().requires_grad_()
    out = temporal_conv(**leaves | {"weight": weight.transpose(1, 2)})
    grad = torch.randn_like(out)
    dresidual, dweight = torch.autograd.grad(out, (leaves["residual"], weight), grad)
    assert dresidual.data_ptr() == grad.data_ptr()
    assert dweight.is_contiguous()


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
    square, _ = ConvCase(id="square", T=3, N=2, C=3, C_out=3, bias="each").arguments()
    leaves = [square[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, w, b: temporal_conv(x, w, b, residual=x, backend=backend), leaves)


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
