"""What FlopCounterMode counts of the operators, their gradients and their streams."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.calls import B, D, H, N, R, T, apply, arguments, differentiate, every_case

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
    "concat": (0, 0),
    "bias": (0, 0),
    "geglu": (0, 0),
    "sum": (0, 0),
    "sum-plain": (0, 0),
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
