"""``python -m benchmarks.bench_unet``: the whole U-Net beside those of other video models, two clips of 24x40x72 latents.

All are of full size with random weights in bfloat16, one after the other in one process; peers are diffusers'. The forward runs
without gradients, the other row is a forward and a backward to all parameters. Rows are written as they come: ``op`` "unet",
``direction`` fwd or fwd_bwd. ``--only NAME`` runs some of them and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from triton.testing import do_bench

from benchmarks import record
from benchmarks.report_models import BUDGET_MS
from univid.model import UNet, UNetConfig
from univid.model.blocks import ResidualBlock, Transformer

CLIPS, FRAMES, HEIGHT, WIDTH = 2, 24, 40, 72
LEVEL = f"{FRAMES}x{HEIGHT}x{WIDTH}"
CONTEXT = 1024
_SAMPLES = 9  # of a time
TEXT, IMAGE = 77, 257  # tokens

KINDS = {
    "univid::pyramid": "attention",
    "univid::dual": "attention",
    "univid::temporal_attn": "attention",
    "univid::temporal_conv": "temporal convolution",
    "aten::cudnn_convolution": "convolution",
    "aten::mm": "linear",
    "aten::addmm": "linear",
    "univid::linear_geglu": "linear",
}


class Model(NamedTuple):
    """A U-Net, and a call of it on a batch of clips; ``run(keys=True)``: with what a sampler keeps between its steps."""

    unet: nn.Module
    run: Callable[..., Tensor]


class Implementation(NamedTuple):
    build: Callable[[], Model]
    graph: bool = False  # as a CUDA graph
    backend: str | None = None  # UNIVID_BACKEND
    directions: tuple[str, ...] = ("fwd", "fwd_bwd")


def _latents(channels: int, *shape: int) -> Tensor:
    return torch.randn(*shape[:1], channels, *shape[1:], device="cuda", dtype=torch.bfloat16)


def _tokens(clips: int, length: int) -> Tensor:
    return torch.randn(clips, length, CONTEXT, device="cuda", dtype=torch.bfloat16)


def ours() -> Model:
    unet = UNet(UNetConfig.load("sd21"))
    x = torch.randn(CLIPS, FRAMES, 4, HEIGHT, WIDTH, device="cuda", dtype=torch.bfloat16)
    t = torch.full((CLIPS,), 500, device="cuda")
    conditions = _tokens(CLIPS, TEXT), _tokens(CLIPS, IMAGE)
    kept: list[Any] = []

    def run(keys: bool = False) -> Tensor:
        if keys and not kept:
            kept.extend(unet.condition(*conditions))
        return unet(x, t, *(kept if keys else conditions), fps=8.0)

    return Model(unet, run)


def compiled() -> Model:
    """By blocks: what repeats is compiled once, for each size."""
    model = ours()
    for module in model.unet.modules():
        if isinstance(module, ResidualBlock | Transformer):
            module.compile(fullgraph=True, dynamic=False)
    return model


def modelscope() -> Model:
    from diffusers import UNet3DConditionModel

    unet, x, text = UNet3DConditionModel(), _latents(4, CLIPS, FRAMES, HEIGHT, WIDTH), _tokens(CLIPS, TEXT)
    return Model(unet, lambda keys=False: unet(x, 500, text).sample)


def svd() -> Model:
    from diffusers import UNetSpatioTemporalConditionModel

    unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20), num_frames=FRAMES)
    x, image = _latents(8, CLIPS, FRAMES, HEIGHT, WIDTH).transpose(1, 2).contiguous(), _tokens(CLIPS, 1)
    ids = torch.tensor([[7.0, 127.0, 0.02]] * CLIPS, device="cuda", dtype=torch.bfloat16)
    return Model(unet, lambda keys=False: unet(x, 500.0, image, ids).sample)


def i2vgen() -> Model:
    from diffusers import I2VGenXLUNet

    unet = I2VGenXLUNet()
    x, image = (_latents(4, CLIPS, FRAMES, HEIGHT, WIDTH) for _ in range(2))
    fps, text, vector = torch.full((CLIPS,), 8, device="cuda"), _tokens(CLIPS, TEXT), _tokens(CLIPS, 1)[:, 0]
    return Model(unet, lambda keys=False: unet(x, 500, fps, image, vector, text).sample)


def sd21() -> Model:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=CONTEXT, use_linear_projection=True, sample_size=96
    ).to(memory_format=torch.channels_last)
    x, text = _latents(4, CLIPS * FRAMES, HEIGHT, WIDTH), _tokens(CLIPS * FRAMES, TEXT)
    x = x.contiguous(memory_format=torch.channels_last)
    return Model(unet, lambda keys=False: unet(x, 500, text).sample)


def _compiled(build: Callable[[], Model]) -> Callable[[], Model]:
    def compiled() -> Model:
        model = build()
        model.unet.compile()
        return model

    return compiled


IMPLEMENTATIONS = {
    "univid": Implementation(ours),
    "univid, backend triton": Implementation(ours, backend="triton"),
    "univid, backend torch": Implementation(ours, backend="torch"),
    "ModelScope T2V (UNet3D)": Implementation(modelscope),
    "I2VGen-XL": Implementation(i2vgen),
    "Stable Video Diffusion": Implementation(svd),
    "Stable Diffusion 2.1, frames as a batch": Implementation(sd21),
    "univid, CUDA graph": Implementation(ours, graph=True),  # after all that a capture broken off would disturb
    "univid, backend triton, CUDA graph": Implementation(ours, backend="triton", graph=True),
    "univid, backend reference": Implementation(ours, backend="reference", directions=("fwd",)),
    # What takes minutes to compile comes last.
    "univid, compiled, CUDA graph": Implementation(compiled, graph=True),
    "univid, compiled": Implementation(compiled),
    "Stable Video Diffusion, compiled": Implementation(_compiled(svd), directions=("fwd",)),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_unet", description=__doc__)
    parser.add_argument("--only", action="append", help="implementations whose names contain this; nothing is written")
    parser.add_argument("--without", action="append", default=[], help="all but those whose names contain this")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed")
    torch._dynamo.config.recompile_limit = 128
    record.environment()
    rows = []
    for name, implementation in IMPLEMENTATIONS.items():
        if (asked.only and not any(x in name for x in asked.only)) or any(x in name for x in asked.without):
            continue
        for row in measure(name, implementation):
            rows.append(row)
            print(_line(row), flush=True)
            if not asked.only:
                record.write("unet", rows)
    return 0


def measure(name: str, implementation: Implementation) -> Iterator[dict]:
    """The rows of an implementation; of what cannot run, why."""
    head = {"op": "unet", "level": LEVEL, "batch": CLIPS, "implementation": name}
    direction = implementation.directions[0]
    with _backend(implementation.backend):
        try:
            model = _built(implementation.build)
            for direction in implementation.directions:
                row = _measured(model, implementation, direction)
                yield head | {"direction": direction} | row
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            yield head | {"direction": direction, "failure": reason}
    model = None
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def _built(build: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = build()
    finally:
        torch.set_default_dtype(default)
    model.unet.to("cuda", torch.bfloat16).eval()
    return model


def _measured(model: Model, implementation: Implementation, direction: str) -> dict:
    backward = direction == "fwd_bwd"

    def forward() -> Tensor:
        with torch.no_grad():
            return model.run(keys=True)

    def both() -> None:
        model.unet.zero_grad(set_to_none=True)  # in a graph too: its gradients are written anew at each replay
        model.run().float().square().mean().backward()

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _eagerly(model, lambda: model.run(keys=True))
    flops = counter.get_total_flops() * (3 if backward else 1)
    run: Callable[[], Any] = both if backward else forward
    if implementation.graph:
        run = _graphed(run)
    for _ in range(2):  # compiles, and measures configurations
        run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # of what measuring configurations took
    torch.cuda.reset_peak_memory_stats()
    began = perf_counter()
    run()
    torch.cuda.synchronize()
    once = 1e3 * (perf_counter() - began)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    # Of several samples: Python collects garbage in some of them, for 0.2 s with all peers loaded.
    ms = median(do_bench(run, warmup=50, rep=max(700, round(_SAMPLES * once)), return_mode="all"))
    row = {
        "ms": round(ms, 2),
        "tflop": round(flops / 1e12, 1),
        "tflops": round(flops / ms / 1e9),
        "peak_mb": round(peak / 1e6),
        "reserved_mb": round(reserved / 1e6),
    }
    parameters = sum(p.numel() for p in model.unet.parameters())
    row |= {"parameters_m": round(parameters / 1e6, 1)}
    if not backward and not implementation.graph and implementation.build is ours and implementation.backend is None:
        row["breakdown_ms"] = breakdown(run)
    model.unet.zero_grad(set_to_none=True)
    return row


def breakdown(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds on the GPU of one call, by kind of layer."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kinds = dict.fromkeys(BUDGET_MS, 0.0)
    for event in profiler.key_averages():
        if event.self_device_time_total and event.key.startswith(("aten::", "univid::")):
            kind = next((kind for start, kind in KINDS.items() if event.key.startswith(start)), "norm, pointwise")
            kinds[kind] += event.self_device_time_total / 1e3
    return {kind: round(ms, 1) for kind, ms in kinds.items()}


def _eagerly(model: Model, run: Callable[[], Any]) -> None:
    """FLOPs are counted where operators can be seen."""
    with torch.compiler.set_stance("force_eager"):
        run()


def _graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = run()
    torch.cuda.current_stream().wait_stream(stream)
    return lambda: (graph.replay(), out)


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    if name is not None:
        os.environ["UNIVID_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("UNIVID_BACKEND", None)


def _line(row: dict) -> str:
    about = f"{row['implementation']:<42} {row['direction']:<8}"
    if "failure" in row:
        return f"{about} {row['failure']}"
    more = "".join(f"\n    {kind:<22} {ms:6.1f} ms" for kind, ms in row.get("breakdown_ms", {}).items())
    return f"{about} {row['ms']:8.1f} ms {row['tflops']:5} TFLOP/s {row['peak_mb'] / 1e3:6.1f} GB{more}"


if __name__ == "__main__":
    sys.exit(main())
