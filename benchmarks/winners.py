"""``python -m benchmarks.winners``: the configurations of Triton kernels that were measured on this GPU go into the package.

To be run after what uses the kernels (the benchmarks, a training, a generation) on a GPU to itself. Winners of kernels
whose source has changed since are dropped; what is taken out of ``winners.json`` is measured anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
import triton

from univid.kernels import triton as kernels
from univid.kernels.measured import architecture
from univid.kernels.triton import launch
from univid.kernels.triton.launch import Tuned


def all_tuned() -> Iterator[Tuned]:
    for module in sorted(info.name for info in iter_modules(kernels.__path__)):
        for value in vars(import_module(f"{kernels.__name__}.{module}")).values():
            if isinstance(value, Tuned) and value.name.startswith(f"{module}."):  # not what it imports
                yield value


def collected(device: torch.device, before: dict[str, Any]) -> dict[str, Any]:
    """An architecture's winners, those of before among them where a kernel is still the same."""
    found: dict[str, Any] = {}
    for tuned in all_tuned():
        old = before.get("kernels", {}).get(tuned.name, {})
        kept = old["winners"] if old.get("source") == tuned.source else {}
        if winners := kept | tuned.winners(device):
            found[tuned.name] = {"source": tuned.source, "winners": dict(sorted(winners.items()))}
    card = torch.get_device_module(device).get_device_name(device)
    return {"gpu": card, "triton": triton.__version__, "kernels": dict(sorted(found.items()))}


def main() -> int:
    if not torch.cuda.is_available():
        print("winners: an NVIDIA GPU is needed", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    table = dict(launch.shipped())
    table[architecture(device)] = collected(device, table.get(architecture(device), {}))
    launch.WINNERS.write_text(json.dumps(table, indent=1) + "\n")
    print(launch.WINNERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
