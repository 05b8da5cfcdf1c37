"""Classifier-free guidance with two conditions: which passes of the U-Net a step needs, and how they are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weight = float | Sequence[float] | Mapping[int, "float | Sequence[float]"]  # a number, one for every frame, or by level


class Pass(NamedTuple):
    """One evaluation of the U-Net in a step."""

    prompted: bool  # the prompt, or the negative one
    pictured: bool  # the image, or image weight 0
    scale: float  # what it counts in the guided prediction


def passes(with_text: bool, with_image: bool, text_scale: float, image_scale: float) -> list[Pass]:
    """The passes of ``e(0,0) + s_image·(e(0,I) - e(0,0)) + s_text·(e(T,I) - e(0,I))``, without those of a condition that is not there.

    The last is the conditional one. A pass that counts nothing (a scale of 1 before it) is left out.
    """
    if with_text and with_image:
        every = [
            Pass(False, False, 1 - image_scale),
            Pass(False, True, image_scale - text_scale),
            Pass(True, True, text_scale),
        ]
    elif with_text:
        every = [Pass(False, False, 1 - text_scale), Pass(True, False, text_scale)]
    else:
        every = [Pass(False, False, 1 - image_scale), Pass(False, True, image_scale)]
    return [one for one in every[:-1] if one.scale != 0] + every[-1:]


def guide(predictions: Sequence[Tensor], plan: Sequence[Pass], rescale: float = 0.0) -> Tensor:
    """The guided prediction of the passes' ``(V, T, C, h, w)``.

    ``rescale`` in [0, 1] moves each video's standard deviation back to that of its conditional pass, which large scales raise
    (Lin et al., Common diffusion noise schedules and sample steps are flawed, eq. 15-16).
    """
    guided = torch.stack([one.scale * x.float() for one, x in zip(plan, predictions, strict=True)]).sum(0)
    if rescale:
        dims = tuple(range(1, guided.ndim))
        conditional = predictions[-1].float()
        guided = guided * (1 - rescale + rescale * conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return guided


def by_level(name: str, weight: Weight, levels: Sequence[int], num_frames: int) -> dict[int, float | Tensor]:
    """A stream's weight at every level f: a number, or ``(T,)`` where each frame has its own.

    Raises:
        ValueError: a sequence whose length is not the number of frames, or a level that does not exist. TypeError: neither a number nor
            a sequence of them.
    """
    if isinstance(weight, Mapping):
        if unknown := [level for level in weight if level not in levels]:
            raise ValueError(f"{name}: got weights of level {unknown[0]!r}; levels are {tuple(levels)}")
        return {level: _weight(name, weight.get(level, 1.0), num_frames) for level in levels}
    return dict.fromkeys(levels, _weight(name, weight, num_frames))


def scalar(value: Any) -> Any:
    """Python's number of one of NumPy's or PyTorch's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def absent(weights: Mapping[int, float | Tensor]) -> bool:
    """Whether a stream has no part at any level: its weight is the number 0 everywhere."""
    return all(not isinstance(weight, Tensor) and weight == 0 for weight in weights.values())


def _weight(name: str, weight: float | Sequence[float], num_frames: int) -> float | Tensor:
    weight = scalar(weight)
    if isinstance(weight, (int, float)):
        return float(weight)
    try:
        each = [_number(w) for w in weight]
    except TypeError:
        raise TypeError(f"{name}: got {weight!r}; a number, or one for every frame, needed") from None
    if len(each) != num_frames:
        raise ValueError(f"{name}: got {len(each)} weights, {num_frames} needed, one for every frame")
    return torch.tensor(each, dtype=torch.float32)


def _number(value: Any) -> float:
    value = scalar(value)
    if not isinstance(value, (int, float)):
        raise TypeError
    return float(value)
