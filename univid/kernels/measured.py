"""Which backend was measured to be the fastest, where that is not the first one: ``measured.json``.

``python -m benchmarks.report`` writes it from the results in ``benchmarks/results/``: by architecture ("sm_90"), operator (a
module's name), direction and class of shapes, the name of a backend. What is not in it was not measured, or is fastest
on the first backend that can run it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PATH = Path(__file__).with_suffix(".json")

# The sizes that decide, by operator.
SIZES = {
    "pyramid": ("tokens",),
    "dual_stream": ("tokens",),
    "temporal": ("frames",),
    "temporal_conv": ("channels", "taps", "epilogue"),
    "group_norm": ("tokens",),
    "concat": ("channels",),
    "add_bias": ("channels",),
    "geglu": ("channels",),
    "linear_geglu": ("channels",),
    "add_layer_norm": ("channels",),
}


def shape_class(operator: str, **sizes: int | bool) -> str:
    """The class of a call's shapes: tokens and frames up to a power of two, from half of it on; channels up to that or
    three quarters of it; taps as they are; whether there is an epilogue (bias or residual)."""

    def term(name: str) -> str:
        size = sizes[name]
        if name == "epilogue":
            return "epilogue" if size else "no epilogue"
        if name == "taps":
            return f"taps = {size}"
        limit = 1 << (size - 1).bit_length()
        return f"{name} <= {3 * limit // 4 if name == 'channels' and 4 * size <= 3 * limit else limit}"

    return ", ".join(map(term, SIZES[operator]))


@cache
def architecture(device: torch.device) -> str:
    """Of an NVIDIA GPU, as what was measured is filed by."""
    import torch  # here, so that a report of results does without

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def choices(architecture: str, operator: str, direction: str) -> dict[str, str]:
    """{class of shapes: the backend that was fastest}."""
    return _table().get(architecture, {}).get(operator, {}).get(direction, {})


@cache
def _table() -> dict:
    return json.loads(PATH.read_text())
