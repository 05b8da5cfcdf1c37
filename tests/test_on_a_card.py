"""The operators on a GPU: compiled, captured, in streams and threads, far in memory, watched by compute-sanitizer.

One type and one head dimension, so that every kernel is compiled once.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.calls import (
    OPERATOR,
    OPERATORS,
    B,
    R,
    T,
    apply,
    arguments,
    check_autocast,
    check_compiled,
    check_operator,
    compiled,
    differentiate,
    every_operator,
    in_threads,
    incoming,
    leaves,
)
from univid import ops
from univid.ops import ReferenceFrames
from univid.ops.explain import _OPERATORS, backends_for

CARD = {"device": "cuda", "dtype": torch.bfloat16, "H": 2, "N": 37, "D": 64}


def with_kernels(cases, *others):
    """Parametrises by ``case`` and ``backend``: those that have compiled kernels, and ``others``."""
    cuda = {c for c in cases if importlib.util.find_spec(f"univid.kernels.cuda.{_OPERATORS[OPERATOR[c]].module}")}
    rows = [
        (case, backend)
        for case in cases
        for backend in ("cuda", "triton", *others)
        if backend != "cuda" or case in cuda
    ]
    return pytest.mark.parametrize(("case", "backend"), rows)


def refusal(case, inputs, backend):
    """Why the backend does not take the call and its backward, or None."""
    directions = (backends_for(OPERATOR[case], **inputs, direction=d)[1][backend] for d in ("forward", "backward"))
    return next((reason for reason in directions if reason), None)


def need(case, inputs, backend):
    """A CUDA kernel may refuse a call, for it says why; the other backends take it."""
    if reason := refusal(case, inputs, backend):
        (pytest.skip if backend == "cuda" else pytest.fail)(f"{backend}: {reason}")


def on_card(case, seed=0, backend=None, **sizes):
    inputs = arguments(case, seed, **(CARD | sizes))
    if backend:
        need(case, inputs, backend)
    return inputs


def assert_equal(results, expected):
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


def assert_repeated(case, backend, results, expected):
    """The same bits; but the CUDA backward of pyramid_st_attn adds in any order, unless it is to be deterministic."""
    ordered = not (backend == "cuda" and "pyramid" in case)
    for name, x in expected.items():
        within = 0.0 if ordered or name == "out" else 0.02 * x.abs().max().item()
        torch.testing.assert_close(results[name], x, rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-raw"])
def test_opcheck_on_a_card(case, backend):
    check_operator(case, on_card(case, backend=backend), backend)


@pytest.mark.gpu
@every_operator
def test_compile_on_a_card(case):
    check_compiled(case, None, "inductor", dynamic=True, expected=1, **CARD)


@pytest.mark.gpu
def test_compile_moves_tables():
    """Tables made on the host at every step: one compilation for those that have been moved, one for the others."""
    call, compilations = compiled(ops.pyramid_st_attn)
    inputs = on_card("pyramid")
    for _ in range(3):
        inputs["refs"] = ReferenceFrames.pyramid(T, R, "random")
        for _ in range(2):
            assert torch.equal(call(**inputs), ops.pyramid_st_attn(**inputs))
    assert compilations() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_operator
def test_autocast_on_a_card(case, dtype):
    backend = "reference" if dtype == torch.float16 else None  # whose kernels would be compiled for these alone
    check_autocast(case, "cuda", dtype, backend, **{k: CARD[k] for k in "HND"})


# --- CUDA graphs


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-window", "pyramid-raw"], "torch")
def test_cuda_graph(case, backend, monkeypatch, tmp_path):
    """Forward and backward are captured, and replayed with other inputs; autotuning is on, but measures nothing."""
    static = on_card(case, backend=backend)
    asked = list(leaves(static).values())
    grad = incoming(apply(case, static, backend=backend))

    def step():
        out = apply(case, static, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, asked, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with monkeypatch.context() as patch:
        forget_winners(patch, tmp_path)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
    before = [x.clone() for x in results]
    for seed in (1, 2):
        with torch.no_grad():
            for name, x in on_card(case, seed).items():
                if isinstance(x, Tensor):
                    static[name].copy_(x)
            grad.normal_()
        graph.replay()
        expected = step()
        unordered = backend == "torch" or (backend == "cuda" and "pyramid" in case)
        for result, wanted, old in zip(results, expected, before, strict=True):
            error = (result - wanted).abs().max()
            assert error == 0 or (unordered and error <= 0.02 * wanted.abs().max())
            assert not torch.equal(result, old)


def forget_winners(monkeypatch, folder):
    """Autotuning is on, and nothing has been measured yet."""
    from univid.kernels.triton import launch

    monkeypatch.setenv("UNIVID_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_cache_folder", lambda: str(folder))
    monkeypatch.setattr(launch.Tuned, "_measure", lambda *_: pytest.fail("measured in a capture"))
    for name, module in list(sys.modules.items()):
        if name.startswith("univid.kernels.triton."):
            for one in vars(module).values():
                if isinstance(one, launch.Tuned):
                    monkeypatch.setattr(one, "_chosen", {})


# --- determinism, and tables


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-raw"], "torch", "reference")
def test_bit_equal_from_run_to_run(case, backend, monkeypatch):
    """With the flag set at the forward, and with ``deterministic=True``."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    inputs = on_card(case, backend=backend, T=8, N=150)

    def flagged(inputs):
        torch.use_deterministic_algorithms(True)
        try:
            return apply(case, inputs, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)

    first = differentiate(case, inputs, flagged)
    assert_equal(differentiate(case, inputs, flagged), first)
    if "pyramid" in case:
        first = differentiate(case, inputs, backend=backend, deterministic=True)
        assert_equal(differentiate(case, inputs, backend=backend, deterministic=True), first)


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-window", "pyramid-raw"])
def test_everything_is_written(case, backend):
    """PyTorch fills new memory with NaN while it is deterministic."""
    inputs = on_card(case, backend=backend)
    expected = differentiate(case, inputs, backend=backend)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device="cuda").isnan().all()
        results = differentiate(case, inputs, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_repeated(case, backend, results, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(4,), (T, 4), (B, T, 4)], ids=str)
@with_kernels(["pyramid"], "torch", "reference")
def test_raw_entries_out_of_range(case, backend, shape, dtype, monkeypatch):
    """In a raw table on a card they are skipped like -1, also those beyond 32 bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    clean = torch.randint(T, shape, generator=torch.Generator().manual_seed(0))
    junk = clean.clone()
    wide = [2**40, 2**32, -(2**32) + 1, 2**62] if dtype == torch.int64 else [2**31 - 1, -(2**31)]
    for i, entry in enumerate([T, -2, 10**6, *wide] * 2):
        clean.view(-1)[3 * i % clean.numel()] = -1
        junk.view(-1)[3 * i % clean.numel()] = entry
    inputs = on_card(case) | {"refs": junk.to("cuda", dtype)}
    need(case, inputs, backend)
    results = differentiate(case, inputs, backend=backend, deterministic=True)
    padded = inputs | {"refs": clean.to("cuda", dtype)}
    assert_equal(results, differentiate(case, padded, backend=backend, deterministic=True))
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.gpu
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@with_kernels(["pyramid"], "torch", "reference")
def test_unreferenced_frames(case, backend, equal, raw):
    """Their gradients are exactly zero, those of the others are not."""
    table = torch.tensor([[1, 3]] * T if equal else [[1, 3], [3, 3], [1, 1], [3, 1], [1, 3]])
    inputs = on_card(case) | {"refs": table.cuda() if raw else ReferenceFrames.from_table(table, T)}
    need(case, inputs, backend)
    results = differentiate(case, inputs, backend=backend)
    for name in "kv":
        assert results[name][:, [1, 3]].any() and not results[name][:, [0, 2, 4]].any()


# --- memory


@pytest.mark.xdist_group("memory")
@pytest.mark.gpu
@pytest.mark.parametrize("raw", [False, True])
@with_kernels(["pyramid"])
def test_peak_memory(case, backend, raw):
    """The gather is never made: what the design allows, and a little for tables and rounding."""
    frames, small = 16, 4 * 2**20
    refs = ReferenceFrames.pyramid(frames, 8).to("cuda")
    inputs = on_card(case, B=1, T=frames, N=1024, H=8) | {"refs": refs.table[0].clone() if raw else refs}
    need(case, inputs, backend)
    asked = list(leaves(inputs).values())
    row = inputs["q"].nbytes // (2 * 64) * 4  # a float32 for every row of queries
    forward = inputs["q"].nbytes + row  # out, logsumexp
    # dq, dk, dv; float32 dQ, two row vectors, float32 dK and dV
    backward = 3 * inputs["q"].nbytes + 2 * inputs["q"].nbytes + 2 * row + 2 * 2 * inputs["q"].nbytes
    gather = 8 * inputs["k"].nbytes
    grad = incoming(inputs["q"])

    def peaks(backend):
        """Of the forward and of the backward, the second time they run."""
        for _ in range(2):
            out = None
            out, first = peak(lambda: apply(case, inputs, backend=backend))
            _, second = peak(lambda out=out: torch.autograd.grad(out, asked, grad))
        return first, second

    first, second = peaks(backend)
    assert first <= forward + small, f"{first} bytes, {first - forward} more than out and logsumexp"
    assert second <= backward + small, f"{second} bytes, {second - backward} more than the design allows"
    assert min(peaks("torch")) > gather > forward + small  # the test can fail


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
        results = differentiate(case, apart, grad=lambda out: far(incoming(out)), backend=backend)
        torch.testing.assert_close(results, expected)


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
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("70 GB needed")
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


# --- streams, threads, devices


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-raw"])
def test_another_stream(case, backend):
    """Inputs arrive on a stream of their own, late: what runs on another one would not see them."""
    source = on_card(case, backend=backend)
    expected = differentiate(case, source, backend=backend)
    static = {name: torch.zeros_like(x) if isinstance(x, Tensor) else x for name, x in source.items()}
    given = incoming(expected["out"])
    late = torch.zeros_like(given)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clocks: some 50 ms
        with torch.no_grad():
            late.copy_(given)
            for name, x in source.items():
                if isinstance(x, Tensor):
                    static[name].copy_(x)
        results = differentiate(case, static, grad=lambda _: late, backend=backend)
        assert not stream.query()  # it has not slept yet
    stream.synchronize()
    assert_repeated(case, backend, results, expected)


@pytest.mark.gpu
@with_kernels(OPERATORS)
def test_the_first_call_of_a_thread(case, backend):
    """Where nothing before it has made the device's context the thread's: memory comes from what lies ready."""
    inputs = on_card(case, backend=backend)
    expected = apply(case, inputs, backend=backend)
    ready = torch.empty_like(expected)
    torch.cuda.synchronize()
    del ready
    (result,) = in_threads(1, lambda _: apply(case, inputs, backend=backend))
    torch.cuda.synchronize()
    assert isinstance(result, Tensor), result
    assert torch.equal(result, expected)


@pytest.mark.gpu
@with_kernels(["pyramid", "temporal"])
def test_threads_that_compile(case, backend):
    """The first calls with a head dimension come from four threads at once, each on its stream."""
    inputs = [on_card(case, seed, D=40) for seed in range(4)]
    need(case, inputs[0], backend)

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = differentiate(case, inputs[i], backend=backend)
            torch.cuda.current_stream().synchronize()
        return results

    torch.cuda.synchronize()
    results = in_threads(4, work)
    for i, result in enumerate(results):
        assert_repeated(case, backend, result, differentiate(case, inputs[i], backend=backend))
        reference = differentiate(case, inputs[i], backend="reference")
        torch.testing.assert_close(result, reference, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@with_kernels([*OPERATORS, "pyramid-raw"])
def test_another_device(case, backend):
    """Not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU needed")
    inputs = on_card(case, backend=backend)
    there = {name: x.to("cuda:1") if hasattr(x, "to") else x for name, x in inputs.items()}
    assert torch.cuda.current_device() == 0
    given = incoming(apply(case, inputs, backend=backend))
    expected = differentiate(case, inputs, grad=lambda _: given, backend=backend)
    results = differentiate(case, there, grad=lambda _: given.to("cuda:1"), backend=backend)
    assert all(x.device.index == 1 for x in results.values())
    assert_repeated(case, backend, {name: x.to("cuda:0") for name, x in results.items()}, expected)


# --- compute-sanitizer


def run_cuda_kernels():
    """Every CUDA kernel, on shapes with remainders; what compute-sanitizer watches. Prints how many calls ran."""
    ran = 0
    for cases in (("temporal", "temporal_qkv"), ("pyramid", "pyramid_qkv"), ("dual", "dual-text")):
        for dtype in (torch.bfloat16, torch.float16):
            for frames, tokens, heads, dim in (
                (1, 1, 1, 8),
                (5, 7, 3, 64),
                (16, 3, 1, 128),
                (1, 37, 2, 64),
                (24, 37, 2, 64),
                (33, 2, 1, 40),
                (64, 3, 1, 64),
            ):
                for case in cases:
                    inputs = arguments(case, dtype=dtype, B=2, T=frames, N=tokens, H=heads, D=dim)
                    inputs = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in inputs.items()}
                    if refusal(case, inputs, "cuda") is None:
                        grad = torch.randn(2, frames, tokens, heads, dim).to("cuda", dtype)
                        differentiate(case, inputs, grad=lambda _: grad, backend="cuda")  # noqa: B023
                        ran += 1
    torch.cuda.synchronize()
    print(f"{ran} calls ran")


@pytest.mark.gpu
def test_compute_sanitizer():
    """No access out of bounds. Every tensor has an allocation of its own."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer needed")
    inputs = on_card("temporal", backend="cuda")
    differentiate("temporal", inputs, backend="cuda")
    code = "from tests.test_on_a_card import run_cuda_kernels; run_cuda_kernels()"
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    assert int(done.stdout.split(" calls ran")[0].split()[-1]) >= 10
