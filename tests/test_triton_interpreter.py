"""The Triton kernels in Triton's interpreter, on a machine without a GPU: the operators' own tests, in a process of their own.

``TRITON_INTERPRET`` is read as kernels are decorated, so this process cannot interpret them.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("half", ["fp16", "fp32"])
@pytest.mark.parametrize(
    "operator",
    [
        "pyramid",
        "dual_stream",
        "temporal",
        "temporal_conv",
        "group_norm",
        "geglu",
        "concat",
        "add_bias",
        "add_layer_norm",
    ],
)
def test_interpreted(operator: str, half: str):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", "-k", half, "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"tests/test_{operator}.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^[1-9]\d* passed", result.stdout, flags=re.MULTILINE), result.stdout
    assert "skipped" not in result.stdout, result.stdout
