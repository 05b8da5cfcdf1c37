"""Which backend would run a call, and why the others would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from univid.kernels.calls import AddBiasCall, AddLayerNormCall, ConcatCall, GroupNormSiluCall, TemporalConvCall
from univid.ops import dispatch, dual_stream, geglu, group_norm, linear_geglu, pyramid, temporal, temporal_conv
from univid.ops.add_bias import _arguments as _add_bias_arguments
from univid.ops.add_layer_norm import _arguments as _add_layer_norm_arguments
from univid.ops.concat import _arguments as _concat_arguments


class _Operator(NamedTuple):
    module: str  # the name of its files, on every floor
    arguments: Callable  # the public arguments, checked -> those of the registered operator, the backend's name last
    call: Callable  # those -> what a backend is given
    directions: tuple[str, ...] = dispatch.DIRECTIONS  # of its own


_OPERATORS = {
    "pyramid_st_attn": _Operator("pyramid", pyramid._arguments, pyramid._call),
    "pyramid_st_attn_qkv": _Operator("pyramid", pyramid._arguments_qkv, pyramid._call_qkv),
    "dual_stream_attn": _Operator("dual_stream", dual_stream._arguments, dual_stream._call),
    "temporal_attn": _Operator("temporal", temporal._arguments, temporal._call),
    "temporal_attn_qkv": _Operator("temporal", temporal._arguments_qkv, temporal._call_qkv),
    "temporal_conv": _Operator("temporal_conv", temporal_conv._arguments, lambda *a: TemporalConvCall(*a[:-1])),
    "group_norm_silu": _Operator("group_norm", group_norm._arguments, lambda *a: GroupNormSiluCall(*a[:-1])),
    "concat": _Operator("concat", _concat_arguments, lambda *a: ConcatCall(*a[:-1])),
    "add_bias": _Operator("add_bias", _add_bias_arguments, lambda *a: AddBiasCall(*a[:-1])),
    "geglu": _Operator("geglu", geglu._arguments, lambda *a: geglu._call(*a[:-1])),
    "linear_geglu": _Operator(
        "linear_geglu", linear_geglu._arguments, lambda *a: linear_geglu._call(*a[:-1]), ("forward",)
    ),
    "add_layer_norm": _Operator("add_layer_norm", _add_layer_norm_arguments, lambda *a: AddLayerNormCall(*a[:-1])),
}


def explain(operator: str, *args: Any, **kwargs: Any) -> None:
    """Print, for each direction, which backend would run ``operator(*args, **kwargs)`` and why the others would not.

    Args:
        operator: an operator's name, such as "pyramid_st_attn"; the rest are its own arguments, which are checked as it
            would.
    """
    for direction in directions_of(operator):
        chosen, refusals, fastest = _ask(operator, args, kwargs, direction)
        print(f"{operator} {direction}: {chosen or 'the backend asked for cannot run it'}")
        for backend, refusal in refusals.items():
            can = "runs" if backend == chosen else "can"
            faster = ", measured to be the fastest at such sizes" if backend == fastest else ""
            print(f"  {backend:<9}  {refusal or can + faster}")


def directions_of(operator: str) -> tuple[str, ...]:
    """Those that an operator has of its own, of dispatch.DIRECTIONS; with gradients one without a backward is its parts."""
    return _of(operator).directions


def backends_for(
    operator: str, *args: Any, direction: str = "forward", **kwargs: Any
) -> tuple[str | None, dict[str, str | None]]:
    """The backend that would run a call (None: the one asked for cannot), and for every backend why it cannot, or
    None."""
    chosen, refusals, _ = _ask(operator, args, kwargs, direction)
    return chosen, refusals


def _ask(
    operator: str, args: tuple, kwargs: dict[str, Any], direction: str
) -> tuple[str | None, dict[str, str | None], str | None]:
    """What :func:`backends_for` returns, and the backend that was measured to be faster than the first, if any."""
    module, arguments, call, _ = _of(operator)
    *checked, backend = arguments(*args, **kwargs)
    given = call(*checked, backend)
    refusals = dispatch.candidates(module, given, direction)
    fastest = dispatch.measured_fastest(module, given, direction)
    return dispatch.preferred(refusals, backend, fastest), refusals, fastest


def _of(operator: str) -> _Operator:
    if operator not in _OPERATORS:
        raise ValueError(f"operator: got {operator!r}, needs one of {', '.join(map(repr, _OPERATORS))}")
    return _OPERATORS[operator]
