"""Where batches come from, and how they become what the U-Net takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from train.config import Stream, need
from train.parts import Parts
from train.processes import Processes
from train.sharding import stable_seed
from univid.data.batch import Batch, to_device
from univid.data.cache import Cached
from univid.data.dataset import DataConfig, open_dataset
from univid.data.loader import Loader
from univid.model import UNetConfig

POOLED = ("fps", "latents", "text", "image")


class Source(Protocol):
    """Endless batches of this rank; its state is of all ranks together, and holds for any number of them."""

    @property
    def skipped(self) -> int:
        """Broken clips that this rank has met."""
        ...

    def next(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def open_source(
    name: str, stream: Stream, config: UNetConfig, encoder: Encoder, processes: Processes, seed: int
) -> Source:
    """Raises ValueError, OSError: a source that does not exist, or does not fit (univid.data.dataset.open_dataset)."""
    if stream.source == "random":
        return RandomLatents(stream, config, encoder, processes)
    if stream.source == "shapes":
        return RenderedShapes(name, stream, encoder, processes, stable_seed(seed, name))
    files = DataConfig(
        paths=(stream.source,),
        num_frames=stream.num_frames,
        sizes=stream.buckets,
        fps=stream.fps,
        min_score=stream.min_score,
    )
    with processes.first_before_others():  # it writes the indices that the others read
        dataset = open_dataset(files, encoder.parts.fingerprint)
    if isinstance(dataset, Cached) and None not in dataset.rates:
        rates = " or ".join(f"{rate:g}" for rate in sorted(dataset.rates))
        kept = stream.fps in (Stream.fps, *dataset.rates)
        need(f"streams.{name}.fps", stream.fps, kept, f"{rates}, as the cache that is its source")
    if not isinstance(dataset, Cached):
        encoder.parts.check_fits(config)
    elif encoder.parts.folder is None and not dataset.random:
        raise ValueError(
            f"streams.{name}.source: {stream.source} is a cache, needs the folder of the VAE and CLIP that made it: model.frozen"
        )
    return Loader(
        dataset,
        stream.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=stable_seed(seed, name),
        workers=stream.workers,
        max_skipped=stream.max_skipped,
    )


def kind_of(stream: Stream) -> type:
    """Of what `open_source` would open."""
    return {"random": RandomLatents, "shapes": RenderedShapes}.get(stream.source, Loader)


def as_opened(stream: Stream, source: Source) -> Stream:
    """With the rate of its clips, where they have one: a cache's is its own."""
    rates: set[float | None] = getattr(source, "rates", set())
    (rate,) = rates if len(rates) == 1 else (None,)
    return stream if rate is None else replace(stream, fps=rate)


def check_streams(streams: Mapping[str, Stream], config: UNetConfig, factor: int) -> None:
    """Raises ValueError: clips that the U-Net does not take. ``factor``: pixels along the side of a latent."""
    unit = factor * config.factors[-1]
    for name, stream in streams.items():
        if stream.num_frames > config.max_frames:
            raise ValueError(
                f"streams.{name}.num_frames: got {stream.num_frames}, needs at most the U-Net's max_frames = {config.max_frames}"
            )
        for size in stream.buckets:
            if any(side % unit for side in size):
                nearest = "x".join(str(max(1, round(side / unit)) * unit) for side in size)
                raise ValueError(
                    f"streams.{name}: got {size[0]}x{size[1]}, needs multiples of {unit}, of which {nearest} is the nearest"
                )


class _Counted:
    """A source of samples that are numbered: the ranks take turns of a batch each."""

    skipped = 0

    def __init__(self, stream: Stream, processes: Processes):
        self.stream, self.processes = stream, processes
        self.position = 0  # samples that all ranks together have had

    def _indices(self) -> Tensor:
        size = self.stream.batch_size
        first = self.position + self.processes.rank * size
        self.position += self.processes.world_size * size
        return torch.arange(first, first + size)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class RandomLatents(_Counted):
    """The same random latents and tokens in every step, under other keys: to measure speed, with nothing to load."""

    def __init__(self, stream: Stream, config: UNetConfig, encoder: Encoder, processes: Processes):
        super().__init__(stream, processes)
        device = processes.device
        clips, factor = stream.batch_size, encoder.factor
        size = (config.in_channels, stream.height // factor, stream.width // factor)
        shapes = (stream.num_frames, *size), (77, config.context_dim), (257, config.image_dim)
        first = processes.rank * clips
        generators = [torch.Generator(device).manual_seed(clip) for clip in range(first, first + clips)]
        self.latents, self.text, self.image = (
            torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators])
            for shape in shapes
        )
        self.fps = torch.full((clips,), stream.fps, device=device)

    def next(self) -> Batch:
        keys = [f"random/{index}" for index in self._indices().tolist()]
        return Batch(keys, [""] * len(keys), self.fps, latents=self.latents, text=self.text, image=self.image)


class RenderedShapes(_Counted):
    """Clips of the shapes world, rendered on the device; or a pool of them, encoded once and kept there.

    A pool's clips come in another order each time round, by a permutation that depends on the seed.
    """

    def __init__(self, name: str, stream: Stream, encoder: Encoder, processes: Processes, seed: int):
        from univid.data.shapes import HELD_OUT, MOTIONS, Shapes

        super().__init__(stream, processes)
        if unknown := set(stream.motions) - set(MOTIONS):
            raise ValueError(f"streams.{name}.motions: got {min(unknown)!r}, needs some of {', '.join(MOTIONS)}")
        self.motions = torch.tensor([MOTIONS.index(name) for name in stream.motions])
        if stream.first >= HELD_OUT:
            raise ValueError(
                f"streams.{name}.first: got {stream.first}, needs a number < {HELD_OUT}, where held-out clips begin"
            )
        if stream.height != stream.width:
            raise ValueError(f"streams.{name}: got shapes of {stream.height}x{stream.width}, needs squares")
        self.world = Shapes(num_frames=stream.num_frames, size=stream.height)
        self.encoder, self.seed = encoder, seed
        self.pool: Batch | None = None
        if stream.pool:
            parts = [self._encoded(indices) for indices in (stream.first + torch.arange(stream.pool)).split(256)]
            self.pool = Batch(
                [key for part in parts for key in part.keys],
                [caption for part in parts for caption in part.captions],
                **{name: torch.cat([getattr(part, name) for part in parts]) for name in POOLED},
            )

    def next(self) -> Batch:
        indices = self._indices()
        return self._render(self.stream.first + indices) if self.pool is None else self._of_pool(self.pool, indices)

    def _render(self, indices: Tensor) -> Batch:
        given = {"motion": self.motions[indices % len(self.motions)]} if len(self.motions) else {}
        attributes = self.world.sample(indices, **given)
        frames = self.world.render(attributes, self.processes.device)
        # What moves cannot be told from a picture.
        kind: Literal["random", "appearance"] = "random" if self.stream.num_frames > 1 else "appearance"
        captions = self.world.captions(attributes, kind=kind)
        fps = torch.full((len(indices),), self.stream.fps, device=frames.device)
        return Batch([f"shapes/{i}" for i in indices.tolist()], captions, fps, frames)

    def _encoded(self, indices: Tensor) -> Batch:
        batch = self._render(indices)
        encode = self.encoder
        latents, text, image = encode.latents(batch), encode.text(batch), encode.image(batch)
        return replace(batch, frames=None, latents=latents, text=text, image=image)

    def _of_pool(self, pool: Batch, indices: Tensor) -> Batch:
        times, places = indices // len(pool.keys), indices % len(pool.keys)
        rows = torch.cat([self._order(time)[places[times == time]] for time in times.unique().tolist()])
        there = to_device(rows, self.processes.device)
        tensors = {name: getattr(pool, name)[there] for name in POOLED}
        chosen = rows.tolist()
        return Batch([pool.keys[row] for row in chosen], [pool.captions[row] for row in chosen], **tensors)

    def _order(self, time: int) -> Tensor:
        if getattr(self, "_time", None) != time:
            generator = torch.Generator().manual_seed(stable_seed(self.seed, time))
            self._time, self._permutation = time, torch.randperm(self.stream.pool, generator=generator)
        return self._permutation


@dataclass(frozen=True)
class Conditioned:
    """A batch on the device, as the U-Net takes it."""

    latents: Tensor  # (B, T, C, h, w)
    text: Tensor  # (B, L, context_dim)
    image: Tensor | None  # (B, L, image_dim) of the first frame, before the adapter
    fps: Tensor  # (B,)


class Encoder:
    """The frozen parts at work: on frames and captions, where the data does not come as latents and tokens.

    Args:
        context_dim: of the prompt's tokens. trial: there is nothing but random ones, and zeros are the empty prompt's.
    """

    def __init__(self, parts: Parts, device: torch.device, context_dim: int, trial: bool = False):
        self.parts, self.device, self.context_dim, self.trial = parts, device, context_dim, trial
        self._empty: Tensor | None = None

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent."""
        return 8 if self.trial else self.parts.factor

    def __call__(self, batch: Batch, task: str) -> Conditioned:
        return Conditioned(
            self.latents(batch),
            self.empty(len(batch.keys)) if task == "i2v" else self.text(batch),
            None if task == "t2v" else self.image(batch),
            batch.fps.to(self.device, non_blocking=True),
        )

    def latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.to(self.device, torch.float32, non_blocking=True)
        vae, pixels = self.parts.vae, self._pixels(batch)
        vae.chunk = max(1, 2**21 // (pixels.shape[-1] * pixels.shape[-2]))  # frames; bounds the memory
        return vae.encode(pixels * 2 - 1)

    def text(self, batch: Batch) -> Tensor:
        if batch.text is not None:
            return batch.text.to(self.device, self.parts.dtype, non_blocking=True)
        return self.parts.clip.text(batch.captions)

    def image(self, batch: Batch) -> Tensor:
        if batch.image is not None:
            return batch.image.to(self.device, self.parts.dtype, non_blocking=True)
        return self.parts.clip.image(self._pixels(batch)[:, 0])

    def empty(self, clips: int) -> Tensor:
        """The empty prompt's tokens."""
        if self._empty is None:
            if self.trial:
                self._empty = torch.zeros(1, 77, self.context_dim, device=self.device)
            else:
                self._empty = self.parts.clip.text([""])
        return self._empty.expand(clips, -1, -1)

    def _pixels(self, batch: Batch) -> Tensor:
        """``(B, T, 3, H, W)`` in [0, 1]."""
        assert batch.frames is not None  # else the cache lacks tokens
        frames = batch.frames.to(self.device, non_blocking=True)
        return frames.movedim(-1, 2).to(self.parts.dtype) / 255
