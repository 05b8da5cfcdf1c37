"""CUDA kernels: what ``csrc/`` holds, in the extension module ``_csrc`` that the build makes where CUDA is wanted."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


def unavailable(device: torch.device | None = None, *, hopper: bool = False) -> str | None:
    """Why kernels of csrc cannot run on ``device`` (by default the current GPU), in one line; None where they can.

    ``hopper``: kernels in Hopper's own instructions, which run on compute capability 9.0 alone; others need 8.0 or
    later.
    """
    return _reason(device, hopper)


@cache
def extension() -> ModuleType:
    """The extension module; ImportError where it was not built."""
    return import_module("univid.kernels.cuda._csrc")


@cache
def _reason(device: torch.device | None, hopper: bool) -> str | None:
    try:
        csrc = extension()
    except ModuleNotFoundError:
        return "not built: install univid with UNIVID_BUILD_CUDA=1 (needs a C++ compiler; nvcc comes along)"
    except ImportError as error:
        return f"its extension does not load: {' '.join(str(error).split())}"
    if device is not None and device.type != "cuda":
        return f"tensors on {device.type}: an NVIDIA GPU needed"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if problem := csrc.problem():
        major, minor = divmod(csrc.CUDA_VERSION // 10, 100)
        return f"built with CUDA {major}.{minor}: {problem}"
    major, minor = torch.cuda.get_device_capability(device)
    if hopper and (major, minor) != (9, 0):
        return f"compute capability {major}.{minor}: 9.0 (Hopper) needed"
    if major < 8:
        return f"compute capability {major}.{minor}: 8.0 or later needed"
    return None
