"""The operators inside PyTorch: compiled, differentiated, checkpointed, deterministic, in modules and threads."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.calls import (
    OPERATOR,
    Seen,
    apply,
    arguments,
    check_compiled,
    check_operator,
    compiled,
    differentiate,
    eager_backends,
    every_case,
    every_operator,
    in_threads,
    incoming,
    leaves,
    no_equal_sizes,
    one_tensor,
)
from univid import ops
from univid.ops import ReferenceFrames, eager

SAVE_OUTPUTS = {OPERATOR[case] for case in ("pyramid", "pyramid_qkv", "dual", "sum")}  # for their backward


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
    with no_equal_sizes():
        yield


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
    """A kind of its own are tables with padding, those whose rows are equal, and those that list all frames: each is compiled
    once."""
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
    assert compilations() == 4


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
        if name in ("residual", "offset") or (case, name) == ("bias", "x"):
            assert not backward  # of the incoming gradient alone
        elif name != "qkv":
            (args,) = backward
            kind = case.split("-")[0]
            firsts = {"pyramid": 4, "temporal": 3, "dual": 5, "conv": 2, "norm": 4, "sum": 3}
            firsts |= {"concat": 1, "bias": 1, "geglu": 2}
            first = firsts[kind]  # past call, grad, statistics
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


@eager_backends
@pytest.mark.parametrize("case", [case for case in OPERATOR if OPERATOR[case] not in SAVE_OUTPUTS])
def test_outputs_change_in_place(case, backend):
    """They are new tensors, and no view of one that the operator keeps to itself."""
    inputs = arguments(case)
    leaves(inputs)
    expected = torch.relu(apply(case, inputs, backend=backend))
    outputs = getattr(ops, OPERATOR[case])(**inputs, backend=backend)
    for out in outputs if isinstance(outputs, tuple) else (outputs,):
        assert not out._is_view()
        torch.relu_(out)
    torch.testing.assert_close(one_tensor(outputs), expected)
    one_tensor(outputs).sum().backward()


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
    # What keeps nothing for its backward need not run again for it.
    again = [] if how == "selective" or (case, how) == ("concat", "not reentrant") else ["forward"]
    assert [direction for direction, *_ in runs] == ["forward", *again, "backward"]


def test_checkpoint_compiled():
    inputs = arguments("pyramid")
    expected = differentiate("pyramid", inputs)
    block, _ = compiled(
        lambda inputs: checkpoint(lambda q: apply("pyramid", inputs | {"q": q}), inputs["q"], use_reentrant=False)
    )
    torch.testing.assert_close(differentiate("pyramid", inputs, block), expected)


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


@every_operator
def test_threads(case):
    """As DataParallel calls a model: each thread with inputs of its own."""
    expected = [differentiate(case, arguments(case, seed)) for seed in range(4)]
    results = in_threads(4, lambda seed: [differentiate(case, arguments(case, seed)) for _ in range(3)])
    for wanted, given in zip(expected, results, strict=True):
        for one in given:
            torch.testing.assert_close(one, wanted)
