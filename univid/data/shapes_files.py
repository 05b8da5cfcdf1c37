"""Clips of the shapes world as files: tar shards in video2dataset's layout, of real mp4 videos."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from univid.data.files import write_frames
from univid.data.shapes import Shapes


def write_shards(
    folder: str | Path, world: Shapes, indices: Tensor, *, clips_per_shard: int = 1000, fps: float = 8
) -> list[Path]:
    """Write clips ``indices`` as ``00000.tar``, ``00001.tar``, … of ``key.mp4``, ``key.txt`` (a caption) and ``key.json``.

    The key is shard and place, as video2dataset's; the JSON has it, the caption, the clip's size and rate, and what it shows.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard: got {clips_per_shard}, needs >= 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(dir=folder) as room:
        for shard, part in enumerate(indices.split(clips_per_shard)):
            partial = Path(room) / f"{shard:05}.tar"
            with tarfile.open(partial, "w") as tar:
                _write_clips(tar, world, part, f"{shard:05}", fps, Path(room) / "clip.mp4")
            written.append(partial.replace(folder / partial.name))
    return written


def _write_clips(tar: tarfile.TarFile, world: Shapes, indices: Tensor, shard: str, fps: float, room: Path) -> None:
    attributes = world.sample(indices)
    frames, captions = world.render(attributes), world.captions(attributes)
    for place, (clip, caption) in enumerate(zip(frames.cpu().numpy(), captions, strict=True)):
        key = f"{shard}{place:04}"
        known: dict[str, Any] = {
            "key": key,
            "caption": caption,
            "index": int(indices[place]),
            **attributes.names(place),
        }
        known |= {"fps": fps, "num_frames": len(clip), "height": world.size, "width": world.size}
        write_frames(clip, room, fps)
        for suffix, content in (
            ("mp4", room.read_bytes()),
            ("txt", caption.encode()),
            ("json", json.dumps(known).encode()),
        ):
            entry = tarfile.TarInfo(f"{key}.{suffix}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
