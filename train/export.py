"""From a run to a pipeline's folder: ``python train/export.py RUN OUT [key=value ...]``, with the averaged weights, as safetensors.

A model of the stage t2v has seen no image: its keys and values of the image become copies of the text's, from which the stage
adapters is to start.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that holds univid/ and train/

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from train.checkpoint import checkpoints, read_state, step_of, whole
from train.config import Config, Stream, asks_for_help, load
from train.parts import Parts
from train.sharding import Denoiser
from train.validation import assemble
from univid.checkpoint import find
from univid.data.files import check_place
from univid.model import UNetConfig

if TYPE_CHECKING:
    from univid.pipeline import Settings, UniVidPipeline

HISTORY = "training.json"


@dataclass(frozen=True, kw_only=True)
class Export:
    step: int = 0  # of the checkpoint; 0: the last
    weights: Literal["ema", "model"] = "ema"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    fold_fps: bool = False  # of a model that saw one rate: its embedding becomes a part of the noise level's


def export(run: Path, out: Path, choices: Export = Export()) -> Path:
    """Write ``out``; the checkpoint that it is of.

    Raises:
        FileNotFoundError: no run, or no such checkpoint.
    """
    found = {step_of(path): path for path in checkpoints(run / "checkpoints")}
    step = choices.step or max(found, default=0)
    if step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise FileNotFoundError(f"run: {run} has no checkpoint of step {step}; there is {there}")
    state = read_state(found[step])
    config = load(Config, run / "config.json")
    unet = UNetConfig.of(state["unet"])
    dtype: torch.dtype = getattr(torch, choices.dtype)
    model = assemble(unet, read_weights(found[step], choices.weights))
    if choices.fold_fps:
        fold_fps(model, config.streams)
    parts = Parts(config.model, dtype, torch.device("cpu"))
    pipeline_of(model.to(dtype), state["stage"], parts, config.streams).save_pretrained(out)
    write_history(out, config, {"steps": step})
    return found[step]


@torch.no_grad()
def fold_fps(model: Denoiser, streams: Mapping[str, Stream]) -> None:
    """Make the embedding of the rate that all clips had a part of the noise level's bias: two layers less, and clips are the same.
    (A picture, whose rate training does not tell, gets it too.)

    Raises:
        ValueError: the model has no such embedding, or it saw several rates.
    """
    unet = model.unet
    rates = sorted({stream.fps for stream in streams.values() if stream.num_frames > 1 and stream.share > 0})
    if unet.fps_embedding is None:
        raise ValueError("fold_fps: got True; the model has no embedding of the rate (fps_conditioning)")
    if len(rates) != 1:
        raise ValueError(f"fold_fps: got True; a model of one rate needed, this one saw {rates or 'pictures alone'}")
    bias = unet.time_embedding.linear_2.bias
    bias.add_(unet.fps_embedding(torch.tensor(rates), bias.dtype)[0])
    unet.fps_embedding, unet.config = None, replace(unet.config, fps_conditioning=False)


def check_out(out: Path, name: str = "export") -> None:
    """See, before hours of training, that a model can be written there. Raises OSError."""
    real = out.resolve()
    if real.exists() and not real.is_dir():
        raise FileExistsError(f"{name}: got {str(out)!r}, a file, needs a folder's name")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{name}: {out} cannot be written: {error.strerror}") from None
    check_place(name, out)


def pipeline_of(model: Denoiser, stage: str, parts: Parts, streams: Mapping[str, Stream]) -> UniVidPipeline:
    """What a stage trained, with the parts that stayed as they are, set to what it was trained for."""
    if stage == "t2v":
        for transformer in model.unet.transformers():
            attention = transformer.cross_attention
            attention.to_k_image.load_state_dict(attention.to_k.state_dict())
            attention.to_v_image.load_state_dict(attention.to_v.state_dict())
    pipe = parts.pipeline(model)
    pipe.settings = settings_of(streams, pipe.settings, model.unet.config.max_frames)
    return pipe


def settings_of(streams: Mapping[str, Stream], settings: Settings, max_frames: int) -> Settings:
    """Frames, size and rate of the largest clips that were trained on; where there were images alone, what the model takes."""
    clips = [
        (stream.num_frames * height * width, stream.num_frames, height, width, stream.fps)
        for stream in streams.values()
        for height, width in stream.buckets
        if stream.num_frames > 1 and stream.share > 0
    ]
    if clips:
        _, frames, height, width, fps = max(clips)
        settings = replace(settings, num_frames=frames, height=height, width=width, fps=fps)
    return replace(settings, num_frames=min(settings.num_frames, max_frames))


def write_history(out: Path, config: Config, piece: dict[str, Any]) -> None:
    """``unet/training.json``: the pieces of training behind an exported model, this one and those of what it started from."""
    earlier = find(config.model.start, "model.start") / "unet" / HISTORY if config.model.start else None
    pieces = json.loads(earlier.read_text()) if earlier is not None and earlier.is_file() else []
    optimizer = {name: getattr(config.optimizer, name) for name in ("lr", "warmup", "final", "ema")}
    streams = {
        name: {key: getattr(stream, key) for key in ("source", "share", "batch_size", "pool", "first", "motions")}
        for name, stream in config.streams.items()
    }
    chosen = {"stage": config.stage, "seed": config.seed, "of_steps": config.steps, **optimizer, "streams": streams}
    own = json.loads(json.dumps({"steps": piece["steps"], **chosen}))
    if pieces and pieces[-1] == pieces[-1] | own:  # exported before, onto what it started from
        pieces.pop()
    (out / "unet" / HISTORY).write_text(json.dumps([*pieces, piece | chosen], indent=1) + "\n")


def read_weights(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """Whole tensors, in this one process: of the average where there is one (what is not trained has none)."""
    reader = dcp.FileSystemReader(checkpoint)
    with whole(checkpoint):
        stored: Any = reader.read_metadata().state_dict_metadata
    names = [name.removeprefix("model.") for name in stored if name.startswith("model.")]
    keys = {name: f"{kind}.{name}" if f"{kind}.{name}" in stored else f"model.{name}" for name in names}
    tensors = {key: torch.empty(stored[key].size) for key in keys.values()}
    with warnings.catch_warnings(), whole(checkpoint):
        warnings.filterwarnings("ignore", "torch.distributed is")  # disabled, as it should be
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensors[key] for name, key in keys.items()}


def main(arguments: Sequence[str]) -> int:
    if asks_for_help(arguments, __doc__, Export):
        return 0
    try:
        if len(arguments) < 2:
            raise ValueError("arguments: RUN and OUT needed, two folders")
        run, out, *overrides = arguments
        source = export(Path(run), Path(out), load(Export, None, overrides))
        print(f"{out}: {source}")
    except (ValueError, OSError, SafetensorError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
