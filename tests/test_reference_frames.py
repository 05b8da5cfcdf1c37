"""``ReferenceFrames``: every constructor against its definition, and the inverse table that the backward reads."""

import copy
import dataclasses
import pickle
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from univid.kernels.inverse import inverse_table
from univid.ops import ReferenceFrames, pyramid_st_attn

sizes = st.integers(1, 40).flatmap(lambda frames: st.tuples(st.just(frames), st.integers(1, frames)))  # (T, R)


def rows_of(refs):
    """The table as lists, which is shared by all clips."""
    assert refs.table.shape[0] == 1
    return refs.table[0].tolist()


def segments(num_frames, num_refs):
    """The definition: R segments [⌊iT/R⌋, ⌊(i+1)T/R⌋)."""
    return [range(i * num_frames // num_refs, (i + 1) * num_frames // num_refs) for i in range(num_refs)]


# --- the paper's sampler ----------------------------------------------------------------------------------------------


@given(sizes, st.sampled_from(["center", "random"]))
def test_pyramid_rows_have_r_different_sorted_frames_their_own_among_them(size, sample):
    frames, num_refs = size
    refs = ReferenceFrames.pyramid(frames, num_refs, sample)
    assert (refs.num_frames, refs.num_key_frames, refs.num_refs, refs.padded) == (frames, frames, num_refs, False)
    for frame, row in enumerate(rows_of(refs)):
        assert row == sorted(set(row)) and len(row) == num_refs and frame in row


@given(sizes)
def test_pyramid_takes_the_centre_of_every_segment_but_its_own(size):
    rows = rows_of(ReferenceFrames.pyramid(*size))
    for frame, row in enumerate(rows):
        for entry, segment in zip(row, segments(*size), strict=True):
            assert entry == (frame if frame in segment else segment.start + (len(segment) - 1) // 2)


@given(sizes, st.integers(0, 2**31))
def test_random_frames_stay_in_their_segments_and_are_shared(size, seed):
    rows = rows_of(ReferenceFrames.pyramid(*size, "random", generator=torch.Generator().manual_seed(seed)))
    chosen = rows_of(
        ReferenceFrames.pyramid(*size, "random", own_frame=False, generator=torch.Generator().manual_seed(seed))
    )[0]
    for frame, row in enumerate(rows):
        for entry, one, segment in zip(row, chosen, segments(*size), strict=True):
            assert one in segment
            assert entry == (frame if frame in segment else one)


def test_random_frames_follow_the_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [rows_of(ReferenceFrames.pyramid(24, 3, "random", generator=generator)) for _ in range(4)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0)[0] != draw(0)[1]
    torch.manual_seed(7)
    first = rows_of(ReferenceFrames.pyramid(24, 3, "random"))
    torch.manual_seed(7)
    assert rows_of(ReferenceFrames.pyramid(24, 3, "random")) == first


def test_random_frames_are_uniform_over_their_segment():
    generator = torch.Generator().manual_seed(0)
    draws = [rows_of(ReferenceFrames.pyramid(7, 2, "random", False, generator))[0] for _ in range(2000)]
    for i, segment in enumerate(segments(7, 2)):
        counts = Counter(draw[i] for draw in draws)
        assert set(counts) == set(segment)
        expected = len(draws) / len(segment)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())


@given(sizes, st.sampled_from(["center", "random"]))
def test_without_own_frame_all_rows_are_equal(size, sample):
    frames, num_refs = size
    refs = ReferenceFrames.pyramid(frames, num_refs, sample, own_frame=False)
    rows = rows_of(refs)
    assert rows == [rows[0]] * frames and len(set(rows[0])) == num_refs
    assert refs.rows.tolist() == [[rows[0]]]


@given(st.integers(1, 40), st.booleans(), st.sampled_from(["center", "random"]))
def test_as_many_references_as_frames_is_full_attention(frames, own_frame, sample):
    refs = ReferenceFrames.pyramid(frames, frames, sample, own_frame)
    assert rows_of(refs) == rows_of(ReferenceFrames.all(frames)) == [list(range(frames))] * frames
    assert refs.rows.shape == (1, 1, frames)


def test_full_attention_is_that_of_one_long_frame():
    refs = ReferenceFrames.from_table(torch.tensor([[2, 0, 1]] * 4), 3)
    assert refs.joined.table.tolist() == [[[0]] * 4]
    assert (refs.joined.num_key_frames, refs.joined.joined) == (1, None)
    assert refs.to("meta").joined.device.type == "meta"
    rows = [[0, 1, 1], [0, 1, -1], [0, 1]]
    assert not [row for row in rows if ReferenceFrames.from_table(torch.tensor([row] * 4), 3).joined]
    assert ReferenceFrames.pyramid(4, 3).joined is None


def test_one_frame_is_spatial_attention():
    refs = ReferenceFrames.pyramid(1, 1)
    assert rows_of(refs) == [[0]]
    q, k, v = (torch.randn(2, 1, 6, 2, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x[:, 0].transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(pyramid_st_attn(q, k, v, refs)[:, 0], expected.transpose(1, 2))


def test_the_model_s_levels():
    """T = 24, R = 3, 6, 12, 24 (design: R(f) = ceil(T·f / 8))."""
    assert rows_of(ReferenceFrames.pyramid(24, 3))[0] == [0, 11, 19]
    assert rows_of(ReferenceFrames.pyramid(24, 3))[13] == [3, 13, 19]
    assert rows_of(ReferenceFrames.pyramid(24, 6, own_frame=False))[5] == [1, 5, 9, 13, 17, 21]
    assert rows_of(ReferenceFrames.pyramid(5, 3))[2] == [0, 2, 3]  # segments [0, 1), [1, 3), [3, 5)


# --- the other constructors -------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 6))
def test_constructors(n, k):
    assert rows_of(ReferenceFrames.first(n)) == [[0]] * n
    assert rows_of(ReferenceFrames.previous(n)) == [[max(t - 1, 0)] for t in range(n)]
    assert rows_of(ReferenceFrames.sparse_causal(n)) == [[0, max(t - 1, 0)] for t in range(n)]
    assert rows_of(ReferenceFrames.all(n)) == [list(range(n))] * n
    window = ReferenceFrames.window(n, k)
    assert rows_of(window) == [[s if 0 <= s < n else -1 for s in range(t - k, t + k + 1)] for t in range(n)]
    assert window.padded == (k > 0)


CONSTRUCTORS = {
    "pyramid": lambda n: ReferenceFrames.pyramid(n, 1),
    "first": ReferenceFrames.first,
    "previous": ReferenceFrames.previous,
    "sparse_causal": ReferenceFrames.sparse_causal,
    "window": lambda n: ReferenceFrames.window(n, 1),
    "all": ReferenceFrames.all,
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_number_of_frames(name):
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=rf"^num_frames: got {wrong}, needs an integer >= 1$"):
            CONSTRUCTORS[name](wrong)
    for wrong in (2.0, "2", None, True, torch.tensor(2)):
        with pytest.raises(TypeError, match=rf"^num_frames: got {type(wrong).__name__}, needs an integer"):
            CONSTRUCTORS[name](wrong)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ReferenceFrames.pyramid(4, 5), ValueError, "num_refs: got 5, needs at most num_frames = 4"),
        (lambda: ReferenceFrames.pyramid(4, 0), ValueError, "num_refs: got 0, needs"),
        (lambda: ReferenceFrames.pyramid(4, 2.0), TypeError, "num_refs: got float, needs"),
        (lambda: ReferenceFrames.pyramid(4, 2, "middle"), ValueError, "sample: got 'middle', needs 'center' or 'ran"),
        (lambda: ReferenceFrames.window(4, -1), ValueError, "k: got -1, needs"),
        (lambda: ReferenceFrames.window(4, 1.5), TypeError, "k: got float, needs"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value).startswith(message)


# --- a table of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(4, 2), (1, 4, 2), (3, 4, 2)], ids=str)
def test_from_table(shape, dtype):
    table = torch.randint(-1, 7, shape, dtype=dtype)
    table.view(-1)[0] = -1
    refs = ReferenceFrames.from_table(table, 7)
    assert refs.table.dtype == torch.int32 and refs.table.is_contiguous()
    assert refs.table.shape == (1,) * (3 - len(shape)) + shape
    assert torch.equal(refs.table.view(shape), table.int())
    assert (refs.num_frames, refs.num_refs, refs.num_key_frames, refs.padded) == (4, 2, 7, True)
    before = refs.table.clone()
    table.fill_(0)
    assert torch.equal(refs.table, before)  # a table of its own


def test_from_table_takes_views_and_unsigned_numbers():
    table = torch.arange(8).view(2, 4).t()
    assert not table.is_contiguous()
    assert rows_of(ReferenceFrames.from_table(table, 8)) == table.tolist()
    assert rows_of(ReferenceFrames.from_table(table.to(torch.uint8), 8)) == table.tolist()
    assert rows_of(ReferenceFrames.from_table(torch.tensor([3]).expand(4, 2), 8)) == [[3, 3]] * 4


@pytest.mark.parametrize(
    ("table", "error", "got"),
    [
        (torch.zeros(4, 2), TypeError, "torch.float32"),
        (torch.zeros(4, 2, dtype=torch.bool), TypeError, "torch.bool"),
        (torch.zeros(4, 2, dtype=torch.cfloat), TypeError, "torch.complex64"),
        ([[0, 1]], TypeError, "list"),
        (torch.zeros(4, dtype=torch.int64), ValueError, "shape (4,)"),
        (torch.zeros(1, 1, 4, 2, dtype=torch.int64), ValueError, "shape (1, 1, 4, 2)"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "shape (0, 2)"),
        (torch.zeros(2, 0, 2, dtype=torch.int64), ValueError, "shape (2, 0, 2)"),
        (torch.tensor([[0, 3]]), ValueError, "entry 3"),
        (torch.tensor([[0, -2]]), ValueError, "entry -2"),
        (torch.tensor([[0, 2**32]]), ValueError, f"entry {2**32}"),
    ],
)
def test_bad_table(table, error, got):
    with pytest.raises(error) as raised:
        ReferenceFrames.from_table(table, 3)
    assert str(raised.value).startswith(f"table: got {got}, needs ")


@pytest.mark.parametrize("wrong", [0, -1, 2.0, None])
def test_bad_number_of_key_frames(wrong):
    with pytest.raises((ValueError, TypeError), match=r"^num_key_frames: got .*, needs an integer >= 1"):
        ReferenceFrames.from_table(torch.zeros(1, 1, dtype=torch.int64), wrong)


@pytest.mark.parametrize(
    ("table", "equal"),
    [
        ([[0, 1]] * 3, True),
        ([[0, 1], [0, 1], [1, 0]], False),  # another order is another row
        ([[-1, 1]] * 3, True),
        ([[[0], [0]], [[1], [1]]], True),  # each clip has its own
        ([[[0], [0]], [[1], [0]]], False),
        ([[2, 2]], True),
    ],
)
def test_equal_rows(table, equal):
    table = torch.tensor(table)
    refs = ReferenceFrames.from_table(table, 3)
    table = table.view(-1, *table.shape[-2:]).int()
    assert torch.equal(refs.table, table)  # the public table has every row
    assert refs.num_frames == table.shape[1]
    assert torch.equal(refs.rows, table[:, :1] if equal else table)
    assert refs.rows.is_contiguous()


# --- the inverse ------------------------------------------------------------------------------------------------------

tables = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 6), st.integers(1, 8)).flatmap(
    lambda size: st.tuples(
        st.just(size[3]),
        st.lists(
            st.lists(
                st.lists(st.integers(-1, size[3] - 1), min_size=size[2], max_size=size[2]),
                min_size=size[1],
                max_size=size[1],
            ),
            min_size=size[0],
            max_size=size[0],
        ),
    )
)  # (Tk, (B, T, R) entries)


def check_inverse(inverse, table, key_frames):
    """``inverse`` against the definition in kernels/inverse.py, for a (B, G, R) table in lists."""
    assert inverse.dtype == torch.int32 and inverse.is_contiguous() and inverse.shape[0] == len(table)
    for one, rows in zip(inverse.tolist(), table, strict=True):
        readers = [[g for g, row in enumerate(rows) for entry in row if entry == j] for j in range(key_frames)]
        lengths = [len(r) for r in readers]
        offsets, order, listed = (
            one[: key_frames + 1],
            one[key_frames + 1 : 2 * key_frames + 1],
            one[2 * key_frames + 1 :],
        )
        assert offsets == [sum(lengths[:j]) for j in range(key_frames + 1)]
        assert [listed[offsets[j] : offsets[j + 1]] for j in range(key_frames)] == readers  # ascending, with duplicates
        assert order == sorted(range(key_frames), key=lambda j: -lengths[j])  # longest first, ties in order
        assert len(listed) == sum(map(len, rows))


@given(tables)
def test_inverse_of_any_table(case):
    key_frames, entries = case
    table = torch.tensor(entries, dtype=torch.int64).view(len(entries), len(entries[0]), -1)
    refs = ReferenceFrames.from_table(table, key_frames)
    check_inverse(refs.inverse, refs.rows.tolist(), key_frames)
    check_inverse(inverse_table(table.int(), key_frames), entries, key_frames)


@given(sizes)
def test_inverse_of_pyramid(size):
    refs = ReferenceFrames.pyramid(*size)
    check_inverse(refs.inverse, refs.rows.tolist(), size[0])


def test_inverse_skips_what_lies_outside():
    """As a raw table on a card may hold."""
    table = [[[5, 0], [-7, 2]], [[2, 2], [3, 2**31 - 1]]]
    inverse = inverse_table(torch.tensor(table, dtype=torch.int32), 3)
    check_inverse(inverse, table, 3)


# --- as an object -----------------------------------------------------------------------------------------------------


def test_immutable():
    refs = ReferenceFrames.pyramid(4, 2)
    for field in ("table", "num_key_frames", "padded", "rows", "inverse", "anything"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            setattr(refs, field, None)
    for field in ("num_frames", "num_refs", "device"):
        with pytest.raises(AttributeError):
            setattr(refs, field, 3)


def test_says_what_it_is():
    text = repr(ReferenceFrames.pyramid(3, 2))
    assert "ReferenceFrames" in text and "num_key_frames=3" in text and "inverse" not in text


def same(a, b):
    return (
        (a.num_key_frames, a.padded) == (b.num_key_frames, b.padded)
        and torch.equal(a.table, b.table)
        and torch.equal(a.rows, b.rows)
        and torch.equal(a.inverse, b.inverse)
    )


@pytest.mark.parametrize(
    "make",
    [copy.copy, copy.deepcopy, lambda refs: pickle.loads(pickle.dumps(refs))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("refs", [ReferenceFrames.window(5, 1), ReferenceFrames.all(3)], ids=["window", "all"])
def test_copies(refs, make):
    refs.to("meta")
    again = make(refs)
    assert again is not refs and same(again, refs)
    assert not again._copies  # else what was used on a GPU could not be read where there is none


def test_to():
    refs = ReferenceFrames.window(5, 1)
    assert refs.to("cpu") is refs and refs.to(refs.device) is refs
    moved = refs.to("meta")
    assert moved is refs.to(torch.device("meta")) and moved.to("meta") is moved  # one transfer
    assert {x.device.type for x in (moved.table, moved.rows, moved.inverse)} == {"meta"} == {moved.device.type}
    assert (moved.num_frames, moved.num_refs, moved.num_key_frames, moved.padded) == (5, 3, 5, True)
    assert refs.device.type == "cpu"


def test_to_while_pytorch_traces():
    """What stands in for a table then is not kept for later calls."""
    refs = ReferenceFrames.window(5, 1)

    class Module(torch.nn.Module):
        def forward(self, x):
            return x + refs.to(x.device).table.sum()

    torch.export.export(Module(), (torch.zeros(2, device="meta"),), strict=False)
    assert type(refs.to("meta").table) is torch.Tensor


def test_to_while_pytorch_compiles():
    """In one graph, also where the table is not yet on the tensors' device."""
    refs = ReferenceFrames.window(3, 1)
    call = torch.compile(lambda q: pyramid_st_attn(q, q, q, refs), fullgraph=True, backend="eager")
    assert call(torch.zeros(1, 3, 4, 2, 8, device="meta")).shape == (1, 3, 4, 2, 8)


def test_made_in_inference_mode():
    """Tables made or moved while sampling serve a training step."""
    with torch.inference_mode():
        refs = [ReferenceFrames.window(3, 1), ReferenceFrames.from_table(torch.tensor([[0], [1], [2]]), 3)]
        moved = [one.to("meta") for one in refs]
    for one in (*refs, *moved):
        assert not any(x.is_inference() for x in (one.table, one.rows, one.inverse))
    q, k, v = torch.randn(3, 1, 3, 2, 1, 4, requires_grad=True)
    pyramid_st_attn(q, k, v, refs[1]).sum().backward()


@pytest.mark.gpu
def test_to_a_card():
    refs = ReferenceFrames.window(5, 1)
    moved = refs.to("cuda")
    assert moved is refs.to("cuda") is refs.to(f"cuda:{torch.cuda.current_device()}")
    assert moved.table.is_cuda and moved.rows.is_cuda and moved.inverse.is_cuda
    assert same(moved.to("cpu"), refs)
    made_there = ReferenceFrames.from_table(refs.table.cuda(), 5)
    assert made_there.device.type == "cuda" and same(made_there.to("cpu"), refs)
    check_inverse(inverse_table(refs.table.cuda(), 5).cpu(), refs.table.tolist(), 5)


@pytest.mark.gpu
def test_to_a_card_from_threads():
    refs, moved = ReferenceFrames.pyramid(8, 3), []
    threads = [threading.Thread(target=lambda: moved.append(refs.to("cuda"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(moved) == 8 and all(same(one.to("cpu"), refs) for one in moved)
