"""The shapes that are timed: the levels of the U-Net at 24 frames of 40x72 latents, shapes of other video models, and
one shape whose frames, tokens and references grow in turn."""

from typing import NamedTuple


class Level(NamedTuple):
    """One size of the operators' inputs."""

    frames: int  # T
    tokens: int  # N
    heads: int  # H
    refs: int  # R
    channels: int  # C of temporal_conv, the norms, add_bias and concat; geglu has four times as many
    taps: int  # K of temporal_conv
    dim: int = 64  # D


TEXT_KEYS, IMAGE_KEYS = 77, 257  # dual_stream_attn

UNET = {
    "f1": Level(24, 2880, 5, 3, 320, 3),
    "f2": Level(24, 720, 10, 6, 640, 5),
    "f4": Level(24, 180, 20, 12, 1280, 7),
    "f8": Level(24, 45, 20, 24, 1280, 9),
}
LEVELS = UNET | {
    "n1024_t16": Level(16, 1024, 8, 4, 512, 3),
    "n4096_t8": Level(8, 4096, 8, 2, 512, 3),
    "n256_t64": Level(64, 256, 16, 16, 1024, 5),
}
# The levels of the small model `shapes`, 64 clips of 16 frames as the tokens of one: to temporal_conv, rows are rows.
SMALL = {
    "c64": Level(16, 64 * 256, 2, 4, 64, 3, 32),
    "c96": Level(16, 64 * 64, 3, 8, 96, 5, 32),
    "c128": Level(16, 64 * 16, 4, 16, 128, 7, 32),
}
QUICK = ("f1", "f4")

# Growth from T = 16, N = 1024, R = 4: by axis, the sizes on it.
GROWTH = {"frames": (8, 16, 32, 64), "tokens": (256, 512, 1024, 2048, 4096), "refs": (1, 2, 4, 8, 16)}
SCALING = {
    f"t{level.frames}_n{level.tokens}_r{level.refs}": level
    for axis, sizes in GROWTH.items()
    for level in (LEVELS["n1024_t16"]._replace(**{axis: size}) for size in sizes)
}
