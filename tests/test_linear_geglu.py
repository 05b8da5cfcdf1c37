"""``linear_geglu``: every backend against float64 where no gradient is asked for, and its parts where one is."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.card import need_memory
from tests.tester import DTYPES, HALVES, Case, Operator, Random, Run, Tester, drawn_runs, every_run
from univid.ops import geglu, linear_geglu, reference
from univid.ops.explain import backends_for

BF16, FP16, FP32 = DTYPES


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    return reference.linear_geglu(inputs["x"], inputs["weight"], inputs.get("bias"), accumulate)


LINEAR_GEGLU = Operator("linear_geglu", "linear_geglu", ("x", "weight", "bias"), _reference)


@dataclass(frozen=True, kw_only=True)
class LinearGegluCase(Case):
    B: int = 2
    T: int = 3
    N: int = 5
    channels: int = 24
    C: int = 40
    bias: bool = True
    scale: float = 1.0
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    bias_layout: str = "contiguous"
    needs: tuple[str, ...] | None = ()

    def arguments(self):
        randn = Random()
        inputs = {
            "x": self.scale * randn(self.B, self.T, self.N, self.channels, layout=self.layout),
            "weight": self.channels**-0.5 * randn(2 * self.C, self.channels, layout=self.weight_layout),
        }
        return inputs | ({"bias": randn(2 * self.C, layout=self.bias_layout)} if self.bias else {}), {}


BOTH = {"interpreted": (FP16, FP32)}
ONCE = {"interpreted": (FP32,)}

CASES = [
    LinearGegluCase(id="remainders", compiled=DTYPES, **BOTH),
    LinearGegluCase(id="one-channel", channels=1, C=1, **ONCE),
    LinearGegluCase(id="odd", channels=37, C=13, **ONCE),
    LinearGegluCase(id="no-bias", bias=False, compiled=DTYPES),
    LinearGegluCase(id="eighths", channels=8, C=8, N=37, compiled=HALVES),  # of a tile, and of a step
    LinearGegluCase(id="pairs", channels=320, C=1280, N=401, compiled=HALVES),  # tiles of two neighbours
    LinearGegluCase(id="alone", channels=136, C=72, N=401, compiled=HALVES),  # no neighbour, and a remainder of columns
    LinearGegluCase(id="odd-tiles", channels=64, C=232, N=130, compiled=HALVES),
    LinearGegluCase(id="cut", channels=2048, C=320, T=1, N=400, compiled=HALVES),  # fewer tiles than processors: sums in parts
    LinearGegluCase(id="one-row", B=1, T=1, N=1, channels=64, C=80),
    LinearGegluCase(id="tails", channels=64, scale=8.0, compiled=HALVES),  # where Φ is 0 or 1
    LinearGegluCase(id="sliced", layout="sliced", weight_layout="sliced", bias_layout="sliced", **ONCE),
    LinearGegluCase(id="odd-strides", layout="odd", weight_layout="odd"),
    LinearGegluCase(id="shifted", layout="shifted", weight_layout="shifted", bias_layout="shifted"),
    LinearGegluCase(id="expanded", layout="expanded0", **ONCE),
    LinearGegluCase(id="all-gradients", needs=None, **BOTH),
    LinearGegluCase(id="one-gradient", needs=("bias",)),
]  # fmt: skip


@every_run(LINEAR_GEGLU, CASES)
def test_like_float64(case: LinearGegluCase, run: Run):
    Tester.of(LINEAR_GEGLU, case, run).check(run.backend)


@drawn_runs(LINEAR_GEGLU, (BF16, 40), (FP32, 24))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (columns,) = fixed
    sizes = {name: data.draw(st.integers(1, 40), label=name) for name in "BTN"}
    channels, bias = 8 * data.draw(st.integers(1, 12), label="channels"), data.draw(st.booleans(), label="bias")
    inputs, options = LinearGegluCase(id="drawn", C=columns, channels=channels, bias=bias, **sizes).arguments()
    Tester(LINEAR_GEGLU, inputs, options, dtype=run.dtype, device=run.device, needs=(), name=str(sizes)).check(
        run.backend
    )


def arguments():
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(12, 8), torch.randn(12)
    return x, weight, bias


def names(call):
    with torch.profiler.profile() as profiler:
        call()
    return {event.key.removeprefix("univid::") for event in profiler.key_averages() if event.key.startswith("univid::")}


@pytest.mark.parametrize("needs", ["x", "weight", "bias", None])
def test_is_its_parts_where_a_gradient_is_asked_for(needs):
    x, weight, bias = arguments()
    for name, tensor in zip(("x", "weight", "bias"), (x, weight, bias), strict=True):
        tensor.requires_grad_(name == needs)
    assert names(lambda: linear_geglu(x, weight, bias)) == {"geglu" if needs else "linear_geglu"}
    with torch.no_grad():
        assert names(lambda: linear_geglu(x, weight, bias)) == {"linear_geglu"}
    expected = geglu(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(linear_geglu(x, weight, bias), expected)


def test_flops_are_the_linear_layers():
    x, weight, bias = arguments()
    counts = []
    for call in (linear_geglu, torch.nn.functional.linear):
        with FlopCounterMode(display=False) as counter:
            call(x, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 30 * 8 * 12] * 2


def test_autocast():
    x, weight, bias = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_geglu(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), linear_geglu(x, weight, bias), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_to_one_graph(grad):
    x, weight, bias = arguments()
    weight.requires_grad_(grad)
    out = torch.compile(linear_geglu, backend="aot_eager", fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(out, linear_geglu(x, weight, bias))
    assert out.requires_grad == grad


def test_no_rows():
    x, weight, bias = arguments()
    assert linear_geglu(x[:, :, :0], weight, bias).shape == (2, 3, 0, 6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.randn(11, 8)}, r"^weight: got shape \(11, 8\), needs \(2C, C_in\), an even first dimension$"),
        ({"weight": torch.randn(12, 7)}, r"^weight: got shape \(12, 7\), needs \(12, 8\) \(2C, x's C_in\)$"),
        ({"bias": torch.randn(6)}, r"^bias: got shape \(6,\), needs \(12,\) \(weight's 2C\)$"),
        ({"weight": torch.randn(8, 12).T}, r"^weight: got strides \(1, 12\), needs a contiguous last dimension"),
    ],
)
def test_bad_input(changed, message):
    x, weight, bias = arguments()
    with pytest.raises(ValueError, match=message):
        linear_geglu(**{"x": x, "weight": weight, "bias": bias} | changed)


def on_card(rows, channels, columns, backend="cuda"):
    torch.manual_seed(0)
    shapes = (1, 1, rows, channels), (2 * columns, channels), (2 * columns,)
    x, weight, bias = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    weight *= channels**-0.5
    if reason := backends_for("linear_geglu", x[:, :, :1], weight, bias)[1][backend]:
        pytest.skip(reason)
    return x, weight, bias


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [0, 1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        (222, 72, 232),  # a whole tile lies past the last column
        (400, 2048, 320),  # tiles that are cut
        (5000, 320, 1280),  # whole ones, the first of a worker stored in turn
        (6208, 640, 1280),  # both
        (64, 64, 22400),  # of one step, with warpgroups that have no rows
    ],
    ids=str,
)
def test_every_tiling(sizes, tiling, monkeypatch):
    """Also those that are not chosen."""
    from univid.kernels.cuda import linear_geglu as kernel

    x, weight, bias = on_card(*sizes)
    monkeypatch.setattr(kernel, "_CHOSEN", tiling)
    out = linear_geglu(x, weight, bias, backend="cuda")
    exact = reference.linear_geglu(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=2**-8)
    assert torch.equal(out, linear_geglu(x, weight, bias, backend="cuda"))


@pytest.mark.gpu
def test_what_is_not_finite():
    """An infinite gate is an infinite result, its negative one nothing, and NaN stays NaN."""
    x, weight, _ = (tensor.abs() for tensor in on_card(4, 64, 80))
    bias = torch.zeros(160, device="cuda", dtype=torch.bfloat16)
    bias[80], bias[81], bias[82] = torch.inf, torch.nan, -torch.inf
    out = linear_geglu(x, weight, bias, backend="cuda")
    assert out[..., 0].isposinf().all() and out[..., 1].isnan().all() and out[..., 3:].isfinite().all()
    assert (out[..., 2].abs() < 1e-20).all()  # GELU's limit, where its formula has NaN


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gelu_is_the_exact_one(backend):
    """Where products are nothing: the gates are the bias. What float16 can tell of x · Φ(x), at 40 gates of each unit."""
    x, weight, bias = (tensor.half() for tensor in on_card(8, 64, 800, backend))
    weight.zero_()
    bias[:800], bias[800:] = 1, torch.linspace(-10, 10, 800)
    gate = bias[800:].double()
    exact = gate * torch.special.ndtr(gate)
    out = linear_geglu(x, weight, bias, backend=backend)
    torch.testing.assert_close(out.double(), exact.expand_as(out), atol=3e-6, rtol=5.1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cuda_graph(backend):
    """Replayed with other inputs; cut into parts too, whose flags each replay clears."""
    x, weight, bias = on_card(400, 2048, 320, backend)
    linear_geglu(x, weight, bias, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_geglu(x, weight, bias, backend=backend)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, linear_geglu(x, weight, bias, backend=backend))


@pytest.mark.xdist_group("memory")
@pytest.mark.gpu
def test_past_two_to_the_31():
    """The result has more than 2³¹ elements; the first rows and the last ones are compared."""
    need_memory(12)
    rows, columns = 1_700_000, 1280
    x, weight, bias = on_card(rows, 64, columns)
    out = linear_geglu(x, weight, bias, backend="cuda")
    assert out.numel() > 2**31
    for part in (slice(100), slice(rows - 100, None)):
        exact = reference.linear_geglu(x[:, :, part].double(), weight.double(), bias.double())
        torch.testing.assert_close(out[:, :, part].double(), exact, atol=0.02, rtol=0.01)
