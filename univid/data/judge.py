"""What a clip of the shapes world shows, read back from its pixels by fitting what draws them; nothing in it is learned.

Backgrounds are muted, objects are not. So the frame's edge gives the background's chroma, the pixels furthest from it the object's
colour, and every pixel's place between the two a soft mask. In each frame the mask's area, centroid and n-fold moment are a radius,
a center and an angle for every shape; the shape whose drawing then differs least from the mask is the one. Lines through the tracks
of these numbers over the frames are the motion. Blur, noise and faded colours, as generated clips have them, change little of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, pi

import torch
import torch.nn.functional as F
from torch import Tensor

from univid.data.shapes import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    NAMES,
    RADII,
    SHAPES,
    SYMMETRIES,
    Attributes,
    signed_distance,
)

JUDGED = ("colour", "shape", "size", "motion")

_CHUNK = 64  # clips that are judged together
_GRID, _REACH = 32, 1.7  # a shape is compared on _GRID² points up to _REACH radii from its center
_FAINT = 0.12  # chroma, of 1, below which there is no object; the palest colour has 0.4
# The least travel in a frame of 64 pixels, turns, growth, shrinking and height of the world's motions: what makes them one.
_TRAVEL, _TURN, _GROWTH, _SHRINKING, _HEIGHT = 17.0, 0.21, log(1.5), -log(0.67), 11.0


@dataclass(frozen=True)
class Verdicts:
    """Of each clip, ``(B,)``: indices into ``univid.data.shapes.NAMES``, -1 where no object is seen."""

    colour: Tensor
    shape: Tensor
    size: Tensor
    motion: Tensor
    confidence: Mapping[str, Tensor]  # of each of the four, in [0, 1]: how far the next best is
    fit: Tensor  # in [0, 1]: how much of the object's mask is explained by the shape's drawing; true clips have above 0.9

    def right(self, attributes: Attributes) -> dict[str, Tensor]:
        """Whether each verdict is what the attributes say, bool ``(B,)``."""
        return {name: getattr(self, name).cpu() == getattr(attributes, name).cpu() for name in JUDGED}

    def names(self, row: int) -> dict[str, str]:
        """One clip's verdicts in words; "nothing" where no object is seen."""
        seen = {name: int(getattr(self, name)[row]) for name in JUDGED}
        return {name: NAMES[name][index] if index >= 0 else "nothing" for name, index in seen.items()}


def judge(frames: Tensor) -> Verdicts:
    """Read back clips, uint8 ``(B, T, H, W, 3)``, of any device.

    Raises:
        ValueError: frames of another kind.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"frames: got {frames.dtype} {tuple(frames.shape)}, needs uint8 (B, T, S, S, 3)")
    if not len(frames):
        raise ValueError("frames: got no clip")
    with torch.no_grad():
        parts = [_judge(part.float() / 255) for part in frames.split(_CHUNK)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Verdicts(
        **{name: joined[name] for name in JUDGED},
        confidence={name: joined[f"sure of {name}"] for name in JUDGED},
        fit=joined["fit"],
    )


def _judge(frames: Tensor) -> dict[str, Tensor]:
    mask, colour, sure_of_colour, seen = _object(frames)
    center, area = _blobs(mask)
    losses, angles, radii = _shapes(mask, center, area)
    total = losses.sum(1)  # over frames: (B, shapes)
    two = total.topk(2, largest=False)
    shape = two.indices[:, 0]
    rows = torch.arange(len(shape), device=shape.device)
    angle, radius = angles[rows, :, shape], radii[rows, :, shape]
    turns = _unwrapped(angle, torch.tensor(SYMMETRIES, device=shape.device)[shape])
    motion, sure_of_motion, first_radius = _motion(center, radius, turns, frames.shape[2])
    off = (first_radius / (frames.shape[2] / 64 * (RADII[0] * RADII[1]) ** 0.5)).log()
    verdicts = {"colour": colour, "shape": shape, "size": (off > 0).long(), "motion": motion}
    sure = {
        "colour": sure_of_colour,
        "shape": 1 - two.values[:, 0] / two.values[:, 1].clamp(min=1e-6),
        "size": (off.abs() / log(RADII[1] / RADII[0]) * 2).clamp(max=1),
        "motion": sure_of_motion,
    }
    return {
        **{name: torch.where(seen, verdict, -1) for name, verdict in verdicts.items()},
        **{f"sure of {name}": torch.where(seen, value, 0.0) for name, value in sure.items()},
        "fit": torch.where(seen, 1 - two.values[:, 0] / frames.shape[1], 0.0).clamp(0, 1),
    }


# --- the object's pixels ----------------------------------------------------------------------------------------------


def _chroma(rgb: Tensor) -> Tensor:
    """RGB without its grey: two coordinates."""
    r, g, b = rgb.unbind(-1)
    return torch.stack([(2 * r - g - b) / 6**0.5, (g - b) / 2**0.5], -1)


def _object(frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A soft mask ``(B, T, H, W)``, the colour, how sure it is, and whether there is an object at all, ``(B,)``."""
    chroma = _chroma(frames)
    edge = (chroma[:, :, :2].flatten(1, 3), chroma[:, :, -2:].flatten(1, 3))
    sides = (chroma[:, :, :, :2].flatten(1, 3), chroma[:, :, :, -2:].flatten(1, 3))
    relative = chroma - torch.cat((*edge, *sides), 1).median(1).values[:, None, None, None]
    strength = relative.square().sum(-1).sqrt()
    flat = strength.flatten(1)
    peak = flat.topk(max(1, flat.shape[1] // 100)).values[:, -1:]
    core = (flat > 0.8 * peak).float()
    core = core / core.sum(1, keepdim=True).clamp(min=1)
    seen_rgb = (core[..., None] * frames.flatten(1, 3)).sum(1)
    palette = torch.tensor(list(COLOURS.values()), device=frames.device) / 255
    near = (seen_rgb[:, None] - palette).square().sum(-1).sqrt().topk(2, largest=False)
    toward = (core[..., None] * relative.flatten(1, 3)).sum(1)[:, None, None, None]
    length = toward.square().sum(-1).sqrt()
    mask = 1 - (relative - toward).square().sum(-1).sqrt() / length.clamp(min=1e-3)
    mask = ((mask - 0.1) / 0.9).clamp(0, 1)
    seen = (length[:, 0, 0, 0] > _FAINT) & (mask.sum((1, 2, 3)) > 4 * frames.shape[1])
    return mask, near.indices[:, 0], 1 - near.values[:, 0] / near.values[:, 1].clamp(min=1e-6), seen


def _blobs(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each frame's largest patch: its centroid ``(B, T, 2)`` and area ``(B, T)``."""
    size = mask.shape[-1]
    pixel = torch.arange(size, device=mask.device) + 0.5
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    # Where most of the mask is within reach: a start that stray pixels do not move.
    heat = F.avg_pool2d(mask.flatten(0, 1)[:, None], size // 5 | 1, 1, size // 10)[:, 0]
    place = heat.flatten(1).argmax(1)
    cx, cy = place % size + 0.5, place // size + 0.5
    weight, reach = mask.flatten(0, 1), torch.full_like(cx, size / 4.0)
    for _ in range(3):
        near = weight * ((x - cx[:, None, None]) ** 2 + (y - cy[:, None, None]) ** 2 < reach[:, None, None] ** 2)
        area = near.sum((1, 2)).clamp(min=1)
        cx, cy = (near * x).sum((1, 2)) / area, (near * y).sum((1, 2)) / area
        reach = 1.6 * (area / 3).sqrt() + 4
    return torch.stack([cx, cy], -1).unflatten(0, mask.shape[:2]), area.unflatten(0, mask.shape[:2])


# --- the shape --------------------------------------------------------------------------------------------------------


def _templates(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every shape: signed distances on the grid ``(S, G, G)``, area in squared radii, and the phase of its n-fold moment."""
    fine = (torch.arange(512, device=device) + 0.5) / 512 * 2 * _REACH - _REACH
    kinds = torch.arange(len(SHAPES), device=device)[:, None, None]
    mask = (signed_distance(kinds, fine[None, None, :], fine[None, :, None]) < 0).float()
    area = mask.mean((1, 2)) * (2 * _REACH) ** 2
    phase = torch.stack([_moment(one, n).angle() for one, n in zip(mask, SYMMETRIES, strict=True)])
    grid = _grid(device)
    return signed_distance(kinds, grid[None, None, :], grid[None, :, None]), area, phase


def _grid(device: torch.device) -> Tensor:
    return (torch.arange(_GRID, device=device) + 0.5) / _GRID * 2 * _REACH - _REACH


def _moment(mask: Tensor, n: int) -> Tensor:
    """Of masks ``(..., G, G)`` around their middle: r² exp(i n angle), summed."""
    line = (torch.arange(mask.shape[-1], device=mask.device) + 0.5) / mask.shape[-1] * 2 - 1
    z = torch.complex(line[None, :].expand(len(line), -1), line[:, None].expand(-1, len(line)))
    kernel = z.abs() ** 2 * torch.exp(1j * n * z.angle()) * (z.abs() < 1)
    return torch.complex((mask * kernel.real).sum((-2, -1)), (mask * kernel.imag).sum((-2, -1)))


def _crop(mask: Tensor, center: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Masks ``(M, H, W)`` on the grid of a shape of this center, radius and angle (in turns)."""
    size = mask.shape[-1]
    grid = _grid(mask.device) * (2 / size)  # grid_sample's frame is 2 wide
    cos, sin = (f(2 * pi * angle)[:, None, None] * radius[:, None, None] for f in (torch.cos, torch.sin))
    u, v = grid[None, None, :], grid[None, :, None]
    x = cos * u - sin * v + (center[:, 0, None, None] * 2 / size - 1)
    y = sin * u + cos * v + (center[:, 1, None, None] * 2 / size - 1)
    return F.grid_sample(mask[:, None], torch.stack([x, y], -1), align_corners=False)[:, 0]


def _shapes(mask: Tensor, center: Tensor, area: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each frame and shape, ``(B, T, S)``: the share of the mask that its best drawing misses, its angle, its radius."""
    clips = mask.shape[:2]
    mask, center, area = mask.flatten(0, 1), center.flatten(0, 1), area.flatten()
    distances, areas, phases = _templates(mask.device)
    mean_radius = (area / areas.mean()).sqrt()
    upright = _crop(mask, center, mean_radius, torch.zeros_like(area))
    losses, angles, radii = [], [], []
    for kind, n in enumerate(SYMMETRIES):
        radius = (area / areas[kind]).sqrt()
        angle = torch.zeros_like(area)
        if n > 1:
            angle = (_moment(upright, n).angle() - phases[kind]) / (2 * pi * n)
        seen = _crop(mask, center, radius, angle)
        # Blurred edges are wide ones; that much may fit each frame and shape alike.
        widths = (1.2, 3.0)
        drawn = [(0.5 - distances[kind] * radius[:, None, None] / width).clamp(0, 1) for width in widths]
        missed = torch.stack(
            [(seen - one).square().sum((1, 2)) / seen.square().sum((1, 2)).clamp(min=1) for one in drawn]
        )
        losses.append(missed.amin(0))
        angles.append(angle)
        radii.append(radius)
    return tuple(torch.stack(x, -1).unflatten(0, clips) for x in (losses, angles, radii))


# --- the motion -------------------------------------------------------------------------------------------------------


def _unwrapped(angle: Tensor, symmetry: Tensor) -> Tensor:
    """Angles ``(B, T)``, in turns, known up to a 1/symmetry-th: the track with the shortest steps; 0 for what no turn changes."""
    folds = symmetry[:, None]
    steps = angle.diff(dim=1) * folds
    steps = (steps - steps.round()) / folds
    return torch.cat([torch.zeros_like(angle[:, :1]), steps.cumsum(1)], 1) * (folds > 1)


def _motion(center: Tensor, radius: Tensor, turns: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The motion, how sure it is, and the first frame's radius on the line through all."""
    frames = center.shape[1]
    t = torch.linspace(0, 1, frames, device=center.device)
    arc = 2 * t - (2 * t).floor()
    # Four frames are the least in which a bounce differs from a line.
    known = [torch.ones_like(t), t] + ([4 * arc * (1 - arc)] if frames > 3 else [])
    solve = torch.linalg.pinv(torch.stack(known, 1))  # least squares
    tracks = torch.stack([center[..., 0], center[..., 1], radius.log(), turns], -1)
    found = torch.einsum("kt,btc->bkc", solve, tracks)
    travel, growth, turn = found[:, 1, :2] * 64 / size, found[:, 1, 2], found[:, 1, 3]
    height = -found[:, 2, 1] * 64 / size if frames > 3 else torch.zeros_like(turn)
    ways = torch.tensor(DIRECTIONS, device=center.device, dtype=torch.float32)
    along = travel @ F.normalize(ways, dim=1).T
    zero = torch.zeros_like(turn)
    evidence = dict.fromkeys(MOTIONS, zero)
    straight = torch.where(along == along.amax(1, keepdim=True), travel.norm(dim=1, keepdim=True), zero[:, None])
    evidence |= dict(zip(MOTIONS, (straight / _TRAVEL).unbind(1), strict=False))
    evidence |= {"clockwise": turn / _TURN, "counterclockwise": -turn / _TURN, "bounce": height / _HEIGHT}
    evidence |= {"grow": growth / _GROWTH, "shrink": -growth / _SHRINKING, "still": torch.full_like(turn, 0.5)}
    two = torch.stack([evidence[name] for name in MOTIONS], 1).topk(2)
    margin = (two.values[:, 0] - two.values[:, 1]) / two.values[:, 0].clamp(min=0.5)
    return two.indices[:, 0], (2 * margin).clamp(0, 1), found[:, 0, 2].exp()
