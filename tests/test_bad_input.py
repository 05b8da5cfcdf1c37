"""Bad input: a ValueError or a TypeError from the public function, on every backend alike.

Its message begins with the argument's name, and says what it got and what it needs.
"""

import re
from functools import partial

import pytest
import torch

from tests.calls import one_tensor
from univid import ops
from univid.ops import ReferenceFrames
from univid.ops.explain import backends_for

B, T, N, H, D = 2, 4, 3, 2, 8
LENGTH, C, C_OUT, K, GROUPS = 5, 6, 4, 3, 3

BACKENDS = (None, "torch", "reference")
backends = pytest.mark.parametrize("backend", BACKENDS)


def arguments(operator, *, D=D, C=C, C_OUT=C_OUT):
    """Arguments that the operator takes, by name."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    frames, packed, prompt = (B, T, N, H, D), (B, T, N, 3, H, D), (B, LENGTH, H, D)
    q, k, v = ({name: randn(frames)} for name in "qkv")
    return {
        "pyramid_st_attn": lambda: q | k | v | {"refs": ReferenceFrames.pyramid(T, 2)},
        "pyramid_st_attn_qkv": lambda: {"qkv": randn(packed), "refs": ReferenceFrames.pyramid(T, 2)},
        "temporal_attn": lambda: q | k | v,
        "temporal_attn_qkv": lambda: {"qkv": randn(packed)},
        "dual_stream_attn": lambda: (
            q
            | {name: randn(prompt) for name in ("k_text", "v_text", "k_image", "v_image")}
            | {"text_weight": randn(B, T), "image_weight": 0.5}
        ),
        "temporal_conv": lambda: {
            "x": randn(B, T, N, C),
            "weight": randn(C_OUT, C, K),
            "bias": randn(C_OUT),
            "residual": randn(B, T, N, C_OUT),
        },
        "group_norm_silu": lambda: {
            "x": randn(B, N, C),
            "num_groups": GROUPS,
            "weight": randn(C),
            "bias": randn(C),
            "eps": 1e-5,
        },
        "concat": lambda: {"x": randn(B, T, N, C), "y": randn(B, T, N, C_OUT)},
        "add_bias": lambda: {"x": randn(B, T, N, C), "bias": randn(C)},
        "geglu": lambda: {"x": randn(B, T, N, 2 * C)},
        "linear_geglu": lambda: {"x": randn(B, T, N, C), "weight": randn(2 * C_OUT, C), "bias": randn(2 * C_OUT)},
        "add_layer_norm": lambda: {
            "x": randn(B, T, N, C),
            "weight": randn(C),
            "bias": randn(C),
            "branch": randn(B, T, N, C),
            "offset": randn(T, 1, C),
        },
    }[operator]()


OPERATORS = [name for name in ops.__all__ if name not in ("BACKENDS", "ReferenceFrames", "explain")]
ATTENTION = [name for name in OPERATORS if "attn" in name]
PYRAMIDS = [name for name in OPERATORS if "pyramid" in name]


def tensors(names=None, *, first=True):
    """Every (operator, tensor argument), but for weights of streams and tables, which have tests of their own.

    ``first=False`` leaves out the first argument, which the others are to be like.
    """
    return [
        (operator, name)
        for operator in OPERATORS
        for i, (name, value) in enumerate(arguments(operator).items())
        if isinstance(value, torch.Tensor) and name != "text_weight"
        if (names is None or name in names) and (first or i > 0)
    ]


def run(operator, **changes):
    return one_tensor(getattr(ops, operator)(**(arguments(operator) | changes)))


def refused(error, name, operator, **changes):
    """The call raises ``error``, naming the argument, what it got and what it needs; the message."""
    with pytest.raises((ValueError, TypeError)) as raised:
        run(operator, **changes)
    message = str(raised.value)
    assert raised.type is error, message
    assert re.match(rf"{re.escape(name)}: got .+, (but|needs) .*", message) and "needs " in message, message
    return message


@backends
@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_are_good(operator, backend):
    assert run(operator, backend=backend).isfinite().all()


# --- any tensor -------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("value", [[[1.0]], "q", 3.0], ids=repr)
@pytest.mark.parametrize(("operator", "name"), tensors())
def test_not_a_tensor(operator, name, value, backend):
    message = refused(TypeError, name, operator, backend=backend, **{name: value})
    assert f"got {type(value).__name__}, needs a tensor" in message


@pytest.mark.parametrize(("operator", "name"), tensors(["q", "qkv", "x", "weight", "k", "v"]))
def test_none(operator, name):
    refused(TypeError, name, operator, **{name: None})


@backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize(("operator", "name"), tensors())
def test_dtype(operator, name, dtype, backend):
    value = arguments(operator)[name].to(dtype)
    message = refused(TypeError, name, operator, backend=backend, **{name: value})
    assert f"got {dtype}".replace("torch.", "") in message and "bfloat16" in message


@backends
@pytest.mark.parametrize(("operator", "name"), tensors(first=False))
def test_other_dtype_than_the_first(operator, name, backend):
    value = arguments(operator)[name].bfloat16()
    assert "float32" in refused(TypeError, name, operator, backend=backend, **{name: value})


@backends
@pytest.mark.parametrize(("operator", "name"), tensors())
def test_rank(operator, name, backend):
    x = arguments(operator)[name]
    any_rank = (operator, name) == ("dual_stream_attn", "q")  # from 3 on
    for wrong in (x[0, 0, 0],) if any_rank else (x[0], x[None]):
        assert str(tuple(wrong.shape)) in refused(ValueError, name, operator, backend=backend, **{name: wrong})


@backends
@pytest.mark.parametrize(("operator", "name"), tensors(first=False))
def test_device(operator, name, backend):
    message = refused(ValueError, name, operator, backend=backend, **{name: arguments(operator)[name].to("meta")})
    assert "on meta" in message and "cpu" in message


@backends
@pytest.mark.parametrize(("operator", "name"), tensors(["q", "k", "v", "qkv", "x", "k_text", "v_image", "branch"]))
def test_last_dimension_is_not_contiguous(operator, name, backend):
    x = arguments(operator)[name]
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert "stride" in refused(ValueError, name, operator, backend=backend, **{name: strided})
    assert "stride" in refused(ValueError, name, operator, backend=backend, **{name: x[..., :1].expand(x.shape)})


# --- shapes -----------------------------------------------------------------------------------------------------------

WRONG_SHAPES = [
    ("pyramid_st_attn", "k", (B + 1, T, N, H, D)),
    ("pyramid_st_attn", "k", (1, T, N, H, D)),
    ("pyramid_st_attn", "k", (B, T, N, H + 1, D)),
    ("pyramid_st_attn", "k", (B, T, N, H, 2 * D)),
    ("pyramid_st_attn", "v", (B, T + 1, N, H, D)),
    ("pyramid_st_attn", "v", (B, T, N + 1, H, D)),
    ("pyramid_st_attn", "v", (B, T, N, H, 2 * D)),
    ("pyramid_st_attn_qkv", "qkv", (B, T, N, 2, H, D)),
    ("temporal_attn", "k", (B, T + 1, N, H, D)),
    ("temporal_attn", "k", (B, T, 1, H, D)),
    ("temporal_attn", "v", (B, T, N, H, 2 * D)),
    ("temporal_attn_qkv", "qkv", (B, T, N, 4, H, D)),
    ("dual_stream_attn", "k_text", (B + 1, LENGTH, H, D)),
    ("dual_stream_attn", "k_text", (B, LENGTH, H + 1, D)),
    ("dual_stream_attn", "v_text", (B, LENGTH + 1, H, D)),
    ("dual_stream_attn", "k_image", (B, LENGTH, H, 2 * D)),
    ("dual_stream_attn", "v_image", (B, LENGTH, H, 2 * D)),
    ("temporal_conv", "weight", (C_OUT, C + 1, K)),
    ("temporal_conv", "weight", (C_OUT, C, 2)),
    ("temporal_conv", "weight", (C_OUT, C, 4)),
    ("temporal_conv", "bias", (C_OUT + 1,)),
    ("temporal_conv", "bias", (1,)),
    ("temporal_conv", "bias", (1, C_OUT)),
    ("temporal_conv", "bias", (B, T, C_OUT)),
    ("temporal_conv", "residual", (B, T, N, C)),
    ("temporal_conv", "residual", (1, T, N, C_OUT)),
    ("group_norm_silu", "weight", (C + 1,)),
    ("group_norm_silu", "bias", (1,)),
    ("concat", "y", (1, T, N, C)),
    ("concat", "y", (B, T, N + 1, C)),
    ("add_bias", "bias", (C + 1,)),
    ("add_bias", "bias", (1,)),
    ("add_layer_norm", "weight", (C + 1,)),
    ("add_layer_norm", "bias", (1,)),
    ("add_layer_norm", "branch", (1, T, N, C)),
    ("add_layer_norm", "offset", (1, 1, C)),
    ("add_layer_norm", "offset", (T, N, C)),
]


@backends
@pytest.mark.parametrize(("operator", "name", "shape"), WRONG_SHAPES)
def test_shape(operator, name, shape, backend):
    assert str(tuple(shape)) in refused(ValueError, name, operator, backend=backend, **{name: torch.randn(shape)})


EMPTY_SHAPES = [  # T = 0, and other dimensions that may not be empty
    ("pyramid_st_attn", "q", (B, 0, N, H, D)),
    ("pyramid_st_attn", "q", (B, T, N, 0, D)),
    ("pyramid_st_attn", "q", (B, T, N, H, 0)),
    ("pyramid_st_attn", "k", (B, 0, N, H, D)),
    ("pyramid_st_attn_qkv", "qkv", (B, 0, N, 3, H, D)),
    ("temporal_attn", "q", (B, 0, N, H, D)),
    ("temporal_attn_qkv", "qkv", (B, 0, N, 3, H, D)),
    ("dual_stream_attn", "q", (B, 0, N, H, D)),
    ("dual_stream_attn", "q", (B, T, N, H, 0)),
    ("dual_stream_attn", "k_text", (B, 0, H, D)),
    ("temporal_conv", "x", (B, 0, N, C)),
    ("temporal_conv", "x", (B, T, N, 0)),
    ("temporal_conv", "weight", (0, C, K)),
    ("temporal_conv", "weight", (C_OUT, C, 0)),
    ("group_norm_silu", "x", (B, N, 0)),
    ("concat", "y", (B, T, N, 0)),
    ("add_bias", "x", (B, T, N, 0)),
    ("geglu", "x", (B, T, N, 0)),
    ("add_layer_norm", "x", (B, T, N, 0)),
]


@backends
@pytest.mark.parametrize(("operator", "name", "shape"), EMPTY_SHAPES)
def test_empty_dimension(operator, name, shape, backend):
    assert ">= 1" in refused(ValueError, name, operator, backend=backend, **{name: torch.randn(shape)})


@backends
@pytest.mark.parametrize("value", [4, 12, 0, -3])
def test_groups_do_not_divide(value, backend):
    refused(ValueError, "num_groups", "group_norm_silu", num_groups=value, backend=backend)


@pytest.mark.parametrize("value", [2.0, "3", True, None, torch.tensor(3)], ids=repr)
def test_groups_are_no_integer(value):
    refused(TypeError, "num_groups", "group_norm_silu", num_groups=value)


# --- numbers ----------------------------------------------------------------------------------------------------------

NOT_NUMBERS = ["1", True, 1j, [0.5]]


@backends
@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("operator", "name"),
    [*((name, "scale") for name in ATTENTION), ("group_norm_silu", "eps"), ("add_layer_norm", "eps")],
    ids=str,
)
def test_number_out_of_range(operator, name, value, backend):
    refused(ValueError, name, operator, backend=backend, **{name: value})


@pytest.mark.parametrize("value", [*NOT_NUMBERS, torch.tensor(0.5)], ids=repr)
@pytest.mark.parametrize(
    ("operator", "name"),
    [*((name, "scale") for name in ATTENTION), ("group_norm_silu", "eps"), ("add_layer_norm", "eps")],
    ids=str,
)
def test_not_a_number(operator, name, value):
    refused(TypeError, name, operator, **{name: value})


# --- reference frames -------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("operator", PYRAMIDS)
@pytest.mark.parametrize(
    "refs",
    [None, [[0]] * T, 0, torch.zeros(T, 2), torch.zeros(T, 2, dtype=torch.bool), torch.zeros(T, 2, dtype=torch.cfloat)],
    ids=["None", "list", "int", "float tensor", "bool tensor", "complex tensor"],
)
def test_table_type(operator, refs, backend):
    refused(TypeError, "refs", operator, refs=refs, backend=backend)


WRONG_TABLES = {
    "rank 0": (),
    "rank 4": (1, B, T, 2),
    "T": (T + 1, 2),
    "T of (B, T, R)": (B, T + 1, 2),
    "T of one": (1, 2),
    "B": (B + 1, T, 2),
}


@backends
@pytest.mark.parametrize("operator", PYRAMIDS)
@pytest.mark.parametrize("shape", WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_table_shape(operator, shape, backend):
    table = torch.zeros(shape, dtype=torch.int32)
    assert str(tuple(shape)) in refused(ValueError, "refs", operator, refs=table, backend=backend)
    if len(shape) in (2, 3):
        refs = ReferenceFrames.from_table(table, T)
        refused(ValueError, "refs", operator, refs=refs, backend=backend)


@backends
@pytest.mark.parametrize("operator", PYRAMIDS)
def test_table_over_other_key_frames(operator, backend):
    refs = ReferenceFrames.from_table(torch.zeros(T, 2, dtype=torch.int32), T + 3)
    message = refused(ValueError, "refs", operator, refs=refs, backend=backend)
    assert str(T + 3) in message and str(T) in message


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (T, 3), (B, T, 3)], ids=str)
@pytest.mark.parametrize("entry", [T, -2, 30000])
@pytest.mark.parametrize("operator", PYRAMIDS)
def test_entry_out_of_range(operator, entry, shape, dtype, backend):
    table = torch.zeros(shape, dtype=dtype)
    table.view(-1)[-2] = entry
    message = refused(ValueError, "refs", operator, refs=table, backend=backend)
    assert str(entry) in message and f"[0, {T})" in message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("operator", PYRAMIDS)
def test_entries_without_sign(operator, dtype):
    run(operator, refs=torch.tensor([0, T - 1]).to(dtype))
    assert str(T) in refused(ValueError, "refs", operator, refs=torch.tensor([0, T]).to(dtype))


@pytest.mark.parametrize("entry", [2**31, 2**32, -(2**32), 2**62])
def test_entry_beyond_32_bits(entry):
    table = torch.tensor([entry])
    assert str(entry) in refused(ValueError, "refs", "pyramid_st_attn", refs=table)
    with pytest.raises(ValueError, match=str(entry)):
        ReferenceFrames.from_table(table[None], 4)


@backends
@pytest.mark.parametrize("operator", PYRAMIDS)
def test_table_on_another_device(operator, backend):
    table = torch.zeros(T, 2, dtype=torch.int32, device="meta")
    assert "meta" in refused(ValueError, "refs", operator, refs=table, backend=backend)


# --- streams ----------------------------------------------------------------------------------------------------------

ABSENT = dict.fromkeys(("k_text", "v_text", "k_image", "v_image"))


@backends
@pytest.mark.parametrize(
    "changes",
    [
        ABSENT,
        {"text_weight": 0, "image_weight": 0.0},
        {"k_text": None, "v_text": None, "image_weight": 0},
        {"k_image": None, "v_image": None, "text_weight": 0.0},
        ABSENT | {"text_weight": torch.ones(B)},
    ],
    ids=["no keys", "weights 0", "no text, image 0", "no image, text 0", "no keys, tensor weight"],
)
def test_both_streams_absent(changes, backend):
    refused(ValueError, "k_text, k_image", "dual_stream_attn", backend=backend, **changes)


@backends
@pytest.mark.parametrize(("given", "missing"), [("k_text", "v_text"), ("v_text", "k_text"), ("k_image", "v_image")])
def test_half_a_stream(given, missing, backend):
    assert given in refused(ValueError, missing, "dual_stream_attn", backend=backend, **{missing: None})


@backends
@pytest.mark.parametrize("name", ["text_weight", "image_weight"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, None, torch.ones(B, dtype=torch.int64)], ids=repr)
def test_weight_type(name, value, backend):
    refused(TypeError, name, "dual_stream_attn", backend=backend, **{name: value})


@backends
@pytest.mark.parametrize("name", ["text_weight", "image_weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_is_not_finite(name, value, backend):
    refused(ValueError, name, "dual_stream_attn", backend=backend, **{name: value})


@backends
@pytest.mark.parametrize("name", ["text_weight", "image_weight"])
@pytest.mark.parametrize(
    "shape", [(B + 1,), (T,), (B, T + 1), (N, T), (B, T, N, H), (B, T, N, 1), (B, T, 2), (0,)], ids=str
)
def test_weight_shape(name, shape, backend):
    message = refused(ValueError, name, "dual_stream_attn", backend=backend, **{name: torch.ones(shape)})
    assert str(shape) in message


@pytest.mark.parametrize("name", ["text_weight", "image_weight"])
def test_weight_on_another_device(name):
    refused(ValueError, name, "dual_stream_attn", **{name: torch.ones(B, device="meta")})


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["fastest", "", "Torch", 3, ["torch"]], ids=repr)
@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_backend(operator, value):
    assert "'triton'" in refused(ValueError, "backend", operator, backend=value)


@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_backend_in_the_environment(operator, monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "fastest")
    assert "'fastest'" in refused(ValueError, "UNIVID_BACKEND", operator)
    run(operator, backend="torch")  # an explicit one goes before it


@pytest.mark.parametrize("by_environment", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_backend_that_cannot_run(operator, backend, by_environment, monkeypatch):
    """The tensors are on the CPU."""
    _, refusals = backends_for(operator, **arguments(operator))
    if refusals[backend] is None:
        pytest.skip("runs here (Triton's interpreter)")
    if by_environment:
        monkeypatch.setenv("UNIVID_BACKEND", backend)
    with pytest.raises(RuntimeError, match="cannot run") as raised:
        run(operator, **({} if by_environment else {"backend": backend}))
    assert str(raised.value).startswith(f"backend: {backend!r}") and refusals[backend] in str(raised.value)


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "name"), tensors(first=False))
def test_mixed_devices(operator, name):
    """One argument is left on the host."""
    inputs = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in arguments(operator).items()}
    message = refused(ValueError, name, operator, **(inputs | {name: inputs[name].cpu()}))
    assert "on cpu" in message and "cuda" in message


@pytest.mark.gpu
@pytest.mark.parametrize("operator", PYRAMIDS)
def test_host_table_with_a_card(operator):
    inputs = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in arguments(operator).items()}
    refused(ValueError, "refs", operator, **(inputs | {"refs": torch.zeros(T, 2, dtype=torch.int32)}))
    run(operator, **inputs)  # a ReferenceFrames moves itself
