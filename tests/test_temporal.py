"""``temporal_attn``: every backend against float64, along short and long times and on every layout."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import (
    DTYPES,
    HALVES,
    LARGE_LOGITS,
    Case,
    Operator,
    Random,
    Run,
    Tester,
    drawn_runs,
    every_run,
    one_key_terms,
)
from univid.ops import reference, temporal_attn, temporal_attn_qkv

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    q, k, v = inputs["qkv"].unbind(3) if "qkv" in inputs else (inputs["q"], inputs["k"], inputs["v"])
    return reference.temporal_attn(q, k, v, options.get("scale") or q.shape[-1] ** -0.5, accumulate)[0]


def _terms(inputs: dict, options: dict, grad: Tensor) -> dict:
    """Where all keys and values of a pixel are the same, the gradients of q and k are 0."""
    if "qkv" in inputs or not all((inputs[name] == inputs[name][:, :1]).all() for name in "kv"):
        return {}
    terms = one_key_terms(inputs["q"], inputs["k"], inputs["v"], grad, options.get("scale") or grad.shape[-1] ** -0.5)
    of_k, dtype = terms["k"]
    return terms | {"k": (of_k.mean(1, keepdim=True).expand(of_k.shape), dtype)}


TEMPORAL = Operator("temporal_attn", "temporal", ("q", "k", "v"), _reference, _terms)
PACKED = Operator("temporal_attn_qkv", "temporal", ("qkv",), _reference)


@dataclass(frozen=True, kw_only=True)
class TemporalCase(Case):
    B: int = 2
    T: int = 5
    N: int = 37
    H: int = 3
    D: int = 64
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    scale: float | None = None
    logits: float = 0  # scale · q · kᵀ is about plus or minus this

    def arguments(self):
        random = Random()
        shape = (self.B, self.T, self.N, self.H, self.D)
        inputs = {name: random(*shape, layout=layout) for name, layout in zip("qkv", self.layouts, strict=True)}
        if self.logits:
            for name in "qk":
                inputs[name][..., 0] = random(*shape[:-1]).sign() * (self.logits * self.D**0.5) ** 0.5
        return inputs, {"scale": self.scale}


@dataclass(frozen=True, kw_only=True)
class PackedCase(TemporalCase):
    layout: str = "contiguous"

    def arguments(self):
        return {"qkv": Random()(self.B, self.T, self.N, 3, self.H, self.D, layout=self.layout)}, {"scale": self.scale}


SMALL = {"N": 7, "H": 2}
ONCE = {"interpreted": (FP32,), "small": SMALL}
TWICE = {"interpreted": (FP16, FP32), "small": SMALL}

CASES = [
    TemporalCase(id="remainders", compiled=DTYPES, **TWICE),
    TemporalCase(id="T1", T=1, **ONCE),
    TemporalCase(id="T16", T=16, compiled=HALVES),
    TemporalCase(id="T24", T=24, compiled=DTYPES, interpreted=(FP16,), small=SMALL),
    TemporalCase(id="T33", T=33),
    TemporalCase(id="T64", T=64, compiled=DTYPES),
    TemporalCase(id="T65", T=65, N=7, compiled=(BF16, FP32), interpreted=(FP32,), small={"N": 2, "H": 1}),
    TemporalCase(id="T100", T=100, N=7, compiled=HALVES),
    TemporalCase(id="one-token", N=1, H=1, **ONCE),
    TemporalCase(id="packed", layouts=("packed",) * 3, **ONCE),
    TemporalCase(id="sliced", layouts=("sliced",) * 3),
    TemporalCase(id="odd", layouts=("odd",) * 3, compiled=(BF16, FP32), **ONCE),
    TemporalCase(id="expanded-clips", layouts=("contiguous", "expanded0", "expanded0")),
    TemporalCase(id="expanded-frames", layouts=("expanded0", "expanded1", "expanded1"), **ONCE),
    TemporalCase(id="grad-ones", grad="ones"),
    TemporalCase(id="grad-transposed", grad="transposed"),
    TemporalCase(id="scaled", scale=0.3),
    TemporalCase(id="logits-1e4", **LARGE_LOGITS, interpreted=(FP16,), small=SMALL),
    TemporalCase(id="logits-1e4-long", **LARGE_LOGITS, T=70, N=3),
    TemporalCase(id="needs-nothing", needs=()),
    TemporalCase(id="needs-q", needs=("q",), **ONCE),
    TemporalCase(id="needs-k", needs=("k",)),
    TemporalCase(id="needs-v", needs=("v",), **ONCE),
    TemporalCase(id="needs-q-v", needs=("q", "v")),
    TemporalCase(id="needs-k-v-long", needs=("k", "v"), T=70, N=3),
    TemporalCase(id="D8", D=8, H=2, **ONCE),
    TemporalCase(id="D24", D=24, H=2),
    TemporalCase(id="D40", D=40, H=2, interpreted=(FP16,), small=SMALL),
    TemporalCase(id="D72", D=72, H=2, compiled=(FP16,)),
    TemporalCase(id="D80", D=80, H=2),
    TemporalCase(id="D128", D=128, H=2),
    TemporalCase(id="D5", D=5, compiled=()),
]  # fmt: skip

PACKED_CASES = [
    PackedCase(id="remainders", **TWICE),
    PackedCase(id="T24", T=24),
    PackedCase(id="odd", layout="odd"),
    PackedCase(id="grad-transposed", grad="transposed"),
]


@every_run(TEMPORAL, CASES)
def test_like_float64(case: TemporalCase, run: Run):
    Tester.of(TEMPORAL, case, run).check(run.backend)


@every_run(PACKED, PACKED_CASES)
def test_packed_like_float64(case: PackedCase, run: Run):
    Tester.of(PACKED, case, run).check(run.backend)


@drawn_runs(TEMPORAL, (BF16, 8), (FP32, 24), (BF16, 64))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (dim,) = fixed
    draw = lambda name, low, high: data.draw(st.integers(low, high), label=name)  # noqa: E731
    shape = (draw("B", 1, 3), draw("T", 2, 32), draw("N", 1, 70), draw("H", 1, 4), dim)
    random = Random()
    inputs = {name: random(*shape) for name in "qkv"}
    Tester(TEMPORAL, inputs, {}, dtype=run.dtype, device=run.device, name=str(shape)).check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str):
    inputs, _ = TemporalCase(id="tiny", T=4, N=2, H=2, D=3).arguments()
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda q, k, v: temporal_attn(q, k, v, backend=backend), leaves)
    inputs, _ = PackedCase(id="tiny", T=3, N=2, H=2, D=2).arguments()
    assert torch.autograd.gradcheck(lambda x: temporal_attn_qkv(x, backend=backend), inputs["qkv"].requires_grad_())


@every_run(TEMPORAL, [Case(id="empty")])
@pytest.mark.parametrize(("clips", "tokens"), [(0, 3), (2, 0)], ids=["B0", "N0"])
def test_empty(case: Case, run: Run, clips: int, tokens: int):
    q, k, v = (torch.randn(clips, 4, tokens, 2, 8, dtype=run.dtype, device=run.device).requires_grad_() for _ in "qkv")
    out = temporal_attn(q, k, v, backend=run.backend)
    assert out.shape == q.shape
    assert all(g.shape == q.shape for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
