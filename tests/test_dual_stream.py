"""``dual_stream_attn``: every backend against float64, over weights of every kind, absent streams and any rank of q."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tester import (
    DTYPES,
    HALVES,
    LARGE_LOGITS,
    STEEP_LOGITS,
    STEEP_LOGITS_FLOAT32,
    Case,
    Operator,
    Random,
    Run,
    Tester,
    drawn_runs,
    every_run,
)
from univid.ops import dual_stream_attn, reference

BF16, FP16, FP32 = DTYPES
STREAMS = ("text", "image")


def _streams(inputs: dict, options: dict, q: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor | float]]:
    """Name, k, v and weight of the streams that are computed; a weight over all query dimensions of q."""
    streams = []
    for name in STREAMS:
        weight = inputs.get(f"{name}_weight", options.get(f"{name}_weight", 1.0))
        if f"k_{name}" not in inputs or (not isinstance(weight, Tensor) and weight == 0):
            continue
        if isinstance(weight, Tensor):
            weight = weight.reshape(weight.shape + (1,) * (q.ndim - 2 - weight.ndim))
        streams.append((name, inputs[f"k_{name}"], inputs[f"v_{name}"], weight))
    return streams


def _as_frames(q: Tensor, weight: Tensor | float) -> Tensor | float:
    """A weight for q seen as (B, 1, N, H, D), N being all its queries."""
    if not isinstance(weight, Tensor):
        return weight
    return weight.expand(q.shape[:-2]).reshape(q.shape[0], 1, -1)


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    q = inputs["q"]
    flat = q.reshape(q.shape[0], 1, -1, *q.shape[-2:])
    streams = [(k, v, _as_frames(q, weight)) for _, k, v, weight in _streams(inputs, options, q)]
    return reference.dual_stream_attn(flat, streams, options.get("scale") or q.shape[-1] ** -0.5, accumulate)[0].view(
        q.shape
    )


def _terms(inputs: dict, options: dict, grad: Tensor) -> dict:
    """The gradient of a weight sums dO · O over all it scales."""
    terms = {}
    q = inputs["q"]
    flat = q.reshape(q.shape[0], 1, -1, *q.shape[-2:])
    for name, k, v, weight in _streams(inputs, options, q):
        if isinstance(weight, Tensor):
            out, _ = reference.dual_stream_attn(flat, [(k, v.abs(), 1.0)], options.get("scale") or q.shape[-1] ** -0.5)
            rows = (out.view(q.shape) * grad.abs()).sum((-1, -2))
            terms[f"{name}_weight"] = (rows.sum_to_size(weight.shape).view(inputs[f"{name}_weight"].shape), None)
    return terms


DUAL = Operator(
    "dual_stream_attn",
    "dual_stream",
    ("q", "k_text", "v_text", "text_weight", "k_image", "v_image", "image_weight"),
    _reference,
    _terms,
)


@dataclass(frozen=True, kw_only=True)
class DualCase(Case):
    B: int = 2
    queries: tuple[int, ...] = (5, 37)  # q's dimensions between B and H
    H: int = 3
    D: int = 64
    text: int = 13  # keys; 0: the stream is absent
    image: int = 35
    text_weight: Any = 1.0  # a number, or the shape of a tensor
    image_weight: Any = 0.7
    weight_dtype: torch.dtype = torch.float64  # float64: that of the run
    zeros: str = ""  # "all": tensor weights hold 0; "some": in every second place
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    scale: float | None = None
    logits: float = 0
    # (stream, first key, by how much): from there on logits are so high where the default scale is, for about half of the queries.
    rises: tuple[tuple[str, int, float], ...] = ()
    rising_tokens: int | None = None  # of these alone, the first of a frame

    def arguments(self):
        random = Random()
        q = random(self.B, *self.queries, self.H, self.D, layout=self.layouts[0])
        inputs, options = {"q": q}, {"scale": self.scale}
        for name, length in zip(STREAMS, (self.text, self.image), strict=True):
            for tensor, layout in zip("kv", self.layouts[1:], strict=True):
                key = f"{tensor}_{name}"
                if length:
                    inputs[key] = random(self.B, length, self.H, self.D, layout=layout)
                else:
                    options[key] = None
        if self.logits:
            for key in ("q", "k_text", "k_image"):
                inputs[key][..., 0] = random(*inputs[key].shape[:-1]).sign() * (self.logits * self.D**0.5) ** 0.5
        if self.rises:
            rising = random(*q.shape[:-1]) > 0
            if self.rising_tokens is not None:
                rising[..., self.rising_tokens :, :] = False
            q[..., 0] = rising * self.D**0.5
            for keys in (inputs[key] for key in ("k_text", "k_image") if key in inputs):
                keys[..., 0] = 0
            for name, first, by in self.rises:
                inputs[f"k_{name}"][:, first:, :, 0] = by
        for name, weight in zip(STREAMS, (self.text_weight, self.image_weight), strict=True):
            if isinstance(weight, tuple):
                tensor = random(*weight, 1)[..., 0]
                if self.zeros:
                    tensor.view(-1)[:: 1 if self.zeros == "all" else 2] = 0
                inputs[f"{name}_weight"] = tensor.to(self.weight_dtype)
            else:
                options[f"{name}_weight"] = weight
        return inputs, options


SMALL = {"queries": (3, 7), "H": 1}
ONCE = {"interpreted": (FP32,), "small": SMALL}
TWICE = {"interpreted": (FP16, FP32), "small": SMALL}
WEIGHTS = ("text_weight", "image_weight")
KEYS = ("k_text", "v_text", "k_image", "v_image")
# 1264 tiles of 64 queries: several for each warpgroup of 132 multiprocessors, across clips and heads; one to four tiles of keys.
LARGE = {"queries": (5, 1000), "H": 8, "dtypes": HALVES, "compiled": HALVES, "large": True}

ONE_WARP = {"queries": (9, 64), "rising_tokens": 16, **STEEP_LOGITS}  # of the four of a tile

CASES = [
    DualCase(id="remainders", compiled=DTYPES, **TWICE),
    DualCase(id="clip-lengths", text=77, image=257),
    DualCase(id="large", text=77, image=257, **LARGE),
    DualCase(id="large-weights", text=77, image=257, text_weight=(2,), image_weight=(2, 5), **LARGE),
    DualCase(id="large-gates", text=77, image=257, text_weight=(), image_weight=(1, 5), layouts=("packed",) * 3, **LARGE),
    DualCase(id="large-long-text", text=200, image=9, text_weight=(2, 5), image_weight=(2,), **LARGE),
    DualCase(id="large-text-only", text=300, image=0, text_weight=(2, 1), **LARGE),
    DualCase(id="large-image-only", text=0, image=257, image_weight=(2, 5), **LARGE),
    DualCase(id="large-needs-weights", text=77, image=257, text_weight=(2, 5), image_weight=(2, 5), needs=WEIGHTS, **LARGE),
    DualCase(id="large-needs-v", text=77, image=257, image_weight=(2, 5), needs=("v_text", "v_image"), **LARGE),
    DualCase(id="clip-weights", text=77, image=257, text_weight=(2,), image_weight=(2, 5), compiled=HALVES),
    # Blocks that go on into the next (clip, head), of which there are more; frames that do not follow each other.
    DualCase(id="large-lines", text=77, image=257, text_weight=(2, 2), **(LARGE | {"queries": (2, 70), "H": 70})),
    DualCase(id="large-sliced", text=77, image=257, layouts=("sliced", "packed", "packed"), **LARGE),
    # Tiles of keys that are full, and one more of them; none of a second stream.
    DualCase(id="full-tiles", text=88, image=264, compiled=HALVES),
    DualCase(id="two-tiles", text=0, image=150),
    DualCase(id="two-full-tiles", text=176, image=0),
    DualCase(id="all-tiles", text=0, image=352, compiled=HALVES),
    DualCase(id="long-text", text=200, image=35),
    DualCase(id="long-streams", text=300, image=515, queries=(2, 37)),
    DualCase(id="one-key", text=1, needs=("v_text", "k_image", "v_image"), **ONCE),
    DualCase(id="text-only", image=0, compiled=HALVES, **ONCE),
    DualCase(id="image-only", text=0, compiled=HALVES, **ONCE),
    DualCase(id="text-weight-0", text_weight=0, **ONCE),
    DualCase(id="image-weight-0", image_weight=0.0),
    DualCase(id="negative-weight", image_weight=-1.5),
    DualCase(id="gate", text_weight=(), image_weight=(), compiled=HALVES, **ONCE),
    DualCase(id="gate-float32", text_weight=(), image_weight=(2,), weight_dtype=torch.float32),
    DualCase(id="weights-clip-frame", text_weight=(2,), image_weight=(2, 5)),
    DualCase(id="weights-frame", text_weight=(1, 3), image_weight=1.0, queries=(3, 7), **ONCE),
    DualCase(id="weights-token", text_weight=(2, 3, 7), image_weight=(2, 1, 7), queries=(3, 7), compiled=(BF16, FP32), **ONCE),
    DualCase(id="weights-at-0", text_weight=(), image_weight=(2, 3), queries=(3, 7), zeros="all", **ONCE),
    # Weights that vanish beside those of the other stream, whichever of the two a kernel takes first.
    DualCase(id="weights-some-0-text", queries=(3, 7), text_weight=(2, 3), zeros="some", compiled=HALVES, **ONCE),
    DualCase(id="weights-some-0-image", image_weight=(2, 5), zeros="some", compiled=HALVES),
    DualCase(id="clip-weights-some-0-text", text=77, image=257, text_weight=(2, 5), zeros="some", compiled=HALVES),
    DualCase(id="clip-weights-some-0-image", text=77, image=257, image_weight=(2, 5), zeros="some", compiled=HALVES),
    DualCase(id="weights-far-apart", text=77, image=257, image_weight=0.02, compiled=HALVES),
    DualCase(id="weights-far-apart-text", text=77, image=257, text_weight=0.02, image_weight=1.0),
    # Tiles of keys that outgrow the reference which a row has, or all but vanish beside it: first ones, and later ones.
    DualCase(id="rising", text=77, image=257, rises=(("image", 100, 12.0),), **STEEP_LOGITS),
    DualCase(id="rising-text", text=200, image=9, rises=(("text", 150, 12.0), ("image", 0, -10.0)), **STEEP_LOGITS),
    DualCase(id="rising-alone", text=0, image=257, queries=(100,), rises=(("image", 100, 9.0), ("image", 190, 21.0)), **STEEP_LOGITS),
    DualCase(id="rising-first", text=77, image=257, rises=(("text", 0, 10.5), ("image", 0, -10.0)), **STEEP_LOGITS),
    DualCase(id="falling-first", text=77, image=257, rises=(("text", 0, -27.0), ("image", 0, 10.5)), **STEEP_LOGITS),
    DualCase(id="falling", text=13, image=35, rises=(("text", 0, -27.0), ("image", 0, -10.0)), **STEEP_LOGITS),
    DualCase(id="rising-one-warp", text=77, image=257, rises=(("image", 100, 12.0),), **ONE_WARP),
    DualCase(id="rising-one-warp-first", text=77, image=257, rises=(("text", 0, 10.5), ("image", 0, -10.0)), **ONE_WARP),
    DualCase(id="rising-one-warp-alone", text=0, image=257, rises=(("image", 0, 10.5), ("image", 190, 21.0)), **ONE_WARP),
    DualCase(id="rising-float32", text=77, image=257, rises=(("image", 100, 12.0),), **STEEP_LOGITS_FLOAT32),
    DualCase(id="falling-first-float32", text=77, image=257, rises=(("text", 0, -27.0), ("image", 0, 10.5)), **STEEP_LOGITS_FLOAT32),
    DualCase(id="rank3", queries=(), text_weight=(2,), interpreted=(FP32,)),
    DualCase(id="rank4", queries=(37,), text_weight=(2, 37), image_weight=(1, 37)),
    DualCase(id="rank6", queries=(3, 5, 7), text_weight=(2, 3), image_weight=(1, 3, 5, 1), interpreted=(FP32,), small={"H": 1}),
    DualCase(id="packed", layouts=("packed", "packed", "packed"), compiled=HALVES),
    DualCase(id="sliced", layouts=("sliced", "sliced", "sliced"), **ONCE),
    DualCase(id="odd", layouts=("odd", "odd", "odd"), **ONCE),
    DualCase(id="expanded-heads", layouts=("contiguous", "expanded2", "expanded2"), compiled=HALVES, **ONCE),
    DualCase(id="expanded-query-heads", layouts=("expanded3", "contiguous", "packed")),
    DualCase(id="expanded", layouts=("expanded0", "expanded0", "expanded0"), **ONCE),
    # Values that are all the same make dS cancel: the gradients of q and k would be nothing but rounding.
    DualCase(id="expanded-keys", layouts=("expanded1", "expanded1", "expanded1"), needs=("v_text", "v_image"), **ONCE),
    DualCase(id="grad-ones", grad="ones"),
    DualCase(id="grad-transposed", grad="transposed", **ONCE),
    DualCase(id="scaled", scale=0.3),
    DualCase(id="logits-1e4", **LARGE_LOGITS, interpreted=(FP16,), small=SMALL),
    DualCase(id="needs-nothing", needs=()),
    DualCase(id="needs-q", needs=("q",), **ONCE),
    DualCase(id="needs-keys", needs=KEYS, compiled=HALVES, **ONCE),
    DualCase(id="needs-k_text", needs=("k_text",)),
    DualCase(id="needs-v_image", needs=("v_image",), **ONCE),
    DualCase(id="needs-weight", text_weight=(2,), needs=("text_weight",), **ONCE),
    DualCase(id="needs-q-weight", image_weight=(), needs=("q", "image_weight")),
    DualCase(id="D8", D=8, H=2, **ONCE),
    DualCase(id="D24", D=24, H=2),
    DualCase(id="D40", D=40, H=2, interpreted=(FP16,), small=SMALL),
    DualCase(id="D72", D=72, H=2, compiled=(FP16,)),
    DualCase(id="D80", D=80, H=2),
    DualCase(id="D128", D=128, H=2),
    DualCase(id="D5", D=5, compiled=()),
]  # fmt: skip


@every_run(DUAL, CASES)
def test_like_float64(case: DualCase, run: Run):
    results = Tester.of(DUAL, case, run).check(run.backend)
    if case.id == "text-weight-0":
        assert not results["k_text"].any()
        assert not results["v_text"].any()


@drawn_runs(DUAL, (BF16, 8), (FP32, 24), (BF16, 64), (torch.float16, 64))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    (dim,) = fixed
    draw = lambda name, low, high: data.draw(st.integers(low, high), label=name)  # noqa: E731
    # Kernels are compiled for lengths rounded up to 16: these ranges share one set.
    sizes = {"B": draw("B", 1, 3), "text": draw("text", 65, 80), "image": draw("image", 129, 144)}
    queries = (draw("T", 1, 6), draw("N", 2, 90))
    inputs, options = DualCase(id="drawn", queries=queries, H=2, D=dim, **sizes).arguments()
    Tester(DUAL, inputs, options, dtype=run.dtype, device=run.device, name=f"{sizes} {queries}").check(run.backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("zeros", ["", "some", "all"])
def test_gradcheck(backend: str, zeros: str):
    case = DualCase(
        id="tiny", queries=(2, 2), H=2, D=2, text=2, image=3, text_weight=(2,), image_weight=(1, 2), zeros=zeros
    )
    inputs, _ = case.arguments()
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    call = lambda *x: dual_stream_attn(**dict(zip(leaves, x, strict=True)), backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@every_run(DUAL, [Case(id="empty")])
@pytest.mark.parametrize(("clips", "tokens"), [(0, 3), (2, 0)], ids=["B0", "N0"])
def test_empty(case: Case, run: Run, clips: int, tokens: int):
    made = {"dtype": run.dtype, "device": run.device, "requires_grad": True}
    q = torch.randn(clips, 4, tokens, 2, 8, **made)
    keys = [torch.randn(clips, length, 2, 8, **made) for length in (3, 3, 5, 5)]
    out = dual_stream_attn(q, *keys, backend=run.backend)
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out, (q, *keys), torch.ones_like(out))
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, (q, *keys), strict=True))
