"""What is kept of a CUDA graph, and the host's pace: by fakes without a GPU, and on one."""

from types import SimpleNamespace

import pytest
import torch

from univid.graphs import Graphed, Pace, cloned, graph_key, leaves, signature
from univid.ops import ReferenceFrames


def held(text=(2, 7), weight=1.0, weights=None, dtype=torch.float32):
    keys = [(torch.randn(text, dtype=dtype), torch.randn(text, dtype=dtype))]
    return [(2, (keys, None), {"text_weight": {1: weight, 2: weights}, "fps": 8.0})]


def test_a_signature_is_all_but_the_numbers_in_tensors():
    assert signature(held()) == signature(held())
    assert signature(held(weights=torch.zeros(1, 3))) == signature(held(weights=torch.ones(1, 3)))
    others = [
        *(held(text=(2, 8)), held(weight=0.5), held(dtype=torch.bfloat16)),
        *(held(weights=torch.zeros(1, 3)), held(weights=0.5), held() * 2),
    ]
    assert all(signature(other) != signature(held()) for other in others)


def test_what_a_graph_depends_on(monkeypatch):
    layer, x = torch.nn.Linear(3, 3), torch.zeros(3)
    key = graph_key(layer, x, held())
    with torch.no_grad():
        layer.weight.zero_()  # replays read it
    assert graph_key(layer, x + 1, held()) == key
    assert graph_key(torch.nn.Linear(3, 3), x, held()) != key
    assert graph_key(layer, x.double(), held()) != key
    monkeypatch.setenv("UNIVID_BACKEND", "torch")
    assert graph_key(layer, x, held()) != key
    monkeypatch.delenv("UNIVID_BACKEND")
    assert graph_key(layer.eval(), x, held()) != key
    layer.train()
    with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
        assert graph_key(layer, x, held()) != key
    assert graph_key(layer, x, held()) == key
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "highest" else "highest")
    key = key, graph_key(layer, x, held())
    torch.set_float32_matmul_precision(precision)
    assert key[0] != key[1]
    key = graph_key(layer, x, held())
    layer.weight = torch.nn.Parameter(torch.zeros(3, 3))
    assert graph_key(layer, x, held()) != key


def test_reference_frames_are_shared_by_samplers_and_a_training_steps_own():
    """A sampler's table may be the U-Net's, which others read; another one is another graph's."""
    first, second = (ReferenceFrames.from_table(torch.tensor([pair] * 4), 4) for pair in ([0, 1], [2, 3]))
    layer = torch.nn.Linear(3, 3)
    assert graph_key(layer, {2: first}) == graph_key(layer, {2: first}) != graph_key(layer, {2: second})
    table = first.table.clone()
    Graphed(lambda held: [], {2: first}).load({2: second})
    assert torch.equal(first.table, table)
    own = cloned({2: first})
    assert signature(own) == signature({2: first}) == signature({2: second})
    assert [x for x in leaves(own) if not isinstance(x, torch.Tensor)] == [2, first.num_key_frames, first.padded]
    assert torch.equal(own[2].table, table) and own[2].table is not first.table


def test_what_is_held_is_replaced_in_place():
    first, second = held(), held()
    graphed = Graphed(lambda x, held: [x + held[0][1][0][0][1]], first)
    own = first[0][1][0][0][1]
    graphed.load(second)
    assert torch.equal(own, second[0][1][0][0][1]) and own is not second[0][1][0][0][1]
    x = torch.randn(2, 7)
    assert torch.equal(graphed(x)[0], x + own)


def test_the_host_is_one_step_ahead(monkeypatch):
    log = []

    class Event:
        def __init__(self, blocking):
            self.step = sum(what == "made" for what, _ in log)
            log.append(("made", self.step))

        def record(self, stream):
            log.append(("record", self.step))

        def synchronize(self):
            log.append(("wait", self.step))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    pace = Pace(SimpleNamespace(type="cuda"))
    for _ in range(3):
        pace.step()
    assert [entry for entry in log if entry[0] != "made"] == [
        *(("record", 0), ("record", 1), ("wait", 0), ("record", 2), ("wait", 1)),
    ]
    log.clear()
    Pace(torch.device("cpu")).step()
    assert not log


@pytest.mark.gpu
def test_replays_see_what_is_held():
    first, second = (torch.randn(64, device="cuda") for _ in range(2))
    graphed = Graphed(lambda x, held: [x * held["scale"]], {"scale": first.clone()})
    for scale in (first, first, first, second, second):
        graphed.load({"scale": scale})
        x = torch.randn(64, device="cuda")
        assert torch.equal(graphed(x)[0], x * scale)
    assert graphed.graph is not None
