"""Which backend runs: by default, by argument, by UNIVID_BACKEND, without Triton; and what ``explain`` says of it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.calls import one_tensor
from univid import ops
from univid.kernels import measured
from univid.kernels.calls import TemporalCall
from univid.ops import BACKENDS, ReferenceFrames, dispatch, eager, explain
from univid.ops.explain import _OPERATORS, backends_for, directions_of

B, T, N, H, D, LENGTH, C = 2, 4, 3, 2, 8, 5, 6


def calls():
    """The arguments of every operator."""
    q, k, v = torch.randn(3, B, T, N, H, D)
    keys = torch.randn(4, B, LENGTH, H, D)
    refs = ReferenceFrames.pyramid(T, 2)
    return {
        "pyramid_st_attn": (q, k, v, refs),
        "pyramid_st_attn_qkv": (torch.stack([q, k, v], 3), refs),
        "dual_stream_attn": (q, *keys),
        "temporal_attn": (q, k, v),
        "temporal_attn_qkv": (torch.stack([q, k, v], 3),),
        "temporal_conv": (torch.randn(B, T, N, C), torch.randn(C, C, 3)),
        "group_norm_silu": (torch.randn(B, N, C), 3, torch.randn(C), torch.randn(C), 1e-5),
        "concat": (torch.randn(B, T, N, C), torch.randn(B, T, N, C)),
        "add_bias": (torch.randn(B, T, N, C), torch.randn(C)),
        "geglu": (torch.randn(B, T, N, C),),
        "linear_geglu": (torch.randn(B, T, N, C), torch.randn(2 * C, C)),
        "add_layer_norm": (torch.randn(B, T, N, C), torch.randn(C), torch.randn(C)),
    }


every_operator = pytest.mark.parametrize("operator", list(calls()))


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by "<backend> <direction>" whenever PyTorch's backends run."""
    log = []

    def spy(run, name):
        return lambda *args: (log.append(name), run(*args))[1]

    for backend, operators in eager.BACKENDS.items():
        for one in operators.values():
            for direction in ("forward", "backward"):
                monkeypatch.setattr(one, direction, spy(getattr(one, direction), f"{backend} {direction}"))
    return log


def run(operator, **kwargs):
    """Forward and backward."""
    args = calls()[operator]
    args = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
    one_tensor(getattr(ops, operator)(*args, **kwargs)).sum().backward()


# --- explain ----------------------------------------------------------------------------------------------------------


@every_operator
def test_explain(operator, capsys):
    args = calls()[operator]
    assert explain(operator, *args) is None
    lines = capsys.readouterr().out.splitlines()
    directions, rows_of_one = directions_of(operator), 1 + len(BACKENDS)
    assert len(lines) == len(directions) * rows_of_one
    for i, direction in enumerate(directions):
        title, *rows = lines[i * rows_of_one : (i + 1) * rows_of_one]
        assert title == f"{operator} {direction}: torch"
        assert [row.split()[0] for row in rows] == list(BACKENDS)  # the fastest first
        cuda, triton, torch_, reference = (row[2:].split(maxsplit=1)[1] for row in rows)
        assert (torch_, reference) == ("runs", "can")
        for row, backend in ((cuda, "cuda"), (triton, "triton")):
            refusals = backends_for(operator, *args, direction=direction)[1]
            assert row == refusals[backend] and row not in ("runs", "can") and "\n" not in row


@every_operator
def test_what_explain_says_runs(operator, runs):
    args = calls()[operator]
    chosen = [backends_for(operator, *args, direction=direction)[0] for direction in ("forward", "backward")]
    run(operator)
    assert runs == [f"{chosen[0]} forward", f"{chosen[1]} backward"] == ["torch forward", "torch backward"]


@every_operator
def test_explain_takes_a_backend(operator, capsys, monkeypatch):
    args, last = calls()[operator], directions_of(operator)[-1]
    explain(operator, *args, backend="reference")
    out = capsys.readouterr().out
    assert f"{operator} forward: reference\n" in out and "torch      can\n" in out and "reference  runs\n" in out
    explain(operator, *args, backend="triton")
    assert f"{operator} forward: the backend asked for cannot run it\n" in capsys.readouterr().out
    monkeypatch.setenv("UNIVID_BACKEND", "reference")
    explain(operator, *args)
    assert f"{operator} {last}: reference\n" in capsys.readouterr().out
    explain(operator, *args, backend="torch")
    assert f"{operator} {last}: torch\n" in capsys.readouterr().out


def test_explain_checks_as_the_operator_does():
    with pytest.raises(ValueError, match=r"^operator: got 'attention', needs one of 'pyramid_st_attn', "):
        explain("attention")
    q, k, v, refs = calls()["pyramid_st_attn"]
    with pytest.raises(ValueError, match=r"^scale: got -1\.0, needs"):
        explain("pyramid_st_attn", q, k, v, refs, scale=-1.0)
    with pytest.raises(ValueError, match=r"^backend: got 'best', needs"):
        explain("pyramid_st_attn", q, k, v, refs, backend="best")
    with pytest.raises(ValueError, match=r"^v: got shape"):
        explain("pyramid_st_attn", q, k, v[:, :1], refs)


def test_explain_names_every_operator():
    public = [name for name in ops.__all__ if name not in ("BACKENDS", "ReferenceFrames", "explain")]
    assert sorted(public) == sorted(calls())
    for operator in public:
        assert hasattr(torch.ops.univid, operator)


# --- the choice -------------------------------------------------------------------------------------------------------


def backend_of(name, log, *, refusal=None, backward=True):
    """A backend that notes what is run."""
    one = SimpleNamespace(unsupported=lambda call: refusal, forward=lambda call: log.append(f"{name} forward"))
    if backward:
        one.backward = lambda call: log.append(f"{name} backward")
    return one


@pytest.fixture
def backends(monkeypatch):
    """{name: backend or reason}, which a test fills, in place of the real ones."""
    held = {name: f"no {name} here" for name in BACKENDS}
    monkeypatch.setattr(dispatch, "_load", lambda backend, operator: held[backend])
    return held


def call():
    q, k, v = torch.randn(3, B, T, N, H, D)
    return TemporalCall(q, k, v, 1.0)


def test_the_fastest_that_can(backends):
    log = []
    backends["torch"] = backend_of("torch", log)
    backends["triton"] = backend_of("triton", log, refusal="too small a card")
    assert dispatch.choose("temporal", call(), None) is backends["torch"]
    backends["cuda"] = backend_of("cuda", log, backward=False)
    assert dispatch.choose("temporal", call(), None) is backends["cuda"]
    assert dispatch.choose("temporal", call(), None, "backward") is backends["torch"]
    assert dispatch.candidates("temporal", call()) == {
        "cuda": None,
        "triton": "too small a card",
        "torch": None,
        "reference": "no reference here",
    }
    backward = dispatch.candidates("temporal", call(), "backward")
    assert backward["cuda"] == "this operator has no cuda backward yet" and backward["torch"] is None
    assert list(backward) == list(BACKENDS)
    assert dispatch.preferred(backward, None) == "torch"
    assert dispatch.preferred(backward, "cuda") is None
    assert log == []


@pytest.mark.parametrize("by_environment", [False, True])
def test_asked_for_by_name_nothing_falls_back(backends, by_environment, monkeypatch):
    log = []
    backends["torch"] = backend_of("torch", log)
    backends["triton"] = backend_of("triton", log, refusal="too small a card")
    backends["cuda"] = backend_of("cuda", log, backward=False)

    def choose(backend, direction):
        if by_environment:
            monkeypatch.setenv("UNIVID_BACKEND", backend)
        return dispatch.choose("temporal", call(), None if by_environment else backend, direction)

    with pytest.raises(RuntimeError, match=r"^backend: 'triton' cannot run this temporal forward: too small a card$"):
        choose("triton", "forward")
    with pytest.raises(RuntimeError, match=r"^backend: 'cuda' cannot run this temporal backward: this operator has no"):
        choose("cuda", "backward")
    with pytest.raises(
        RuntimeError, match=r"^backend: 'reference' cannot run this temporal forward: no reference here$"
    ):
        choose("reference", "forward")
    assert choose("cuda", "forward") is backends["cuda"]


@every_operator
def test_the_environment_counts_at_the_forward(operator, runs, monkeypatch):
    """The backward runs where its forward did: the logsumexp of the torch backend, for one, is nothing to a kernel."""
    args = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in calls()[operator]]
    monkeypatch.setenv("UNIVID_BACKEND", "reference")
    out = one_tensor(getattr(ops, operator)(*args))
    monkeypatch.delenv("UNIVID_BACKEND")
    out.sum().backward()
    assert runs == ["reference forward", "reference backward"]


# --- the choice by measurement ----------------------------------------------------------------------------------------


@pytest.fixture
def measurements(monkeypatch):
    """{(architecture, operator, direction): {class of shapes: backend}}, which a test fills, on a card of its own."""
    held = {}
    monkeypatch.setattr(measured, "choices", lambda *key: held.get(key, {}))
    monkeypatch.setattr(measured, "architecture", lambda device: device)
    return held


def call_on(card, frames=24, element_size=2):
    """What dispatch sees of a call on a GPU."""
    q = SimpleNamespace(
        is_cuda=card is not None, element_size=lambda: element_size, device=card, shape=(2, frames, 3, 1, 64)
    )
    return TemporalCall(q, q, q, 1.0)


def test_what_was_measured_to_be_faster_runs_first(backends, measurements):
    for name in BACKENDS:
        backends[name] = backend_of(name, [])
    measurements["sm_90", "temporal", "forward"] = {"frames <= 32": "torch"}
    assert dispatch.choose("temporal", call_on("sm_90"), None) is backends["torch"]
    # In the other direction, at other sizes, in another dtype and on another card nothing was measured.
    assert dispatch.choose("temporal", call_on("sm_90"), None, "backward") is backends["cuda"]
    assert dispatch.choose("temporal", call_on("sm_90", frames=33), None) is backends["cuda"]
    assert dispatch.choose("temporal", call_on("sm_90", element_size=4), None) is backends["cuda"]
    assert dispatch.choose("temporal", call_on("sm_80"), None) is backends["cuda"]
    assert dispatch.choose("temporal", call_on(None), None) is backends["cuda"]
    # Asked for by name, or unable to run it, it is as if nothing was.
    assert dispatch.choose("temporal", call_on("sm_90"), "triton") is backends["triton"]
    backends["torch"] = backend_of("torch", [], refusal="no")
    assert dispatch.choose("temporal", call_on("sm_90"), None) is backends["cuda"]


def test_environment_outweighs_measurements(backends, measurements, monkeypatch):
    for name in BACKENDS:
        backends[name] = backend_of(name, [])
    measurements["sm_90", "temporal", "forward"] = {"frames <= 32": "torch"}
    monkeypatch.setenv("UNIVID_BACKEND", "reference")
    assert dispatch.choose("temporal", call_on("sm_90"), None) is backends["reference"]


@every_operator
def test_explain_says_what_was_measured(operator, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "measured_fastest", lambda *args: "reference")
    args = calls()[operator]
    explain(operator, *args)
    out = capsys.readouterr().out
    assert out.count(f"{operator} forward: reference\n") == 1
    assert out.count("  reference  runs, measured to be the fastest at such sizes\n") == len(directions_of(operator))
    explain(operator, *args, backend="torch")
    out = capsys.readouterr().out
    assert f"{operator} forward: torch\n" in out and "reference  can, measured to be the fastest at such sizes\n" in out


def test_the_measured_table_names_what_there_is():
    for table in json.loads(measured.PATH.read_text()).values():
        for operator, directions in table.items():
            if operator == "gpu":
                continue
            assert operator in measured.SIZES and set(directions) <= set(dispatch.DIRECTIONS)
            for direction, choices in directions.items():
                for backend in choices.values():
                    assert backend in BACKENDS[:-1] and direction in dispatch.directions(backend, operator)
                    # A forward that keeps no logsumexp is no forward for another's backward.
                    keeps_one = operator in ("pyramid", "dual_stream", "temporal")
                    assert backend != "torch" or direction == "backward" or not keeps_one


@every_operator
def test_every_call_has_a_class(operator):
    """Of every operator, the sizes that a class asks for."""
    module, arguments, call, _ = _OPERATORS[operator]
    given = call(*arguments(*calls()[operator]))
    assert measured.shape_class(module, **dispatch._SIZES[module](given))


# --- by name ----------------------------------------------------------------------------------------------------------


@every_operator
def test_reference_and_torch_take_everything(operator):
    for direction in ("forward", "backward"):
        _, refusals = backends_for(operator, *calls()[operator], direction=direction)
        assert refusals["torch"] is None and refusals["reference"] is None


@every_operator
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_named_backend_runs_both_ways(operator, backend, runs):
    run(operator, backend=backend)
    assert runs == [f"{backend} forward", f"{backend} backward"]


# --- UNIVID_BACKEND ---------------------------------------------------------------------------------------------------


@every_operator
def test_environment_replaces_none(operator, runs, monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "reference")
    run(operator)
    run(operator, backend=None)
    assert runs == ["reference forward", "reference backward"] * 2


@every_operator
def test_environment_yields_to_an_argument(operator, runs, monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "triton")  # which cannot run it
    run(operator, backend="torch")
    assert runs == ["torch forward", "torch backward"]


def test_empty_environment_is_none(runs, monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "")
    run("temporal_attn")
    assert runs == ["torch forward", "torch backward"]


def test_bad_environment(monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "Torch")
    with pytest.raises(
        ValueError, match=r"^UNIVID_BACKEND: got 'Torch', needs None or one of 'cuda', 'triton', 'torch'"
    ):
        run("temporal_attn")
    with pytest.raises(ValueError, match=r"^UNIVID_BACKEND: got 'Torch'"):
        explain("temporal_attn", *calls()["temporal_attn"])
    run("temporal_attn", backend="torch")


def test_the_choice_is_not_traced(runs, monkeypatch):
    """What torch.compile keeps has no backend in it: the environment counts when it runs."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: ops.temporal_attn(q, q, q), fullgraph=True, backend="aot_eager")
    q = torch.randn(B, T, N, H, D)
    compiled(q)
    monkeypatch.setenv("UNIVID_BACKEND", "reference")
    compiled(q)
    assert runs == ["torch forward", "reference forward"]


# --- import -----------------------------------------------------------------------------------------------------------


def python(code):
    """The output of a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_import_is_quiet_and_loads_no_kernels():
    done = python(
        "import sys, univid, univid.ops\n"
        "loaded = [m for m in sys.modules if m.startswith(('univid.kernels.triton', 'univid.kernels.cuda'))]\n"
        "assert not loaded, loaded"
    )
    assert done.stdout == "" and done.stderr == ""


EVERY_OPERATOR = """
import torch
from univid import ops
q, k, v = torch.randn(3, 2, 4, 3, 2, 8, requires_grad=True).unbind()
qkv, keys = torch.stack([q, k, v], 3), torch.randn(4, 2, 5, 2, 8).unbind()
refs, x, c = ops.ReferenceFrames.pyramid(4, 2), torch.randn(2, 4, 3, 6), torch.randn(6, requires_grad=True)
calls = [
    (ops.pyramid_st_attn, (q, k, v, refs)), (ops.pyramid_st_attn_qkv, (qkv, refs)), (ops.dual_stream_attn, (q, *keys)),
    (ops.temporal_attn, (q, k, v)), (ops.temporal_attn_qkv, (qkv,)),
    (ops.temporal_conv, (x, torch.randn(6, 6, 3, requires_grad=True))), (ops.group_norm_silu, (x[0], 3, c, c, 1e-5)),
    (ops.add_bias, (x, c)), (ops.concat, (x, c * x)),
    (ops.geglu, (q[0],)), (lambda *args, **options: ops.add_layer_norm(*args, **options)[1], (x, c, c)),
]
for operator, args in calls:
    for backend in (None, "torch", "reference"):
        operator(*args, backend=backend).sum().backward(retain_graph=True)
    try:
        operator(*args, backend="triton")
    except RuntimeError as error:
        assert "Triton cannot be imported" in str(error), error
    else:
        raise AssertionError("ran on Triton")
ops.explain("temporal_attn", q, k, v)
"""


def test_without_triton():
    out = python("import sys; sys.modules['triton'] = None" + EVERY_OPERATOR).stdout
    assert out.count("triton     Triton cannot be imported: ") == 2 and "temporal_attn forward: torch" in out


def test_with_a_broken_triton(tmp_path):
    """One whose libraries do not load, as on a machine that it was not built for."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    out = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + EVERY_OPERATOR).stdout
    assert out.count("triton     Triton cannot be imported: libtriton.so: undefined symbol") == 2


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_operator
def test_a_card_takes_a_kernel(operator, capsys):
    """By default a compiled backend runs in bfloat16, and ``explain`` says so."""
    args = calls()[operator]
    args = [x.to("cuda", torch.bfloat16) if isinstance(x, torch.Tensor) else x for x in args]
    explain(operator, *args)
    said = capsys.readouterr().out
    for direction in directions_of(operator):
        chosen, refusals = backends_for(operator, *args, direction=direction)
        assert chosen in ("cuda", "triton") and refusals["triton"] is None
        assert f"{operator} {direction}: {chosen}" in said
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    chosen, refusals = backends_for(operator, *wide)
    assert chosen == "torch" and "float64" in refusals["triton"]
    with pytest.raises(RuntimeError, match=r"'triton' cannot run this .*float64"):
        getattr(ops, operator)(*wide, backend="triton")
