"""``univid encode``: what the frozen encoders make of clips, once, as shards that the trainer reads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm import tqdm

from univid.data.autoencoder import Autoencoder, load_autoencoder
from univid.data.batch import Batch, Sample, collate
from univid.data.cache import Cached, fingerprint
from univid.data.clip import Clip, load_clip
from univid.data.dataset import Clips, DataConfig, open_dataset
from univid.data.folder import TABLES, Folder
from univid.data.locks import alone
from univid.data.shards import HEADER, Shards

log = logging.getLogger("univid.data")

_FEW = 10  # broken clips that are no rate yet, or all of a smaller set


@dataclass(frozen=True)
class Counts:
    written: int  # clips
    skipped: int  # clips that could not be read
    there: int  # shards that had been finished before


def settings(model: Path, config: DataConfig, chosen: dict[str, Any], kept: dict[str, Any]) -> DataConfig:
    """What was not ``chosen`` is as the checkpoint was trained; without its settings (``kept``) it has to be said."""
    if kept:
        trained = {"sizes": ((kept["height"], kept["width"]),), "num_frames": kept["num_frames"], "fps": kept["fps"]}
        chosen = trained | chosen
    for name in ("num_frames", "sizes"):
        if name not in chosen:
            raise ValueError(f"{name}: not given, and {model} has no generation.json that says it")
    return replace(config, **chosen)


def encode(
    config: DataConfig,
    output: str | Path,
    model: str | Path,
    clip: str | Path | None = None,
    *,
    batch_size: int = 8,
    shard_size: int = 1000,
    workers: int = 4,
    max_skipped: float = 0.1,
    device: str = "cpu",
    progress: bool = True,
) -> Counts:
    """Write ``output``/000000.tar and so on: of each clip float16 latents, text and image tokens, with its caption and scores.

    A shard is written beside its name and renamed, and one that is there already is left as it is, so the same call goes on after an end
    of any kind.

    Args:
        model: a checkpoint's folder, of which vae/ and clip/ are read. clip: another CLIP, as
            :func:`univid.data.clip.load_clip` takes it. batch_size: clips that are encoded together. shard_size: clips of a shard.
        max_skipped: the largest part of all clips that may be broken.

    Raises:
        ValueError, OSError: the data or the model cannot be read, ``output`` holds something else or is full, or too many clips are broken.
    """
    output, vae_path, clip_path = Path(output), Path(model) / "vae", clip or Path(model) / "clip"
    for name, value, least in (("batch_size", batch_size, 1), ("shard_size", shard_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name}: got {value}; at least {least} needed")
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"max_skipped: got {max_skipped}; a number from 0 to 1 needed")
    dataset = open_dataset(config)
    if isinstance(dataset, Cached):
        raise ValueError(f"source: {config.paths[0]} is a cache already; clips needed")
    source = dataset.source
    paths = source.paths if isinstance(source, Shards) else [source.table]
    if output.resolve() in {path.parent.resolve() for path in paths}:
        raise ValueError(f"output: {output} holds the source; another folder needed")
    made_with = fingerprint(vae_path, clip_path)
    vae, tower = load_autoencoder(vae_path).to(device), load_clip(clip_path).to(device)
    for size in config.sizes:
        if size[0] % vae.factor or size[1] % vae.factor:
            raise ValueError(f"sizes: got {size[0]}x{size[1]}; multiples of {vae.factor} needed, the VAE's factor")
    if os.path.exists(output) and not os.path.isdir(output):
        raise FileExistsError(f"output: {output} is not a folder")
    with alone("output", output):
        shards = [range(first, min(first + shard_size, len(dataset))) for first in range(0, len(dataset), shard_size)]
        headers = [_header(dataset, clips, config, made_with) for clips in shards]
        todo = [number for number in range(len(shards)) if not _finished(output / _name(number), headers[number])]
        _refuse_others(output, {_name(number) for number in range(len(shards))})
        jobs = [job for number in todo for job in _jobs(dataset, number, shards[number], batch_size)]
        batches: DataLoader = DataLoader(
            _Reader(dataset),
            sampler=jobs,
            batch_size=None,
            num_workers=min(workers, os.cpu_count() or 1),
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
        written = skipped = 0
        encoder = _Encoder(vae, tower, torch.device(device))
        waiting = iter(batches)
        bar = tqdm(
            total=sum(len(shards[number]) for number in todo), desc="Encoding", unit="clip", disable=not progress
        )
        with bar:
            for number in todo:
                with _Writer(output / _name(number), headers[number]) as shard:
                    for _ in range(sum(job.shard == number for job in jobs)):
                        job, samples, reasons = next(waiting)
                        for reason in reasons:
                            log.warning("data: left out %s", reason)
                        skipped += len(reasons)
                        written += len(samples)
                        # Of all clips, not of those so far: broken ones lie together, as those of one upload do.
                        if skipped > max_skipped * len(dataset) and skipped >= min(_FEW, len(dataset)):
                            raise ValueError(
                                f"data: {skipped} of {len(dataset)} clips could not be read, more than"
                                f" max_skipped={max_skipped:g} of them; the last is {reasons[-1]}"
                            )
                        if samples:
                            encoder.write(job, samples, dataset, shard)
                        bar.update(len(job.clips))
        return Counts(written, skipped, len(shards) - len(todo))


class _Job(NamedTuple):
    shard: int
    clips: list[int]  # of one bucket


class _Reader(torch.utils.data.Dataset):
    def __init__(self, dataset: Clips):
        self.dataset = dataset

    def __getitem__(self, job: _Job) -> tuple[_Job, list[tuple[int, Sample]], list[str]]:
        samples, reasons = [], []
        for index in job.clips:
            try:
                samples.append((index, self.dataset[index]))
            except (ValueError, OSError) as error:
                reasons.append(" ".join(str(error).split()))
        return job, samples, reasons


class _Encoder:
    def __init__(self, vae: Autoencoder, clip: Clip, device: torch.device):
        self.vae, self.clip, self.device = vae, clip, device

    def write(self, job: _Job, samples: list[tuple[int, Sample]], dataset: Clips, shard: _Writer) -> None:
        batch: Batch = collate([sample for _, sample in samples])
        assert batch.frames is not None
        height, width = batch.frames.shape[2:4]
        self.vae.chunk = max(1, 2**21 // (height * width))  # frames; bounds the memory
        pixels = batch.frames.to(self.device).movedim(-1, 2)
        latents = torch.cat([self.vae.encode(clip[None].float() / 127.5 - 1) for clip in pixels])
        text, image = self.clip.text(batch.captions), self.clip.image(pixels[:, 0] / 255)
        tensors = {name: x.half().cpu() for name, x in (("latents", latents), ("text", text), ("image", image))}
        for row, (index, sample) in enumerate(samples):
            about = dataset.numbers(index) | {
                "key": sample.key,
                "caption": sample.caption,
                "fps": sample.fps,
                "height": height,
                "width": width,
            }
            shard.add(f"{index:09}.safetensors", save({name: x[row].contiguous() for name, x in tensors.items()}))
            shard.add(f"{index:09}.json", json.dumps(about).encode())


class _Writer:
    """A tar that takes its name when it is whole; nothing is left of it else."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.partial, self.header = path, path.with_name(f".{path.name}.partial"), header

    def __enter__(self) -> _Writer:
        try:
            self.file = self.partial.open("wb")
        except OSError as error:
            raise OSError(f"output: {self.path} cannot be written: {error.strerror}") from None
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)
        try:
            self.add(HEADER, json.dumps(self.header).encode())
        except OSError:
            self.__exit__(OSError)
            raise
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.tar.close()
                self.file.flush()
                os.fsync(self.file.fileno())
                self.partial.replace(self.path)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            with contextlib.suppress(OSError):  # what cannot be flushed belongs to a file that goes
                self.file.close()
            self.partial.unlink(missing_ok=True)

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        try:
            self.tar.addfile(member, io.BytesIO(data))
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> OSError:
        return OSError(f"output: {self.path} could not be written: {error.strerror}; the shards before it are whole")


def _name(number: int) -> str:
    return f"{number:06}.tar"


def _refuse_others(output: Path, names: set[str]) -> None:
    """A shard that this call does not write, as of clips that have left the source, would be trained on with those that it does."""
    for path in sorted(output.iterdir()):
        if path.suffix in (".tar", *TABLES) and path.name not in names:
            raise FileExistsError(
                f"output: {output} holds {path.name}, which is no shard of these clips; another folder needed"
            )


def _header(dataset: Clips, clips: range, config: DataConfig, made_with: dict[str, str]) -> dict[str, Any]:
    """What a shard is a cache of. Of a clip's file, which may be large, its size and beginning stand for the rest."""
    numbers = dataset.keep[clips.start : clips.stop]
    with ThreadPoolExecutor(8) as pool:
        files = hashlib.sha256(b"".join(pool.map(lambda number: _glimpse(dataset.source, number), numbers.tolist())))
    return {
        **made_with,
        "num_frames": config.num_frames,
        "sizes": [list(size) for size in config.sizes],
        "fps": config.fps,
        "clips": [clips.start, clips.stop],
        "keys": hashlib.sha256(b"\0".join(dataset.source.listing.keys[numbers].tolist())).hexdigest()[:16],
        "files": files.hexdigest()[:16],
    }


def _glimpse(source: Shards | Folder, number: int) -> bytes:
    """A digest."""
    try:
        size, beginning = source.beginning(number, 2**12)
        return hashlib.sha256(f"{size} {source.caption(number)}\0".encode() + beginning).digest()
    except (ValueError, OSError):
        return b""  # it is broken, and will be left out


def _finished(path: Path, header: dict[str, Any]) -> bool:
    """Whether a shard is there; one of something else is an error."""
    if not path.exists():
        return False
    try:
        with tarfile.open(path, "r:") as tar:
            file = tar.extractfile(HEADER)
            there = json.loads(file.read()) if file else {}
    except (tarfile.TarError, KeyError, json.JSONDecodeError):
        raise FileExistsError(
            f"output: {path} is something else than a shard of this command; another folder needed"
        ) from None
    for name, value in header.items():
        if there.get(name) != value:
            raise FileExistsError(
                f"output: {path} is of another encoding ({name} {there.get(name)}, now {value}); another folder needed"
            )
    return True


def _jobs(dataset: Clips, number: int, clips: range, batch_size: int) -> Iterator[_Job]:
    """Batches of a shard, each of one bucket."""
    indices = np.arange(clips.start, clips.stop)
    for bucket in np.unique(dataset.buckets[indices]):
        members = indices[dataset.buckets[indices] == bucket].tolist()
        for first in range(0, len(members), batch_size):
            yield _Job(number, members[first : first + batch_size])


def _as_it_is(read: Any) -> Any:
    return read
