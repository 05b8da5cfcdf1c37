"""``univid doctor``: what this machine has, and every operator, forward and backward, checked against its definition.

It shows which backend ran each operator and why the faster ones did not. A result is right where its error against the
float64 reference is at most twice that of the reference with every operation rounded to the input's dtype, plus one
ulp, for the largest element and for the L2 norm. The exit code is 1 where one is not.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

import univid
from univid import ops
from univid.kernels.cuda import unavailable
from univid.ops import ReferenceFrames, reference
from univid.ops.explain import backends_for, directions_of

_PACKAGES = ("torch", "triton", "diffusers", "open_clip_torch", "av")
_WIDTH = 100
_ROW = "{:<19}  {:<24}  {:<13}  {:>7}  {:>9}  {:>10}  {}"

Tensors = dict[str, Tensor]
Reasons = dict[tuple[str, str], list[str]]  # (backend, why it did not run) -> the operators


class Case(NamedTuple):
    """A call of a public operator, and what it should give."""

    operator: str
    sizes: str
    tensors: Tensors  # the differentiable arguments, by name
    options: dict[str, Any]  # the other arguments
    meaning: Callable[[Tensors, torch.dtype | None], Tensor]  # (tensors, accumulate) -> out


class Result(NamedTuple):
    """How far an output or a gradient is from float64's."""

    name: str
    error: float  # relative, L2
    share: float  # of the error that is allowed; wrong past 1

    @property
    def is_right(self) -> bool:
        return self.share <= 1  # false for NaN


def main() -> int:
    threads, autotune = torch.get_num_threads(), os.environ.get("UNIVID_AUTOTUNE")
    os.environ.setdefault("UNIVID_AUTOTUNE", "0")  # no benchmark: kernels run as they are configured by default
    torch.set_num_threads(1)  # the tensors are small: on a busy CPU, threads mostly wait for each other
    try:
        return _examine()
    finally:  # as it was, for what comes next in this process
        torch.set_num_threads(threads)
        if autotune is None:
            del os.environ["UNIVID_AUTOTUNE"]


def _examine() -> int:
    started = time.perf_counter()
    device, dtype = _machine()
    _print_machine(device)
    print(f"Every operator, forward and backward in {_name(dtype)}, against its definition in float64.")
    print(f"Allowed is twice the error of the definition in {_name(dtype)} arithmetic, plus one ulp.\n")
    print(f"{'relative error':>78}")
    print(_ROW.format("operator", "sizes", "backend", "output", "gradients", "of allowed", "").rstrip())
    print("─" * _WIDTH)

    torch.manual_seed(0)
    reasons: Reasons = {}
    problems: list[str] = []
    all_cases = cases(device, dtype)
    for case in all_cases:
        problem = _run(case, reasons)
        if problem:
            problems.append(f"{case.operator}: {problem}")

    _print_reasons(reasons, [case.operator for case in all_cases])
    print()
    for problem in problems:
        print(textwrap.fill(problem, _WIDTH, subsequent_indent="  "))
    total = len(all_cases)
    verdict = f"{len(problems)} of {total} operators failed" if problems else f"All {total} operators are right"
    print(f"{verdict} ({time.perf_counter() - started:.0f} s).")
    return 1 if problems else 0


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """A U-Net's shapes, small: 8 frames of 6x10 tokens, 4 heads of 64, a prompt of 77 tokens and an image of 257."""

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul(scale).to(dtype)

    clips, frames, tokens, heads, dim, channels, taps, groups = 1, 8, 60, 4, 64, 256, 5, 32
    refs = ReferenceFrames.pyramid(frames, num_refs=4).to(device)
    scale = dim**-0.5
    q, k, v = (make(clips, frames, tokens, heads, dim) for _ in range(3))
    qkv = make(clips, frames, tokens, 3, heads, dim)
    text, image = ([make(clips, length, heads, dim) for _ in range(2)] for length in (77, 257))
    streams = dict(zip(("k_text", "v_text", "k_image", "v_image"), (*text, *image), strict=True))

    attention = f"B{clips} T{frames} N{tokens} H{heads} D{dim}"
    return [
        Case(
            "pyramid_st_attn",
            f"{attention} R{refs.num_refs}",
            {"q": q, "k": k, "v": v},
            {"refs": refs},
            lambda x, a: reference.pyramid_st_attn(x["q"], x["k"], x["v"], refs.table, scale, a)[0],
        ),
        Case(
            "pyramid_st_attn_qkv",
            f"{attention} R{refs.num_refs}",
            {"qkv": qkv},
            {"refs": refs},
            lambda x, a: reference.pyramid_st_attn(*_unpacked(x["qkv"]), refs.table, scale, a)[0],
        ),
        Case(
            "dual_stream_attn",
            f"{attention} L77+257",
            {"q": q, **streams},
            {"text_weight": 1.0, "image_weight": 0.5},
            lambda x, a: reference.dual_stream_attn(
                x["q"], [(x["k_text"], x["v_text"], 1.0), (x["k_image"], x["v_image"], 0.5)], scale, a
            )[0],
        ),
        Case(
            "temporal_attn",
            attention,
            {"q": q, "k": k, "v": v},
            {},
            lambda x, a: reference.temporal_attn(x["q"], x["k"], x["v"], scale, a)[0],
        ),
        Case(
            "temporal_attn_qkv",
            attention,
            {"qkv": qkv},
            {},
            lambda x, a: reference.temporal_attn(*_unpacked(x["qkv"]), scale, a)[0],
        ),
        Case(
            "temporal_conv",
            f"B{clips} T{frames} N{tokens} C{channels} K{taps}",
            {
                "x": make(clips, frames, tokens, channels),
                "weight": make(channels, taps, channels, scale=(channels * taps) ** -0.5).transpose(1, 2),
                "bias": make(channels),
                "residual": make(clips, frames, tokens, channels),
            },
            {},
            lambda x, a: reference.temporal_conv(x["x"], x["weight"], x["bias"], x["residual"], a),
        ),
        Case(
            "group_norm_silu",
            f"M{clips * frames} N{tokens} C{channels} G{groups}",
            {"x": make(clips * frames, tokens, channels), "weight": make(channels), "bias": make(channels)},
            {"num_groups": groups, "eps": 1e-5},
            lambda x, a: reference.group_norm_silu(x["x"], groups, x["weight"], x["bias"], 1e-5, True, a)[0],
        ),
        Case(
            "concat",
            f"B{clips} T{frames} N{tokens} C{channels}+{channels}",
            {name: make(clips, frames, tokens, channels) for name in "xy"},
            {},
            lambda x, a: reference.concat(**x),
        ),
        Case(
            "add_bias",
            f"B{clips} T{frames} N{tokens} C{channels}",
            {"x": make(clips, frames, tokens, channels), "bias": make(channels)},
            {},
            lambda x, a: reference.add_bias(x["x"], x["bias"], a),
        ),
        Case(
            "geglu",
            f"B{clips} T{frames} N{tokens} C{4 * channels}",
            {"x": make(clips, frames, tokens, 8 * channels)},
            {},
            lambda x, a: reference.geglu(x["x"], a),
        ),
        Case(
            "linear_geglu",
            f"B{clips} T{frames} N{tokens} C{channels}-{4 * channels}",
            {
                "x": make(clips, frames, tokens, channels),
                "weight": channels**-0.5 * make(8 * channels, channels),
                "bias": make(8 * channels),
            },
            {},
            lambda x, a: reference.linear_geglu(**x, accumulate=a),
        ),
        Case(
            "add_layer_norm",
            f"B{clips} T{frames} N{tokens} C{channels}",
            {
                "x": make(clips, frames, tokens, channels),
                "weight": make(channels),
                "bias": make(channels),
                "branch": make(clips, frames, tokens, channels),
                "offset": make(frames, 1, channels),
            },
            {},
            lambda x, a: torch.stack(reference.add_layer_norm(**x, eps=1e-5, accumulate=a)),
        ),
    ]


def _unpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(3)
    return q, k, v


def check(case: Case) -> list[Result]:
    """Run the operator and compare its output (first) and its gradients, where it has any, with the reference's."""
    operator = getattr(ops, case.operator)
    if "backward" not in directions_of(case.operator):
        out = operator(**case.tensors, **case.options)
        wide_out = case.meaning({name: x.double() for name, x in case.tensors.items()}, None)
        return [_compare("out", out, case.meaning(case.tensors, out.dtype), wide_out)]
    grad = torch.randn_like(case.meaning(case.tensors, None))
    results = _with_gradients(lambda x: _one(operator(**x, **case.options)), case.tensors, grad)
    rounded = _with_gradients(lambda x: case.meaning(x, grad.dtype), case.tensors, grad)
    wide = {name: x.double() for name, x in case.tensors.items()}
    exact = _with_gradients(lambda x: case.meaning(x, None), wide, grad.double())
    return [_compare(name, results[name], rounded[name], exact[name]) for name in results]


def _one(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """An operator's output; of several, all of them stacked."""
    return torch.stack(out) if isinstance(out, tuple) else out


def _with_gradients(function: Callable[[Tensors], Tensor], tensors: Tensors, grad: Tensor) -> Tensors:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = function(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def _compare(name: str, result: Tensor, rounded: Tensor, exact: Tensor) -> Result:
    ulp = torch.finfo(result.dtype).eps
    error, yardstick = result.double() - exact, rounded.double() - exact
    shares = [
        (size(error) / (2 * size(yardstick) + ulp * size(exact))).item()
        for size in (lambda x: x.abs().amax(), lambda x: x.norm())
    ]
    return Result(name, (error.norm() / exact.norm()).item(), max(shares))


def _run(case: Case, reasons: Reasons) -> str | None:
    """Print the operator's row and return what is wrong with it, or None."""
    ran = []
    for direction in directions_of(case.operator):
        chosen, refusals = backends_for(case.operator, **case.tensors, **case.options, direction=direction)
        if chosen is None:
            print(_ROW.format(case.operator, case.sizes, "–", "–", "–", "–", "cannot run"))
            asked = os.environ["UNIVID_BACKEND"]
            return f"UNIVID_BACKEND={asked} cannot run its {direction}: {refusals[asked]}"
        ran.append(chosen)
        _collect(reasons, case.operator, direction, chosen, refusals)
    backend = ", ".join(dict.fromkeys(ran))
    try:
        output, *gradients = results = check(case)
    except Exception as failure:  # the other operators still run
        print(_ROW.format(case.operator, case.sizes, backend, "–", "–", "–", "failed"))
        return textwrap.shorten(f"{type(failure).__name__}: {failure}", 4 * _WIDTH)
    wrong = [result for result in results if not result.is_right]
    largest = f"{max(result.error for result in gradients):.1e}" if gradients else "–"
    share = max(result.share for result in wrong or results)
    figures = (f"{output.error:.1e}", largest, f"{share:.0%}" if share < 10 else "> 999%")
    print(_ROW.format(case.operator, case.sizes, backend, *figures, "WRONG" if wrong else "ok"), flush=True)
    if not wrong:
        return None
    return "past the error that is allowed: " + ", ".join(f"{r.name} ({r.share:.3g} times)" for r in wrong)


def _collect(reasons: Reasons, operator: str, direction: str, chosen: str, refusals: dict[str, str | None]) -> None:
    """Note why each backend faster than the chosen one does not run."""
    for backend, refusal in refusals.items():
        if backend == chosen:
            return
        operators = reasons.setdefault((backend, refusal or f"UNIVID_BACKEND={chosen}"), [])
        if operator not in operators:
            operators.append(operator if direction == "forward" else f"{operator} (backward)")


def _print_reasons(reasons: Reasons, operators: Iterable[str]) -> None:
    if not reasons:
        return
    print("\nWhy no faster backend ran:")
    for (backend, reason), names in sorted(reasons.items(), key=lambda item: ops.BACKENDS.index(item[0][0])):
        who = "every operator" if names == list(operators) else ", ".join(names)
        print(textwrap.fill(reason, _WIDTH, initial_indent=f"  {backend:<10}", subsequent_indent=" " * 12))
        print(textwrap.fill(who, _WIDTH, initial_indent=" " * 14, subsequent_indent=" " * 14))


def _machine() -> tuple[torch.device, torch.dtype]:
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.bfloat16
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda"), torch.bfloat16 if has_bfloat16 else torch.float16


def _print_machine(device: torch.device) -> None:
    print(f"UniVid {univid.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(", ".join(f"{package} {_version(package)}" for package in _PACKAGES))
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        print(f"GPU: {card.name}, compute capability {card.major}.{card.minor}, {memory}, driver {_driver()}")
    else:
        print(f"GPU: none that PyTorch can use; the CPU runs everything ({os.cpu_count()} cores)")
    reason = unavailable(device if device.type == "cuda" else None)
    print(textwrap.fill(f"CUDA kernels: {reason or 'ready'}", _WIDTH, subsequent_indent="  "), end="\n\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
