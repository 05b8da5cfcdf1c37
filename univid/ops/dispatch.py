"""Which backend runs a call.

A backend of an operator is a module (or, for ``torch`` and ``reference``, an object) with the contract of
``univid/kernels/calls.py``. Not asked for one by name, the first of BACKENDS runs that can, or one that was measured to
be faster on such a card at such sizes (``univid/kernels/measured.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from univid.kernels import measured
from univid.ops import eager

BACKENDS = ("cuda", "triton", "torch", "reference")  # the fastest first, as a rule
DIRECTIONS = ("forward", "backward")

# What measured.shape_class asks of a call.
_SIZES: dict[str, Callable[[Any], dict[str, int | bool]]] = {
    "pyramid": lambda call: {"tokens": call.q.shape[2]},
    "dual_stream": lambda call: {"tokens": call.q.shape[2]},
    "temporal": lambda call: {"frames": call.q.shape[1]},
    "temporal_conv": lambda call: {
        "channels": call.weight.shape[1],
        "taps": call.weight.shape[2],
        "epilogue": call.bias is not None or call.residual is not None,
    },
    "group_norm": lambda call: {"tokens": call.x.shape[1]},
    "concat": lambda call: {"channels": sum(part.shape[-1] for part in call)},
    "add_bias": lambda call: {"channels": call.x.shape[-1]},
    "geglu": lambda call: {"channels": call.x.shape[1] // 2},
    "linear_geglu": lambda call: {"channels": call.x.shape[1]},
    "add_layer_norm": lambda call: {"channels": call.x.shape[-1]},
}


def check_backend(backend: str | None, name: str = "backend") -> str | None:
    """``backend``, if it is None or one of BACKENDS; ValueError otherwise."""
    if backend is not None and backend not in BACKENDS:
        names = ", ".join(repr(b) for b in BACKENDS)
        raise ValueError(f"{name}: got {backend!r}, needs None or one of {names}")
    return backend


def asked_for(backend: str | None) -> str | None:
    """``backend``, or what UNIVID_BACKEND names: read at the call, so that its backward runs where its forward did. (A
    compiled call reads it whenever it runs.)"""
    check_backend(backend)
    return backend if backend is not None or torch.compiler.is_compiling() else wanted_by_environment()


def candidates(operator: str, call: Any, direction: str = "forward") -> dict[str, str | None]:
    """For every backend of ``operator`` (a module name such as "pyramid"), in the order of BACKENDS: why it cannot run
    ``call``, or None."""
    return {backend: _refusal(backend, operator, call, direction) for backend in BACKENDS}


def preferred(refusals: dict[str, str | None], backend: str | None, fastest: str | None = None) -> str | None:
    """The name of the backend that runs, of what :func:`candidates` says: the one asked for, here or in UNIVID_BACKEND,
    else what :func:`measured_fastest` names, if it can, else the first that can."""
    wanted = backend or wanted_by_environment()
    names = (wanted,) if wanted else _order(fastest)
    return next((name for name in names if refusals[name] is None), None)


def measured_fastest(operator: str, call: Any, direction: str = "forward") -> str | None:
    """The backend that was measured to be faster than the first for such a call, if any was."""
    x = call[0]
    if not x.is_cuda or x.element_size() != 2:  # measured in bfloat16
        return None
    choices = measured.choices(measured.architecture(x.device), operator, direction)
    return choices.get(measured.shape_class(operator, **_SIZES[operator](call))) if choices else None


def directions(backend: str, operator: str) -> tuple[str, ...]:
    """Those in which a backend has a kernel for ``operator``."""
    module = _load(backend, operator)
    return tuple(direction for direction in DIRECTIONS if hasattr(module, direction))


def choose(operator: str, call: Any, backend: str | None, direction: str = "forward") -> Any:
    """The backend that runs ``call``: the one asked for by name, here or in UNIVID_BACKEND, else the fastest that can.

    Raises:
        RuntimeError: the backend asked for by name cannot run this call; says why.
    """
    wanted = backend or wanted_by_environment()
    for name in (wanted,) if wanted else _order(measured_fastest(operator, call, direction)):
        refusal = _refusal(name, operator, call, direction)
        if refusal is None:
            return _load(name, operator)
    raise RuntimeError(f"backend: {wanted!r} cannot run this {operator} {direction}: {refusal}")


def wanted_by_environment() -> str | None:
    return check_backend(os.environ.get("UNIVID_BACKEND") or None, "UNIVID_BACKEND")


def _order(first: str | None) -> tuple[str, ...]:
    return BACKENDS if first is None else (first, *(name for name in BACKENDS if name != first))


def _refusal(backend: str, operator: str, call: Any, direction: str) -> str | None:
    module = _load(backend, operator)
    if isinstance(module, str):
        return module
    if not hasattr(module, direction):
        return f"this operator has no {backend} {direction} yet"
    return module.unsupported(call)


@cache
def _load(backend: str, operator: str) -> Any:
    """The backend of an operator, or the reason why there is none."""
    if backend in ("torch", "reference"):
        return eager.BACKENDS[backend][operator]
    if backend == "triton":
        try:
            import_module("triton")
        except ImportError as error:
            return f"Triton cannot be imported: {error}"
    name = f"univid.kernels.{backend}.{operator}"
    if find_spec(name) is None:
        return f"this operator has no {backend} kernel"
    return import_module(name)
