"""The operators on a GPU: compiled, captured, in streams and threads, watched by compute-sanitizer."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.calls import (
    OPERATORS,
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
from tests.card import CARD, assert_repeated, need, on_card, refusal, with_kernels
from univid import ops
from univid.ops import ReferenceFrames
from univid.ops.explain import backends_for


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


COLD = """
import sys
import torch
from tests.calls import apply
from tests.card import on_card

for case in sys.argv[1:]:
    inputs = on_card(case, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = apply(case, inputs, backend="cuda")
    graph.replay()
    with torch.no_grad():
        assert torch.equal(captured, apply(case, inputs, backend="cuda")), case
    print("captured", case)
"""


@pytest.mark.gpu
def test_a_first_call_in_a_capture():
    """Kernels are loaded and given their shared memory then."""
    cases = [case for case, backend in with_kernels(OPERATORS).args[1] if backend == "cuda"]
    cases = [case for case in cases if refusal(case, on_card(case), "cuda") is None]
    done = subprocess.run(
        [sys.executable, "-c", COLD, *cases],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("captured ")[1:] == [f"{case}\n" for case in cases]
    if torch.cuda.get_device_capability() == (9, 0):
        assert {"pyramid", "dual"} <= set(cases)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_one_call_behind_the_other(backend, captured):
    """Each reads what the one ahead has just written, with nothing between them."""
    inputs = on_card("pyramid", backend=backend, T=8, N=333, H=8)
    dual = on_card("dual", backend=backend, T=8, N=333, H=8)
    del dual["q"]

    def steps(between=lambda: None):
        q, k, v = (inputs[name].detach() for name in "qkv")
        for _ in range(3):
            q, k = q.requires_grad_(), k.requires_grad_()
            out = ops.pyramid_st_attn(q, k, v, inputs["refs"], backend=backend, deterministic=True)
            between()
            out = ops.dual_stream_attn(out, **dual, backend=backend)
            between()
            q, k = (x.detach() for x in torch.autograd.grad(out, (q, k), out.detach()))
            between()
        return torch.stack([q, k])

    expected = steps(torch.cuda.synchronize)
    assert expected.isfinite().all() and expected.any()
    if not captured:
        for _ in range(20):
            assert torch.equal(steps(), expected)
        return
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        steps()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = steps()
    for _ in range(20):
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected)


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


def cuda_calls(dtype):
    """(case, inputs, the names whose gradients are asked for, options), on shapes with remainders."""
    sizes = [
        (1, 1, 1, 8),
        (5, 7, 3, 64),
        (16, 3, 1, 128),
        (1, 37, 2, 64),
        (24, 37, 2, 64),
        (33, 2, 1, 40),
        (64, 3, 1, 64),
    ]
    more = {
        "temporal": [(16, 2, 1, 32), (24, 2, 1, 32), (24, 2, 1, 40), (24, 2, 1, 128)],  # T and D known to the compiler
        # Four warpgroups, the second without a round of tiles to share; blocks that take another tile.
        "pyramid": [(1, 200, 2, 64), (12, 200, 2, 64), (6, 70, 12, 64)],
        "norm": [(1, 2880, 1, 160)],
    }
    attention = ("temporal", "temporal_qkv", "pyramid", "pyramid_qkv", "dual", "dual-text")
    for case in (*attention, "conv", "norm", "norm-float32"):
        for frames, tokens, heads, dim in sizes + more.get(case, []):
            inputs = arguments(case, dtype=dtype, B=2, T=frames, N=tokens, H=heads, D=dim)
            yield case, inputs, tuple(leaves(inputs)), {}

    inputs = arguments("pyramid", dtype=dtype, N=37, D=64)
    yield "pyramid", inputs, ("q", "k", "v"), {"deterministic": True}
    for asked in (("q",), ("k",), ("v",), ("k", "v")):
        yield "pyramid", inputs, asked, {}

    def random(*shape):
        return torch.randn(shape, dtype=dtype)

    # One to four tiles of keys; what an output rounded to 16 bits cannot tell has a pass of its own.
    for text, image in ((9, 11), (9, 0), (100, 0), (200, 0), (300, 0), (9, 100), (9, 200), (200, 9), (9, 260)):
        keys = {f"{x}_text": random(2, text, 2, 64) for x in "kv"}
        keys |= {f"{x}_image": random(2, image, 2, 64) if image else None for x in "kv"}
        inputs = {"q": random(2, 3, 37, 2, 64), **keys}
        weights = {"text_weight": random(2, 3)} | ({"image_weight": random(2, 1)} if image else {})
        for asked in (("q", "k_text", "v_text"), ("q",), ("k_text",), ("v_text",)):
            yield "dual", inputs, asked, {}
        yield "dual", inputs | weights, ("q", "v_text", *weights), {}

    # Warpgroups that take another tile of queries, of another head and clip.
    keys = {f"{x}_{name}": random(2, length, 8, 64) for name, length in (("text", 9), ("image", 100)) for x in "kv"}
    inputs = {"q": random(2, 1, 4300, 8, 64), **keys, "text_weight": random(2, 1)}
    yield "dual", inputs, ("q", "k_text", "v_image", "text_weight"), {}

    # Tiles that are cut: of the output and x's gradient, and of the weight's; many small ones, each of one step.
    sizes_of_conv = ((2, 16, 10, 640, 328, 9), (8, 24, 37, 72, 328, 3), (1, 1, 64, 64, 44800, 1))
    for clips, frames, tokens, channels, channels_out, taps in sizes_of_conv:
        x, weight = random(clips, frames, tokens, channels), random(channels_out, taps, channels).transpose(1, 2)
        inputs = {"x": x, "weight": weight, "bias": random(channels_out), "residual": None}
        yield "conv", inputs, ("x", "weight", "bias"), {}


def run_cuda_kernels():
    """Every CUDA kernel; what compute-sanitizer watches. Prints how many calls ran."""
    from univid.kernels.cuda import linear_geglu, temporal_conv

    ran = 0
    for dtype in (torch.bfloat16, torch.float16):
        for case, inputs, asked, options in cuda_calls(dtype):
            on_host = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
            inputs = inputs | {name: x.detach().cuda() for name, x in on_host.items()}
            if refusal(case, inputs, "cuda") is not None:
                continue
            for tiling in range(-1, 5) if case == "conv" else (-1,):
                with mock.patch.object(temporal_conv, "_CHOSEN", tiling):
                    wanted = [inputs[name].requires_grad_() for name in asked]
                    out = apply(case, inputs, backend="cuda", **options)
                    torch.autograd.grad(out, wanted, incoming(out.detach()))
                    ran += 1
        # Tiles that are cut in the second, and many of one step in the third.
        for *rows, channels, columns in ((2, 3, 37, 72, 232), (1, 1, 400, 2048, 320), (1, 1, 64, 64, 22400)):
            x, weight, bias = (
                torch.randn(s, dtype=dtype).cuda() for s in ((*rows, channels), (2 * columns, channels), (2 * columns,))
            )
            if backends_for("linear_geglu", x, weight, bias)[1]["cuda"] is not None:
                continue
            for tiling in range(-1, 3):
                with mock.patch.object(linear_geglu, "_CHOSEN", tiling):
                    ops.linear_geglu(x, weight, bias, backend="cuda")
                    ran += 1
    torch.cuda.synchronize()
    print(f"{ran} calls ran")


@pytest.mark.gpu
@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's cuobjdump")
def test_every_cuda_kernel_runs():
    """Of those that are compiled for this card, under what compute-sanitizer watches."""
    import triton

    from univid.kernels.cuda import extension

    need("temporal", on_card("temporal"), "cuda")
    listing = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-symbols", extension().__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    hopper = torch.cuda.get_device_capability() == (9, 0)
    compiled = set()
    for code in listing.split("Fatbin elf code:")[1:]:
        if re.search(r"arch = sm_9\d" if hopper else r"arch = sm_8\d", code):
            compiled |= set(re.findall(r"STO_ENTRY\s+(\w+)$", code, re.MULTILINE))
    assert len(compiled) > 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_cuda_kernels()
    ran = {event.key for event in profile.key_averages()}
    assert not {torch._C._demangle(name) for name in compiled} - ran


# initcheck does not see what bulk tensor stores write: results of 16 bits, which are made as zeros for it. What else is made,
# statistics and partial sums, has to be written before it is read.
ZEROS = """
import torch
def zeroed(make):
    def made(*args, **kwargs):
        x = make(*args, **kwargs)
        return x.zero_() if x.dtype in (torch.bfloat16, torch.float16) else x
    return made
torch.Tensor.new_empty = zeroed(torch.Tensor.new_empty)
torch.empty_like, torch.empty = zeroed(torch.empty_like), zeroed(torch.empty)
"""
# The bulk copy of the next statistics into a stage whose former ones all lanes have read, in two kernels: racecheck does not
# see the barrier between (docs/kernel-notes.md). The last address is the copy's.
NOT_RACES = re.compile(
    r"((?:backward|backward_keys)<\w+, univid::<unnamed>::Config<\(bool\)1(?:, \(bool\)1){1,2}>>\(univid::<unnamed>::Arguments\))"
    r"\+(0x[0-9a-f]+)$"
)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    """No access out of bounds, nothing read that was not written, no race, no barrier that some miss. Every tensor has its own memory."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer needed")
    inputs = on_card("temporal", backend="cuda")
    differentiate("temporal", inputs, backend="cuda")
    code = "from tests.test_on_a_card import run_cuda_kernels; run_cuda_kernels()"
    done = subprocess.run(
        [sanitizer, "--tool", tool, sys.executable, "-c", (ZEROS if tool == "initcheck" else "") + code],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split(" calls ran")[0].split()[-1]) >= 10
    if tool != "racecheck":
        assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-4000:]
        return
    assert "RACECHECK SUMMARY" in done.stdout
    races = [line.strip() for line in done.stdout.splitlines() if "Race reported between" in line]
    found = [NOT_RACES.search(line) for line in races]
    assert all(found), "\n".join(races)
    places = Counter(kernel for kernel, _ in {match.groups() for match in found})
    assert max(places.values(), default=0) <= 1, races  # one in each of the two, in each dtype
