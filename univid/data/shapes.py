"""The shapes world: clips of one coloured shape that moves over a background, drawn and captioned from an index alone.

Clip i is a function of (seed, i): a counter-based generator gives its attributes, the same on every machine, device and in every
batch, and signed distances give its pixels, with clean edges at any size. Indices from ``HELD_OUT`` on are for judging: training never
draws them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import pi
from typing import Any

import torch
from torch import Tensor

from univid.data import shapes_captions
from univid.data.batch import to_device

HELD_OUT = 1 << 40

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (222, 38, 38),
    "orange": (245, 138, 20),
    "yellow": (247, 220, 40),
    "green": (40, 170, 60),
    "cyan": (30, 200, 215),
    "blue": (45, 80, 225),
    "purple": (140, 50, 190),
    "pink": (250, 120, 190),
}
SIZES = ("small", "large")
MOTIONS = (
    *("left", "right", "up", "down", "up-left", "up-right", "down-left", "down-right"),
    *("clockwise", "counterclockwise", "grow", "shrink", "bounce", "still"),
)
BACKGROUNDS = ("plain", "striped", "checkered", "spotted")
SHADES = ("dark", "light")

ROUND = 2  # the first of SHAPES, which no turn changes
TURNING = (MOTIONS.index("clockwise"), MOTIONS.index("counterclockwise"))
DIRECTIONS = (
    (-1, 0),
    (1, 0),
    (0, -1),
    (0, 1),
    (-1, -1),
    (1, -1),
    (-1, 1),
    (1, 1),
)  # of the first MOTIONS; y points down
RADII = (8.0, 12.5)  # of SIZES: pixels of a circle in a frame of 64; other shapes look about as large
EXTENTS = (1.0, 1.1, 1.25, 1.35, 1.35, 1.23)  # of SHAPES: the circle around it, in radii
SYMMETRIES = (1, 1, 4, 3, 5, 4)  # of SHAPES: turned by 1/n it is the same
MARGIN = 1.5  # pixels that stay free at the frame's edge

_CHUNK = 256  # clips that are rendered together; what bounds the memory
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants (Steele et al., 2014), as signed integers
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@dataclass(frozen=True)
class Attributes:
    """All that clips are made of, ``(B,)`` or ``(B, n)`` each. Names are indices into the tables above; lengths are pixels."""

    shape: Tensor
    colour: Tensor
    size: Tensor  # of the first frame
    motion: Tensor
    background: Tensor
    shade: Tensor
    center: Tensor  # (B, 2): x, y in the first frame
    radius: Tensor
    angle: Tensor  # clockwise, in turns
    travel: Tensor  # (B, 2): from the first frame to the last
    turn: Tensor  # from the first frame to the last
    growth: Tensor  # the last radius over the first
    height: Tensor  # of the bounces
    tones: Tensor  # (B, 2, 3): the background's RGB, of which a plain one has the first
    period: Tensor  # of its texture
    slant: Tensor  # of its texture, in turns
    drift: Tensor  # (B, 2): of its texture, in a frame
    words: Tensor  # what picks a caption's words

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: Any) -> Attributes:
        """Clips by a slice, a mask or indices."""
        return Attributes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: torch.device | str) -> Attributes:
        return Attributes(**{field.name: to_device(getattr(self, field.name), device) for field in fields(self)})

    def names(self, row: int) -> dict[str, str]:
        """What one clip shows, in words."""
        return {name: table[int(getattr(self, name)[row])] for name, table in NAMES.items()}


NAMES: dict[str, Sequence[str]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
    "shade": SHADES,
}


class Shapes:
    """The world of clips of ``num_frames`` frames, ``size`` x ``size`` pixels.

    Args:
        seed: another seed is another world: its clips have nothing to do with those of this one.
    """

    def __init__(self, num_frames: int = 16, size: int = 64, seed: int = 0):
        if num_frames < 1:
            raise ValueError(f"num_frames: got {num_frames}, needs >= 1")
        if size < 32:
            raise ValueError(f"size: got {size}, needs >= 32 pixels, in which shapes can be told")
        self.num_frames, self.size, self.seed = num_frames, size, seed

    def sample(self, indices: Tensor, **given: str | int | Tensor) -> Attributes:
        """The attributes of clips ``indices``, int64 ``(B,)``, on their device.

        Args:
            given: what is not drawn, by name: ``shape="star"``, ``colour="red"``, ``motion=MOTIONS.index("left")``, or an index for
                each clip. The rest is drawn so that it fits.

        Raises:
            ValueError: an unknown name, or a round shape that shall turn.
        """
        draw = _draws(self.seed, indices)

        def choose(name: str, of: int | Tensor | None = None) -> Tensor:
            u = next(draw)
            if name in given:
                return _given(name, given[name], indices)
            return (u * (len(NAMES[name]) if of is None else of)).long()

        def between(low: float | Tensor, high: float | Tensor) -> Tensor:
            return low + next(draw) * (high - low)

        if unknown := given.keys() - NAMES:
            raise ValueError(f"{min(unknown)}: got an unknown attribute, needs one of {', '.join(NAMES)}")
        shape, colour, size = choose("shape"), choose("colour"), choose("size")
        motion, shape = self._motion(next(draw), next(draw), shape, given, indices)
        background, shade = choose("background"), choose("shade")

        unit = self.size / 64
        table = lambda values: torch.tensor(values, dtype=torch.float64, device=indices.device)  # noqa: E731
        zero = torch.zeros_like(next(draw))
        only = lambda values, *names: torch.where(_any(motion, names), values, zero)  # noqa: E731

        radius = unit * table(RADII)[size] * between(0.95, 1.05)
        angle = between(-0.04, 0.04)
        turn = only(between(0.21, 0.36), "clockwise") - only(between(0.21, 0.36), "counterclockwise")
        growth = 1 + only(between(0.5, 0.65), "grow") - only(between(0.33, 0.4), "shrink")
        extent = table(EXTENTS)[shape] * radius * growth.clamp(min=1) + unit * MARGIN
        room = self.size - 2 * extent
        height = only(torch.minimum(unit * between(11, 16), room), "bounce")
        directions = table([*DIRECTIONS, *[(0, 0)] * (len(MOTIONS) - len(DIRECTIONS))])[motion]
        # A diagonal is as long as the others, as far as there is room: by 0.75 along each axis.
        along = torch.where(directions.abs().sum(1) > 1, 0.75, 1.0) * unit * between(17, 27)
        travel = directions * torch.minimum(along, room)[:, None]

        upward = torch.stack([zero, -height], 1)  # the furthest that a bounce goes
        low = extent[:, None] - (travel + upward).clamp(max=0)
        high = self.size - extent[:, None] - travel.clamp(min=0)
        center = low + torch.stack([next(draw), next(draw)], 1) * (high - low)

        # Muted tones: every colour has more than four times their chroma, so objects differ from any background.
        luma = torch.where(shade == 0, between(25, 80), between(170, 225))
        other = luma + torch.where(shade == 0, 1, -1) * between(20, 32)
        tint = torch.stack([between(-11, 11) for _ in range(3)], 1)
        tones = torch.stack([luma, other], 1)[..., None] + tint[:, None]
        floats = {
            "center": center,
            "radius": radius,
            "angle": angle,
            "travel": travel,
            "turn": turn,
            "growth": growth,
            "height": height,
            "tones": tones,
            "period": unit * between(13, 22),
            "slant": next(draw),
            "drift": unit * torch.stack([between(-0.8, 0.8), between(-0.8, 0.8)], 1),
        }
        return Attributes(
            shape,
            colour,
            size,
            motion,
            background,
            shade,
            words=(next(draw) * (1 << 31)).long(),
            **{name: x.float() for name, x in floats.items()},
        )

    def render(
        self, attributes: Attributes, device: torch.device | str | None = None, frames: Sequence[int] | None = None
    ) -> Tensor:
        """Frames ``(B, T, H, W, 3)``, uint8, on ``device`` (the attributes' by default): all, or those that ``frames`` names."""
        attributes = attributes.to(device if device is not None else attributes.shape.device)
        which = torch.tensor(range(self.num_frames) if frames is None else frames, dtype=torch.float32)
        which = to_device(which, attributes.shape.device)
        starts = range(0, len(attributes), _CHUNK)
        parts = [self._render(attributes[start : start + _CHUNK], which) for start in starts]
        empty = torch.empty(0, len(which), self.size, self.size, 3, dtype=torch.uint8, device=which.device)
        return torch.cat(parts) if parts else empty

    def captions(self, attributes: Attributes, kind: shapes_captions.Kind = "random") -> list[str]:
        """A caption of each clip; "random": one of the three kinds, mostly full."""
        if kind not in ("random", *shapes_captions.KINDS):
            raise ValueError(f"kind: got {kind!r}, needs random, {', '.join(shapes_captions.KINDS)}")
        words = attributes.words.tolist()
        rows = zip(*(getattr(attributes, name).tolist() for name in NAMES), strict=True)
        tables = tuple(NAMES.values())
        names = [dict(zip(NAMES, (t[i] for t, i in zip(tables, row, strict=True)), strict=True)) for row in rows]
        return [shapes_captions.caption(one, kind, word) for one, word in zip(names, words, strict=True)]

    def _motion(
        self, u: Tensor, again: Tensor, shape: Tensor, given: dict[str, str | int | Tensor], indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The motion, and the shape, of which the one that was not given fits the other: a round shape does not turn."""
        if "motion" not in given:
            others = torch.tensor([i for i in range(len(MOTIONS)) if i not in TURNING], device=indices.device)
            drawn = torch.where(shape < ROUND, others[(u * len(others)).long()], (u * len(MOTIONS)).long())
            return drawn, shape
        motion = _given("motion", given["motion"], indices)
        wrong = (shape < ROUND) & _any(motion, ("clockwise", "counterclockwise"))
        if "shape" in given and bool(wrong.any()):
            raise ValueError("motion: a circle or a ring shall turn, which cannot be seen")
        return motion, torch.where(wrong, ROUND + (again * (len(SHAPES) - ROUND)).long(), shape)

    def _render(self, a: Attributes, which: Tensor) -> Tensor:
        device = which.device
        pixel = torch.arange(self.size, device=device, dtype=torch.float32) + 0.5
        x, y = pixel[None, None, None, :], pixel[None, None, :, None]
        center, radius, angle = self.trajectory(a, which / max(1, self.num_frames - 1))
        over = lambda values: values[..., None, None]  # noqa: E731  (B, T) over pixels
        cos, sin = over(torch.cos(2 * pi * angle)), over(torch.sin(2 * pi * angle))
        dx, dy = x - over(center[..., 0]), y - over(center[..., 1])
        u, v = (cos * dx + sin * dy) / over(radius), (cos * dy - sin * dx) / over(radius)
        distance = signed_distance(a.shape[:, None, None, None], u, v) * over(radius)
        mask = (0.5 - distance).clamp(0, 1)
        palette = to_device(torch.tensor(list(COLOURS.values()), dtype=torch.float32), device)
        tones = a.tones[:, :, None, None, None]
        ground = torch.lerp(tones[:, 0], tones[:, 1], self._texture(a, which, x, y)[..., None])
        frames = torch.lerp(ground, palette[a.colour][:, None, None, None], mask[..., None])
        return (frames + 0.5).clamp(0, 255).to(torch.uint8)

    def trajectory(self, a: Attributes, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Center ``(B, T, 2)``, radius ``(B, T)`` and angle ``(B, T)`` at times ``step`` ``(T,)`` in [0, 1]."""
        bounce = 2 * step - (2 * step).floor()  # two of them, from the ground to the ground
        up = a.height[:, None] * 4 * bounce * (1 - bounce)
        center = a.center[:, None] + a.travel[:, None] * step[:, None]
        center = torch.stack([center[..., 0], center[..., 1] - up], -1)
        return center, a.radius[:, None] * a.growth[:, None] ** step, a.angle[:, None] + a.turn[:, None] * step

    def _texture(self, a: Attributes, which: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """How much of the second tone each pixel has, ``(B, T, H, W)`` in [0, 1]."""
        frame = which[:, None, None]
        one = lambda values: values[:, None, None, None]  # noqa: E731
        x, y = x - one(a.drift[:, 0]) * frame, y - one(a.drift[:, 1]) * frame
        cos, sin = one(torch.cos(2 * pi * a.slant)), one(torch.sin(2 * pi * a.slant))
        frequency = 2 * pi / one(a.period)
        p, q = torch.sin((cos * x + sin * y) * frequency), torch.sin((cos * y - sin * x) * frequency)
        kind = one(a.background)
        wave = torch.where(kind == 1, p, torch.where(kind == 2, 1.4 * p * q, p + q - 0.9))
        # The wave's slope is about its frequency at zero, so that an edge is two pixels wide.
        return torch.where(kind == 0, 0.0, (0.5 + wave / (2 * frequency)).clamp(0, 1))


def held_out(count: int, start: int = 0) -> Tensor:
    """Indices of clips that no training draws."""
    return HELD_OUT + torch.arange(start, start + count)


def signed_distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of points to the edge of an upright shape of radius 1, negative inside; ``shape`` broadcasts with the points.

    Polygons and the star are one formula with n points (after Quilez, 2D distance functions): folded into half a wedge, the
    edge is a segment.
    """
    table = lambda *values: to_device(torch.tensor(values, dtype=x.dtype), x.device)[shape]  # noqa: E731
    points, edge = table(1, 1, 4, 3, 5, 4), table(1, 1, 2, 2, 3, 2)
    length = (x * x + y * y).sqrt()
    half = pi / points
    wedge = torch.atan2(x, -y) + table(0, 0, pi / 4, 0, 0, 0)
    wedge = wedge - 2 * half * (wedge / (2 * half)).floor() - half
    corner = table(1, 1, EXTENTS[2], EXTENTS[3], EXTENTS[4], 1)
    px = length * torch.cos(wedge) - corner * torch.cos(half)
    py = length * torch.sin(wedge).abs() - corner * torch.sin(half)
    ex, ey = torch.cos(pi / edge), torch.sin(pi / edge)
    along = (-(px * ex + py * ey)).clamp(min=0).minimum(corner * torch.sin(half) / ey.clamp(min=1e-3))
    px, py = px + ex * along, py + ey * along
    pointed = (px * px + py * py).sqrt() * torch.sign(px)

    disc, ring = length - 1, (length - 0.82).abs() - 0.28
    far, near = torch.maximum(x.abs(), y.abs()) - 1.15, torch.minimum(x.abs(), y.abs()) - 0.42
    cross = (far.clamp(min=0) ** 2 + near.clamp(min=0) ** 2).sqrt() + torch.maximum(far, near).clamp(max=0)
    result = torch.where(shape == SHAPES.index("ring"), ring, disc)
    return torch.where(shape < ROUND, result, torch.where(shape == SHAPES.index("cross"), cross, pointed))


def _draws(seed: int, indices: Tensor) -> Iterator[Tensor]:
    """Uniform numbers in [0, 1), float64 ``(B,)``, one tensor after another: splitmix64, its state hashed from (seed, index)."""
    start = _hash(torch.full_like(indices, seed) * _GAMMA + 1)
    state = _hash(start + indices)
    while True:
        state = state + _GAMMA
        yield (_hash(state) >> 33 & 0x7FFFFFFF).double() / (1 << 31)


def _hash(z: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 arithmetic wraps, and shifts are made logical."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return z ^ (z >> 31 & (1 << 33) - 1)


def _given(name: str, value: str | int | Tensor, indices: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(indices.device, torch.int64).expand(len(indices))
    if isinstance(value, str):
        if value not in NAMES[name]:
            raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(NAMES[name])}")
        value = NAMES[name].index(value)
    return torch.full_like(indices, value)


def _any(motion: Tensor, names: Sequence[str]) -> Tensor:
    return torch.stack([motion == MOTIONS.index(name) for name in names]).any(0)
