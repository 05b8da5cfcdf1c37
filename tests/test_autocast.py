"""The operators under autocast."""

import pytest
import torch

from tests.calls import (
    KEEPS_DTYPE,
    OPERATORS,
    apply,
    arguments,
    check_autocast,
    compiled,
    differentiate,
    eager_backends,
    every_case,
    every_operator,
)


@eager_backends
@every_case
def test_autocast(case, backend):
    check_autocast(case, "cpu", torch.bfloat16, backend)


@pytest.mark.parametrize("case", [case for case in OPERATORS if case not in KEEPS_DTYPE and "qkv" not in case])
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


def test_autocast_of_what_is_given_twice():
    """x, as the residual too, is cast once and stays one tensor, so that both gradients come in one pass."""
    inputs = arguments("conv")
    x = inputs["x"].requires_grad_()
    inputs |= {"weight": inputs["weight"][: x.shape[-1]], "bias": None, "residual": x}
    with torch.autocast("cpu", torch.bfloat16):
        out = apply("conv", inputs)
    assert out.grad_fn.adds_grad
    with torch.autocast("cpu", torch.bfloat16):
        other = apply("conv", inputs | {"residual": x.clone()})
    torch.testing.assert_close(out, other)


def test_autocast_compiled():
    inputs = arguments("pyramid")

    def call(inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return apply("pyramid", inputs)

    results = differentiate("pyramid", inputs, compiled(call)[0])
    torch.testing.assert_close(results, differentiate("pyramid", inputs, call))
