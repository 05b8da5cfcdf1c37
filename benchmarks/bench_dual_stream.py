"""``dual_stream_attn`` beside two SDPA calls and a sum."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Problem, Tensors, measure
from benchmarks.levels import IMAGE_KEYS, LEVELS, TEXT_KEYS
from univid.ops import dual_stream_attn, reference

OP = "dual_stream_attn"
WEIGHT = 0.7  # of the image; the text's is 1


def problem(name: str, batch: int) -> Problem:
    level = LEVELS[name]
    make = lambda *s: torch.randn(*s, level.heads, level.dim, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    tensors = {"q": make(batch, level.frames, level.tokens)}
    tensors |= {f"{n}_text": make(batch, TEXT_KEYS) for n in "kv"} | {
        f"{n}_image": make(batch, IMAGE_KEYS) for n in "kv"
    }

    def formula(t: Tensors, accumulate=None):
        streams = [(t["k_text"], t["v_text"], 1.0), (t["k_image"], t["v_image"], WEIGHT)]
        return reference.dual_stream_attn(t["q"], streams, level.dim**-0.5, accumulate)[0]

    flops = 4.0 * batch * level.heads * level.frames * level.tokens * (TEXT_KEYS + IMAGE_KEYS) * level.dim
    keys = sum(x.numel() for n, x in tensors.items() if n != "q") * 2.0
    size = tensors["q"].numel() * 2.0
    one = lambda x: x[:1, ..., :1, :]  # noqa: E731 - one clip and head
    return Problem(
        op=OP,
        level=name,
        batch=batch,
        tensors=tensors,
        reference=formula,
        part=lambda t: {n: one(x) for n, x in t.items()},
        part_of=lambda _, x: one(x),
        flops={"fwd": flops, "bwd": 2.5 * flops},
        bytes={"fwd": 2 * size + keys, "bwd": 4 * size + 2 * keys},
    )


def implementations(name: str, batch: int) -> dict:
    level = LEVELS[name]

    def ours(backend: str):
        return lambda t: dual_stream_attn(
            t["q"], t["k_text"], t["v_text"], t["k_image"], t["v_image"], image_weight=WEIGHT, backend=backend
        )

    def two_calls(t: Tensors, q, keys, backend: SDPBackend):
        with sdpa_kernel(backend):
            text, image = (
                F.scaled_dot_product_attention(q, keys(t[f"k_{s}"]), keys(t[f"v_{s}"])) for s in ("text", "image")
            )
        return torch.add(text, image, alpha=WEIGHT).transpose(1, 2).view(t["q"].shape)

    def one_long_query(t: Tensors):
        q = t["q"].flatten(1, 2).transpose(1, 2)
        return two_calls(t, q, lambda x: x.transpose(1, 2), SDPBackend.CUDNN_ATTENTION)

    def frames_as_batch(t: Tensors):
        q = t["q"].flatten(0, 1).transpose(1, 2)
        repeat = lambda x: x.repeat_interleave(level.frames, 0).transpose(1, 2)  # noqa: E731
        return two_calls(t, q, repeat, SDPBackend.CUDNN_ATTENTION)

    run = {backend: ours(backend) for backend in ("cuda", "triton", "torch", "reference")}
    run["two SDPA cuDNN, one long query"] = one_long_query
    run["two SDPA cuDNN, frames as batch"] = frames_as_batch
    return run


def rows(levels, batches, only=None) -> list[dict]:
    results = []
    for name in levels:
        for batch in batches:
            case = problem(name, batch)
            for implementation, function in implementations(name, batch).items():
                if only is None or implementation in only:
                    results += measure(case, implementation, function)
    return results
