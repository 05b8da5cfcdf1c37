"""``dual_stream_attn`` beside two calls of dense attention and a sum."""

from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.harness import Implementation, Problem, Tensors, ours
from benchmarks.levels import IMAGE_KEYS, LEVELS, TEXT_KEYS, Level
from univid.ops import dual_stream_attn, reference

OP = "dual_stream_attn"
SHAPES = LEVELS
BATCHES = (1, 2)
WEIGHT = 0.7  # of the image; the text's is 1


def problem(level: Level, batch: int, device: str = "cuda") -> Problem:
    make = lambda *s: torch.randn(*s, level.heads, level.dim, device=device, dtype=torch.bfloat16)  # noqa: E731
    tensors = {"q": make(batch, level.frames, level.tokens)}
    tensors |= {f"{n}_text": make(batch, TEXT_KEYS) for n in "kv"}
    tensors |= {f"{n}_image": make(batch, IMAGE_KEYS) for n in "kv"}

    def formula(t: Tensors, accumulate=None):
        streams = [(t["k_text"], t["v_text"], 1.0), (t["k_image"], t["v_image"], WEIGHT)]
        return reference.dual_stream_attn(t["q"], streams, level.dim**-0.5, accumulate)[0]

    flops = 4.0 * batch * level.heads * level.frames * level.tokens * (TEXT_KEYS + IMAGE_KEYS) * level.dim
    keys = sum(x.numel() for n, x in tensors.items() if n != "q") * 2.0
    size = tensors["q"].numel() * 2.0
    one = lambda x: x[-1:, ..., -1:, :]  # noqa: E731 - one clip and head
    return Problem(
        tensors=tensors,
        reference=formula,
        part=lambda t: {n: one(x) for n, x in t.items()},
        part_of=lambda _, x: one(x),
        flops={"fwd": flops, "bwd": 2.5 * flops},
        bytes={"fwd": 2 * size + keys, "bwd": 4 * size + 2 * keys},
    )


def implementations(level: Level, batch: int) -> dict[str, Implementation]:
    def call(t: Tensors, backend: str):
        keys = (t[n] for n in ("k_text", "v_text", "k_image", "v_image"))
        return dual_stream_attn(t["q"], *keys, image_weight=WEIGHT, backend=backend)

    def two_calls(attend: Callable, query_dims: tuple[int, int]) -> Callable:
        def run(t: Tensors):
            q = t["q"].flatten(*query_dims)
            text, image = (attend(q, t[f"k_{s}"], t[f"v_{s}"]) for s in ("text", "image"))
            return torch.add(text, image, alpha=WEIGHT).view(t["q"].shape)

        return run

    def repeat(t: Tensors) -> Tensors:
        """The projections of a prompt that was repeated for every frame."""
        return {n: x if n == "q" else x.repeat_interleave(level.frames, 0) for n, x in t.items()}

    run = ours("dual_stream", call)
    for name in ("SDPA cuDNN", "FlashAttention-4"):
        if attend := peers.ATTENTION.get(name):
            compiles = name in peers.COMPILED
            run[f"two {name}, one long query"] = Implementation(two_calls(attend, (1, 2)), compiles=compiles)
            run[f"two {name}, frames as batch"] = Implementation(
                two_calls(attend, (0, 1)), prepare=repeat, compiles=compiles
            )
    return run
