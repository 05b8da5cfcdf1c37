"""How the time and memory of ``pyramid_st_attn`` grow with frames, tokens and references."""

from benchmarks import bench_pyramid
from benchmarks.bench_pyramid import problem  # noqa: F401 - the same problem on other shapes
from benchmarks.harness import Implementation
from benchmarks.levels import SCALING, Level

OP = "pyramid_st_attn"
FILE = "scaling"
SHAPES = SCALING
BATCHES = (1,)
VARIANTS = {"table": ("per_frame",)}
COMPARED = ("cuda", "triton", "index_select + SDPA cuDNN", "index_select + FlashAttention-4")


def implementations(level: Level, batch: int, kind: str) -> dict[str, Implementation]:
    everything = bench_pyramid.implementations(level, batch, kind)
    return {name: everything[name]._replace(quick=False) for name in COMPARED if name in everything}
