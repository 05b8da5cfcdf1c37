"""Configuration: frozen dataclasses, filled from a TOML file and from ``key=value`` arguments."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import signal
import sys
import tomllib
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from univid.data.files import FPS

CONFIGS = Path(__file__).parent / "configs"

C = TypeVar("C")


def need(name: str, got: Any, ok: bool, needs: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got!r}, needs {needs}")


def need_at_least(least: int, config: Any, *names: str) -> None:
    for name in names:
        need(name, getattr(config, name), getattr(config, name) >= least, f"a number >= {least}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What training starts from: a pipeline's folder, Stable Diffusion 2.1, or random weights."""

    start: str = ""  # a folder that train/export.py or save_pretrained wrote, or the name of a model that ships
    sd21: str = ""  # Stable Diffusion 2.1's folder, with clip: OpenCLIP's
    clip: str = ""
    unet: str = "shapes"  # else random weights of this configuration, or TOML file
    frozen: str = ""  # and vae/, clip/, scheduler/, generation.json from such a folder; "": untrained ones, for a trial


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Batches of one modality and length. A step takes one stream, the same on all ranks."""

    source: str = "shapes"  # "shapes", "random" (noise, for measuring), or files: shards, a table, a folder, or a cache
    share: float = 1.0  # of the steps, in relation to the other streams
    batch_size: int = 8  # clips on each rank, in each of the step's parts
    num_frames: int = 16  # T; 1: images
    height: int = 64
    width: int = 64
    sizes: tuple[str, ...] = ()  # of files: such as "320x576", aspect buckets, one a batch; (): the size above
    fps: float = 8.0
    workers: int = 4  # of files: processes that read
    max_skipped: float = 0.1  # of files: the part of a rank's clips that may be broken
    min_score: dict[str, float] = field(default_factory=dict)  # of files: the least value by field, as of DataConfig
    pool: int = 0  # of "shapes": clips that are rendered and encoded once and kept on the device; 0: each is new
    motions: tuple[str, ...] = ()  # of "shapes": only these, such as "clockwise", to see more of what is hard; (): all
    first: int = 0  # of "shapes": the number of the first clip, by which one run sees other clips than another

    def __post_init__(self) -> None:
        need_at_least(1, self, "batch_size", "num_frames", "height", "width")
        need_at_least(0, self, "share", "workers", "pool", "first")
        need("fps", self.fps, FPS[0] <= self.fps <= FPS[1], f"a number from {FPS[0]} to {FPS[1]}")
        need("max_skipped", self.max_skipped, 0 <= self.max_skipped <= 1, "a number in [0, 1]")
        for size in self.sizes:
            need("sizes", size, re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is not None, "HEIGHTxWIDTH, such as 320x576")
        files = self.source not in ("shapes", "random")
        for name in ("sizes", "min_score"):
            need(name, getattr(self, name), files or not getattr(self, name), "files as the source")
        for name in ("pool", "motions", "first"):
            need(name, getattr(self, name), self.source == "shapes" or not getattr(self, name), "shapes as the source")

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of its batches."""
        chosen = tuple((int(h), int(w)) for h, w in (size.split("x") for size in self.sizes))
        return chosen or ((self.height, self.width),)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with a linear warm-up, then a cosine down to ``final`` of the rate."""

    lr: float = 1e-4
    warmup: int = 100  # steps
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01  # not of vectors: biases and norms
    clip_norm: float = 1.0
    accumulate: int = 1  # parts of a step, one after the other
    ema: float = 0.999  # decay of the average, which begins as (1 + step) / (10 + step)
    min_snr: float = 0.0  # gamma of the loss's min-SNR weights; 0: all noise levels count alike
    max_skipped: int = 20  # steps in a row with a gradient that is not finite, after which training stops

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip_norm"):
            need(name, getattr(self, name), getattr(self, name) > 0, "a number > 0")
        need_at_least(0, self, "warmup", "weight_decay", "min_snr")
        need_at_least(1, self, "accumulate", "max_skipped")
        for name in ("beta1", "beta2", "ema"):
            need(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        need("final", self.final, 0 <= self.final <= 1, "a number in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Compute:
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; "auto": float32 on the CPU only
    compile: str = "none"  # or a backend of torch.compile for the blocks, such as "inductor"
    cuda_graphs: bool = True  # on GPUs: each kind of step is captured and replayed; not where blocks are compiled
    activation_checkpointing: bool = False  # blocks are computed again in the backward, all but their attention
    replicas: int = 0  # copies of the shards; 0: one a node

    def __post_init__(self) -> None:
        need_at_least(0, self, "replicas")
        if self.compile != "none":  # to ask for the others takes seconds
            import torch

            backends = torch.compiler.list_backends(exclude_tags=())
            need("compile", self.compile, self.compile in backends, f"none or one of {', '.join(backends)}")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    every: int = 1000  # steps
    keep: int = 3

    def __post_init__(self) -> None:
        need_at_least(1, self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class Log:
    every: int = 50  # steps
    tensorboard: bool = True
    wandb: str = ""  # a project of Weights & Biases

    def __post_init__(self) -> None:
        need_at_least(1, self, "every")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Clips of fixed prompts and seeds, drawn from the averaged weights."""

    every: int = 0  # steps; 0: never
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()  # files, one for each prompt; "": none
    steps: int = 25

    def __post_init__(self) -> None:
        need_at_least(0, self, "every")
        need_at_least(1, self, "steps")
        need("prompts", self.prompts, bool(self.prompts) or not self.every, f"one or more, for every = {self.every}")
        fits = len(self.images) in (0, len(self.prompts))
        need("images", self.images, fits, f"none, or one for each of {len(self.prompts)} prompts")
        shown = all(map(any, zip_longest(self.prompts, self.images)))
        need("prompts", self.prompts, shown or not self.every, "a text, or an image beside it, in each")


@dataclass(frozen=True, kw_only=True)
class Config:
    run: str = "runs/shapes"  # the folder of checkpoints, logs and validation clips
    stage: Literal["t2v", "adapters", "joint"] = "joint"
    steps: int = 20_000
    seconds: float = 0.0  # after which this command stops as at a SIGTERM, the model's making counted; 0: never
    export: str = ""  # a folder that gets the averaged weights in the end, as by train/export.py
    seed: int = 0
    model: Model = Model()
    streams: dict[str, Stream] = field(default_factory=lambda: {"video": Stream()})
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    checkpoints: Checkpoints = Checkpoints()
    log: Log = Log()
    validation: Validation = Validation()

    def __post_init__(self) -> None:
        for name in ("run", "export"):
            need(name, getattr(self, name), "\0" not in getattr(self, name), "a folder's name")
        need_at_least(1, self, "steps")
        need_at_least(0, self, "seconds")
        total = sum(stream.share for stream in self.streams.values())
        need("streams", {n: s.share for n, s in self.streams.items()}, total > 0, "a share > 0")


# --- reading ----------------------------------------------------------------------------------------------------------


def load(cls: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """A dataclass from a TOML (or JSON) file, if any, and ``key=value`` texts over it, such as ``optimizer.lr=1e-4``.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not TOML; an unknown key (the nearest is named), a value of
            another type, or one that the dataclass refuses.
    """
    choices: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            known = ", ".join(sorted(str(p) for p in CONFIGS.glob("*.toml")))
            raise FileNotFoundError(f"config: {path} does not exist; there are {known}")
        try:
            text = path.read_text()
            choices = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except ValueError as error:
            raise ValueError(f"config: {path} is not TOML: {error}") from None
        if not isinstance(choices, dict):
            raise ValueError(f"config: {path} holds a {type(choices).__name__}, needs a table")
    named = _named(cls, choices)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"arguments: got {override!r}, needs key=value")
        table, *name = key.split(".")[:2]
        if name and name[0] not in named.get(table, name):
            raise _unknown(f"{table}.", name[0], named[table])
        _put(choices, key, _Text(text))
    return _value(cls, choices, "")


def _named(cls: Any, choices: Mapping[str, Any]) -> dict[str, Collection[str]]:
    """The names that a file, or else the defaults, have in each table of tables, such as the streams.

    A mistyped one is not another stream.
    """
    defaults = {
        entry.name: entry.default_factory()
        for entry in dataclasses.fields(cls)
        if entry.default_factory is not dataclasses.MISSING
    }
    tables = {table: names for table, names in defaults.items() if isinstance(names, dict)}
    return tables | {table: choices[table] for table in tables if isinstance(choices.get(table), dict)}


class _Text(str):
    """A value as it was typed."""


def asks_for_help(arguments: Sequence[str], doc: str | None, cls: type | None = None) -> bool:
    """Whether ``--help`` is among the arguments; then what a command's module says of itself, and the keys with their
    defaults, are printed."""
    if not {"-h", "--help"} & set(arguments):
        return False
    print((doc or "").strip())
    if cls is not None:
        print("\nKeys and their defaults:")
        print("\n".join(f"  {key}={value}" for key, value in _defaults(cls, "")))
    return True


def _defaults(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in dataclasses.fields(cls):
        key, value = f"{prefix}{entry.name}", entry.default
        if entry.default_factory is not dataclasses.MISSING:
            value = entry.default_factory()
        if dataclasses.is_dataclass(value):
            yield from _defaults(value, f"{key}.")
        elif isinstance(value, dict) and all(map(dataclasses.is_dataclass, value.values())) and value:
            for name, of_name in value.items():
                yield from _defaults(of_name, f"{key}.{name}.")
        else:
            yield key, "" if value is dataclasses.MISSING else str(value)


def one_line(error: BaseException) -> str:
    """What an error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def device_of(choice: str) -> str:
    """ "auto", "cpu" or "cuda" as a device. Raises ValueError: there is no such."""
    import torch  # here, as below, so that --help does without

    found = torch.cuda.is_available()
    need("device", choice, found or choice != "cuda", "a GPU that PyTorch finds, or cpu")
    return ("cuda" if found else "cpu") if choice == "auto" else choice


def command(
    name: str, run: Callable[[C], object], cls: type[C], arguments: Sequence[str], doc: str | None = None
) -> int:
    """``[config.toml] [key=value ...]``: run with that configuration; what is wrong is one line, and exit code 2."""
    if asks_for_help(arguments, doc, cls):
        return 0
    path = None
    if arguments and "=" not in arguments[0]:
        path, *arguments = arguments
    try:
        run(load(cls, path, arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def until_stopped(steps: int) -> Iterator[int]:
    """Steps 0, 1, … ``steps`` - 1, or until a SIGTERM: what is trained by then is written as at the end."""
    signalled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signalled.append(number))
    try:
        for step in range(steps):
            yield step
            if signalled:
                print(f"stopped at step {step + 1} of {steps}", flush=True)
                return
    finally:
        signal.signal(signal.SIGTERM, before)


def _put(choices: dict[str, Any], key: str, value: _Text) -> None:
    """Put a value at its place in the nested tables."""
    *tables, last = key.split(".")
    for table in tables:
        choices = choices.setdefault(table, {})
        if not isinstance(choices, dict):
            raise ValueError(f"{key}: unknown key; {table} is not a table")
    choices[last] = value


def _value(kind: Any, value: Any, key: str) -> Any:
    """``value`` as a ``kind``; a typed text is read as TOML, or taken as it is where a text is needed."""
    if isinstance(value, _Text):
        value = _parsed(kind, value)
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _table(kind, value, key)
    if origin is dict and isinstance(value, dict):
        return {name: _value(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], entry, key) for entry in value)
    if origin is Literal and value in arguments:
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _value(kind, value, key)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: got {value}, needs a finite number")
    if isinstance(kind, type) and type(value) is kind:
        return value
    needs = " or ".join(map(repr, arguments)) if origin is Literal else _name(kind)
    raise ValueError(f"{key}: got {value!r}, needs {needs}")


def _parsed(kind: Any, text: _Text) -> Any:
    if kind is str or get_origin(kind) is Literal:
        return str(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)  # refused with the type that is needed


def _table(cls: Any, choices: Mapping[str, Any], key: str) -> Any:
    kinds = get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in choices:
        if name not in kinds:
            raise _unknown(prefix, name, kinds)
    values = {name: _value(kinds[name], value, f"{prefix}{name}") for name, value in choices.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a field without a default
        raise ValueError(f"{key or 'config'}: {error}") from None
    except ValueError as error:  # names a field of this table
        raise ValueError(f"{prefix}{error}") from None


def _unknown(prefix: str, name: str, known: Collection[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; the nearest is {prefix}{close[0]}" if close else f"; there are {', '.join(known)}"
    return ValueError(f"{prefix}{name}: unknown key{hint}")


def _name(kind: Any) -> str:
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        return "a table"
    if get_origin(kind) is tuple:
        return f"a list of {get_args(kind)[0].__name__}"
    return getattr(kind, "__name__", str(kind))
