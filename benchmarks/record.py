"""Where results go: ``benchmarks/results/<gpu>/<operator>.json``, with the card's own limits in the same run."""

import datetime
import hashlib
import json
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# An operator's module, its name on every floor. These files and how it is timed make its results stale when they change.
MODULES = {
    "pyramid_st_attn": "pyramid",
    "dual_stream_attn": "dual_stream",
    "temporal_attn": "temporal",
    "temporal_conv": "temporal_conv",
    "group_norm_silu": "group_norm",
    "add_bias": "add_bias",
    "concat": "concat",
    "geglu": "geglu",
    "linear_geglu": "linear_geglu",
    "add_layer_norm": "add_layer_norm",
}

# What some of them have in common, of univid/kernels/triton/.
SHARED = {"temporal_conv": ("column_sums", "rows"), "add_bias": ("column_sums", "rows"), "concat": ("rows",)}

# The same for whole models, of which only their own files count, not their operators'.
MODELS = {
    "unet": ("univid/model/*.py", "univid/model/configs/sd21.toml", "benchmarks/bench_unet.py"),
    "pipeline": (
        "univid/model/*.py",
        "univid/model/configs/sd21.toml",
        "univid/pipeline.py",
        "univid/schedulers.py",
        "univid/guidance.py",
        "univid/graphs.py",
        "univid/data/autoencoder.py",
        "univid/data/clip.py",
        "univid/data/files.py",
        "benchmarks/bench_pipeline.py",
    ),
}


@cache
def environment() -> dict:
    """The card, the versions, and the limits as measured now: TFLOP/s of an 8192³ bfloat16 product, GB/s of a copy
    (read + write)."""
    import torch  # here, so that a report of results needs neither PyTorch nor a GPU
    import triton

    from benchmarks.timing import eager_ms

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = median(eager_ms(lambda: a @ b, 300))
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy_ms = median(eager_ms(lambda: y.copy_(x), 100))
    major, minor = torch.cuda.get_device_capability()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "architecture": f"sm_{major}{minor}",
        "driver": _smi("driver_version"),
        "clocks_mhz": {"sm_max": _smi("clocks.max.sm"), "memory_max": _smi("clocks.max.memory")},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "flash_attn_4": _version("flash-attn-4"),
        "gemm_tflops": round(2 * 8192**3 / product_ms / 1e9, 1),
        "copy_gbs": round(2 * x.numel() * 2 / copy_ms / 1e6),
    }


def write(name: str, rows: list[dict], results: Path = RESULTS) -> Path:
    """Write the rows of one operator to ``<name>.json``, beside and renamed."""
    limits = environment()
    folder = results / re.sub(r"[^a-z0-9]+", "-", limits["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    head = {"environment": limits, "sources_sha256": sources_sha256(rows[0]["op"])}
    # One row a line: a diff shows what moved.
    lines = ",\n".join(json.dumps(row) for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    partial.replace(path)
    return path


CPP = (".cu", ".cuh", ".h")

# Of C++: a literal, which stays, or a comment, with the space before it.
_LITERAL_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\')|[ \t]*(?://[^\n]*|/\*.*?\*/)', re.DOTALL)


def sources_sha256(operator: str) -> str:
    """Of what an operator's results depend on: of C++ all but comments, in which kernels say what they were measured at."""
    digest = hashlib.sha256()
    for path in sorted(sources(operator)):
        text = path.read_text()
        if path.suffix in CPP:
            text = without_comments(text)
        digest.update(text.encode())
    return digest.hexdigest()


def without_comments(code: str) -> str:
    """C++ without comments and the lines that were nothing else."""
    bare = _LITERAL_OR_COMMENT.sub(lambda match: match[1] or "", code)
    return "".join(f"{line}\n" for line in bare.splitlines() if line.strip())


def sources(operator: str) -> list[Path]:
    if operator in MODELS:
        return [path for pattern in MODELS[operator] for path in ROOT.glob(pattern)]
    name = MODULES[operator]
    patterns = (
        f"univid/ops/{name}.py",
        f"univid/kernels/*/{name}.py",
        f"univid/kernels/*/{name}_*.py",
        f"csrc/{name}[._]*",
        f"benchmarks/bench_{name}.py",
        "benchmarks/harness.py",
        "benchmarks/peers.py",
        "benchmarks/timing.py",
        *(f"univid/kernels/triton/{shared}.py" for shared in SHARED.get(name, ())),
    )
    longer = tuple(other for other in MODULES.values() if other.startswith(name) and other != name)
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    own = [path for path in found if not path.name.removeprefix("bench_").startswith(longer)]
    return sorted(set(own).union(*map(_included, own)))


def _included(path: Path) -> set[Path]:
    """What a C++ file includes of csrc, and what that does."""
    if path.suffix not in CPP:
        return set()
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    found = {(path.parent / name).resolve() for name in names}
    return found.union(*map(_included, found))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
