"""The build: what it requires where, what the compilers said of csrc, and a package that is quiet without CUDA."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from univid.kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "csrc" / "report.txt"


@pytest.fixture
def backend(monkeypatch):
    """The build backend, on a machine without nvcc, driver or choice."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import univid_build

    machine_nvcc = univid_build.machine_nvcc
    monkeypatch.setattr(univid_build, "machine_nvcc", lambda: None)
    monkeypatch.setattr(univid_build, "has_driver", lambda: False)
    monkeypatch.setattr(univid_build.sys, "platform", "linux")
    monkeypatch.delenv(univid_build.VARIABLE, raising=False)
    univid_build.unpatched_machine_nvcc = machine_nvcc
    return univid_build


@pytest.fixture(scope="module")
def report() -> str:
    """What the compilers said of csrc; there must be a report where a CUDA build is wanted."""
    if REPORT.exists():
        return REPORT.read_text()
    wanted = [sys.executable, "-c", "import univid_build; print(univid_build.wants_cuda())"]
    answer = subprocess.run(wanted, cwd=ROOT / "build_backend", capture_output=True, text=True, check=True).stdout
    if answer.strip() == "True":
        pytest.fail(f"a CUDA build is wanted here, but {REPORT} is missing: pip install -e .")
    pytest.skip("no CUDA build is wanted here")


# --- what the compilers said ------------------------------------------------------------------------------------------


def test_every_kernel_is_compiled_for_each_architecture(report):
    compiled = re.findall(r"Compiling entry function '\w*?_([a-z_]+)_cu_\w*' for '(\w+)'", report)
    files = list((ROOT / "csrc").glob("*.cu"))
    of_a_header = ("temporal_conv", "linear_geglu")  # is their kernel
    assert len(files) > 7
    assert all("__global__" in path.read_text() for path in files if path.stem not in of_a_header)
    expected = {(path.stem, "sm_90a") for path in files}
    assert set(compiled) == expected | {("temporal_fwd", "sm_80"), ("temporal_bwd", "sm_80")}


def test_no_kernel_spills_or_has_a_stack_frame(report):
    functions = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    assert functions
    assert not [name for name, *counts in functions if any(map(int, counts))]


def test_no_compiler_warns(report):
    # C7510 to C7515 among them: products of a warpgroup that are executed one by one
    warning = re.compile(r"warning|\(C75\d\d\)|serialized", re.IGNORECASE)
    assert not [line for line in report.splitlines() if warning.search(line)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's cuobjdump")
def test_machine_code_uses_tensor_cores_and_no_local_memory(report):
    triton = pytest.importorskip("triton")
    if not (library := Path(next(iter(cuda.__path__)), f"_csrc{sysconfig.get_config_var('EXT_SUFFIX')}")).exists():
        pytest.fail(f"{library} is missing, although {REPORT} is there: pip install -e .")
    code = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", library], capture_output=True, text=True, check=True
    ).stdout
    functions = [(text.split()[0], text) for text in code.split("Function : ")[1:]]  # of each architecture
    for kernel, product in (
        (r"temporal_[fb]wd_cu", r"HMMA\.16816\.F32"),
        (r"temporal_conv_cu\w*convolve", r"HGMMA\.64x(160|128)x16"),
        (r"linear_geglu_cu\w*convolve", r"HGMMA\.64x(160|128)x16"),
        (r"pyramid_fwd_cu\w*forward", r"HGMMA\.64x(96|64)x16"),
        (r"pyramid_bwd_cu\w*backward", r"HGMMA\.64x64x16"),
        (r"pyramid_bwd_dq_cu\w*backward_dq", r"HGMMA\.64x64x16"),
        (r"dual_stream_fwd_cu\w*forward", r"HGMMA\.64x(88|64)x16"),
        (r"dual_stream_bwd_cu\w*backward_keys", r"HGMMA\.64x64x16"),
        (r"dual_stream_bwd_dq_cu\w*backward", r"HGMMA\.64x(88|64)x16"),
    ):
        of_kernel = [text for name, text in functions if re.search(kernel, name)]
        assert of_kernel and all(re.search(product, text) for text in of_kernel), kernel
    assert not [name for name, text in functions if re.search(r"\b(LDL|STL)\b", text)]


# --- what a build requires --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "nvcc", "driver", "platform", "wanted"),
    [
        (None, False, False, "linux", False),
        (None, True, False, "linux", True),
        (None, False, True, "linux", True),
        (None, False, True, "win32", False),
        (None, False, False, "darwin", False),
        ("1", False, False, "linux", True),
        ("1", False, False, "darwin", True),
        ("0", True, True, "linux", False),
        ("", True, False, "linux", True),
    ],
)
def test_when_cuda_is_wanted(backend, monkeypatch, choice, nvcc, driver, platform, wanted):
    if choice is not None:
        monkeypatch.setenv(backend.VARIABLE, choice)
    monkeypatch.setattr(backend, "machine_nvcc", lambda: Path("/cuda/bin/nvcc") if nvcc else None)
    monkeypatch.setattr(backend, "has_driver", lambda: driver)
    monkeypatch.setattr(backend.sys, "platform", platform)
    assert backend.wants_cuda() is wanted


def test_another_choice_is_refused_with_what_it_needs(backend, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "yes")
    with pytest.raises(SystemExit, match=r"'yes'.*0.*unset"):
        backend.wants_cuda()


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_requirements(backend, monkeypatch, hook):
    monkeypatch.setattr(backend.build_meta, hook, lambda settings: ["of-setuptools"])
    get = getattr(backend, hook)
    assert get() == ["of-setuptools"]

    monkeypatch.setenv(backend.VARIABLE, "1")
    with_nvcc = get()
    parts = {requirement.split("==")[0] for requirement in with_nvcc if requirement.startswith("nvidia-")}
    assert parts == {f"nvidia-{part}" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl", "cuda-runtime")}
    assert {requirement.split("==")[1] for requirement in with_nvcc if "==" in requirement} == {"13.0.*"}

    monkeypatch.setattr(backend, "machine_nvcc", lambda: Path("/cuda/bin/nvcc"))
    names = [re.split(r"\W", requirement)[0] for requirement in get()]
    assert names == ["of", "cmake", "ninja", "pybind11"]


def test_where_nvcc_is_found(backend, monkeypatch, tmp_path):
    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        nvcc = folder / "nvcc"
        nvcc.touch(mode=0o755)
        return nvcc

    in_packages = make(tmp_path / "packages" / "nvidia" / "cu13" / "bin")
    on_path = make(tmp_path / "path")
    in_home = make(tmp_path / "home" / "bin")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    assert backend.find_nvcc() == in_packages
    monkeypatch.setattr(backend, "machine_nvcc", backend.unpatched_machine_nvcc)
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert backend.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(in_home.parent.parent))
    assert backend.find_nvcc() == in_home


# --- the package without a GPU ----------------------------------------------------------------------------------------


def test_import_is_silent_and_the_reason_is_one_line():
    code = "import univid.kernels.cuda as c; r = c.unavailable(); assert r is None or r and len(r.splitlines()) == 1, r"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_reason_where_the_extension_is_missing(monkeypatch):
    monkeypatch.setattr(cuda, "extension", lambda: cuda.import_module("univid.kernels.cuda._absent"))
    cuda._reason.cache_clear()
    try:
        assert "UNIVID_BUILD_CUDA=1" in cuda.unavailable()
    finally:
        cuda._reason.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hopper", "reason"),
    [
        ((7, 5), False, "compute capability 7.5: 8.0 or later needed"),
        ((8, 6), False, None),
        ((8, 6), True, "compute capability 8.6: 9.0 (Hopper) needed"),
        ((9, 0), True, None),
        ((10, 0), True, "compute capability 10.0: 9.0 (Hopper) needed"),
    ],
)
def test_reason_by_compute_capability(monkeypatch, capability, hopper, reason):
    class Extension:
        @staticmethod
        def problem():
            return None

    monkeypatch.setattr(cuda, "extension", lambda: Extension)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda._reason.cache_clear()
    try:
        assert cuda.unavailable(torch.device("cuda", 0), hopper=hopper) == reason
        assert cuda.unavailable(torch.device("cpu")) == "tensors on cpu: an NVIDIA GPU needed"
    finally:
        cuda._reason.cache_clear()
