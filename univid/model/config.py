"""Every choice of the model, in one dataclass; architectures are TOML files in ``configs/``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from univid.data.tensors import object_in
from univid.ops.dispatch import check_backend

CONFIGS = Path(__file__).parent / "configs"
PREDICTIONS = ("v_prediction", "epsilon", "sample")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net. The defaults are Stable Diffusion 2.1 with the paper's modules.

    A level works at 1/f of the latent's size, f = 1, 2, 4, 8 from the outside in; a tuple has an entry for each.
    """

    # Stable Diffusion's U-Net
    in_channels: int = 4  # of the latents
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level
    blocks_per_level: int = 2  # residual blocks on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers; the middle always has one
    head_dim: int = 64  # at every level; the number of heads follows from the channels
    context_dim: int = 1024  # of a token of the prompt or, past the adapter, of the image
    norm_groups: int = 32
    norm_eps: float = 1e-5  # GroupNorm in residual blocks and at the output
    prediction_type: str = "v_prediction"  # what the output means, one of PREDICTIONS
    # Time
    max_frames: int = 24
    pstc_kernels: tuple[int, ...] = (3, 5, 7, 9)  # K of the temporal convolutions, odd; 0: the level has none
    psta_refs: tuple[int, ...] = ()  # R, the reference frames of a frame, at most T; (): ceil(T · f / f_mid)
    own_frame: bool = True  # a frame stands for itself in its own segment; False: the paper's one set for all frames
    temporal_attention: bool = True
    fps_conditioning: bool = True
    # The image
    image_dim: int = 1280  # of a token of the image encoder, before the adapter
    image_tokens: str = "patch"  # "patch": the class token and all patches; "global": the class token alone
    # How it runs: no part of a saved model
    backend: str | None = None  # of the operators; None: the fastest that can run the call

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, typed(field.name, getattr(self, field.name), field.default))
        self._need("channels", bool(self.channels) and min(self.channels) >= 1, "numbers >= 1, one for each level")
        self._need("channels", self.channels[0] % 2 == 0, "the first of them even, for sines and cosines of the time")
        for field in fields(self):
            if type(field.default) is int:
                self._need(field.name, getattr(self, field.name) >= 1, "a number >= 1")
        self._need("norm_eps", self.norm_eps > 0, "a number > 0")
        levels = len(self.channels)
        for name in ("attention", "pstc_kernels", "psta_refs"):
            entries = len(getattr(self, name))
            ok = entries == levels or (name == "psta_refs" and entries == 0)
            self._need(name, ok, f"{levels} entries, one for each level of channels")
        for channels, attention in zip(self.channels, (*self.attention[:-1], True), strict=True):
            self._need("norm_groups", channels % self.norm_groups == 0, f"a divisor of {channels} channels")
            self._need("head_dim", not attention or channels % self.head_dim == 0, f"a divisor of {channels} channels")
        odd = all(taps == 0 or (taps > 0 and taps % 2 == 1) for taps in self.pstc_kernels)
        self._need("pstc_kernels", odd, "odd numbers, or 0 for none")
        self._need("psta_refs", all(refs >= 1 for refs in self.psta_refs), "numbers >= 1")
        for name, known in (("prediction_type", PREDICTIONS), ("image_tokens", ("patch", "global"))):
            self._need(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        check_backend(self.backend)

    def _need(self, name: str, ok: bool, needs: str) -> None:
        if not ok:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, needs {needs}")

    @property
    def factors(self) -> tuple[int, ...]:
        """f of each level: 1, 2, 4, 8."""
        return tuple(2**level for level in range(len(self.channels)))

    def num_refs(self, factor: int, num_frames: int) -> int:
        """R(f): how many frames a frame attends to; all of them in the middle."""
        if self.psta_refs:
            return min(self.psta_refs[self.factors.index(factor)], num_frames)
        return -(-num_frames * factor // self.factors[-1])

    @classmethod
    def load(cls, config: str | Path) -> UNetConfig:
        """One of "sd21", "shapes" and "tiny", or the path of a TOML file.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is not TOML, has an unknown key or a wrong value.
        """
        path = CONFIGS / f"{config}.toml"
        if not path.is_file():
            path = Path(config)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.toml")))
            raise FileNotFoundError(f"config: got {str(config)!r}, needs a TOML file or one of {known}")
        try:
            choices = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"config: {path} is not TOML: {error}") from None
        try:
            return cls.of(choices, str(path))
        except TypeError as error:
            raise ValueError(f"config: {path}: {error}") from None

    @classmethod
    def of(cls, choices: dict[str, Any], source: str = "config") -> UNetConfig:
        """From a dictionary, of which an unknown key is a ValueError."""
        unknown = [key for key in choices if key not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(f"{source}: unknown key {', '.join(map(repr, unknown))}")
        return cls(**choices)

    # --- diffusers' config.json ---------------------------------------------------------------------------------------

    def to_diffusers(self) -> dict[str, Any]:
        """What diffusers' UNet2DConditionModel needs to build the image U-Net, and all of ours under "univid"."""
        down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in self.attention]
        up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(self.attention)]
        return {
            "_class_name": "UNet2DConditionModel",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.channels,
            "layers_per_block": self.blocks_per_level,
            "down_block_types": down,
            "up_block_types": up,
            # Diffusers gives the number of heads this name.
            "attention_head_dim": [channels // self.head_dim for channels in self.channels],
            "cross_attention_dim": self.context_dim,
            "norm_num_groups": self.norm_groups,
            "norm_eps": self.norm_eps,
            "use_linear_projection": True,
            "univid": asdict(replace(self, backend=None)),
        }

    @classmethod
    def from_diffusers(cls, config: dict[str, Any], source: str = "config.json", **choices: Any) -> UNetConfig:
        """Of a Stable Diffusion 2 U-Net, or of one that :meth:`to_diffusers` wrote. ``choices`` replace fields.

        Raises:
            ValueError: a U-Net of another kind; names the key.
        """
        for key, needed in _SD21.items():
            if config.get(key, needed) not in (needed, None):
                raise ValueError(f"{source}: {key}: got {config[key]!r}, needs {needed!r} (Stable Diffusion 2's U-Net)")
        if not config.get("use_linear_projection"):
            raise ValueError(f"{source}: use_linear_projection: got false, needs true (Stable Diffusion 2's U-Net)")
        if "univid" in config:
            return cls._of_file(object_in(config, "univid", source), choices, f"{source}: univid", {})
        heads_name = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        try:
            channels = tuple(_list_in(config, "block_out_channels", int, source))
            levels = len(channels)
            down = _list_in(config, "down_block_types", str, source, levels)
            up = _list_in(config, "up_block_types", str, source, levels)
            heads = config[heads_name]
            one = isinstance(heads, int)
            counts = [heads] * levels if one else _list_in(config, heads_name, int, source, levels)
            same = {
                "in_channels": config["in_channels"],
                "out_channels": config["out_channels"],
                "blocks_per_level": config["layers_per_block"],
                "context_dim": config["cross_attention_dim"],
                "norm_groups": config["norm_num_groups"],
                "norm_eps": config["norm_eps"],
            }
        except KeyError as error:
            raise ValueError(
                f"{source}: has no {error.args[0]}, needs a UNet2DConditionModel's configuration"
            ) from None
        attention = tuple("CrossAttn" in kind for kind in down)
        mirrored = tuple("CrossAttn" in kind for kind in reversed(up))
        kinds = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        if mirrored != attention or not kinds.issuperset((*down, *up)):
            raise ValueError(f"{source}: down_block_types, up_block_types: got {down}, {up}, needs one U of {kinds}")
        if min(counts) < 1:
            raise ValueError(f"{source}: {heads_name}: got {heads!r}, needs numbers >= 1")
        dims = {c / n for c, n, a in zip(channels, counts, (*attention[:-1], True), strict=True) if a}
        if len(dims) != 1 or not min(dims).is_integer():
            raise ValueError(
                f"{source}: {heads_name}: got {counts} heads at {channels} channels, needs one head dimension"
            )
        # The kernels grow towards the middle: 3, 5, 7, 9.
        kernels = tuple(3 + 2 * level for level in range(len(channels)))
        found = same | {
            "channels": channels,
            "attention": attention,
            "head_dim": int(min(dims)),
            "pstc_kernels": kernels,
        }
        return cls._of_file(found, choices, source, _FILE_NAMES)

    @classmethod
    def _of_file(cls, found: dict[str, Any], choices: dict[str, Any], source: str, names: dict[str, str]) -> UNetConfig:
        """Of values in a file, which are at fault unless they are choices; ``names``: what it calls our fields."""
        try:
            return cls.of(found | choices, source)
        except (TypeError, ValueError) as error:
            name, _, rest = str(error).partition(":")
            if name in choices or name == source:
                raise
            raise ValueError(f"{source}: {names.get(name, name)}:{rest}") from None


# Our fields that diffusers calls by other names.
_FILE_NAMES = {
    "channels": "block_out_channels",
    "blocks_per_level": "layers_per_block",
    "context_dim": "cross_attention_dim",
    "norm_groups": "norm_num_groups",
}

# What SD 2 leaves at diffusers' defaults and this U-Net builds in. A key that is missing has the default.
_SD21 = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}


def _list_in(config: dict[str, Any], key: str, kind: type, source: str, length: int = 0) -> Sequence[Any]:
    """A list in a file, of ``length`` if that is not 0."""
    value = config[key]
    if (
        not isinstance(value, list | tuple)
        or not value
        or any(type(entry) is not kind for entry in value)
        or len(value) != (length or len(value))
    ):
        each = f", one for each of {length} levels" if length else ""
        raise ValueError(f"{source}: {key}: got {value!r}, needs a list of {kind.__name__}{each}")
    return value


def typed(name: str, value: Any, default: Any) -> Any:
    """``value`` as its field's type (a list becomes a tuple, an integer a float), or a TypeError."""
    if isinstance(default, tuple):
        kind = type(default[0]) if default else int
        if isinstance(value, list | tuple) and all(type(entry) is kind for entry in value):
            return tuple(value)
        raise TypeError(f"{name}: got {value!r}, needs a list of {kind.__name__}")
    if type(default) is float and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise TypeError(f"{name}: got {value!r}, needs {type(default).__name__}")
    return value
