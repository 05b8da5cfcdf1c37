"""The Triton kernels compiled for a Hopper card (sm_90) on a machine without a GPU: all compile, and none spills much.

Operators run with their default configurations on CPU tensors, under a driver that names the card as the target and launches nothing.
"""

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from univid import ops  # noqa: E402
from univid.kernels.triton import column_sums, launch  # noqa: E402
from univid.ops import ReferenceFrames  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
BF16 = torch.bfloat16
ON = {"backend": "triton"}


def _leaf(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16, requires_grad=True)


def _pyramid(dim: int, refs: ReferenceFrames) -> torch.Tensor:
    return ops.pyramid_st_attn(*(_leaf(1, 8, 720, 2, dim) for _ in "qkv"), refs, **ON)


def _dual_stream(dim: int, **weights: torch.Tensor | float) -> torch.Tensor:
    prompts = (_leaf(1, length, 2, dim) for length in (77, 77, 257, 257))
    return ops.dual_stream_attn(_leaf(1, 8, 720, 2, dim), *prompts, **weights, **ON)


def _temporal(dim: int, frames: int) -> torch.Tensor:
    return ops.temporal_attn(*(_leaf(1, frames, 48, 2, dim) for _ in "qkv"), **ON)


def _temporal_conv(channels: int, *clips: int) -> torch.Tensor:
    weight = _leaf(channels, 3, channels).transpose(1, 2)
    x = _leaf(*(clips or (1,)), 8, 720, channels)
    return ops.temporal_conv(x, weight, _leaf(*clips, channels), residual=x, **ON)


def _group_norm(channels: int, tokens: int) -> torch.Tensor:
    affine = (torch.zeros(channels, requires_grad=True) for _ in "wb")
    return ops.group_norm_silu(_leaf(2, tokens, channels), 32, *affine, 1e-5, **ON)


def _concat(channels: int) -> torch.Tensor:
    return ops.concat(_leaf(1, 8, 720, channels), _leaf(1, 8, 720, 2 * channels), **ON)


def _add_bias(channels: int) -> torch.Tensor:
    return ops.add_bias(_leaf(1, 8, 720, channels), _leaf(channels), **ON)


def _geglu(channels: int) -> torch.Tensor:
    return ops.geglu(_leaf(1, 8, 720, 2 * channels), **ON)


def _add_layer_norm(channels: int, offset: torch.Tensor | None = None) -> torch.Tensor:
    x, branch = (_leaf(1, 8, 720, channels) for _ in "xb")
    return torch.stack(ops.add_layer_norm(x, _leaf(channels), _leaf(channels), branch=branch, offset=offset, **ON))


# By name; D = 64 and channels of Stable Diffusion first, then what is padded or odd.
CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "pyramid-64": partial(_pyramid, 64, ReferenceFrames.pyramid(8, 3)),
    "pyramid-64-dense": partial(_pyramid, 64, ReferenceFrames.all(8)),
    "pyramid-64-window": partial(_pyramid, 64, ReferenceFrames.window(8, 1)),
    "pyramid-80": partial(_pyramid, 80, ReferenceFrames.pyramid(8, 3)),
    "dual_stream-64": partial(_dual_stream, 64),
    "dual_stream-64-gates": partial(
        _dual_stream, 64, text_weight=torch.zeros((), requires_grad=True), image_weight=0.5
    ),
    "dual_stream-80": partial(_dual_stream, 80),
    "temporal-64": partial(_temporal, 64, 24),
    "temporal-64-long": partial(_temporal, 64, 100),
    "temporal-80": partial(_temporal, 80, 24),
    "temporal_conv-320": partial(_temporal_conv, 320),
    "temporal_conv-320-clips": partial(_temporal_conv, 320, 2),
    "temporal_conv-40": partial(_temporal_conv, 40),
    "group_norm-320": partial(_group_norm, 320, 2880),
    "group_norm-1280": partial(_group_norm, 1280, 45),
    "concat-320": partial(_concat, 320),
    "concat-40": partial(_concat, 40),
    "add_bias-320": partial(_add_bias, 320),
    "add_bias-40": partial(_add_bias, 40),
    "geglu-1280": partial(_geglu, 1280),
    "geglu-40": partial(_geglu, 40),
    "add_layer_norm-320": partial(_add_layer_norm, 320, torch.zeros(8, 1, 320)),
    "add_layer_norm-1280": partial(_add_layer_norm, 1280),
    "add_layer_norm-8000": partial(_add_layer_norm, 8000),
}
# Bytes of a thread's stack frame, where registers spill to. At 255 registers some invariants of a loop do.
MAX_STACK = 448


class _Hopper:
    """What a jitted function asks a driver for. The device is none that exists: its compiled kernels are never launched."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    @property
    def utils(self) -> "_Hopper":
        return self

    def get_device_properties(self, device: int | None) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list:
    """The kernels that are compiled, instead of launched, from here on."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Hopper())
    monkeypatch.setattr(launch, "unsupported", lambda *tensors: None)
    monkeypatch.setattr(launch, "interpreted", lambda: True)  # CPU tensors, the card being Hopper
    return kernels


def _stack(kernel, folder: Path) -> int:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


@pytest.mark.parametrize("name", CALLS)
def test_compiles(name: str, compiled: list, tmp_path: Path):
    out = CALLS[name]()
    forward = len(compiled)
    out.backward(torch.zeros_like(out))
    assert 0 < forward < len(compiled)
    stacks = {kernel.metadata.name: _stack(kernel, tmp_path) for kernel in compiled}
    assert max(stacks.values()) <= MAX_STACK, stacks


def test_sums_that_start_early(compiled: list, monkeypatch: pytest.MonkeyPatch):
    """As on a card from Hopper on: the second pass waits for the first one's end, which lets it be placed before."""
    monkeypatch.setattr(column_sums, "launches_early", lambda device: True)
    out = _add_bias(1280)
    forward = len(compiled)
    out.backward(torch.zeros_like(out))
    first, second = (kernel.asm["ptx"] for kernel in compiled[forward:])
    assert "griddepcontrol.launch_dependents" in first and "griddepcontrol.wait" not in first
    assert second.count("griddepcontrol.wait") == 1
    early = [kernel.metadata.launch_pdl for kernel in compiled[forward:]]
    assert early == [False, True]
    waits = second.index("griddepcontrol.wait")
    assert all(second.index(load) > waits for load in ("ld.global", "st.global"))
