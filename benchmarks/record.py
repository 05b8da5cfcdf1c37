"""Where results go: ``benchmarks/results/<gpu>/<operator>.json``, with the card's own limits in the same run."""

import datetime
import hashlib
import json
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The files whose change makes an operator's results stale: its name on every floor, and how it is timed.
FILES = {
    "pyramid_st_attn": "pyramid",
    "dual_stream_attn": "dual_stream",
    "temporal_attn": "temporal",
    "temporal_conv": "temporal_conv",
    "group_norm_silu": "group_norm",
}


@cache
def environment() -> dict:
    """The card, the versions, and the limits as measured now: TFLOP/s of an 8192³ bfloat16 product, GB/s of a copy
    (read + write)."""
    import torch  # here, so that a report of results needs neither PyTorch nor a GPU
    import triton

    from benchmarks.timing import eager_ms

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = eager_ms(lambda: a @ b, 300)
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy_ms = eager_ms(lambda: y.copy_(x), 100)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _smi("driver_version"),
        "clocks_mhz": {"sm_max": _smi("clocks.max.sm"), "memory_max": _smi("clocks.max.memory")},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "gemm_tflops": round(2 * 8192**3 / product_ms / 1e9, 1),
        "copy_gbs": round(2 * x.numel() * 2 / copy_ms / 1e6),
    }


def write(operator: str, rows: list[dict]) -> Path:
    """Write an operator's rows, beside and renamed."""
    limits = environment()
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", limits["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{operator}.json"
    head = {"environment": limits, "sources_sha256": sources_sha256(operator)}
    # One row a line: a diff shows what moved.
    lines = ",\n".join(json.dumps(row) for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    partial.replace(path)
    return path


def sources_sha256(operator: str) -> str:
    """Of the sources that an operator's results depend on."""
    digest = hashlib.sha256()
    for path in sorted(sources(operator)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources(operator: str) -> list[Path]:
    name = FILES[operator]
    patterns = (
        f"univid/ops/{name}.py",
        f"univid/kernels/*/{name}.py",
        f"univid/kernels/*/{name}_bwd.py",
        f"csrc/{name}[._]*",
    )
    return [path for pattern in patterns for path in ROOT.glob(pattern)]


def _smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
