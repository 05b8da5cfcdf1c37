"""``python -m tests.soak``: random calls of the attention operators against float64, on a GPU if there is one.

Sizes, tables, weights, dtypes, layouts and the gradients that are asked for are all drawn; call i is the same at every
run (``--first i --calls 1`` repeats one). Calls that a backend refuses are drawn again. Those that differ are printed.
"""

import argparse
import random
import sys
from multiprocessing import get_context

import pytest
import torch

from tests.test_dual_stream import DUAL, DualCase
from tests.test_pyramid import PACKED, PYRAMID, PackedCase, PyramidCase
from tests.test_temporal import PACKED as TEMPORAL_PACKED
from tests.test_temporal import TEMPORAL, TemporalCase
from tests.test_temporal import PackedCase as TemporalPackedCase
from tests.tester import HALVES, Case, Operator, Tester
from univid.ops import ReferenceFrames

LAYOUTS = ("contiguous", "packed", "sliced", "expanded0", "shifted")
GRADS = ("contiguous", "sliced", "shifted", "ones", "transposed")
_DRAWS = 50  # until one is found that the backend takes


def pyramid(draw: random.Random) -> tuple[Operator, Case]:
    frames, tokens, heads = draw.randint(1, 9), _tokens(draw), _heads(draw)
    sizes = {"B": draw.randint(1, 3), "T": frames, "N": tokens, "H": heads, "grad": draw.choice(GRADS)}
    own = draw.random() < 0.5  # keys of the queries' own number and size
    key_frames = frames if own else draw.randint(1, 9)
    refs = _references(draw, sizes["B"], frames, key_frames)
    if own and draw.random() < 0.3:
        layout = draw.choice(("contiguous", "sliced"))
        return PACKED, PackedCase(id="packed", refs=refs, layout=layout, **sizes)
    sizes |= {} if own else {"Tk": key_frames, "Nk": _tokens(draw)}
    layouts = tuple(draw.choice((*LAYOUTS, "expanded3")) for _ in "qkv")
    needs = None if draw.random() < 0.6 else tuple(name for name in "qkv" if draw.random() < 0.5)
    rises = tuple(draw.choice((0, 8, 12, 20)) for _ in range(key_frames)) if _rise(draw, layouts) else ()
    return PYRAMID, PyramidCase(id="pyramid", refs=refs, layouts=layouts, needs=needs, rises=rises, **sizes)


def _rise(draw: random.Random, layouts: tuple[str, ...]) -> bool:
    """Whether logits rise along the keys: sometimes, where q and k can be written."""
    return draw.random() < 0.2 and not any("expanded" in layout for layout in layouts[:2])


def _tokens(draw: random.Random) -> int:
    return draw.choice((draw.randint(3, 40), draw.randint(41, 300), 16 * draw.randint(1, 16), 12 * draw.randint(1, 20)))


def _heads(draw: random.Random) -> int:
    """Sometimes so many that a GPU's blocks compute one tile after another."""
    return draw.randint(8, 20) if draw.random() < 0.2 else draw.randint(1, 4)


def _references(draw: random.Random, clips: int, frames: int, key_frames: int) -> ReferenceFrames | torch.Tensor:
    if frames == key_frames and draw.random() < 0.5:
        some = draw.randint(1, frames)
        return draw.choice(
            (
                ReferenceFrames.pyramid(frames, some),
                ReferenceFrames.pyramid(frames, some, own_frame=False),
                ReferenceFrames.all(frames),
                ReferenceFrames.window(frames, 1),
                ReferenceFrames.sparse_causal(frames),
            )
        )
    number = draw.randint(1, 6)
    shape = draw.choice(((number,), (frames, number), (clips, frames, number), (1, frames, number), (clips, 1, number)))
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    table = torch.randint(draw.choice((-1, 0)), key_frames, shape, generator=generator)
    if shape == (clips, 1, number):  # one row for all frames of a clip
        return ReferenceFrames.from_table(table.expand(-1, frames, -1), key_frames)
    return table


def temporal(draw: random.Random) -> tuple[Operator, Case]:
    sizes = {"B": draw.randint(1, 3), "T": draw.randint(2, 64), "N": draw.randint(1, 70), "H": draw.randint(1, 4)}
    sizes |= {"D": draw.choice((8, 40, 64, 80, 128)), "grad": draw.choice(GRADS)}
    if draw.random() < 0.3:
        return TEMPORAL_PACKED, TemporalPackedCase(id="packed", layout=draw.choice(("contiguous", "sliced")), **sizes)
    return TEMPORAL, TemporalCase(id="temporal", layouts=tuple(draw.choice(LAYOUTS) for _ in "qkv"), **sizes)


def dual_stream(draw: random.Random) -> tuple[Operator, Case]:
    clips, queries = draw.randint(1, 3), (draw.randint(1, 6), draw.randint(3, 200))
    heads = draw.randint(1, 4)
    if draw.random() < 0.2:  # several tiles for each warpgroup of a GPU
        queries, heads = (queries[0], draw.randint(500, 1500)), 8
    weights = (1.0, 0.7, -0.4, (), (clips,), (1, queries[0]), (clips, queries[0]))
    text, image = draw.choice(((77, 257), (draw.randint(3, 90), draw.randint(3, 300)), (77, 0), (0, 257)))
    layouts = tuple(draw.choice((*LAYOUTS, by_heads)) for by_heads in ("expanded3", "expanded2", "expanded2"))
    streams = [(name, length) for name, length in (("text", text), ("image", image)) if length]
    rises = [(*stream, draw.choice((-27, -10, 8, 12, 20))) for stream in streams * 2] if _rise(draw, layouts) else []
    return DUAL, DualCase(
        id="dual-stream",
        B=clips,
        queries=queries,
        H=heads,
        text=text,
        image=image,
        text_weight=draw.choice(weights) if text else 1.0,
        image_weight=draw.choice(weights) if image else 1.0,
        layouts=layouts,
        grad=draw.choice(GRADS),
        rises=tuple((name, draw.randrange(length), by) for name, length, by in rises),
    )


OPERATORS = {"pyramid": pyramid, "temporal": temporal, "dual_stream": dual_stream}


def run(names: list[str], backend: str, index: int) -> str | None:
    """Call ``index``; what went wrong, or None."""
    draw = random.Random(index)
    for _ in range(_DRAWS):
        operator, case = OPERATORS[draw.choice(names)](draw)
        dtype = draw.choice(HALVES)
        inputs, options = case.arguments()
        tester = Tester(
            *(operator, inputs, options),
            dtype=dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            needs=case.needs,
            grad=case.grad,
            name=f"call {index}: {case}",
        )
        try:
            tester.check(backend)
        except pytest.skip.Exception as error:
            refused = str(error)
            continue
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
    return f"call {index}: {_DRAWS} calls refused, the last one: {refused}"


def _run_some(given: tuple[list[str], str, range]) -> list[str]:
    torch.set_num_threads(1)
    return [wrong for index in given[2] if (wrong := run(given[0], given[1], index))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--op", action="append", choices=list(OPERATORS), help="only these")
    parser.add_argument("--processes", type=int, default=8)
    asked = parser.parse_args()
    chunks = [
        range(i, min(i + 50, asked.first + asked.calls)) for i in range(asked.first, asked.first + asked.calls, 50)
    ]
    tasks = [(asked.op or list(OPERATORS), asked.backend, chunk) for chunk in chunks]
    wrong = []
    with get_context("spawn").Pool(min(asked.processes, len(tasks))) as pool:
        for done, some in enumerate(pool.imap_unordered(_run_some, tasks), 1):
            wrong += some
            print(f"\r{done * 50} calls, {len(wrong)} wrong", end="", flush=True)
    print()
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
