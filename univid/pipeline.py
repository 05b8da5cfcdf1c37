"""From a prompt, a picture, or both, to a video."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from univid.arguments import Picture, conditions, generators
from univid.checkpoint import PARTS, find
from univid.data.autoencoder import Autoencoder, load_autoencoder
from univid.data.clip import VOCABULARY, Clip, load_clip
from univid.data.files import (
    Frames,
    beside,
    check_fps,
    check_place,
    check_writable,
    is_empty,
    numbered,
    write_frames,
)
from univid.data.tensors import CLIP_WEIGHTS, HALF_WEIGHTS, WEIGHTS, read_json
from univid.graphs import Graphed, Pace, graph_key
from univid.guidance import Pass, Weight, absent, by_level, guide, passes, scalar
from univid.model import ImageAdapter, UNet, load_sd21
from univid.model.config import typed
from univid.model.weights import check_dtype
from univid.schedulers import SCHEDULERS, chosen, read_schedule, sampler_of, write_schedule

SETTINGS = "generation.json"

Given = tuple[int, tuple, dict[str, Any]]  # of a batch of passes: their number, the U-Net's keys, and its options


@dataclass(frozen=True)
class Settings:
    """What a call takes where it does not say: what the checkpoint was trained for."""

    num_frames: int = 24
    height: int = 320
    width: int = 576
    fps: float = 8.0
    steps: int = 50
    scheduler: str = "ddim"
    guidance_scale: float = 7.5  # of the text
    image_guidance_scale: float = 5.0
    guidance_rescale: float = 0.0


@dataclass(frozen=True)
class Videos:
    """``frames`` uint8 ``(V, T, H, W, 3)``."""

    frames: Frames
    fps: float

    def save(self, path: str | Path) -> list[Path]:
        """Write .mp4, .gif, a folder of png, or one .png of a single frame; of several videos, each under a number: clip-0.mp4, …"""
        names = numbered(path, len(self.frames))
        for name in names:  # all before the first is written
            check_writable(name, self.frames.shape[1])
        return [write_frames(frames, name, self.fps) for frames, name in zip(self.frames, names, strict=True)]


class UniVidPipeline:
    """The U-Net with all that it takes to go from words and pictures to pixels.

    Args:
        unet, adapter: UniVid's own parts. vae, clip: Stable Diffusion's autoencoder and OpenCLIP. scheduler: the noise schedule, as a
            diffusers scheduler's config. settings: what calls default to.
    """

    def __init__(
        self,
        unet: UNet,
        adapter: ImageAdapter,
        vae: Autoencoder,
        clip: Clip,
        scheduler: dict[str, Any],
        settings: Settings | None = None,
    ):
        self.unet, self.adapter, self.vae, self.clip = unet.eval(), adapter.eval(), vae, clip
        self.scheduler = chosen(scheduler)
        self.settings = settings or Settings()
        self.low_memory = (
            False  # passes one by one, single frames to decode, and CLIP on the device only while it works
        )
        self.device = torch.device("cpu")
        self._kept: Graphed | None = None  # the last call's

    # --- loading and saving ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype = torch.float32) -> UniVidPipeline:
        """From a folder that :meth:`save_pretrained` wrote, or, where there is none of that name, one that ships.

        Raises:
            FileNotFoundError, ValueError: a part that is missing, or does not fit its configuration or the other parts.
        """
        check_dtype(torch_dtype)
        path = find(path, "path")
        return cls(
            UNet.from_pretrained(path / "unet", torch_dtype=torch_dtype),
            ImageAdapter.from_pretrained(path / "image_adapter", torch_dtype=torch_dtype),
            load_autoencoder(path / "vae", torch_dtype),
            load_clip(path / "clip", torch_dtype),
            read_schedule(path / "scheduler"),
            read_settings(path / SETTINGS),
        )._fitting(path)

    @classmethod
    def from_sd21(
        cls, sd_path: str | Path, clip_path: str | Path, torch_dtype: torch.dtype = torch.float32
    ) -> UniVidPipeline:
        """Stable Diffusion 2.1, given time: where training starts. Until then a video is its pictures, one after the other.

        Args:
            sd_path: a diffusers pipeline's folder, with unet/, vae/ and scheduler/. clip_path: what :func:`load_clip` takes.
        """
        check_dtype(torch_dtype)
        sd_path = Path(sd_path)
        clip = load_clip(clip_path, torch_dtype)
        unet = load_sd21(sd_path, torch_dtype=torch_dtype, image_dim=clip.image_dim)
        adapter = ImageAdapter(clip.image_dim, unet.config.context_dim, unet.config.image_tokens)
        return cls(
            unet,
            adapter.to(torch_dtype),
            load_autoencoder(sd_path / "vae", torch_dtype),
            clip,
            read_schedule(sd_path / "scheduler"),
        )._fitting(sd_path)

    def _fitting(self, path: Path) -> UniVidPipeline:
        """Itself. Raises ValueError: parts of ``path`` that do not fit each other."""
        unet, vae, adapter = self.unet.config, self.vae.vae.config, self.adapter.to_config()
        predicted = self.scheduler.get("prediction_type", "epsilon")  # diffusers' default
        for name, got, needed, whose in (
            ("scheduler: prediction_type", predicted, unet.prediction_type, "unet"),
            ("vae: latent_channels", vae.latent_channels, unet.in_channels, "unet"),
            ("clip: text_cfg.width", self.clip.text_dim, unet.context_dim, "unet"),
            ("image_adapter: context_dim", adapter["context_dim"], unet.context_dim, "unet"),
            ("image_adapter: image_dim", adapter["image_dim"], self.clip.image_dim, "clip"),
            ("image_adapter: image_dim", adapter["image_dim"], unet.image_dim, "unet"),
            ("image_adapter: image_tokens", adapter["image_tokens"], unet.image_tokens, "unet"),
            ("unet: out_channels", unet.out_channels, unet.in_channels, "in_channels"),
        ):
            if got != needed:
                raise ValueError(f"path: {path}: {name}: got {got!r}, needs {needed!r}, as its {whose}")
        return self

    def save_pretrained(self, path: str | Path) -> None:
        """Every part as safetensors under ``path``: unet/, image_adapter/, vae/, clip/, scheduler/, and the settings.

        They are written beside ``path`` and take its place together. Of a folder that is there, what is no part of a
        model stays in it.

        Raises:
            ValueError: ``path`` is, or holds, the folder one stands in. FileExistsError: it is a file. PermissionError: it
                cannot be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"path: {path} is a file; a folder's name needed")
        real = path.resolve()  # where a link leads, not the link, is replaced
        real.parent.mkdir(parents=True, exist_ok=True)
        check_place("path", path)
        beside(real, partial(self._write, None if is_empty(real) else real))

    def _write(self, there: Path | None, path: Path) -> None:
        """All parts under ``path``, and what else is ``there``."""
        self.unet.save_pretrained(path / "unet")
        self.adapter.save_pretrained(path / "image_adapter")
        self.vae.save(path / "vae")
        self.clip.save(path / "clip")
        write_schedule(self.scheduler, path / "scheduler")
        (path / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        if there is None or not there.is_dir():
            return

        def replaced(folder: str, names: list[str]) -> set[str]:
            """What was written anew, and a former model's weights and words, which would be read with the new ones."""
            inside = Path(folder).relative_to(there)
            former = (WEIGHTS, HALF_WEIGHTS, *CLIP_WEIGHTS, VOCABULARY) if str(inside) in PARTS else ()
            return {name for name in names if (path / inside / name).is_file() or name in former}

        shutil.copytree(there, path, True, replaced, _link, dirs_exist_ok=True)

    def to(self, device: torch.device | str) -> UniVidPipeline:
        """Move all parts. On a GPU the U-Net runs as a CUDA graph, which is kept for calls of the same sizes until one of
        others, or the next move."""
        if not isinstance(device, (str, int, torch.device)):
            raise TypeError(f"device: got {device!r}; a device or its name needed")
        device, self._kept = torch.device(device), None
        for part in (self.unet, self.adapter, self.vae):
            part.to(device)
        self.clip.to("cpu" if self.low_memory else device)
        self.device = device
        return self

    def enable_low_memory(self) -> UniVidPipeline:
        """Keep CLIP on the CPU while it does not work, run guidance passes one by one and decode single frames."""
        self.low_memory, self.vae.chunk = True, 1
        return self.to(self.device)

    # --- generation --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        negative_prompt: str | None = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        steps: int | None = None,
        scheduler: str | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        text_weight: Weight = 1.0,
        image_weight: Weight = 1.0,
        seed: int | None = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_videos: int = 1,
        callback: Callable[[int, int, Tensor], None] | None = None,
        progress: bool = True,
    ) -> Videos:
        """Generate videos from text, from a picture, or from both.

        Args:
            prompt: a text, or one for each video. image: what the video shows: a file, a PIL image, uint8 ``(H, W, 3)``, or a tensor
                ``(3, H, W)`` in [0, 1]; one for all, or one for each prompt. At least one of the two.
            negative_prompt: what guidance leads away from, where there is a prompt.
            num_frames, height, width, fps, steps, scheduler ("ddim", "dpm++" or "euler"), guidance_scale, image_guidance_scale,
                guidance_rescale: the checkpoint's settings by default. One frame makes a picture.
            text_weight, image_weight: how much each condition counts: a number, one for every frame, or either by level, as
                ``{1: 0.5, 8: 2.0}`` (a level that is not named counts 1).
            seed: video i is drawn from seed + i, whatever is drawn with it; or a ``generator`` (CPU) that all are
                drawn from, or one for each video.
            num_videos: of each prompt. callback: called as ``callback(step, steps, latents)`` after every step.

        Raises:
            ValueError, TypeError, FileNotFoundError: an argument that does not fit, before anything is computed.
        """
        s = self._settings(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            steps=steps,
            scheduler=scheduler,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        sampler = sampler_of(s.scheduler, self.scheduler, s.steps)
        levels = self.unet.config.factors
        weights = {
            "text": by_level("text_weight", text_weight, levels, s.num_frames),
            "image": by_level("image_weight", image_weight, levels, s.num_frames),
        }
        for name, weight, condition in (("text", text_weight, prompt), ("image", image_weight, image)):
            if not all(torch.as_tensor(w).isfinite().all() for w in weights[name].values()):
                raise ValueError(f"{name}_weight: got {weight}; finite numbers needed")
            if condition is None:
                weights[name] = by_level(f"{name}_weight", 0.0, levels, s.num_frames)
        with_text, with_image = not absent(weights["text"]), not absent(weights["image"])
        if not with_text and not with_image:
            raise ValueError("prompt, image: both are absent or have weight 0; at least one is needed")
        if not isinstance(negative_prompt, str | None):
            raise TypeError(f"negative_prompt: got {negative_prompt!r}; a text needed")
        if negative_prompt and not with_text:
            warnings.warn(
                "negative_prompt: without a prompt the text takes no part, and so it does nothing", stacklevel=3
            )
        prompts, pictures, videos = conditions(prompt, image, scalar(num_videos))
        drawn = generators(generator, scalar(seed), videos)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: got {callback!r}; a function needed")
        plan = passes(with_text, with_image, s.guidance_scale, s.image_guidance_scale)
        with self._clip_on_device():
            text = self._text(prompts, negative_prompt or "", videos) if with_text else None
            tokens = self._tokens(pictures, videos) if with_image else None
        times = sampler.timesteps.to(self.device, torch.float32)  # whichever the scheduler: one graph serves all
        latents = self._noise(drawn, s).to(self.device) * sampler.init_noise_sigma
        bar = tqdm(sampler.timesteps, "Sampling", disable=not progress or sys.stderr is None, unit="step")
        pace = Pace(self.device)
        batches = [[one] for one in plan] if self.low_memory else [plan]
        given = [self._given(batch, text, tokens, weights, s) for batch in batches]
        with bar:
            predict = self._predictor(latents, times[0], given)
            for step, t in enumerate(bar):
                predictions = predict(sampler.scale_model_input(latents, t), times[step])
                latents = sampler.step(guide(predictions, plan, s.guidance_rescale), t, latents).prev_sample
                if callback is not None:
                    callback(step + 1, s.steps, latents)
                pace.step()
        if isinstance(predict, Graphed) and not self.low_memory:
            self._kept = predict
        del predict, predictions, given  # a graph that is not kept gives its memory to the decoder
        return Videos(self._decode(latents).numpy(), s.fps)

    def _predictor(self, x: Tensor, t: Tensor, given: Sequence[Given]) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
        """A function of latents and a noise level, like x and t, that gives the prediction of every pass."""
        if self.device.type == "cuda":
            return self._graphed(x, t, given)
        return lambda x, t: _predict(self.unet, x, t, given)

    def _graphed(self, x: Tensor, t: Tensor, given: Sequence[Given]) -> Graphed:
        """The last call's graph, or one to be captured; one for all batches: what these need in turn is the same memory."""
        kept, self._kept = self._kept, None  # taken out, so that a call in another thread does not write into it
        key = graph_key(self.unet, x, t, given)
        if kept is not None and kept.key == key:
            kept.load(given)
            return kept
        return Graphed(partial(_predict, self.unet), given, key)  # captured once this is left, and the kept one freed

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames; where memory is short, in that of the graph."""
        try:
            return self.vae.decode(latents)
        except torch.OutOfMemoryError:
            if self._kept is None:
                raise
        self._kept = None
        return self.vae.decode(latents)

    def _given(
        self,
        batch: Sequence[Pass],
        text: dict[bool, Tensor] | None,
        tokens: Tensor | None,
        weights: dict[str, dict[int, float | Tensor]],
        s: Settings,
    ) -> Given:
        """What the U-Net is given with a batch of passes, at every step."""
        count = len(batch)
        keys = self.unet.condition(
            None if text is None else torch.cat([text[one.prompted] for one in batch]),
            None if tokens is None else tokens.repeat(count, 1, 1),
        )
        videos = len(next(x for x in ((text or {}).get(False), tokens) if x is not None))
        pictured = torch.tensor([one.pictured for one in batch])

        def shown(weight: float | Tensor) -> float | Tensor:
            """An image weight that is 0 in the passes without the image."""
            if not pictured.any():
                return 0.0
            if pictured.all() and not isinstance(weight, Tensor):
                return weight
            each = torch.as_tensor(weight).reshape(1, -1) * pictured[:, None]
            return each.repeat_interleave(videos, 0).to(self.device)

        options = {
            "text_weight": {
                f: w.to(self.device)[None] if isinstance(w, Tensor) else w for f, w in weights["text"].items()
            },
            "image_weight": {f: shown(w) for f, w in weights["image"].items()},
            "fps": torch.full((count * videos,), float(s.fps), device=self.device),
        }
        return count, keys, options

    def _text(self, prompts: Sequence[str], negative_prompt: str, videos: int) -> dict[bool, Tensor]:
        """The tokens of the passes with the prompt (True) and without it (False), ``(V, L, context_dim)``."""
        different = list(dict.fromkeys((negative_prompt, *prompts)))
        tokens = dict(zip(different, self.clip.text(different, negative_prompt), strict=True))
        each = [prompts[i * len(prompts) // videos] for i in range(videos)]
        return {
            True: torch.stack([tokens[prompt] for prompt in each]),
            False: tokens[negative_prompt].expand(videos, -1, -1),
        }

    def _tokens(self, pictures: Sequence[Tensor], videos: int) -> Tensor:
        """``(V, L, context_dim)`` of the images."""
        tokens = torch.cat([self.adapter(self.clip.image(picture[None].to(self.device))) for picture in pictures])
        return tokens.repeat_interleave(videos // len(pictures), 0)

    def _noise(self, drawn: Iterable[torch.Generator], s: Settings) -> Tensor:
        """``(V, T, C, h, w)``, drawn on the CPU, so that a seed means the same everywhere."""
        f = self.vae.factor
        shape = (s.num_frames, self.unet.config.in_channels, s.height // f, s.width // f)
        return torch.stack([torch.randn(shape, generator=one, dtype=torch.float32) for one in drawn])

    # --- arguments ---------------------------------------------------------------------------------------------------------------

    def _settings(self, **given: Any) -> Settings:
        """The call's own settings over the checkpoint's, checked."""
        s = replace(self.settings, **{name: scalar(value) for name, value in given.items() if value is not None})
        most = self.unet.config.max_frames
        for name in ("num_frames", "height", "width", "steps"):
            value = getattr(s, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}; a whole number >= 1 needed")
        if s.num_frames > most:
            raise ValueError(f"num_frames: got {s.num_frames}; at most {most} needed, the model's max_frames")
        unit = self.vae.factor * self.unet.config.factors[-1]
        if s.height % unit or s.width % unit:
            near = [max(unit, round(size / unit) * unit) for size in (s.height, s.width)]
            raise ValueError(
                f"height, width: got {s.height}x{s.width}; multiples of {unit} needed, of which the nearest is {near[0]}x{near[1]}"
            )
        noised = self.scheduler.get("num_train_timesteps", 1000)  # diffusers' default
        if s.steps > noised:
            raise ValueError(f"steps: got {s.steps}; at most {noised} needed, the scheduler's num_train_timesteps")
        for name in ("fps", "guidance_scale", "image_guidance_scale", "guidance_rescale"):
            if type(getattr(s, name)) not in (int, float):
                raise TypeError(f"{name}: got {getattr(s, name)!r}; a number needed")
        check_fps(s.fps)
        for name in ("guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(s, name)):
                raise ValueError(f"{name}: got {getattr(s, name)}; a finite number needed")
        if not isinstance(s.scheduler, str) or s.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler: got {s.scheduler!r}; one of {', '.join(SCHEDULERS)} needed")
        if not 0 <= s.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale: got {s.guidance_rescale}; a number in [0, 1] needed")
        return s

    @contextmanager
    def _clip_on_device(self) -> Iterator[None]:
        """In low-memory mode only for so long: its weights are then the ones on the CPU again, and not copied back."""
        home = [(parameter, parameter.data) for parameter in self.clip.parameters()]
        self.clip.to(self.device)
        try:
            yield
        finally:
            if self.low_memory:
                for parameter, data in home:
                    parameter.data = data
                self.clip.to("cpu")  # what is left, buffers
                torch.cuda.empty_cache()


def _predict(unet: UNet, x: Tensor, t: Tensor, batches: Sequence[Given]) -> list[Tensor]:
    """The U-Net's prediction of every pass, of all batches."""
    x = x.to(unet.conv_in.bias.dtype)
    predictions: list[Tensor] = []
    for count, keys, options in batches:
        repeated = x.repeat(count, 1, 1, 1, 1)
        predictions += unet(repeated, t.expand(len(repeated)), *keys, **options).chunk(count)
    return predictions


def _link(source: str, target: str) -> None:
    """A copy in no time and room, where the disk has that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_settings(path: Path) -> Settings:
    """Of the file that :meth:`UniVidPipeline.save_pretrained` wrote; the defaults where there is none."""
    choices = read_json(path) if path.is_file() else {}
    if unknown := sorted(choices.keys() - {field.name for field in fields(Settings)}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}")
    try:
        return Settings(
            **{f.name: typed(f.name, choices[f.name], f.default) for f in fields(Settings) if f.name in choices}
        )
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
