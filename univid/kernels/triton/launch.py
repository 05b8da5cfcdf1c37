"""Launching Triton kernels: which configuration runs, remembered between calls and processes.

``triton.autotune`` measures anew for every exact size, may measure inside a CUDA graph's capture (which breaks it), and
is not safe in two threads. ``Tuned`` measures once for a coarse key, never in a capture, and keeps the winners in
Triton's cache folder. Those in ``winners.json`` (``python -m benchmarks.winners`` writes it) need not be measured: to
compile every configuration of a model's kernels takes minutes.

``UNIVID_AUTOTUNE=0``, or ``torch.use_deterministic_algorithms(True)``, always takes a kernel's first configuration, as
the interpreter and captures without a measured winner do.
"""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from univid.kernels.measured import architecture

WINNERS = Path(__file__).with_name("winners.json")

_HIP = torch.version.hip is not None  # whose compiler takes 32-bit offsets for tensors under 2 GiB

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Config:
    """One way to run a kernel: its tile sizes (constexprs by name), warps of a program, and software-pipelining
    depth; launch_pdl: where `launches_early`, before the launch that it follows has ended."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2
    launch_pdl: bool = False

    @cached_property
    def name(self) -> str:
        tiles = " ".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{tiles} num_warps={self.num_warps} num_stages={self.num_stages}"

    @cached_property
    def options(self) -> dict[str, Any]:
        """For Triton, which does not know launch_pdl on every GPU."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"launch_pdl": True} if self.launch_pdl else options


class Launcher:
    """Launches a ``triton.jit`` kernel: what Triton compiled for arguments like these without asking it again, which takes
    longer than many kernels run."""

    def __init__(self, kernel):
        self.kernel = kernel
        self._known: dict[tuple, _Launch] = {}  # by device, constants and specialization

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, ...],
        args: tuple,
        constants: dict,
        num_warps: int = 4,
        num_stages: int = 3,
        **more: Any,
    ) -> None:
        """On ``device``, which must be the current one. more: of Triton's options."""
        options = {"num_warps": num_warps, "num_stages": num_stages} | more
        index = (device.index, *options.values(), *constants.items(), *map(_specialization, args))
        known = self._known.get(index)
        if known is not None:
            known.compiled[(*grid, 1, 1)[:3]](*args, *known.constants)
            return
        compiled = self.kernel[grid](*args, **constants, **options)
        if not isinstance(compiled, CompiledKernel):  # none in the interpreter
            return
        if len(self._known) >= 4096:  # of sizes that never come back
            self._known.clear()
        values = constants | options
        self._known[index] = _Launch(
            compiled, tuple(values.get(p.name, p.default) for p in self.kernel.params[len(args) :])
        )


class Tuned:
    """A ``triton.jit`` kernel with the configurations that may run it.

    ``configs(key)`` gives them for a key, a dict of what the best one depends on; the first is the default. A kernel
    under ``Tuned`` only overwrites its outputs: it runs many times while it is measured.
    """

    def __init__(self, kernel, configs: Callable[[dict], list[Config]]):
        self.kernel = kernel
        self.configs = configs
        self._defaults: dict[tuple, Config] = {}  # (device, *key) -> the first configuration
        self._chosen: dict[tuple, Config] = {}  # (device, *key) -> the winner
        self._launch = Launcher(kernel)
        self._lock = threading.Lock()

    def __call__(self, grid: Callable[[dict], tuple], *args, key: dict, **constants) -> None:
        device = next(a.device for a in args if isinstance(a, Tensor))
        with _on(device):
            config = self._choose(device, key, lambda config: self._run(config, grid, args, constants))
            meta = constants | config.constants
            self._launch(device, grid(meta), args, meta, **config.options)

    def _run(self, config: Config, grid: Callable[[dict], tuple], args: tuple, constants: dict) -> Any:
        meta = constants | config.constants
        return self.kernel[grid(meta)](*args, **meta, **config.options)

    def _choose(self, device: torch.device, key: dict, run: Callable[[Config], None]) -> Config:
        index = (device, *key.items())
        if not autotunes() or device.type == "cpu":
            config = self._defaults.get(index)
            if config is None:
                config = self._defaults[index] = self.configs(key)[0]
            return config
        config = self._chosen.get(index)
        if config is not None:
            return config
        configs = self.configs(key)
        if len(configs) == 1:
            self._chosen[index] = configs[0]
            return configs[0]
        with self._lock:
            if index not in self._chosen:
                remembered = self.remembered(device, key, configs)
                if remembered is None and device.type != "xpu" and torch.cuda.is_current_stream_capturing():
                    return configs[0]
                self._chosen[index] = remembered or self._measure(device, key, configs, run)
            return self._chosen[index]

    def _measure(self, device: torch.device, key: dict, configs: list[Config], run: Callable[[Config], None]) -> Config:
        times: dict[str, float] = {}  # by configuration's name
        for config in configs:
            try:
                times[config.name] = triton.testing.do_bench(
                    lambda c=config: run(c), warmup=5, rep=20, return_mode="median"
                )
            except triton.runtime.errors.OutOfResources:  # a smaller card than the configuration was made for
                continue
        best = min(configs, key=lambda config: times.get(config.name, float("inf")))
        path = self._path(device)
        winners = _read(path)
        winners[_text(key)] = best.name
        _write(path, winners)
        return best

    def remembered(self, device: torch.device, key: dict, configs: list[Config]) -> Config | None:
        """The winner among ``configs``, measured here or shipped."""
        name = self.winners(device).get(_text(key)) or self._shipped(device).get(_text(key))
        return next((config for config in configs if config.name == name), None)

    @property
    def name(self) -> str:
        return f"{self._jitted.__module__.rpartition('.')[2]}.{self._jitted.__name__.strip('_')}"

    @property
    def _jitted(self) -> JITFunction:
        return self.kernel if isinstance(self.kernel, JITFunction) else self.kernel.kernel  # which launches it

    @cached_property
    def source(self) -> str:
        """A digest of the kernel's text and of all it calls in this package, the same with every Python and Triton."""
        texts: dict[str, str] = {}
        _collect_sources(self._jitted, texts)
        return hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]

    def winners(self, device: torch.device) -> dict[str, str]:
        """What was measured here: {key, as text: a configuration's name}."""
        return _read(self._path(device))

    def _shipped(self, device: torch.device) -> dict[str, str]:
        if device.type != "cuda" or _HIP:
            return {}
        of_kernel = shipped().get(architecture(device), {}).get("kernels", {}).get(self.name)
        return of_kernel["winners"] if of_kernel and of_kernel["source"] == self.source else {}

    def _path(self, device: torch.device) -> Path:
        # The winner holds for this kernel's source, this compiler and this kind of card.
        card = torch.get_device_module(device).get_device_name(device)
        identity = f"{self.kernel.cache_key} {triton.__version__} {card}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Path(_cache_folder()) / "univid" / f"{self.kernel.__name__.strip('_')}-{digest}.json"


def _collect_sources(kernel: JITFunction, texts: dict[str, str]) -> None:
    name = f"{kernel.__module__}.{kernel.__name__}"
    if name in texts:
        return
    texts[name] = kernel.src
    for word in set(re.findall(r"\w+", kernel.src)):  # the names in byte code are not the same in every Python
        other = kernel.fn.__globals__.get(word)
        if isinstance(other, JITFunction) and other.__module__.startswith("univid."):
            _collect_sources(other, texts)


@cache
def shipped() -> dict[str, Any]:
    """The content of ``winners.json``, by architecture."""
    return json.loads(WINNERS.read_text())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds on the host, as all its functions for constants do."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``."""
    return 1 << (n - 1).bit_length()


class _Launch(NamedTuple):
    """A compiled kernel, and the constants behind its arguments."""

    compiled: CompiledKernel
    constants: tuple


def _specialization(argument: Any) -> Any:
    """What Triton compiles for, of an argument, or more: arguments that agree in it run the same compiled kernel."""
    kind = type(argument)
    if kind is int or argument is None:
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16, _HIP and argument.untyped_storage().size() >= 2**31
    if isinstance(argument, tuple):
        return tuple([_specialization(x) for x in argument])
    return kind if kind is float else argument


def autotunes() -> bool:
    """Whether configurations are measured: unless UNIVID_AUTOTUNE=0, or results must be the same bits in every process."""
    return os.environ.get("UNIVID_AUTOTUNE", "1") != "0" and not torch.are_deterministic_algorithms_enabled()


def launches_early(device: torch.device) -> bool:
    """Whether a launch may begin before the one that it follows has ended (programmatic dependent launch: from Hopper
    on)."""
    if device.type != "cuda" or _HIP or interpreted():
        return False
    return int(architecture(device).removeprefix("sm_")) >= 90


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, which takes CPU tensors."""
    return triton.knobs.runtime.interpret


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel here can run on these tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}: bfloat16, float16 or float32 needed"
        if tensor.device.type not in ("cuda", "xpu") and not interpreted():
            return f"tensors on {tensor.device.type}: a GPU needed"
        if tensor.dtype == torch.bfloat16 and interpreted():
            return "dtype torch.bfloat16: Triton's interpreter computes it wrongly"
    return None


def _on(device: torch.device):
    """The device made current, since Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _cache_folder() -> str:
    return triton.knobs.cache.dir


def _text(key: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in key.items())


def _read(path: Path) -> dict[str, str]:
    try:
        winners = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or a damaged one: it is measured and written anew
        winners = None
    return winners if isinstance(winners, dict) else {}


def _write(path: Path, winners: dict[str, str]) -> None:
    """Written beside and renamed, so that another process never reads half a file; a folder that cannot be written
    costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(winners, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass
