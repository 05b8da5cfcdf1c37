"""Settings of the whole process that operators need otherwise for a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Held:
    """A context in which a setting is ``wanted(what was found)``.

    The setting is the process's, and each device's backward runs in a thread of its own: the first thread to enter sets
    it, the last to leave restores it.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], wanted: Callable[[Any], Any]):
        self._read, self._write, self._wanted = read, write, wanted
        self._lock = threading.Lock()
        self._inside = 0  # how many threads are
        self._found: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found = self._read()
                if self._wanted(self._found) != self._found:
                    self._write(self._wanted(self._found))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._wanted(self._found) != self._found:
                self._write(self._found)


def _read_determinism() -> tuple[bool, bool]:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled(), fills


def _write_determinism(setting: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(setting[0])
    torch.utils.deterministic.fill_uninitialized_memory = setting[1]  # type: ignore[attr-defined]


# Without filling new memory, which no kernel reads before it is written; a process that asked for both keeps both.
_DETERMINISTIC = Held(_read_determinism, _write_determinism, lambda found: found if found[0] else (True, False))
_NOTHING = nullcontext()


def deterministic_algorithms(on: bool) -> AbstractContextManager:
    """Within it PyTorch's own operators are deterministic, whatever the process's setting, if ``on``."""
    return _DETERMINISTIC if on else _NOTHING


def _read_tf32() -> bool | str:
    cudnn: Any = torch.backends.cudnn
    try:
        return cudnn.allow_tf32
    except RuntimeError:  # whoever has set convolutions apart speaks of them alone
        return cudnn.conv.fp32_precision


def _write_tf32(setting: bool | str) -> None:
    cudnn: Any = torch.backends.cudnn
    if isinstance(setting, bool):
        cudnn.allow_tf32 = setting
    else:
        cudnn.conv.fp32_precision = setting


_IEEE_CONVOLUTIONS = Held(_read_tf32, _write_tf32, lambda found: False if isinstance(found, bool) else "ieee")


def ieee_convolutions(x: Tensor) -> AbstractContextManager:
    """float32 means float32: PyTorch lets cuDNN multiply ``x`` in TF32 by default."""
    return _IEEE_CONVOLUTIONS if x.is_cuda and x.dtype == torch.float32 else _NOTHING
