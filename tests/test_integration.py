"""The operators inside PyTorch: compiled, checkpointed, under autocast, counted, captured, in threads, past 2³¹."""

import copy
import functools
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from univid import ops
from univid.ops import ReferenceFrames, eager
from univid.ops.explain import _OPERATORS, backends_for
from univid.ops.registration import deterministic_algorithms

# --- the calls --------------------------------------------------------------------------------------------------------

OPERATOR = {
    "pyramid": "pyramid_st_attn",
    "pyramid-window": "pyramid_st_attn",  # with padding
    "pyramid-raw": "pyramid_st_attn",
    "pyramid_qkv": "pyramid_st_attn_qkv",
    "temporal": "temporal_attn",
    "temporal_qkv": "temporal_attn_qkv",
    "dual": "dual_stream_attn",
    "dual-text": "dual_stream_attn",
    "conv": "temporal_conv",
    "conv-plain": "temporal_conv",
    "norm": "group_norm_silu",
    "norm-float32": "group_norm_silu",  # float32 affine parameters, no activation
}
OPERATORS = ("pyramid", "pyramid_qkv", "temporal", "temporal_qkv", "dual", "conv", "norm")  # each one once

every_case = pytest.mark.parametrize("case", OPERATOR)
every_operator = pytest.mark.parametrize("case", OPERATORS)
eager_backends = pytest.mark.parametrize("backend", ["torch", "reference"])

B, T, N, H, D, R = 2, 5, 7, 3, 8, 4


def arguments(case, seed=0, *, device="cpu", dtype=torch.float32, B=B, T=T, N=N, H=H, D=D):
    """The arguments of a call, by name."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.Generator(device).manual_seed(seed) if device == "cuda" else generator

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=numbers, device=numbers.device, dtype=dtype).to(device)

    def each(names, *shape, **options):
        return {name: randn(*shape, **options) for name in names.split()}

    random = ReferenceFrames.pyramid(T, min(R, T), "random", generator=generator).to(device)
    channels, channels_out = 2 * D, 4 * D
    match case:
        case "pyramid":
            return each("q k v", B, T, N, H, D) | {"refs": random}
        case "pyramid-window":
            return each("q k v", B, T, N, H, D) | {"refs": ReferenceFrames.window(T, 1).to(device)}
        case "pyramid-raw":
            return each("q k v", B, T, N, H, D) | {"refs": torch.randint(T, (B, T, R), generator=generator).to(device)}
        case "pyramid_qkv":
            return {"qkv": randn(B, T, N, 3, H, D), "refs": random}
        case "temporal":
            return each("q k v", B, T, N, H, D)
        case "temporal_qkv":
            return {"qkv": randn(B, T, N, 3, H, D)}
        case "dual":
            text, image = each("k_text v_text", B, 9, H, D), each("k_image v_image", B, 11, H, D)
            return each("q", B, T, N, H, D) | text | image | each("text_weight", B, T) | {"image_weight": 0.7}
        case "dual-text":
            absent = {"k_image": None, "v_image": None}
            return each("q", B, T, N, H, D) | each("k_text v_text", B, 9, H, D) | absent
        case "conv":
            weight = randn(channels_out, 3, channels).transpose(1, 2)
            tail = {"bias": randn(channels_out), "residual": randn(B, T, N, channels_out)}
            return {"x": randn(B, T, N, channels), "weight": weight} | tail
        case "conv-plain":
            return {"x": randn(B, T, N, channels), "weight": randn(channels_out, channels, 5)}
        case "norm":
            return {"x": randn(B, N, channels), "num_groups": 4} | each("weight bias", channels) | {"eps": 1e-5}
        case "norm-float32":
            affine = each("weight bias", channels, dtype=torch.promote_types(dtype, torch.float32))
            return {"x": randn(B, N, channels), "num_groups": 2} | affine | {"eps": 1e-5, "silu": False}


def leaves(inputs):
    """The tensors that have gradients, by name; they ask for them from here on."""
    return {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}


def apply(case, inputs, **options):
    return getattr(ops, OPERATOR[case])(**inputs, **options)


def incoming(out):
    device = "cuda" if out.is_cuda else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(out.shape, generator=generator, device=device, dtype=out.dtype).to(out.device)


def differentiate(case, inputs, call=None, *, grad=incoming, **options):
    """{"out": the output, and under their names the gradients of all inputs}; ``grad`` makes the incoming one."""
    asked = leaves(inputs)
    out = apply(case, inputs, **options) if call is None else call(inputs)
    gradients = torch.autograd.grad(out, list(asked.values()), grad(out.detach()))
    return {"out": out.detach(), **dict(zip(asked, gradients, strict=True))}


class Seen(TorchDispatchMode):
    """Notes the library's operators that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "univid":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    @property
    def names(self):
        return [function._opname for function, _ in self.calls]


@pytest.fixture
def runs(monkeypatch):
    """What PyTorch's backends are asked for: (direction, arguments, whether PyTorch is deterministic)."""
    log = []

    def spy(direction, run):
        def noted(*args):
            log.append((direction, args, torch.are_deterministic_algorithms_enabled()))
            return run(*args)

        return noted

    for backend in eager.BACKENDS.values():
        for one in backend.values():
            for direction in ("forward", "backward"):
                monkeypatch.setattr(one, direction, spy(direction, getattr(one, direction)))
    return log


# --- torch.library ----------------------------------------------------------------------------------------------------

NO_AUTOGRAD = ("test_schema", "test_faketensor")


def check_operator(case, inputs, backend, everything=True):
    """opcheck of the operator, and of its backward with the arguments that autograd gives it."""
    leaves(inputs)
    name = OPERATOR[case]
    operator = getattr(torch.ops.univid, name).default
    args = _OPERATORS[name].arguments(**inputs, backend=backend)
    torch.library.opcheck(operator, args, **({} if everything else {"test_utils": NO_AUTOGRAD}))
    with Seen() as seen:
        differentiate(case, inputs, backend=backend)
    assert seen.names == [name, f"{name}_backward"]
    function, args = seen.calls[1]
    torch.library.opcheck(function, [x.detach() if isinstance(x, Tensor) else x for x in args], test_utils=NO_AUTOGRAD)


@eager_backends
@every_case
def test_opcheck(case, backend):
    check_operator(case, arguments(case), backend)


@eager_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_case
def test_opcheck_of_other_dtypes(case, dtype, backend):
    check_operator(case, arguments(case, dtype=dtype), backend, everything=False)


@every_case
def test_meta(case):
    """Shapes without numbers."""
    inputs = arguments(case)
    there = {name: x.to("meta") if hasattr(x, "to") else x for name, x in inputs.items()}
    expected, results = differentiate(case, inputs), differentiate(case, there)
    for name, x in expected.items():
        result = results[name]
        assert (result.shape, result.dtype, result.stride()) == (x.shape, x.dtype, x.stride())
        assert result.device.type == "meta"


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_equal_sizes():
    """torch.compile takes sizes that are equal at first for one; here they are so by chance."""
    with fx_config.patch(use_duck_shape=False):
        yield


def compiled(call, compiler="aot_eager", **options):
    """The call compiled, and a function that says how often it has been."""
    torch._dynamo.reset()
    compilations = lambda: len(_debug_get_cache_entry_list(call.__code__))  # noqa: E731
    return torch.compile(call, fullgraph=True, backend=compiler, **options), compilations


def check_compiled(case, backend, compiler, *, dynamic, expected, **options):
    """Forward and backward of several sizes and tables agree with eager; and how often it is compiled."""
    call, compilations = compiled(lambda inputs: apply(case, inputs, backend=backend), compiler, dynamic=dynamic)
    sizes = [{}, {}, {"B": 3, "T": 6, "N": 11}, {"B": 4, "T": 7, "N": 13}, {}]
    for seed, size in enumerate(sizes):
        inputs = arguments(case, seed, **(options | size))
        torch.testing.assert_close(differentiate(case, inputs, call), differentiate(case, inputs, backend=backend))
    assert compilations() == expected


@eager_backends
@every_case
def test_compile(case, backend):
    """With dynamic sizes there is one compilation, whatever the sizes and the table."""
    check_compiled(case, backend, "aot_eager", dynamic=True, expected=1)


@every_operator
def test_compile_makes_sizes_dynamic_by_itself(case):
    check_compiled(case, None, "aot_eager", dynamic=None, expected=2)


@pytest.mark.parametrize("raw", [False, True])
def test_compile_takes_changing_tables(raw):
    call, compilations = compiled(ops.pyramid_st_attn)
    q, k, v = torch.randn(3, 2, 6, 7, 3, 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        refs = ReferenceFrames.pyramid(6, 4, "random", generator=generator)
        refs = refs.table[0].clone() if raw else refs
        torch.testing.assert_close(call(q, k, v, refs), ops.pyramid_st_attn(q, k, v, refs))
    assert compilations() == 1


def test_compile_takes_every_kind_of_table():
    """A kind of its own are tables with padding, and those whose rows are equal: each is compiled once."""
    call, compilations = compiled(ops.pyramid_st_attn, dynamic=True)
    q, k, v = torch.randn(3, 2, 6, 7, 3, 8)
    kinds = [
        ReferenceFrames.pyramid(6, 4),
        ReferenceFrames.window(6, 2),
        ReferenceFrames.all(6),
        ReferenceFrames.pyramid(6, 5),
        ReferenceFrames.pyramid(6, 5, own_frame=False),
        ReferenceFrames.window(6, 1),
    ]
    for refs in kinds * 2:
        torch.testing.assert_close(call(q, k, v, refs), ops.pyramid_st_attn(q, k, v, refs))
    assert compilations() == 3


def test_compile_takes_changing_weights():
    """A tensor does not recompile; a number does, as a number handed to any operator, and is right."""
    call, compilations = compiled(lambda inputs, weight: ops.dual_stream_attn(**(inputs | {"text_weight": weight})))
    inputs = arguments("dual")
    for seed in range(4):
        weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(call(inputs, weight), ops.dual_stream_attn(**(inputs | {"text_weight": weight})))
    assert compilations() == 1
    for number in (0.5, 1.0, 0, -2.0):
        torch.testing.assert_close(call(inputs, number), ops.dual_stream_attn(**(inputs | {"text_weight": number})))


def test_compile_reads_the_deterministic_flag(runs):
    call, _ = compiled(lambda inputs: apply("temporal", inputs))
    for flag in (False, True, False):
        inputs = arguments("temporal")
        leaves(inputs)
        torch.use_deterministic_algorithms(flag)
        try:
            out = call(inputs)
        finally:
            torch.use_deterministic_algorithms(False)
        out.sum().backward()
        assert runs[-1][0] == "backward" and runs[-1][2] is flag


# --- autograd ---------------------------------------------------------------------------------------------------------


@eager_backends
@every_case
def test_gradients_nobody_asked_for(case, backend, runs):
    """They are None, and the backend does not compute them; the others stay the same."""
    full = differentiate(case, arguments(case), backend=backend)
    names = [name for name in full if name != "out"]
    for name in names:
        inputs = arguments(case)
        asked = inputs[name].requires_grad_()
        runs.clear()
        apply(case, inputs, backend=backend).backward(incoming(full["out"]))
        torch.testing.assert_close(asked.grad, full[name])
        assert all(inputs[other].grad is None for other in names if other != name)
        backward = [args for direction, args, _ in runs if direction == "backward"]
        if name == "residual":
            assert not backward  # it is the incoming gradient
        elif name != "qkv":
            (args,) = backward
            kind = case.split("-")[0]
            first = {"pyramid": 4, "temporal": 3, "dual": 5, "conv": 2, "norm": 4}[kind]  # past call, grad, statistics
            assert sum(x is not None for x in slots(args[first:])) == 1
    inputs = arguments(case)
    runs.clear()
    assert not apply(case, inputs, backend=backend).requires_grad
    assert [direction for direction, *_ in runs] == ["forward"]


def slots(gradients):
    """What a backward writes, those of a stream one by one."""
    for gradient in gradients:
        if isinstance(gradient, tuple):
            yield from gradient
        else:
            yield gradient


@every_operator
def test_some_gradients(case):
    full = differentiate(case, arguments(case))
    names = [name for name in full if name != "out"][::2]
    inputs = arguments(case)
    asked = [inputs[name].requires_grad_() for name in names]
    gradients = torch.autograd.grad(apply(case, inputs), asked, incoming(full["out"]))
    torch.testing.assert_close(dict(zip(names, gradients, strict=True)), {name: full[name] for name in names})


@every_case
def test_accumulation(case):
    """Two backwards add up; a kept graph gives the same again."""
    inputs = arguments(case)
    expected = differentiate(case, inputs)
    asked = leaves(inputs)
    out = apply(case, inputs)
    out.backward(incoming(out), retain_graph=True)
    apply(case, inputs).backward(incoming(out))
    out.backward(incoming(out))
    for name, x in asked.items():
        torch.testing.assert_close(x.grad, 3 * expected[name])


@eager_backends
@every_operator
def test_double_backward_raises(case, backend):
    inputs = arguments(case)
    asked = list(leaves(inputs).values())
    out = apply(case, inputs, backend=backend)
    first = torch.autograd.grad(out.square().sum(), asked, create_graph=True)
    plain = torch.autograd.grad(apply(case, inputs, backend=backend).square().sum(), asked)
    torch.testing.assert_close(first, plain)  # the first gradients are right all the same
    with pytest.raises(RuntimeError, match=f"{OPERATOR[case]}: cannot be differentiated twice"):
        torch.autograd.grad(sum(g.sum() for g in first), asked)


@every_case
def test_inference(case):
    expected = apply(case, arguments(case))
    inputs = arguments(case)
    leaves(inputs)
    with torch.inference_mode():
        out = apply(case, inputs)
    assert out.is_inference()
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        out = apply(case, inputs)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)


@eager_backends
@every_case
def test_dispatch_modes(case, backend):
    """Under a mode the operators are seen, nothing within them, and the results are the same."""
    expected = differentiate(case, arguments(case), backend=backend)
    with Seen() as seen:
        results = differentiate(case, arguments(case), backend=backend)
    torch.testing.assert_close(results, expected)
    assert seen.names == [OPERATOR[case], f"{OPERATOR[case]}_backward"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_univid(ctx, function, *args, **kwargs):
    ours = getattr(function, "namespace", "") == "univid"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, save_univid),
    },
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@every_case
def test_checkpoint(case, how, runs):
    expected = differentiate(case, arguments(case))
    inputs = arguments(case)
    runs.clear()
    names = list(leaves(inputs))

    def block(*tensors):
        return apply(case, inputs | dict(zip(names, tensors, strict=True))) * 1.0

    def call(inputs):
        return checkpoint(block, *(inputs[name] for name in names), **CHECKPOINTS[how])

    if how == "reentrant":  # which gives no torch.autograd.grad
        out = call(inputs)
        out.backward(incoming(out))
        results = {"out": out.detach()} | {name: inputs[name].grad for name in names}
    else:
        results = differentiate(case, inputs, call)
    torch.testing.assert_close(results, expected)
    again = [] if how == "selective" else ["forward"]
    assert [direction for direction, *_ in runs] == ["forward", *again, "backward"]


def test_checkpoint_compiled():
    inputs = arguments("pyramid")
    expected = differentiate("pyramid", inputs)
    block, _ = compiled(
        lambda inputs: checkpoint(lambda q: apply("pyramid", inputs | {"q": q}), inputs["q"], use_reentrant=False)
    )
    torch.testing.assert_close(differentiate("pyramid", inputs, block), expected)


# --- autocast ---------------------------------------------------------------------------------------------------------


def check_autocast(case, device, dtype, backend=None, **sizes):
    """As if everything but gates had been cast by hand; norms as without autocast.

    Gradients come in their inputs' dtypes. The backward may run outside of the block, or inside.
    """
    inputs = arguments(case, device=device, **sizes)
    keeps = ["text_weight"] if "norm" not in case else list(inputs)
    cast = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name not in keeps else x
        for name, x in inputs.items()
    }
    results = differentiate(case, cast, backend=backend)
    expected = {name: x if name == "out" else x.to(inputs[name].dtype) for name, x in results.items()}
    assert expected["out"].dtype == (torch.float32 if "norm" in case else dtype)
    inputs = arguments(case, device=device, **sizes)

    def inside(inputs):
        with torch.autocast(device, dtype):
            return apply(case, inputs, backend=backend)

    torch.testing.assert_close(differentiate(case, inputs, inside), expected)
    with torch.autocast(device, dtype):
        torch.testing.assert_close(differentiate(case, inputs, backend=backend), expected)


@eager_backends
@every_case
def test_autocast(case, backend):
    check_autocast(case, "cpu", torch.bfloat16, backend)


@pytest.mark.parametrize("case", [case for case in OPERATORS if "norm" not in case and "qkv" not in case])
def test_autocast_takes_mixed_dtypes(case):
    """A bfloat16 activation beside float32 parameters; without autocast that is an error, and float64 always is."""
    inputs = arguments(case)
    first = next(iter(inputs))
    mixed = inputs | {first: inputs[first].bfloat16()}
    with pytest.raises(TypeError, match=r"needs \w+'s dtype, bfloat16"):
        apply(case, mixed)
    with torch.autocast("cpu", torch.bfloat16):
        results = differentiate(case, mixed)
        with pytest.raises(TypeError, match=r"needs \w+'s dtype, float64"):
            apply(case, inputs | {first: inputs[first].double()})
    assert results["out"].dtype == torch.bfloat16
    for name, x in results.items():
        assert name == "out" or x.dtype == mixed[name].dtype


def test_autocast_of_norms():
    """x keeps its dtype, beside float32 parameters."""
    for dtype in (torch.bfloat16, torch.float32):
        inputs = arguments("norm-float32", dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = apply("norm-float32", inputs)
        assert out.dtype == dtype
        torch.testing.assert_close(out, apply("norm-float32", inputs))


def test_autocast_leaves_float64_alone():
    inputs = arguments("temporal", dtype=torch.float64)
    expected = apply("temporal", inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(apply("temporal", inputs), expected)


@every_operator
def test_autocast_that_is_off(case):
    inputs = arguments(case)
    expected = apply(case, inputs)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(apply(case, inputs), expected)


def test_autocast_compiled():
    inputs = arguments("pyramid")

    def call(inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return apply("pyramid", inputs)

    results = differentiate("pyramid", inputs, compiled(call)[0])
    torch.testing.assert_close(results, differentiate("pyramid", inputs, call))


# --- FLOPs ------------------------------------------------------------------------------------------------------------

PYRAMID, TEMPORAL, DUAL = B * H * (T * N) * (R * N) * D, B * H * N * T * T * D, B * H * T * N * D
CONV = B * T * N * (2 * D) * (4 * D)
FLOPS = {  # forward, backward with all gradients
    "pyramid": (4 * PYRAMID, 10 * PYRAMID),
    "pyramid-window": (4 * PYRAMID * 3 // R, 10 * PYRAMID * 3 // R),  # padding counts
    "pyramid-raw": (4 * PYRAMID, 10 * PYRAMID),
    "pyramid_qkv": (4 * PYRAMID, 10 * PYRAMID),
    "temporal": (4 * TEMPORAL, 10 * TEMPORAL),
    "temporal_qkv": (4 * TEMPORAL, 10 * TEMPORAL),
    "dual": (4 * DUAL * (9 + 11), 10 * DUAL * (9 + 11)),
    "dual-text": (4 * DUAL * 9, 10 * DUAL * 9),
    "conv": (2 * CONV * 3, 4 * CONV * 3),
    "conv-plain": (2 * CONV * 5, 4 * CONV * 5),
    "norm": (0, 0),
    "norm-float32": (0, 0),
}


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", [None, "reference"])
@every_case
def test_flops(case, backend, device):
    """The formula's, whichever backend runs."""
    inputs = {name: x.to(device) if hasattr(x, "to") else x for name, x in arguments(case).items()}
    forward, backward = FLOPS[case]
    assert count(lambda: apply(case, inputs, backend=backend)) == forward
    # the image's weight is a number: its gradient is not asked for
    assert count(lambda: differentiate(case, inputs, backend=backend)) == forward + backward


@pytest.mark.parametrize(
    ("case", "name", "products"),
    [
        ("pyramid", "q", 6),  # S, dP, dQ: two each
        ("pyramid", "k", 6),
        ("pyramid", "v", 4),  # S, dV
        ("temporal", "q", 6),
        ("temporal", "v", 4),
        ("dual-text", "k_text", 6),
        ("dual-text", "v_text", 4),
        ("conv", "x", 2),
        ("conv", "weight", 2),
        ("conv", "bias", 0),
        ("conv", "residual", 0),
    ],
)
def test_flops_of_one_gradient(case, name, products):
    inputs = arguments(case)
    inputs[name].requires_grad_()
    forward, _ = FLOPS[case]
    unit = forward // (2 if case == "conv" else 4)
    assert count(lambda: apply(case, inputs).sum().backward()) == forward + products * unit


def test_flops_of_streams_that_are_left_out():
    inputs = arguments("dual")
    assert count(lambda: apply("dual", inputs | {"text_weight": 0})) == 4 * DUAL * 11
    assert count(lambda: apply("dual", inputs | {"image_weight": 0.0})) == 4 * DUAL * 9
    assert count(lambda: apply("dual", inputs | {"image_weight": torch.zeros(())})) == 4 * DUAL * 20  # it is computed


# --- determinism ------------------------------------------------------------------------------------------------------


@eager_backends
@every_case
def test_the_deterministic_flag_counts_at_the_forward(case, backend, runs):
    inputs = arguments(case)
    leaves(inputs)
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag)
        try:
            out = apply(case, inputs, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)
        out.sum().backward()
        assert runs[-1][0] == "backward" and runs[-1][2] is flag
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("case", ["pyramid", "pyramid-raw", "pyramid_qkv"])
def test_the_deterministic_argument(case, runs):
    inputs = arguments(case)
    leaves(inputs)
    for flag in (False, True):
        apply(case, inputs, deterministic=flag).sum().backward()
        assert runs[-1][0] == "backward" and runs[-1][2] is flag
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_deterministic_flag_is_restored():
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True), deterministic_algorithms(False):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # the user's setting stands
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_deterministic_flag_in_threads():
    """As long as one backward needs it, it is on, whoever leaves first."""
    entered, leave = threading.Event(), threading.Event()

    def first():
        with deterministic_algorithms(True):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with deterministic_algorithms(True):
        leave.set()
        thread.join()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


# --- modules, objects, threads ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """How a model holds the operators."""

    def __init__(self, refs):
        super().__init__()
        self.refs = refs
        self.norm = nn.GroupNorm(4, 24)
        self.to_qkv = nn.Linear(24, 72, bias=False)
        self.temporal = nn.Parameter(torch.randn(24, 3, 24))  # (C_out, K, C)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        clips, frames, tokens, _ = x.shape
        y = ops.group_norm_silu(x.flatten(0, 1), 4, self.norm.weight, self.norm.bias, self.norm.eps).view(x.shape)
        q, k, v = self.to_qkv(y).view(clips, frames, tokens, 3, 3, 8).unbind(3)
        y = ops.pyramid_st_attn(q, k, v, self.refs)
        prompt = k[:, 0]
        y = y + ops.dual_stream_attn(y, prompt, prompt, None, None, text_weight=self.gate)
        y = ops.temporal_attn(y, k, v).view(x.shape)
        return ops.temporal_conv(y, self.temporal.transpose(1, 2), residual=x)


def test_a_module():
    block, x = Block(ReferenceFrames.pyramid(5, 2)), torch.randn(2, 5, 7, 24)
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert block.gate.grad != 0  # at 0
    other = {name: torch.randn_like(p).requires_grad_() for name, p in block.named_parameters()}
    out = torch.func.functional_call(block, other, (x,))
    gradients = torch.autograd.grad(out.sum(), list(other.values()))
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert again.refs is not block.refs
        torch.testing.assert_close(again(x), block(x))
        again.load_state_dict(other)
        torch.testing.assert_close(again(x), out)
        again.zero_grad()
        again(x).sum().backward()
        torch.testing.assert_close([p.grad for p in again.parameters()], list(gradients))


def test_a_module_compiled():
    block, x = Block(ReferenceFrames.pyramid(5, 2)), torch.randn(2, 5, 7, 24)
    call = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x), block(x))
    parameters = list(block.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(call(x).sum(), parameters), torch.autograd.grad(block(x).sum(), parameters)
    )


def in_threads(number, work):
    """The results of ``work(i)`` in so many threads, which start together."""
    start, results = threading.Barrier(number), [None] * number

    def run(i):
        start.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@every_operator
def test_threads(case):
    """As DataParallel calls a model: each thread with inputs of its own."""
    expected = [differentiate(case, arguments(case, seed)) for seed in range(4)]
    results = in_threads(4, lambda seed: [differentiate(case, arguments(case, seed)) for _ in range(3)])
    for wanted, given in zip(expected, results, strict=True):
        for one in given:
            torch.testing.assert_close(one, wanted)


# --- on a card --------------------------------------------------------------------------------------------------------
#
# One type and one head dimension, so that every kernel is compiled once.

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
RANKS = {"pyramid": 4, "pyramid_qkv": 5, "temporal": 4, "temporal_qkv": 5, "dual": 4, "conv": 3, "norm": 2}


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
    for module in ("temporal", "pyramid"):
        for dtype in (torch.bfloat16, torch.float16):
            for T, N, H, D in (
                (1, 1, 1, 8),
                (5, 7, 3, 64),
                (16, 3, 1, 128),
                (1, 37, 2, 64),
                (24, 37, 2, 64),
                (33, 2, 1, 40),
                (64, 3, 1, 64),
            ):
                for case in (module, f"{module}_qkv"):
                    inputs = arguments(case, dtype=dtype, B=2, T=T, N=N, H=H, D=D)
                    inputs = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in inputs.items()}
                    if refusal(case, inputs, "cuda") is None:
                        grad = torch.randn(2, T, N, H, D).to("cuda", dtype)
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
    code = "from tests.test_integration import run_cuda_kernels; run_cuda_kernels()"
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
