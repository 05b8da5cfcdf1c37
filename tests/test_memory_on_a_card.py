"""The operators on a GPU: how much memory they take, and tensors that reach far in it."""

import pytest
import torch
from torch import Tensor

from tests.calls import apply, differentiate, incoming, leaves
from tests.card import need, need_memory, on_card, refusal, with_kernels
from univid.ops import ReferenceFrames


@pytest.mark.xdist_group("memory")
@pytest.mark.gpu
@pytest.mark.parametrize("table", ["frames", "raw", "shared", "deterministic"])
@with_kernels(["pyramid"])
def test_peak_memory(case, backend, table):
    """The gather is never made: what the design allows, and a little for tables and rounding."""
    frames, small = 16, 4 * 2**20
    refs = ReferenceFrames.pyramid(frames, 8).to("cuda")
    refs = {"raw": refs.table[0].clone(), "shared": torch.arange(0, frames, 2, device="cuda")}.get(table, refs)
    inputs = on_card(case, B=1, T=frames, N=1024, H=8) | {"refs": refs}
    options = {"deterministic": True} if table == "deterministic" else {}
    need(case, inputs, backend)
    asked = list(leaves(inputs).values())
    row = inputs["q"].nbytes // (2 * 64) * 4  # a float32 for every row of queries
    forward = inputs["q"].nbytes + row  # out, logsumexp
    # dq, dk, dv; float32 dQ, two row vectors, float32 dK and dV
    backward = 3 * inputs["q"].nbytes + 2 * inputs["q"].nbytes + 2 * row + 2 * 2 * inputs["q"].nbytes
    gather = 8 * inputs["k"].nbytes
    grad = incoming(inputs["q"])
    first, second = peaks(lambda: apply(case, inputs, backend=backend, **options), asked, grad)
    assert first <= forward + small, f"{first} bytes, {first - forward} more than out and logsumexp"
    assert second <= backward + small, f"{second} bytes, {second - backward} more than the design allows"
    if table != "shared":  # the test can fail
        assert min(peaks(lambda: apply(case, inputs, backend="torch"), asked, grad)) > gather > forward + small


@pytest.mark.xdist_group("memory")
@pytest.mark.gpu
@with_kernels(["dual"])
def test_peak_memory_of_two_streams(case, backend):
    """The probabilities are never made, nor the output of one stream: some numbers a query, and float32 sums of dK and dV."""
    inputs = on_card(case, backend=backend, B=1, T=16, N=1024, H=8)
    random = {name: torch.randn(1, 257, 8, 64, device="cuda").bfloat16() for name in ("k_image", "v_image")}
    inputs |= {name: x.requires_grad_() for name, x in random.items()}
    asked = list(leaves(inputs).values())
    size, row = inputs["q"].nbytes, inputs["q"].nbytes // (2 * 64) * 4
    grad = incoming(inputs["q"])
    first, second = peaks(lambda: apply(case, inputs, backend=backend), asked, grad)
    assert first <= size + 2 * row + 4 * 2**20, f"{first} bytes, out has {size}"
    assert second <= 2.5 * size + 16 * 2**20, f"{second} bytes, dq has {size}"
    assert peaks(lambda: apply(case, inputs, backend="torch"), asked, grad)[1] > 2.5 * size + 16 * 2**20


def peaks(forward, asked, grad):
    """Of the forward and of the backward, the second time they run."""
    for _ in range(2):
        out = None
        out, first = peak(forward)
        _, second = peak(lambda out=out: torch.autograd.grad(out, asked, grad))
    return first, second


def peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


FAR = 2**30 + 2**20  # the third element along a dimension of this stride lies past 2³¹
RANKS = {"pyramid": 4, "pyramid_qkv": 5, "temporal": 4, "temporal_qkv": 5, "dual": 4}
RANKS |= {"conv": 3, "norm": 2, "concat": 3, "bias": 3, "sum": 3}


@pytest.fixture(scope="module")
def far_memory():
    yield torch.empty(2 * FAR + 2**22, dtype=torch.bfloat16, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.xdist_group("memory")
@pytest.mark.gpu
@with_kernels(RANKS)
def test_far_strides(case, backend, far_memory):
    """Along each dimension in turn the inputs and the incoming gradient lie so far apart that offsets pass 2³¹."""
    inputs = on_card(case, backend=backend, B=3, T=3, N=3, H=3)
    if "pyramid" in case:
        inputs["refs"] = ReferenceFrames.from_table(torch.tensor([[0, 2], [2, 1], [1, 2]]), 3).to("cuda")
    expected = differentiate(case, inputs, backend=backend)
    refused = []
    for dim in range(RANKS[case]):
        taken = 0

        def far(x, dim=dim):
            nonlocal taken
            if x.ndim < max(dim + 2, 3) or x.shape[dim] != 3:
                return x
            strides = list(x[(slice(None),) * dim + (slice(1),)].contiguous().stride())
            strides[dim] = FAR
            moved = far_memory.data.as_strided(x.shape, strides, taken).copy_(x)  # .data: with versions of its own
            taken += x.numel()
            return moved

        apart = {name: far(x.detach()) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        assert taken
        if backend == "cuda" and refusal(case, apart, backend):
            refused.append(dim)
            continue
        results = differentiate(case, apart, grad=lambda out: far(incoming(out)), backend=backend)
        torch.testing.assert_close(results, expected)
    # A tensor map has the frames of a clip in one piece, and nothing else follows a pattern of its own.
    assert refused == ([1, 2] if (case, backend) == ("conv", "cuda") else [])


LARGE = {  # inputs and outputs past 2³¹ elements; the dimension that is cut, and how much of it is compared
    "pyramid": ({"B": 8200, "T": 8, "N": 64, "H": 8}, 0, 1),
    "pyramid_qkv": ({"B": 2740, "T": 8, "N": 64, "H": 8}, 0, 1),
    "temporal": ({"B": 1, "T": 8, "N": 524300, "H": 8}, 2, 50),
    "temporal_qkv": ({"B": 1, "T": 8, "N": 174800, "H": 8}, 2, 50),
    "dual": ({"B": 2, "T": 8, "N": 262200, "H": 8}, 2, 50),
    "conv": ({"B": 1, "T": 8, "N": 2100000}, 2, 50),
    "norm": ({"B": 33, "N": 510000}, 0, 1),
    "concat": ({"B": 1, "T": 8, "N": 2100000}, 2, 50),
    "bias": ({"B": 1, "T": 8, "N": 2100000}, 2, 50),
    "sum": ({"B": 1, "T": 8, "N": 2100000}, -2, 50),
}


@pytest.mark.xdist_group("memory")
@pytest.mark.gpu
@with_kernels(LARGE)
def test_past_two_to_the_31(case, backend):
    """The first rows and the last ones against the reference on them alone; only the last have a gradient."""
    sizes, dim, length = LARGE[case]
    need_memory(70)
    inputs = on_card(case, **sizes) | ({"text_weight": 0.5} if case == "dual" else {})
    need(case, inputs, backend)
    first = next(iter(inputs))
    rows = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim == inputs[first].ndim}
    assert inputs[first].numel() > 2**31

    def at(x, end):
        return x.narrow(dim, 0 if end == "first" else x.shape[dim] - length, length)

    def only_last(out):
        grad = torch.zeros_like(out)
        at(grad, "last").copy_(incoming(at(out, "last")))
        return grad

    results = differentiate(case, inputs, grad=only_last, backend=backend)
    for end in ("first", "last"):
        part = {name: at(x, end) if name in rows else x for name, x in inputs.items()}
        part = {name: x.detach().float() if name in leaves(inputs) else x for name, x in part.items()}
        expected = differentiate(case, part, backend="reference", grad=lambda out: incoming(out.bfloat16()).float())
        for name, x in expected.items():
            whole = name != "out" and name not in rows
            result = results[name] if whole else at(results[name], end)
            if name == "out" or end == "last":
                assert (result.float() - x).abs().max() <= 0.03 * x.abs().max(), (name, end)
            elif not whole:
                assert not result.any(), (name, end)
    del results, inputs, rows, part, expected
    torch.cuda.empty_cache()
