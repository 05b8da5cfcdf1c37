"""The part of the build that pyproject.toml cannot say: ``csrc/`` through CMake, where a GPU build is wanted."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from univid_build import TOOLS, VARIABLE, find_nvcc, wants_cuda  # noqa: E402

BUILD = ROOT / "build" / "csrc"
REPORT = BUILD / "report.txt"  # what the compilers said: registers, spills, warnings


class BuildWithCMake(build_ext):
    def build_extension(self, extension: Extension) -> None:
        nvcc = find_nvcc() or give_up("nvcc was not found")
        cmake = find_program("cmake")
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        configure = [
            *(cmake, "--fresh", "-S", ROOT, "-B", BUILD, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_FLAGS={library_folder(nvcc)}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DUNIVID_PYBIND11_INCLUDE_DIR={find_pybind11()}",
        ]
        BUILD.mkdir(parents=True, exist_ok=True)
        with REPORT.open("w") as report:
            run(configure, report)
            run([cmake, "--build", BUILD], report)
        if not target.exists():
            give_up(f"CMake made no {target.name}")


def run(command: list, report) -> None:
    """Run a command; its output goes into the report and, less what ptxas says of every kernel, to the terminal."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            report.write(line)
            if "ptxas info" not in line and "bytes stack frame" not in line:
                print(line, end="", flush=True)
    if process.returncode != 0:
        give_up("CMake or a compiler failed, see above")


def find_program(name: str) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or give_up(f"{name} was not found")


def find_pybind11() -> Path:
    """Its headers; where it is not installed, without build isolation, the copy of them that PyTorch carries serves."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or []:
            if Path(folder, "include/pybind11/pybind11.h").exists():
                return Path(folder, "include")
    return give_up("the Python package pybind11 was not found")


def library_folder(nvcc: Path) -> str:
    """nvcc looks for its libraries in lib64, which the Python packages call lib."""
    folder = nvcc.parent.parent / "lib"
    return f'-L"{folder}"' if folder.is_dir() and not folder.with_name("lib64").exists() else ""


def give_up(reason: str):
    raise SystemExit(
        f"univid: the CUDA kernels were not built: {reason}. Set {VARIABLE}=0 to install without them, or provide a "
        f"C++20 compiler, CUDA >= 12.5 (CUDA_HOME) and, with --no-build-isolation, {', '.join(TOOLS)}."
    )


setup(
    ext_modules=[Extension("univid.kernels.cuda._csrc", sources=[])] if wants_cuda() else [],
    cmdclass={"build_ext": BuildWithCMake},
)
