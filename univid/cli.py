"""``univid``: generate videos, prepare clips for training, and see what this machine can do."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

_EXAMPLES = """\
  univid generate "a red star moves left" -o star.gif
  univid generate --image start.png --model path/to/univid -o clip.mp4
  univid generate "a cat in the snow" --image cat.png --sweep 0,0.5,1 --model path/to/univid -o sweep.mp4
  univid encode clips/ -o latents --model path/to/univid
  univid doctor
  univid bench
  univid info shapes
  univid judge shapes
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it did what it says, 2 where it cannot, as for bad input, 130 if it was interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # escapes for what it has no characters for
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    # Before PyTorch is there, whose waiting threads spin: with one of two cores taken by others, a clip took 98 s spinning and 18 s
    # asleep (2026-11-29).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _complain(f"warning: {message}")
            return options.command(options)
    except KeyboardInterrupt:
        _complain("stopped; nothing is half-written")
        return 130
    except MemoryError as error:
        _complain(f"out of memory: {str(error) or 'this machine has too little'}")
    except ModuleNotFoundError as error:
        extra = "benchmark" if options.command is bench else "generate"
        _complain(f"{error}; `pip install 'univid[{extra}]'` brings it")
    except RuntimeError as error:
        lower = type(error).__name__ == "OutOfMemoryError" and getattr(options, "low_memory", None) is False
        _complain(str(error).partition("\n")[0] + ("; --low-memory needs less" if lower else ""))  # PyTorch says more
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        _complain(str(error))
    return 2


def _complain(text: str) -> None:
    """In one line."""
    print("univid: " + text.replace("\n", "\\n"), file=sys.stderr)


def _tell(text: str, written: str) -> None:
    """Print what there is to say of files; where it cannot be printed, as into a closed pipe, they are written all the same."""
    try:
        print(text, flush=True)
    except OSError as error:
        _complain(f"warning: standard output: {error.strerror}; {written}: written")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for what Python does when it ends


def generate(options: argparse.Namespace) -> int:
    import torch

    from univid.arguments import check_num_videos
    from univid.checkpoint import find
    from univid.data.files import check_writable, numbered
    from univid.ops.dispatch import wanted_by_environment
    from univid.pipeline import SETTINGS, UniVidPipeline, read_settings

    grid = _sweep(options)
    if not options.prompt and not options.image:
        raise ValueError("PROMPT, --image: got neither; at least one is needed")
    model, output = find(options.model), Path(options.output)
    check_num_videos(options.num_videos)
    wanted_by_environment()
    num_frames = options.num_frames
    if num_frames is None:
        num_frames = read_settings(model / SETTINGS).num_frames
    elif num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}; at least 1 needed")
    for name in numbered(output, options.num_videos):  # before the model is loaded, let alone sampled
        check_writable(name, num_frames)
    device = _device(options.device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = UniVidPipeline.from_pretrained(model, torch_dtype=dtype)
    pipe = (pipe.enable_low_memory() if options.low_memory else pipe).to(device)
    settings = {
        name: getattr(options, name)
        for name in (
            *("prompt", "image", "negative_prompt", "num_frames", "height", "width", "fps", "steps", "scheduler"),
            *("guidance_scale", "image_guidance_scale", "guidance_rescale", "seed", "num_videos"),
        )
    }
    if grid:
        from univid.sweep import sweep

        written = [sweep(pipe, grid, settings, output)]
    else:
        weights = {
            name: getattr(options, name)
            for name in ("text_weight", "image_weight")
            if getattr(options, name) is not None
        }
        written = pipe(**settings, **weights).save(output)
    names = [str(path) for path in written]
    _tell("\n".join(names), ", ".join(names))
    return 0


def encode(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from univid.checkpoint import find
    from univid.data import encode as encoding
    from univid.data.dataset import DataConfig
    from univid.pipeline import SETTINGS, read_settings

    model = find(options.model)
    kept = asdict(read_settings(model / SETTINGS)) if (model / SETTINGS).is_file() else {}
    given = {"num_frames": options.num_frames, "sizes": tuple(options.size or ()), "fps": options.fps}
    config = encoding.settings(
        model,
        DataConfig(paths=tuple(options.source), min_score=dict(options.min_score)),
        {name: value for name, value in given.items() if value not in (None, ())},
        kept,
    )
    device = _device(options.device)
    names = ("batch_size", "shard_size", "workers", "max_skipped")
    choices = {name: getattr(options, name) for name in names}
    counts = encoding.encode(config, options.output, model, options.clip, device=device, **choices)
    left_out = f", {counts.skipped} left out" if counts.skipped else ""
    before = f"; {counts.there} shards were there" if counts.there else ""
    _tell(f"{options.output}: {counts.written} clips{left_out}{before}", options.output)
    return 0


def doctor(options: argparse.Namespace) -> int:
    from univid.doctor import main

    return main()


def info(options: argparse.Namespace) -> int:
    from univid.checkpoint import describe, find

    print(describe(find(options.checkpoint, "checkpoint")))
    return 0


def judge(options: argparse.Namespace) -> int:
    import torch

    from univid.checkpoint import find
    from univid.judge import Examination, examine
    from univid.pipeline import UniVidPipeline

    device = _device(options.device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = UniVidPipeline.from_pretrained(find(options.checkpoint, "checkpoint"), torch_dtype=dtype).to(device)
    settings = {name: getattr(options, name) for name in ("count", "pairs", "batch", "steps", "seed")}
    found = examine(Examination(pipe, **settings), options.sets.split(","), Path(options.output))
    _tell(found, options.output)
    return 0


def bench(options: argparse.Namespace) -> int:
    root = Path(__file__).parent.parent / "benchmarks"
    if not root.is_dir():
        raise FileNotFoundError(
            "bench: the benchmarks are part of the repository, not of the package; run it in a clone"
        )
    import pytest
    import torch

    if not torch.cuda.is_available():  # pytest would skip every row, and call that a success
        raise ValueError("bench: PyTorch finds no GPU here; the benchmarks time one")
    return int(pytest.main([str(root), "--quick"]))


def _device(given: str | None) -> str:
    import torch

    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {device!r}; cuda or cpu needed")
    if kind != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {device!r}; PyTorch finds no GPU here")
    try:
        return device if kind == "cuda" else torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device: got {device!r}; cuda or cpu needed") from None


def _sweep(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Pairs of text and image weight: --sweep 0,0.5,1 goes from the image alone to the text alone."""
    if options.sweep is None:
        return []
    if not (options.prompt and options.image):
        raise ValueError("--sweep: goes from a text to an image; PROMPT and --image are needed")
    for name, value in (
        ("--text-weight", options.text_weight),
        ("--image-weight", options.image_weight),
        ("--num-videos", None if options.num_videos == 1 else options.num_videos),
    ):
        if value is not None:
            raise ValueError(
                f"{name}: got {value} with --sweep, which makes one video of each of its weights; drop one"
            )
    pairs = []
    for entry in options.sweep.split(","):
        parts = entry.split(":")
        try:
            text, image = map(float, parts if len(parts) == 2 else (entry, 1 - float(entry)))
            if not (math.isfinite(text) and math.isfinite(image)):
                raise ValueError
        except ValueError:
            raise ValueError(f"--sweep: got {entry!r}; numbers, or text:image pairs such as 0.5:1, needed") from None
        if text == image == 0:
            raise ValueError(f"--sweep: got {entry!r}; at least one of text and image needs a weight")
        pairs.append((text, image))
    return pairs


def _weight(text: str) -> float | list[float] | dict[int, float]:
    """``0.5``; ``0,0.5,1``, one for every frame; ``1=0.5,8=2``, by level."""
    try:
        if "=" in text:
            entries = [entry.split("=") for entry in text.split(",")]
            by_level = {int(level): float(weight) for level, weight in entries}
            if len(by_level) < len(entries):
                raise argparse.ArgumentTypeError(f"got {text!r}; one weight for a level needed")
            return by_level
        return [float(weight) for weight in text.split(",")] if "," in text else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; a number, one for every frame (0,0.5,1), or by level (1=0.5,8=2) needed"
        ) from None


def _size(text: str) -> tuple[int, int]:
    """``320x576``: height and width."""
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; HEIGHTxWIDTH needed, such as 320x576") from None
    return height, width


def _score(text: str) -> tuple[str, float]:
    """``aesthetic=4.5``."""
    try:
        name, least = text.split("=")
        return name, float(least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; FIELD=NUMBER needed, such as aesthetic=4.5") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one line, as every other."""
        line = f"{self.prog}: {message}".replace("\n", "\\n")
        self.exit(2, f"{line}; `{self.prog} --help` shows what there is\n")


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(prog="univid", description=__doc__, epilog=f"examples:\n{_EXAMPLES}", **form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        name = function.__name__
        own = [line for line in _EXAMPLES.splitlines() if line.startswith(f"  univid {name}")]
        epilog = "\n".join(["examples:" if len(own) > 1 else "example:", *own])
        added = commands.add_parser(name, help=help, description=help, epilog=epilog, **form)
        added.set_defaults(command=function)
        return added

    make = command(generate, "Make a video from a text, a picture, or both.")
    make.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the video shows")
    make.add_argument("--image", metavar="FILE", help="a picture of what the video shows")
    make.add_argument(
        "--model", default="shapes", help="a checkpoint's folder, or the name of one that ships (default: shapes)"
    )
    make.add_argument(
        "-o", "--output", default="video.mp4", help=".mp4, .gif, .png, or a folder for png files (default: video.mp4)"
    )
    make.add_argument("--negative-prompt", default="", metavar="TEXT", help="what it should not show")
    make.add_argument(
        "--text-weight",
        type=_weight,
        metavar="W",
        help="a number; 0,0.5,1 by frame; 1=0.5,8=2 by level (default: 1); below 0 after =: --text-weight=-0.5,1",
    )
    make.add_argument("--image-weight", type=_weight, metavar="W", help="the same of the picture")
    make.add_argument(
        "--sweep",
        metavar="W,W,…",
        help="a labelled grid over text weights (image weight 1 - W), or text:image pairs;"
        " below 0 after =: --sweep=-0.5,1",
    )
    make.add_argument("--seed", type=int, default=0, help="of the first video; the next has the next (default: 0)")
    make.add_argument("--num-videos", type=int, default=1, metavar="V", help="of several each has a number in its name")
    make.add_argument("--device", help="cuda or cpu (default: the GPU, if there is one)")
    make.add_argument("--low-memory", action="store_true", help="slower, in less GPU memory")
    kept = make.add_argument_group("by default the checkpoint's")
    kept.add_argument("--num-frames", type=int, metavar="T", help="1 makes a picture")
    kept.add_argument("--height", type=int, metavar="PIXELS")
    kept.add_argument("--width", type=int, metavar="PIXELS")
    kept.add_argument("--fps", type=float, help="frames per second")
    kept.add_argument("--steps", type=int, help="sampling steps")
    kept.add_argument("--scheduler", help="ddim, dpm++ or euler")
    kept.add_argument("--guidance-scale", type=float, metavar="S", help="of the text; 1 guides nowhere")
    kept.add_argument("--image-guidance-scale", type=float, metavar="S", help="the same of the picture")
    kept.add_argument("--guidance-rescale", type=float, metavar="PHI", help="0 to 1; tames large scales")

    cache = command(encode, "Keep what the frozen encoders make of clips: latents and tokens, for training.")
    cache.add_argument("source", nargs="+", metavar="SOURCE", help="tar shards, a .csv or .jsonl, or a folder of them")
    cache.add_argument("-o", "--output", required=True, metavar="FOLDER", help="of the cache's shards")
    cache.add_argument("--model", default="shapes", metavar="CHECKPOINT", help="whose vae/ and clip/ (default: shapes)")
    cache.add_argument("--clip", metavar="PATH", help="another CLIP: a folder, or NAME:PATH of one open_clip knows")
    cache.add_argument("--num-frames", type=int, metavar="T", help="1: images (default: the checkpoint's)")
    cache.add_argument("--size", type=_size, action="append", metavar="HxW", help="more than one: aspect buckets")
    cache.add_argument("--fps", type=float, help="of what is kept (default: the checkpoint's)")
    cache.add_argument("--min-score", type=_score, action="append", default=[], metavar="FIELD=X", help="of key.json")
    cache.add_argument("--batch-size", type=int, default=8, metavar="CLIPS")
    cache.add_argument("--shard-size", type=int, default=1000, metavar="CLIPS")
    cache.add_argument("--workers", type=int, default=4, help="processes that decode")
    cache.add_argument(
        "--max-skipped",
        type=float,
        default=0.1,
        metavar="X",
        help="of all clips the part that may be broken (default: 0.1)",
    )
    cache.add_argument("--device", help="cuda or cpu (default: the GPU, if there is one)")

    command(doctor, "GPU, driver, versions, and which backend runs each operator, and why.")
    command(bench, "Time the operators on this GPU (the quick set).")
    show = command(info, "What a checkpoint holds.")
    show.add_argument("checkpoint", metavar="CHECKPOINT", help="its folder, or the name of one that ships")
    test = command(judge, "How often clips of a checkpoint of the shapes world show what they were told to.")
    test.add_argument("checkpoint", metavar="CHECKPOINT", help="its folder, or the name of one that ships")
    test.add_argument("-o", "--output", default="judge.json", help="what was found (default: judge.json)")
    test.add_argument(
        "--sets",
        default="t2v,i2v,ti2v,sweep",
        help="which (default: t2v,i2v,ti2v,sweep); true: the judge itself, on true clips and on the autoencoder's copies",
    )
    test.add_argument("--count", type=int, default=500, metavar="N", help="clips of each set (default: 500)")
    test.add_argument("--pairs", type=int, default=200, metavar="N", help="of the sweeps (default: 200)")
    test.add_argument("--batch", type=int, default=50, metavar="N", help="clips at a time (default: 50)")
    test.add_argument("--steps", type=int, default=25, help="sampling steps (default: 25)")
    test.add_argument("--seed", type=int, default=0)
    test.add_argument("--device", help="cuda or cpu (default: the GPU, if there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
