"""Where checkpoints are, and what a checkpoint's folder holds, read without loading it."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from safetensors import safe_open

from univid.data.tensors import check_safetensors, object_in, read_json

PARTS = ("unet", "image_adapter", "vae", "clip")
MODELS = Path(__file__).parent / "models"  # what ships in the package


def find(name: str | Path, argument: str = "model") -> Path:
    """A checkpoint's folder: a path, or one that ships, by its name. A pipeline's folder of that name comes first.

    Raises:
        FileNotFoundError: neither; ``argument`` is what the message calls it.
    """
    shipped = sorted(path.name for path in MODELS.glob("*/"))
    if str(name) in shipped and not is_pipeline(Path(name)):
        return MODELS / name
    if name and Path(name).is_dir():  # "" is not the folder one stands in
        return Path(name)
    raise FileNotFoundError(
        f"{argument}: got {str(name)!r}; a checkpoint's folder or one of {', '.join(shipped)} needed"
    )


def is_pipeline(folder: Path) -> bool:
    return (folder / "unet" / "config.json").is_file()


def describe(folder: Path) -> str:
    """Parts, parameters, dtypes, bytes, and the settings that a call defaults to.

    Raises:
        FileNotFoundError: it is no checkpoint. ValueError: a file that cannot be read.
    """
    missing = [part for part in PARTS if not list((folder / part).glob("*.safetensors"))]
    if missing:
        raise FileNotFoundError(
            f"checkpoint: {folder} has no weights (safetensors) in {', '.join(f'{m}/' for m in missing)}"
        )
    lines = [str(folder), ""]
    for part in PARTS:
        tensors, parameters, kinds, size = _weights(folder / part)
        kind = ", ".join(sorted(kinds))
        lines.append(
            f"{part:<14} {parameters / 1e6:9.2f}M parameters in {tensors:4} tensors  {kind:<8} {size / 1e6:9.1f} MB"
        )
    unet = folder / "unet" / "config.json"
    described = {
        "U-Net": object_in(read_json(unet), "univid", unet),
        "noise": read_json(folder / "scheduler" / "scheduler_config.json"),
    }
    if (settings := folder / "generation.json").exists():  # generating does without
        described["settings"] = read_json(settings)
    for title, choices in described.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<24} {value}" for name, value in choices.items() if not name.startswith("_")]
    return "\n".join(lines)


def _weights(folder: Path) -> tuple[int, int, Counter[str], int]:
    """Tensors, parameters, dtypes and bytes of a part."""
    count, parameters, kinds, size = 0, 0, Counter[str](), 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                part = file.get_slice(name)
                count += 1
                parameters += prod(part.get_shape())
                kinds[part.get_dtype()] += 1
    return count, parameters, kinds, size
