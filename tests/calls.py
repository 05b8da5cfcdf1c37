"""Calls of every operator by name, and what is asked of each of them inside PyTorch, on the CPU and on a card."""

import threading

import pytest
import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode

from univid import ops
from univid.ops import ReferenceFrames
from univid.ops.explain import _OPERATORS

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
    "concat": "concat",
    "bias": "add_bias",
    "geglu": "geglu",
    "sum": "add_layer_norm",
    "sum-plain": "add_layer_norm",  # the norm alone
}
OPERATORS = (
    "pyramid",
    "pyramid_qkv",
    "temporal",
    "temporal_qkv",
    "dual",
    "conv",
    "norm",
    "concat",
    "bias",
    "geglu",
    "sum",
)  # each one once
KEEPS_DTYPE = ("norm", "norm-float32", "concat", "bias", "geglu", "sum", "sum-plain")  # of x, under autocast too

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
        case "concat":
            return {"x": randn(B, T, N, channels), "y": randn(B, T, N, channels_out)}
        case "bias":
            return {"x": randn(B, T, N, channels), "bias": randn(channels)}
        case "geglu":
            return {"x": randn(B, T, N, 2 * channels)}
        case "sum":
            inputs = {"x": randn(B, T, N, channels)} | each("weight bias", channels) | {"eps": 1e-5}
            return inputs | {"branch": randn(B, T, N, channels), "offset": randn(T, 1, channels)}
        case "sum-plain":
            return {"x": randn(B, T, N, channels)} | each("weight bias", channels)


def leaves(inputs):
    """The tensors that have gradients, by name; they ask for them from here on."""
    return {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}


def apply(case, inputs, **options):
    return one_tensor(getattr(ops, OPERATOR[case])(**inputs, **options))


def one_tensor(out):
    """An operator's output; of several, all of them stacked."""
    return torch.stack(out) if isinstance(out, tuple) else out


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


# --- what is asked of each -----------------------------------------------------------------------------------------------

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


def no_equal_sizes():
    """torch.compile takes sizes that are equal at first for one; here they are so by chance."""
    return fx_config.patch(use_duck_shape=False)


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
        with no_equal_sizes():
            torch.testing.assert_close(differentiate(case, inputs, call), differentiate(case, inputs, backend=backend))
    assert compilations() == expected


def check_autocast(case, device, dtype, backend=None, **sizes):
    """As if everything but gates had been cast by hand; norms and GEGLU as without autocast.

    Gradients come in their inputs' dtypes. The backward may run outside of the block, or inside.
    """
    inputs = arguments(case, device=device, **sizes)
    keeps = list(inputs) if case in KEEPS_DTYPE else ["text_weight"]
    cast = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name not in keeps else x
        for name, x in inputs.items()
    }
    results = differentiate(case, cast, backend=backend)
    expected = {name: x if name == "out" else x.to(inputs[name].dtype) for name, x in results.items()}
    assert expected["out"].dtype == (torch.float32 if case in KEEPS_DTYPE else dtype)
    inputs = arguments(case, device=device, **sizes)

    def inside(inputs):
        with torch.autocast(device, dtype):
            return apply(case, inputs, backend=backend)

    torch.testing.assert_close(differentiate(case, inputs, inside), expected)
    with torch.autocast(device, dtype):
        torch.testing.assert_close(differentiate(case, inputs, backend=backend), expected)


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
