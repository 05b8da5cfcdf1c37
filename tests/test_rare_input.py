"""Input that is not bad, though rare: any strides, nothing at all, large logits, rows without references, constant groups."""

import pytest
import torch

from tests.calls import one_tensor
from tests.test_bad_input import (
    ATTENTION,
    BACKENDS,
    OPERATORS,
    PYRAMIDS,
    B,
    D,
    H,
    N,
    T,
    arguments,
    backends,
)
from univid import ops
from univid.ops import ReferenceFrames
from univid.ops.explain import backends_for, directions_of

ON_A_CARD = ("triton", "cuda")
all_backends = pytest.mark.parametrize(
    "backend", [*BACKENDS, *(pytest.param(backend, marks=pytest.mark.gpu) for backend in ON_A_CARD)]
)


def sized(operator, backend):
    """The operator's arguments; CUDA kernels take no other head dimension, and channels by 8."""
    return arguments(operator, **({"D": 64, "C": 48, "C_OUT": 32} if backend == "cuda" else {}))


def placed(backend, inputs):
    """The inputs of a backend that runs on a card are there, in bfloat16."""
    if backend not in ON_A_CARD:
        return inputs
    return {
        name: x.to("cuda", torch.bfloat16 if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }


def gradients(operator, form=None, *, backend, **changes):
    """The output, and the gradients of every floating-point tensor, by name; ``form`` strides the incoming one."""
    inputs = placed(backend, sized(operator, backend) | changes)
    if backend == "cuda":
        if refusal := backends_for(operator, **inputs)[1]["cuda"]:
            pytest.skip(refusal)
        if "backward" not in directions_of(operator):
            pytest.skip(f"{operator} with gradients is its parts, which have no cuda kernel")
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    for x in leaves.values():
        x.requires_grad_()
    out = one_tensor(getattr(ops, operator)(**inputs, backend=backend))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grad = grad if form is None else form(grad)
    return out, dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


WEIGHTS = {
    "C contiguous": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "C_out contiguous": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "sliced": lambda w: w.repeat(2, 2, 2)[::2, ::2, ::2],
    "expanded": lambda w: w[:, :1, :1].expand_as(w),
}


@backends
@pytest.mark.parametrize("form", WEIGHTS)
def test_weight_of_temporal_conv_has_any_strides(form, backend):
    weight = WEIGHTS[form](arguments("temporal_conv")["weight"]).detach()
    assert not weight.is_contiguous()
    out, given = gradients("temporal_conv", weight=weight, backend=backend)
    expected, wanted = gradients("temporal_conv", weight=weight.detach().contiguous(), backend=backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(given, wanted)


GRADS = {
    "expanded": lambda g: g.flatten()[0].expand_as(g),
    "expanded rows": lambda g: g[:, :1].expand_as(g),
    "transposed": lambda g: g.transpose(-1, -2).contiguous().transpose(-1, -2),
    "clips innermost": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda g: g.repeat_interleave(2, -1)[..., ::2],
}


@all_backends
@pytest.mark.parametrize("form", GRADS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_incoming_gradient_has_any_strides(operator, form, backend):
    _, given = gradients(operator, GRADS[form], backend=backend)
    _, wanted = gradients(operator, lambda grad: GRADS[form](grad).contiguous(), backend=backend)
    torch.testing.assert_close(given, wanted)


@all_backends
@pytest.mark.parametrize("empty", ["clips", "tokens"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_in_nothing_out(operator, empty, backend):
    """B = 0 or N = 0 gives an empty result, and parameters zero gradients."""
    dim = {"clips": 0, "tokens": 1 if operator == "group_norm_silu" else 2}[empty]
    shared = [*(("text_weight",) if operator == "dual_stream_attn" else ("weight", "bias", "offset"))]
    if empty == "tokens":
        shared += ["k_text", "v_text", "k_image", "v_image"]
    changes = {
        name: x.narrow(0 if name == "text_weight" else dim, 0, 0)
        for name, x in sized(operator, backend).items()
        if isinstance(x, torch.Tensor) and (name not in shared or (name == "text_weight" and empty == "clips"))
    }
    out, given = gradients(operator, backend=backend, **changes)
    assert out.numel() == 0 and out.shape[dim - 4 if operator == "add_layer_norm" else dim] == 0
    inputs = sized(operator, backend) | changes
    assert all(g.shape == inputs[name].shape and not g.any() for name, g in given.items())


def test_no_key_tokens():
    """Nk = 0: every row is without keys."""
    q, k = torch.randn(B, T, N, H, D, requires_grad=True), torch.randn(B, T, 0, H, D, requires_grad=True)
    out = ops.pyramid_st_attn(q, k, k, ReferenceFrames.all(T))
    out.sum().backward()
    assert out.shape == q.shape and not out.any() and not q.grad.any() and k.grad.shape == k.shape


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in BACKENDS for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    + [pytest.param(backend, torch.bfloat16, marks=pytest.mark.gpu) for backend in ON_A_CARD],
)
@pytest.mark.parametrize("signs", ["both", "positive", "negative"])
@pytest.mark.parametrize("operator", ATTENTION)
def test_large_logits(operator, signs, dtype, backend):
    """Logits of ±1e4 give no NaN, forward and gradients."""
    inputs = sized(operator, backend)
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and name != "text_weight":
            x = inputs[name] = x.to(dtype)
        query, *keys = x.unbind(3)[:2] if name == "qkv" else (x if name == "q" else None,)
        keys += [x] if name in ("k", "k_text", "k_image") else []
        if query is not None:
            query.zero_()[..., 0] = 100.0
        for key in keys:
            alternating = torch.where(torch.arange(key[..., 0].numel()) % 2 == 0, 1.0, -1.0)
            sign = {"both": alternating.view(key.shape[:-1]), "positive": 1.0, "negative": -1.0}[signs]
            key.zero_()[..., 0] = 100.0 * sign
    out, given = gradients(operator, scale=1.0, backend=backend, **inputs)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in given.values())


@all_backends
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("operator", PYRAMIDS)
def test_rows_without_references(operator, raw, backend):
    """They give 0 and pass no gradient; nothing is NaN, with large logits too."""
    table = torch.tensor([[0, 1], [-1, -1], [-1, 2], [-1, -1]])
    refs = table if raw else ReferenceFrames.from_table(table, T)
    scale = 1e4
    out, given = gradients(operator, refs=refs, scale=scale, backend=backend)
    assert out.isfinite().all() and out[:, [0, 2]].any() and not out[:, [1, 3]].any()
    assert all(g.isfinite().all() for g in given.values())
    dq, dk, dv = (given[name] for name in "qkv") if "q" in given else given["qkv"].unbind(3)
    assert not dq[:, [1, 3]].any()
    assert not dk[:, 3].any() and not dv[:, 3].any() and dv[:, :3].any()


@all_backends
@pytest.mark.parametrize("operator", PYRAMIDS)
@pytest.mark.parametrize("table", [torch.full((T, 2), -1), torch.zeros(T, 0, dtype=torch.int64)], ids=["-1", "R = 0"])
def test_no_references_at_all(operator, table, backend):
    for refs in (table, ReferenceFrames.from_table(table, T)):
        out, given = gradients(operator, refs=refs, backend=backend)
        assert not out.any() and not any(g.any() for g in given.values())


@all_backends
def test_constant_groups(backend):
    """A variance of 0 gives no NaN."""
    x = torch.full_like(sized("group_norm_silu", backend)["x"], 3.0)
    out, given = gradients("group_norm_silu", x=x, backend=backend)
    assert out.isfinite().all() and all(g.isfinite().all() for g in given.values())
