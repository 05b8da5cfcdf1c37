"""``Tuned``: measured once for a key, remembered between processes, never measured in a capture. Without a GPU."""

import json
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from univid.kernels.triton import launch  # noqa: E402
from univid.kernels.triton.launch import Config, Tuned  # noqa: E402

SMALL, LARGE = Config({"BLOCK": 16}, num_warps=2, num_stages=1), Config({"BLOCK": 64})
KEY = {"dtype": "bf16", "D": 64}


class Kernel:
    """Stands for a jitted kernel: notes its launches."""

    __name__ = "_forward"

    def __init__(self, cache_key="source"):
        self.cache_key = cache_key
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options))


class Card:
    """Stands for a GPU: what each configuration takes, and what has been measured."""

    def __init__(self):
        self.name = "Card 9000"
        self.capturing = False
        self.times = {16: 2.0, 64: 1.0}  # by BLOCK; the second is the fastest
        self.measured = []

    def do_bench(self, run, **_):
        kernel = self.kernel
        run()
        block = kernel.launches.pop()[2]["BLOCK"]
        self.measured.append(block)
        time.sleep(0.01)  # other threads come in
        if self.times[block] is None:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return self.times[block]


@pytest.fixture
def card(monkeypatch, tmp_path):
    card = Card()
    monkeypatch.setenv("UNIVID_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_cache_folder", lambda: str(tmp_path))
    monkeypatch.setattr(triton.testing, "do_bench", card.do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(get_device_name=lambda _: card.name))
    return card


def tuned(card, kernel=None, configs=(SMALL, LARGE)):
    card.kernel = kernel or Kernel()
    return Tuned(card.kernel, lambda key: list(configs))


def call(one, key=KEY, device="meta", **constants):
    """One launch; the BLOCK it ran with. The meta device stands for a card."""
    before = len(one.kernel.launches)
    one(lambda meta: (meta["BLOCK"], 1, 1), torch.empty(4, device=device), 3, key=key, **constants)
    (launched,) = one.kernel.launches[before:]
    return launched[2]["BLOCK"]


def test_a_launch(card):
    one = tuned(card, configs=[SMALL])
    x = torch.empty(4, device="meta")
    one(lambda meta: (meta["BLOCK"] * meta["HEAD_DIM"],), None, x, 7, key={}, HEAD_DIM=40)
    ((grid, args, options),) = one.kernel.launches
    assert grid == (640,) and args == (None, x, 7)
    assert options == {"HEAD_DIM": 40, "BLOCK": 16, "num_warps": 2, "num_stages": 1}
    assert card.measured == []  # there is nothing to choose


# --- winners that come with the package -----------------------------------------------------------------------------


@pytest.fixture
def shipped(monkeypatch):
    """Says what comes with the package for the one kernel there is."""

    def ship(winners):
        monkeypatch.setattr(Tuned, "_shipped", lambda self, device: winners)

    return ship


def test_a_shipped_winner_is_not_measured(card, shipped):
    shipped({"dtype=bf16 D=64": SMALL.name})  # the slower one, so that it cannot have been measured
    one = tuned(card)
    assert call(one) == 16 and card.measured == []
    card.capturing = True
    assert call(one, key=KEY | {"D": 128}) == 16  # of another key there is none: the default
    card.capturing = False
    assert call(one, key=KEY | {"D": 128}) == 64 and card.measured == [16, 64]


def test_what_was_measured_here_comes_before_what_is_shipped(card, shipped):
    assert call(tuned(card)) == 64
    shipped({"dtype=bf16 D=64": SMALL.name})
    assert call(tuned(card)) == 64


def test_a_shipped_winner_that_is_no_configuration_any_more(card, shipped):
    shipped({"dtype=bf16 D=64": "BLOCK=7 num_warps=4 num_stages=2"})
    assert call(tuned(card)) == 64


def test_shipped_winners_are_of_the_kernels_as_they_are(monkeypatch):
    """By architecture, kernel and source; their configurations are not looked at here, since these follow from keys."""
    from benchmarks.winners import all_tuned

    kernels = {one.name: one for one in all_tuned()}
    assert len(kernels) == len(list(all_tuned()))  # a name is of one kernel
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    device = torch.device("cuda", 0)
    found = {name: one._shipped(device) for name, one in kernels.items()}
    assert sum(map(bool, found.values())) > 10
    of_table = launch.shipped()["sm_90"]["kernels"]
    stale = [name for name, entry in of_table.items() if name not in kernels or entry["source"] != kernels[name].source]
    assert not stale, "their kernels have changed: take them out of winners.json, or run python -m benchmarks.winners"
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_100")
    assert not any(one._shipped(device) for one in kernels.values())


def test_winners_are_collected(monkeypatch, tmp_path):
    """What was measured here joins what was shipped, but for kernels that have changed; it is what is then found."""
    from benchmarks import winners

    kernels = {one.name: one for one in winners.all_tuned()}
    kept, changed, fresh = (kernels[name] for name in ("geglu.forward", "concat.copy", "add_bias.add_bias"))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(get_device_name=lambda _: "Card 9000"))
    monkeypatch.setattr(launch, "_cache_folder", lambda: str(tmp_path))
    for one, winner in ((kept, "new"), (fresh, "only")):
        launch._write(one._path(device), {"b": winner})
    before = {
        kept.name: {"source": kept.source, "winners": {"a": "old", "b": "old"}},
        changed.name: {"source": "of another text", "winners": {"a": "old"}},
        "gone.forward": {"source": "", "winners": {"a": "old"}},
    }
    found = winners.collected(device, {"kernels": before})
    assert found["gpu"] == "Card 9000"
    assert {name: entry["winners"] for name, entry in found["kernels"].items()} == {
        kept.name: {"a": "old", "b": "new"},
        fresh.name: {"b": "only"},
    }
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "shipped", lambda: {"sm_90": found})
    assert fresh._shipped(device) == {"b": "only"} and changed._shipped(device) == {}


def test_source_is_of_what_a_kernel_calls_too():
    """Two kernels of the same text, of which one calls another function of the same name."""
    digests = []
    for value in (1, 2):
        space = {"__name__": "univid.kernels.triton.some", "triton": triton}
        helper = triton.jit(_written(f"def helper(x):\n    return x + {value}\n", space))
        kernel = triton.jit(_written("def kernel(x):\n    helper(x)\n", space | {"helper": helper}))
        digests.append(Tuned(kernel, lambda key: [SMALL]).source)
    assert digests[0] != digests[1]


def _written(text, space):
    """A function of a text, whose source can be looked up as that of one in a file."""
    import linecache

    file = f"<{hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"), space)
    return space[text[4 : text.index("(")]]


# --- launched again ---------------------------------------------------------------------------------------------------


class Compiled:
    """Stands for a compiled kernel, which is launched by its arguments in order."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Jitted(Kernel):
    """Stands for a jitted kernel that says what it has compiled."""

    params = tuple(SimpleNamespace(name=n, default=None) for n in ("x", "size", "HEAD_DIM", "BLOCK", "num_warps"))

    def __getitem__(self, grid):
        def run(*args, **options):
            self.launches.append((grid, args, options))
            self.compiled = Compiled()
            return self.compiled

        return run


@pytest.fixture
def jitted(card, monkeypatch):
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    return tuned(card, Jitted(), configs=[SMALL])


def test_launched_again(jitted):
    """Triton is not asked again what it has compiled; the grid follows the call."""
    x = torch.empty(4, device="meta")
    for programs in (5, 6):
        jitted(lambda meta, p=programs: (p * meta["BLOCK"],), x, 7, key=KEY, HEAD_DIM=40)
    assert len(jitted.kernel.launches) == 1
    assert jitted.kernel.compiled.launches == [((96, 1, 1), (x, 7, 40, 16, 2))]


@pytest.mark.parametrize(
    "other",
    [
        (torch.empty(4, device="meta", dtype=torch.float16), 7, 40),
        (None, 7, 40),
        (torch.empty(4, device="meta"), 8, 40),
        (torch.empty(4, device="meta"), 7.0, 40),
        (torch.empty(4, device="meta"), (7,), 40),
        (torch.empty(4, device="meta"), 7, 48),
    ],
    ids=["dtype", "none", "integer", "float", "tuple", "constant"],
)
def test_asked_again_for_another(jitted, other):
    like = torch.empty(4, device="meta")  # says the device
    for x, size, dim in ((torch.empty(4, device="meta"), 7, 40), other):
        jitted(lambda _: (1,), x, size, like, key=KEY, HEAD_DIM=dim)
    assert len(jitted.kernel.launches) == 2


def test_a_float_is_no_constant(jitted):
    x = torch.empty(4, device="meta")
    for scale in (0.5, 0.25):
        jitted(lambda _: (1,), x, scale, key=KEY, HEAD_DIM=40)
    assert len(jitted.kernel.launches) == 1
    assert jitted.kernel.compiled.launches[0][1][1] == 0.25


def test_alignment_is_part_of_what_is_compiled():
    room = torch.empty(64, dtype=torch.uint8)
    begin = -room.data_ptr() % 16
    aligned, odd = launch._specialization(room[begin:]), launch._specialization(room[begin + 1 :])
    assert aligned == launch._specialization(room[begin + 16 :]) != odd


# --- the default ------------------------------------------------------------------------------------------------------


def test_not_measured_where_autotuning_is_off(card, monkeypatch):
    monkeypatch.setenv("UNIVID_AUTOTUNE", "0")
    one = tuned(card)
    assert call(one) == call(one) == 16 and card.measured == []
    monkeypatch.delenv("UNIVID_AUTOTUNE")
    assert call(one) == 64  # nothing was remembered of that


def test_off_means_off_where_it_was_measured(card, monkeypatch):
    one = tuned(card)
    assert call(one) == 64
    monkeypatch.setenv("UNIVID_AUTOTUNE", "0")
    assert call(one) == 16


def test_not_measured_where_pytorch_is_deterministic(card):
    """A winner may differ from process to process, and so may the last bits."""
    one = tuned(card)
    torch.use_deterministic_algorithms(True)
    try:
        assert call(one) == 16 and card.measured == []
    finally:
        torch.use_deterministic_algorithms(False)
    assert call(one) == 64


def test_not_measured_in_the_interpreter(card):
    assert call(tuned(card), device="cpu") == 16 and card.measured == []


# --- measuring --------------------------------------------------------------------------------------------------------


def test_measured_once_for_a_key(card):
    one = tuned(card)
    assert [call(one) for _ in range(3)] == [64, 64, 64]
    assert card.measured == [16, 64]
    assert call(one, HEAD_DIM=40) == 64 and card.measured == [16, 64]  # of a key, not of every constant
    card.times[64] = 3.0
    assert call(one, key=KEY | {"D": 128}) == 16 and card.measured == [16, 64, 16, 64]
    assert call(one) == 64


def test_configurations_may_depend_on_the_key(card):
    card.kernel = Kernel()
    one = Tuned(card.kernel, lambda key: [LARGE] if key["D"] == 64 else [SMALL, LARGE])
    assert call(one) == 64 and card.measured == []
    card.times[16] = 0.5
    assert call(one, key=KEY | {"D": 32}) == 16 and card.measured == [16, 64]


def test_a_configuration_too_large_for_the_card(card):
    card.times[64] = None
    assert call(tuned(card)) == 16 and card.measured == [16, 64]


def test_no_configuration_fits_the_card(card):
    """The default is launched, and says itself what is wrong."""
    card.times = {16: None, 64: None}
    assert call(tuned(card)) == 16


def test_another_error_is_not_swallowed(card, monkeypatch):
    def fail(run, **_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(triton.testing, "do_bench", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(tuned(card))


# --- remembering ------------------------------------------------------------------------------------------------------


def test_remembered_between_processes(card, tmp_path):
    assert call(tuned(card)) == 64
    (path,) = (tmp_path / "univid").iterdir()  # and no temporary file
    assert path.suffix == ".json" and path.name.startswith("forward-")
    assert json.loads(path.read_text()) == {"dtype=bf16 D=64": LARGE.name}
    card.measured.clear()
    card.times = {16: 1.0, 64: 2.0}
    assert call(tuned(card)) == 64 and card.measured == []  # as a new process would


def test_remembers_every_key(card):
    one = tuned(card)
    keys = [{"D": d} for d in (16, 32, 64)]
    for i, key in enumerate(keys):
        card.times[16] = 2.0 * (i % 2)
        call(one, key=key)
    card.measured.clear()
    again = tuned(card)
    assert [call(again, key=key) for key in keys] == [16, 64, 16] and card.measured == []


@pytest.mark.parametrize("change", ["source", "card", "compiler"])
def test_measured_anew_for_another(change, card, monkeypatch):
    call(tuned(card))
    card.measured.clear()
    if change == "card":
        card.name = "Card 9001"
    if change == "compiler":
        monkeypatch.setattr(triton, "__version__", "99.0")
    call(tuned(card, Kernel("other source" if change == "source" else "source")))
    assert card.measured == [16, 64]


def test_measured_anew_when_the_winner_is_gone(card):
    call(tuned(card))
    card.measured.clear()
    assert call(tuned(card, configs=[SMALL, Config({"BLOCK": 64}, num_warps=8)])) == 64
    assert card.measured == [16, 64]


DAMAGED = {
    "empty": b"",
    "half": b'{"dtype=bf16 D=64": "BLO',
    "binary": b"\xff\xfe\x00\x01",
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"3",
    "no name": b'{"dtype=bf16 D=64": 3}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file(damage, card, tmp_path):
    """It costs a measurement, and is made good."""
    call(tuned(card))
    (path,) = (tmp_path / "univid").iterdir()
    path.write_bytes(DAMAGED[damage])
    card.measured.clear()
    assert call(tuned(card)) == 64 and card.measured == [16, 64]
    assert json.loads(path.read_text())["dtype=bf16 D=64"] == LARGE.name
    card.measured.clear()
    assert call(tuned(card)) == 64 and card.measured == []


def test_folder_that_cannot_be_written(card, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(launch, "_cache_folder", lambda: str(tmp_path / "file"))
    one = tuned(card)
    assert call(one) == call(one) == 64 and card.measured == [16, 64]


# --- captures ---------------------------------------------------------------------------------------------------------


def test_not_measured_in_a_capture(card):
    one = tuned(card)
    card.capturing = True
    assert call(one) == call(one) == 16 and card.measured == []
    card.capturing = False
    assert call(one) == 64 and card.measured == [16, 64]  # afterwards it is
    card.capturing = True
    assert call(one) == 64


def test_a_capture_uses_what_is_remembered(card):
    call(tuned(card))
    card.measured.clear()
    card.capturing = True
    assert call(tuned(card)) == 64 and card.measured == []


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_measure_once(card):
    """All wait for the one that measures; every one launches the winner."""
    one = tuned(card)
    start, blocks = threading.Barrier(8), []

    def work():
        start.wait()
        config = one._choose(torch.device("meta"), KEY, lambda config: one._run(config, lambda _: (1,), (), {}))
        blocks.append(config.constants["BLOCK"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert blocks == [64] * 8 and card.measured == [16, 64]


def test_processes_do_not_read_half_a_file(card, tmp_path):
    """A reader sees the old winners or the new ones."""
    path = tmp_path / "winners.json"
    winners = [{str(i): "x" * 1000 for i in range(n)} for n in (50, 100)]
    launch._write(path, winners[0])
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(len(launch._read(path)))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        launch._write(path, winners[i % 2])
    stop.set()
    reader.join()
    assert seen and set(seen) <= {50, 100}
    assert os.listdir(tmp_path) == ["winners.json"]


# --- what runs at all -------------------------------------------------------------------------------------------------


def test_unsupported():
    x = torch.empty(2, dtype=torch.bfloat16)
    assert launch.unsupported(None, x) == "tensors on cpu: a GPU needed"
    assert "float64" in launch.unsupported(x.double())
    assert launch.unsupported(None) is None


def test_the_interpreter_takes_the_host(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert launch.unsupported(torch.empty(2)) is None
    assert "float64" in launch.unsupported(torch.empty(2, dtype=torch.float64))
    assert "bfloat16" in launch.unsupported(torch.empty(2, dtype=torch.bfloat16))


def test_names():
    """By them winners are remembered: each part counts."""
    config = Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=3)
    assert config.name == "BLOCK_M=64 BLOCK_N=32 num_warps=8 num_stages=3"


@pytest.mark.gpu
def test_on_a_card(monkeypatch, tmp_path):
    """A real kernel, measured by the real clock, once."""
    monkeypatch.setenv("UNIVID_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_cache_folder", lambda: str(tmp_path))
    measured, do_bench = [], triton.testing.do_bench
    monkeypatch.setattr(triton.testing, "do_bench", lambda *a, **k: measured.append(1) or do_bench(*a, **k))
    x, out = torch.randn(1000, device="cuda"), torch.empty(1000, device="cuda")
    for _ in range(2):
        one = Tuned(_double, lambda key: [SMALL, LARGE])
        for _ in range(2):
            one(lambda meta: (triton.cdiv(1000, meta["BLOCK"]),), x, out, 1000, key=KEY)
            torch.testing.assert_close(out, 2 * x)
            out.zero_()
    assert len(measured) == 2  # its configurations, in the first call
    graph = torch.cuda.CUDAGraph()
    fresh = Tuned(_double, lambda key: [SMALL, LARGE])
    with torch.cuda.graph(graph):
        fresh(lambda meta: (triton.cdiv(1000, meta["BLOCK"]),), x, out, 1000, key=KEY | {"D": 8})
    graph.replay()
    torch.testing.assert_close(out, 2 * x)
    assert len(measured) == 2


@triton.jit
def _double(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < size), mask=at < size)
