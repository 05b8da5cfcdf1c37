"""The build backend: setuptools, and for a GPU build what compiles ``csrc/``.

A GPU build is wanted where ``UNIVID_BUILD_CUDA=1``, or where the variable is unset on a Linux machine that has nvcc or
an NVIDIA driver; never where it is 0. Only then are CMake, Ninja and pybind11 required, and nvcc with its headers where
the machine has none.
"""

import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

if int(setuptools.__version__.split(".")[0]) < 77:  # reached only with --no-build-isolation
    raise SystemExit(
        f"univid: setuptools {setuptools.__version__} is too old to build this package: 77 or later needed"
    )

VARIABLE = "UNIVID_BUILD_CUDA"
TOOLS = ["cmake>=3.24", "ninja>=1.11", "pybind11>=2.13"]
# nvcc's own requirements are not pinned among each other, and parts of different minor versions do not fit together.
CUDA = "13.0"
NVCC = [f"nvidia-{part}=={CUDA}.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl", "cuda-runtime")]


def wants_cuda() -> bool:
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"univid: {VARIABLE}={choice!r}: 1 (build the CUDA kernels), 0 (do not) or unset needed")
    if choice:
        return choice == "1"
    return sys.platform == "linux" and (machine_nvcc() is not None or has_driver())


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def machine_nvcc() -> Path | None:
    """The nvcc that is installed on this machine."""
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if folder and (found := shutil.which("nvcc", path=Path(folder, "bin"))):
            return Path(found)
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def find_nvcc() -> Path | None:
    """The machine's nvcc, else the one of Python packages: a requirement of this build, or installed by hand."""
    packages = (nvcc for folder in sys.path for nvcc in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc")))
    return machine_nvcc() or next(packages, None)


def requirements() -> list[str]:
    if not wants_cuda():
        return []
    return TOOLS + ([] if machine_nvcc() else NVCC)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + requirements()


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    if not wants_cuda():  # what an earlier build left in the source tree would be taken for this one's
        for extension in Path("univid", "kernels", "cuda").glob("_csrc.*.so"):
            extension.unlink()
        shutil.rmtree(Path("build", "csrc"), ignore_errors=True)
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
