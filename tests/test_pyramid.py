"""``pyramid_st_attn``: every backend against float64, over tables of every kind and shapes that divide nothing."""

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
    one_key_terms,
)
from univid.ops import ReferenceFrames, pyramid_st_attn, pyramid_st_attn_qkv, reference

BF16, FP16, FP32 = DTYPES


def _table(refs: ReferenceFrames | Tensor, device: torch.device) -> Tensor:
    """(1 or B, 1 or T, R)"""
    table = refs.table if isinstance(refs, ReferenceFrames) else refs.view((1,) * (3 - refs.ndim) + refs.shape)
    return table.to(device)


def _reference(inputs: dict, options: dict, accumulate: torch.dtype | None) -> Tensor:
    q, k, v = inputs["qkv"].unbind(3) if "qkv" in inputs else (inputs["q"], inputs["k"], inputs["v"])
    scale = options.get("scale") or q.shape[-1] ** -0.5
    return reference.pyramid_st_attn(q, k, v, _table(options["refs"], q.device), scale, accumulate)[0]


def _terms(inputs: dict, options: dict, grad: Tensor) -> dict:
    if "qkv" in inputs or inputs["q"][0, ..., 0, 0].numel() > 1 or inputs["k"][0, ..., 0, 0].numel() > 1:
        return {}
    return one_key_terms(inputs["q"], inputs["k"], inputs["v"], grad, options.get("scale") or grad.shape[-1] ** -0.5)


PYRAMID = Operator("pyramid_st_attn", "pyramid", ("q", "k", "v"), _reference, _terms, (("deterministic", True),))
PACKED = Operator("pyramid_st_attn_qkv", "pyramid", ("qkv",), _reference, repeatable=(("deterministic", True),))


@dataclass(frozen=True, kw_only=True)
class PyramidCase(Case):
    B: int = 2
    T: int = 5
    N: int = 37
    H: int = 3
    D: int = 64
    Tk: int | None = None  # T by default
    Nk: int | None = None  # N by default
    refs: Any = None  # a ReferenceFrames or a raw table; by default pyramid(T, 3)
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    scale: float | None = None
    logits: float = 0  # scale · q · kᵀ is about plus or minus this
    # By key frame: how much logits rise where the default scale is, for about half of the queries.
    rises: tuple[float, ...] = ()

    def arguments(self):
        random = Random()
        sizes = ((self.T, self.N), *((self.Tk or self.T, self.Nk or self.N),) * 2)
        inputs = {
            name: random(self.B, *size, self.H, self.D, layout=layout)
            for name, size, layout in zip("qkv", sizes, self.layouts, strict=True)
        }
        if self.logits:
            for name in "qk":
                signs = random(*inputs[name].shape[:-1]).sign()
                inputs[name][..., 0] = signs * (self.logits * self.D**0.5) ** 0.5
        if self.rises:
            inputs["q"][..., 0] = (random(*inputs["q"].shape[:-1]) > 0) * self.D**0.5
            inputs["k"][..., 0] = torch.tensor(self.rises).view(-1, 1, 1)
        refs = ReferenceFrames.pyramid(self.T, 3) if self.refs is None else self.refs
        return inputs, {"refs": refs, "scale": self.scale}


def _random_segments(num_frames: int, num_refs: int) -> ReferenceFrames:
    return ReferenceFrames.pyramid(num_frames, num_refs, "random", generator=torch.Generator().manual_seed(0))


# A repeated frame, a padded entry in the middle, a row without any reference; frame 1 is read by nobody.
RAGGED = torch.tensor([[0, 0, 2], [4, -1, 3], [-1, -1, -1], [2, 3, 4], [-1, -1, 4]])
RAGGED_CLIPS = torch.stack([RAGGED, RAGGED.flip(0)])

# Frames whose logits rise, one behind the other in every order: a tile of keys that outgrows the former ones, in its first
# half or its second, and by more or less than P can hold.
RISING = torch.tensor([[0, 1, 2, 4], [0, 1, 3, 2], [1, -1, 0, 4], [2, 0, 1, 4], [3, 0, 4, 2]])
RISES = {"rises": (0, 0, 10.5, 0, 26), "refs": ReferenceFrames.from_table(RISING, 5)}
SHARED_CLIPS = torch.tensor([[3, 0, 3, 1], [4, -1, 2, 2]])[:, None].expand(2, 5, 4)  # all rows of a clip are equal

ONCE = {"interpreted": (FP32,), "small": {"H": 1}}
TWICE = {"interpreted": (FP16, FP32), "small": {"H": 1}}

# Two rounds of tiles and more on 132 multiprocessors, of queries and of keys.
LARGE = {"T": 6, "N": 180, "H": 24, "dtypes": HALVES, "compiled": HALVES, "large": True}
LARGE_RAGGED = torch.tensor([[0, 0, 2], [4, -1, 3], [-1, -1, -1], [2, 3, 5], [-1, -1, 4], [5, 2, 0]])
LARGE_CLIPS = torch.stack([LARGE_RAGGED, LARGE_RAGGED.flip(0)])

LONG = {"B": 1, "T": 3, "H": 1, "refs": ReferenceFrames.previous(3), "compiled": (BF16, FP32), "interpreted": (FP32,)}

CASES = [
    PyramidCase(id="remainders", compiled=DTYPES, interpreted=(FP16, FP32), small={"B": 1, "N": 19}),
    PyramidCase(id="one-frame", T=1, refs=ReferenceFrames.all(1)),
    PyramidCase(id="one-token", N=1, **ONCE),
    PyramidCase(id="one-reference", refs=ReferenceFrames.previous(5), compiled=(BF16, FP32)),
    PyramidCase(id="one-key", T=1, N=1, refs=ReferenceFrames.all(1), **ONCE),
    PyramidCase(id="dense", refs=ReferenceFrames.all(5), compiled=HALVES, **TWICE),
    PyramidCase(id="random-segments", T=7, N=21, refs=_random_segments(7, 4)),
    PyramidCase(id="first-frame", refs=ReferenceFrames.first(5)),
    PyramidCase(id="repeated-frame", refs=ReferenceFrames.sparse_causal(5), compiled=(BF16, FP32), **ONCE),
    PyramidCase(id="window", refs=ReferenceFrames.window(5, 1), compiled=(BF16, FP32)),
    PyramidCase(id="ragged", refs=ReferenceFrames.from_table(RAGGED, 5), compiled=DTYPES, **ONCE),
    PyramidCase(id="ragged-clips", refs=ReferenceFrames.from_table(RAGGED_CLIPS, 5), compiled=HALVES, **TWICE),
    PyramidCase(id="nothing-referenced", refs=ReferenceFrames.from_table(torch.full((5, 2), -1), 5), **ONCE),
    PyramidCase(id="raw-shared", refs=torch.tensor([3, 0, 3, 1]), **ONCE),
    PyramidCase(id="raw-shared-int32", refs=torch.tensor([4, -1, 2], dtype=torch.int32)),
    PyramidCase(id="raw-rows", refs=RAGGED),
    PyramidCase(id="raw-rows-int32", refs=RAGGED.int()),
    PyramidCase(id="raw-clips", refs=RAGGED_CLIPS, compiled=HALVES),
    PyramidCase(id="raw-clips-int32", refs=RAGGED_CLIPS.int().mT.contiguous().mT),
    PyramidCase(id="raw-one-clip", refs=RAGGED_CLIPS[:1]),
    PyramidCase(id="other-frames", Tk=7, Nk=21, refs=Random().table(2, 5, 4, frames=7), compiled=(BF16, FP32), **ONCE),
    PyramidCase(id="other-frames-shared", T=3, Tk=6, Nk=50, refs=torch.tensor([5, 0, 2])),
    # Frames that tiles of 96 keys share in parts of 12.
    PyramidCase(id="pieces", B=1, T=6, N=36, H=1, refs=ReferenceFrames.pyramid(6, 5), interpreted=(FP32,)),
    # Long enough for tiles that lie inside a frame, and for what is left of it.
    PyramidCase(id="long-keys", N=60, Nk=569, small={"N": 9}, **LONG),
    PyramidCase(id="long-queries", N=569, Nk=60, small={"Nk": 9}, **LONG),
    PyramidCase(id="long-dense", B=1, T=2, N=569, H=1, refs=ReferenceFrames.all(2)),
    # More references than a warp has lanes.
    PyramidCase(id="many-references", B=1, T=40, N=5, H=1, refs=ReferenceFrames.window(40, 17)),
    PyramidCase(id="many-references-shared", B=1, T=40, N=5, H=1, refs=torch.arange(40)),
    PyramidCase(id="shared-by-clip", refs=ReferenceFrames.from_table(SHARED_CLIPS, 5), compiled=HALVES),
    PyramidCase(id="shared-by-clip-raw", refs=SHARED_CLIPS),
    # As many references as frames: the keys of all are one long frame, with weights.
    PyramidCase(id="shared-repeated", refs=torch.tensor([3, 0, 3, 1, 0, -1]), compiled=HALVES),
    PyramidCase(id="rising", **RISES, **STEEP_LOGITS),
    PyramidCase(id="rising-float32", **RISES, **STEEP_LOGITS_FLOAT32),
    PyramidCase(id="rising-four-warpgroups", **RISES, **STEEP_LOGITS, B=1, N=200, H=1),
    PyramidCase(id="rising-dense", **(RISES | {"refs": ReferenceFrames.all(5)}), **STEEP_LOGITS),
    PyramidCase(id="large", **LARGE, refs=ReferenceFrames.pyramid(6, 4)),
    PyramidCase(id="large-ragged", **LARGE, refs=ReferenceFrames.from_table(LARGE_RAGGED, 6)),
    PyramidCase(id="large-clips", **LARGE, refs=LARGE_CLIPS, layouts=("packed",) * 3),
    PyramidCase(id="large-shared", **LARGE, refs=torch.tensor([3, 0, 3, 1])),
    PyramidCase(id="large-four-warpgroups", **(LARGE | {"N": 200}), refs=ReferenceFrames.pyramid(6, 4)),
    PyramidCase(id="large-dense", **(LARGE | {"T": 8, "N": 45, "H": 40}), refs=ReferenceFrames.all(8)),
    PyramidCase(id="large-rounds", **(LARGE | {"T": 7}), refs=ReferenceFrames.pyramid(7, 4)),
    PyramidCase(id="large-many", **(LARGE | {"B": 8, "T": 1, "N": 64, "H": 64}), Tk=2, Nk=64, refs=torch.tensor([[[1]]] * 8)),
    PyramidCase(id="large-unread", **LARGE, refs=torch.tensor([[-1] * 6, [3, 0, 3, 1, 0, -1]])[:, None].expand(2, 6, 6)),
    PyramidCase(id="large-dense-split", B=1, **(LARGE | {"T": 10, "N": 128, "H": 32}), refs=ReferenceFrames.all(10)),
    PyramidCase(id="large-shared-repeated", **LARGE, refs=torch.tensor([3, 0, 3, 1, 0, -1])),
    PyramidCase(id="large-needs-k", **LARGE, refs=ReferenceFrames.pyramid(6, 4), needs=("k",)),
    PyramidCase(id="large-needs-v", **LARGE, refs=ReferenceFrames.pyramid(6, 4), needs=("v",)),
    # A last round of few tiles of keys, which blocks share.
    PyramidCase(id="large-last-round", B=1, **(LARGE | {"T": 10, "N": 128, "H": 14}), refs=ReferenceFrames.all(10)),
    PyramidCase(id="large-last-round-rest", B=1, **(LARGE | {"T": 10, "N": 130, "H": 16}), refs=torch.tensor([7, 0, 3, 9, 1, 2])),
    PyramidCase(id="packed", layouts=("packed",) * 3, compiled=HALVES),
    PyramidCase(id="sliced", layouts=("sliced",) * 3, compiled=HALVES),
    PyramidCase(id="odd", layouts=("odd",) * 3, **ONCE),
    PyramidCase(id="expanded-clips", layouts=("contiguous", "expanded0", "expanded0")),
    PyramidCase(id="expanded-frames", layouts=("expanded0", "expanded1", "expanded1"), compiled=HALVES, **ONCE),
    PyramidCase(id="expanded-query-frames", layouts=("expanded1", "contiguous", "contiguous")),
    PyramidCase(id="expanded-heads", layouts=("contiguous", "expanded3", "expanded3"), compiled=HALVES, **ONCE),
    PyramidCase(id="expanded-query-heads", layouts=("expanded3", "contiguous", "packed")),
    PyramidCase(id="sliced-dense", layouts=("sliced",) * 3, refs=ReferenceFrames.all(5)),
    PyramidCase(id="grad-ones", grad="ones"),
    PyramidCase(id="grad-transposed", grad="transposed", **ONCE),
    PyramidCase(id="grad-sliced", grad="sliced"),
    PyramidCase(id="grad-shifted", grad="shifted"),
    PyramidCase(id="shared-unaligned-rest", T=3, N=70, refs=torch.tensor([2, 0]), compiled=HALVES),
    PyramidCase(id="one-token-expanded", N=1, refs=ReferenceFrames.all(5), layouts=("expanded12", "contiguous", "contiguous")),
    PyramidCase(id="scaled", scale=0.3),
    PyramidCase(id="logits-1e4", **LARGE_LOGITS, interpreted=(FP16,), small={"H": 1}),
    PyramidCase(id="logits-1e4-dense", **LARGE_LOGITS, refs=ReferenceFrames.all(5)),
    PyramidCase(id="needs-nothing", needs=()),
    PyramidCase(id="needs-q", needs=("q",), compiled=HALVES),
    PyramidCase(id="needs-k", needs=("k",), compiled=HALVES, **ONCE),
    PyramidCase(id="needs-v", needs=("v",), compiled=HALVES),
    PyramidCase(id="needs-q-k", needs=("q", "k")),
    PyramidCase(id="needs-q-v", needs=("q", "v"), **ONCE),
    PyramidCase(id="needs-k-v", needs=("k", "v"), compiled=HALVES),
    PyramidCase(id="needs-k-dense", needs=("k",), refs=ReferenceFrames.all(5)),
    PyramidCase(id="D8", D=8, H=2, **ONCE),
    PyramidCase(id="D24", D=24, H=2, compiled=(FP32,)),
    PyramidCase(id="D40", D=40, H=2, interpreted=(FP16,), small={"H": 1}),
    PyramidCase(id="D72", D=72, H=2, compiled=(FP16,)),
    PyramidCase(id="D80", D=80, H=2, **ONCE),
    PyramidCase(id="D128", D=128, H=2),
    PyramidCase(id="D5", D=5, compiled=()),
    PyramidCase(id="D136", D=136, compiled=()),
]  # fmt: skip


@every_run(PYRAMID, CASES)
def test_like_float64(case: PyramidCase, run: Run):
    results = Tester.of(PYRAMID, case, run).check(run.backend)
    if case.id == "ragged":
        assert not results["out"][:, 2].any()
        assert not results["q"][:, 2].any()
        assert not results["k"][:, 1].any()
        assert not results["v"][:, 1].any()
    if case.id == "nothing-referenced":
        assert not any(result.any() for result in results.values())


@dataclass(frozen=True, kw_only=True)
class PackedCase(PyramidCase):
    layout: str = "contiguous"

    def arguments(self):
        refs = ReferenceFrames.pyramid(self.T, 3) if self.refs is None else self.refs
        return {"qkv": Random()(self.B, self.T, self.N, 3, self.H, self.D, layout=self.layout)}, {"refs": refs}


PACKED_CASES = [
    PackedCase(id="remainders", **TWICE),
    PackedCase(id="dense", refs=ReferenceFrames.all(5)),
    PackedCase(id="odd", layout="odd"),
    PackedCase(id="grad-transposed", grad="transposed"),
]


@every_run(PACKED, PACKED_CASES)
def test_packed_like_float64(case: PackedCase, run: Run):
    Tester.of(PACKED, case, run).check(run.backend)


@drawn_runs(PYRAMID, (BF16, 8), (FP32, 24), (BF16, 40), (FP32, 64), (BF16, 64), (FP16, 64), (BF16, 128))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_sizes(run: Run, fixed: list, data: st.DataObject):
    """Sizes alone are drawn; the table is random, padded and raw, so that one set of kernels takes them all."""
    (dim,) = fixed
    draw = lambda name, low, high: data.draw(st.integers(low, high), label=name)  # noqa: E731
    clips, frames, tokens = draw("B", 1, 3), draw("T", 2, 9), draw("N", 3, 70)
    key_frames, key_tokens, num_refs = draw("Tk", 1, 9), draw("Nk", 3, 150), draw("R", 1, 6)
    random = Random()
    inputs = {"q": random(clips, frames, tokens, 2, dim)}
    inputs |= {name: random(clips, key_frames, key_tokens, 2, dim) for name in "kv"}
    refs = random.table(1, frames, num_refs, frames=key_frames, padding=True)
    Tester(PYRAMID, inputs, {"refs": refs}, dtype=run.dtype, device=run.device, name=str(refs.tolist())).check(
        run.backend
    )


TINY = [
    PyramidCase(id="pyramid", T=3, N=3, H=2, D=3, refs=ReferenceFrames.pyramid(3, 2)),
    PyramidCase(id="dense", T=3, N=2, H=1, D=4, refs=ReferenceFrames.all(3)),
    PyramidCase(id="ragged", T=5, N=2, H=1, D=2, refs=ReferenceFrames.from_table(RAGGED_CLIPS, 5)),
    PyramidCase(id="other-frames", T=2, N=2, Tk=3, Nk=3, H=1, D=2, refs=torch.tensor([[0, 0], [2, -1]])),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_gradcheck(case: PyramidCase, backend: str):
    inputs, options = case.arguments()
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    call = lambda q, k, v: pyramid_st_attn(q, k, v, **options, backend=backend)  # noqa: E731
    torch.testing.assert_close(call(*leaves), _reference(inputs, options, None), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_packed(backend: str):
    inputs, options = PackedCase(id="tiny", T=3, N=2, H=2, D=2).arguments()
    qkv = inputs["qkv"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pyramid_st_attn_qkv(x, **options, backend=backend), qkv)


@every_run(PYRAMID, [Case(id="empty", compiled=HALVES)])
@pytest.mark.parametrize(
    ("clips", "tokens", "key_tokens", "num_refs"),
    [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 3, 0), (2, 0, 0, 2)],
    ids=["B0", "N0", "Nk0", "R0", "all-N0"],
)
def test_empty(case: Case, run: Run, clips: int, tokens: int, key_tokens: int, num_refs: int):
    sizes = {"q": tokens, "k": key_tokens, "v": key_tokens}
    made = {"dtype": run.dtype, "device": run.device}
    q, k, v = (torch.randn(clips, 4, size, 2, 8, **made, requires_grad=True) for size in sizes.values())
    refs = torch.zeros(4, num_refs, dtype=torch.long, device=run.device)
    out = pyramid_st_attn(q, k, v, refs, backend=run.backend)
    assert out.shape == q.shape
    assert out.dtype == run.dtype
    assert not out.any()
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, (q, k, v), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "packed"])
def test_full_attention(layout: str):
    """Frames that are joined into a long one, and such as do not follow each other, make no difference."""
    qkv = torch.randn(2, 4, 3, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 3, 2, 8, dtype=torch.float64)
    outs = []
    for refs in (ReferenceFrames.all(4), torch.arange(4)):
        if layout == "packed":
            outs.append(pyramid_st_attn_qkv(qkv, refs))
        else:
            parts = [x.contiguous() for x in qkv.unbind(3)]
            if layout == "sliced":
                parts = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))[:, :, :3] for x in parts]
            outs.append(pyramid_st_attn(*parts, refs))
    gradients = [torch.autograd.grad(out, qkv, grad)[0] for out in outs]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_entries_out_of_range(backend: str, dtype: torch.dtype):
    """In a raw GPU table they are skipped like -1, however far outside they are."""
    far = torch.iinfo(dtype)
    table = torch.tensor([[0, 5, far.max], [far.min, 4, 2], [7, 99, -7], [1, -1, 5], [-2, 2**30, 3]], dtype=dtype)
    inside = torch.where((table >= 0) & (table < 5), table, -1)
    inputs, _ = PyramidCase(id="").arguments()
    results = []
    for refs in (table, inside):
        leaves = {name: x.to("cuda", BF16).requires_grad_() for name, x in inputs.items()}
        out = pyramid_st_attn(**leaves, refs=refs.cuda(), backend=backend, deterministic=True)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_unlisted_frame_is_not_read(backend: str, deterministic: bool):
    """What is not finite in a frame that nobody lists reaches nothing, also where a tile of keys goes across frames."""
    inputs, _ = PyramidCase(id="").arguments()
    refs = torch.tensor([3, 0, 3, 1, 0], device="cuda")  # as many as frames; 2 and 4 are not among them
    results = []
    for fill in (0.0, torch.nan):
        leaves = {name: x.to("cuda", BF16) for name, x in inputs.items()}
        for name in "kv":
            leaves[name][:, [2, 4]] = fill
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        out = pyramid_st_attn(**leaves, refs=refs, backend=backend, deterministic=deterministic)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(other, clean)
