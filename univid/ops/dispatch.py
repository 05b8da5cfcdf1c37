"""Which backend runs a call.

A backend of an operator is a module (or, for ``torch`` and ``reference``, an object) with the contract of
``univid/kernels/calls.py``.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from univid.ops import eager

BACKENDS = ("cuda", "triton", "torch", "reference")  # the fastest first


def check_backend(backend: str | None, name: str = "backend") -> str | None:
    """``backend``, if it is None or one of BACKENDS; ValueError otherwise."""
    if backend is not None and backend not in BACKENDS:
        names = ", ".join(repr(b) for b in BACKENDS)
        raise ValueError(f"{name}: got {backend!r}, needs None or one of {names}")
    return backend


def candidates(operator: str, call: Any, direction: str = "forward") -> dict[str, str | None]:
    """For every backend of ``operator`` (a module name such as "pyramid"), the fastest first: why it cannot run
    ``call``, or None."""
    return {backend: _refusal(backend, operator, call, direction) for backend in BACKENDS}


def preferred(refusals: dict[str, str | None], backend: str | None) -> str | None:
    """The name of the backend that runs, of what :func:`candidates` says: the one asked for, here or in UNIVID_BACKEND,
    else the first."""
    wanted = backend or wanted_by_environment()
    names = [name for name, refusal in refusals.items() if refusal is None and wanted in (None, name)]
    return names[0] if names else None


def choose(operator: str, call: Any, backend: str | None, direction: str = "forward") -> Any:
    """The backend that runs ``call``: the one asked for by name, here or in UNIVID_BACKEND, else the fastest that can.

    Raises:
        RuntimeError: the backend asked for by name cannot run this call; says why.
    """
    wanted = backend or wanted_by_environment()
    for name in (wanted,) if wanted else BACKENDS:
        refusal = _refusal(name, operator, call, direction)
        if refusal is None:
            return _load(name, operator)
    raise RuntimeError(f"backend: {wanted!r} cannot run this {operator} {direction}: {refusal}")


def wanted_by_environment() -> str | None:
    return check_backend(os.environ.get("UNIVID_BACKEND") or None, "UNIVID_BACKEND")


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
