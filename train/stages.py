"""What a step is about: drawn from streams that all ranks share, so that their collectives are the same.

Nothing here has a state. A step's choices follow from (seed, step), a sample's from (seed, step, its place in the
step's batch), whatever rank it is on: so a run is resumed exactly from its step, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import Stream
from train.sharding import Denoiser, stable_seed
from univid.data.batch import to_device
from univid.model import UNet
from univid.ops import ReferenceFrames

Frames = dict[int, ReferenceFrames]  # by level

DROP = 0.05  # of the conditions that are there: text alone, image alone, both


@dataclass(frozen=True)
class Stage:
    """Which tasks a stage has, in which shares, and which parameters it trains."""

    tasks: Mapping[str, float]  # "t2v", "i2v", "ti2v"
    trains: tuple[str, ...] | None = None  # parts of the parameters' names; None: all
    leaves: tuple[str, ...] = ()  # but these

    def choose(self, model: Denoiser) -> None:
        """Set which parameters ask for a gradient."""
        for name, parameter in model.named_parameters():
            trained = self.trains is None or any(part in f".{name}" for part in self.trains)
            parameter.requires_grad_(trained and not any(part in f".{name}" for part in self.leaves))


_MIXED = {"t2v": 0.25, "i2v": 0.25, "ti2v": 0.5}
STAGES = {
    "t2v": Stage({"t2v": 1.0}, leaves=(".adapter.", ".to_k_image.", ".to_v_image.")),
    "adapters": Stage(_MIXED, trains=(".adapter.", ".attn2.")),
    "joint": Stage(_MIXED),
}


@dataclass(frozen=True)
class Plan:
    """A step's choices."""

    stream: str
    task: str
    generator: torch.Generator  # for what else all ranks draw alike: reference frames


def plan(stage: Stage, streams: Mapping[str, Stream], seed: int, step: int) -> Plan:
    generator = torch.Generator().manual_seed(stable_seed(seed, "step", step))
    stream = _pick({name: stream.share for name, stream in streams.items()}, generator)
    return Plan(stream, _pick(stage.tasks, generator), generator)


def _pick(shares: Mapping[str, float], generator: torch.Generator) -> str:
    names = list(shares)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(weights, 1, generator=generator))]


@dataclass(frozen=True)
class Draw:
    """Each sample's own choices: its noise, and which conditions it sees."""

    t: Tensor  # (B,) int64
    noise: Tensor  # like the latents, float32
    empty_text: Tensor  # (B,) bool: the empty prompt in place of the text
    text_weight: Tensor | float  # (B,) of 0 and 1, or 1
    image_weight: Tensor | float


def draw(task: str, first: int, latents: Tensor, steps: int, *seed: object) -> Draw:
    """Draw a batch's choices.

    Text is dropped by the empty prompt, the image by weight 0, as guidance does in sampling. Where the task gives no text, text
    weight 0 and the empty prompt are equally likely: sampling uses the one for an image alone, the other beside a negative prompt.

    Args:
        first: the place of the first sample in the step's batch, of all ranks and parts; two may have one key. latents:
            ``(B, T, C, h, w)``. steps: noise levels. seed: what the draws depend on beside the places.
    """
    noise = torch.empty_like(latents, dtype=torch.float32)
    t, drop, half = [], [], []
    own = torch.Generator()
    device = torch.Generator(latents.device)
    for i in range(len(latents)):
        own.manual_seed(stable_seed(*seed, first + i))
        numbers = torch.rand(3, generator=own, dtype=torch.float64).tolist()
        t.append(int(numbers[0] * steps))
        drop.append(numbers[1])
        half.append(numbers[2] < 0.5)
        device.manual_seed(stable_seed(*seed, first + i, "noise"))  # of one seed it would hang together with t
        torch.randn(noise[i].shape, generator=device, device=latents.device, out=noise[i])
    u = torch.tensor(drop, dtype=torch.float64)
    no_text = (u < DROP) | (u >= 2 * DROP) & (u < 3 * DROP)
    no_image = (u >= DROP) & (u < 3 * DROP)
    text_weight: Tensor | float = 1.0
    if task == "i2v":
        no_text = torch.ones_like(no_text)
        text_weight = to_device(torch.tensor(half).float(), latents.device)
    image_weight = 0.0 if task == "t2v" else to_device((~no_image).float(), latents.device)
    return Draw(
        to_device(torch.tensor(t), latents.device),
        noise,
        to_device(no_text, latents.device),
        text_weight,
        image_weight,
    )


def reference_frames(unet: UNet, num_frames: int, generator: torch.Generator, device: torch.device) -> Frames:
    """A step's reference frames, the same on all ranks."""

    def moved(refs: ReferenceFrames) -> ReferenceFrames:
        table, rows, inverse = (to_device(x, device) for x in (refs.table, refs.rows, refs.inverse))
        joined = refs.joined and moved(refs.joined)
        return ReferenceFrames(table, refs.num_key_frames, refs.padded, rows, inverse, joined)

    return {f: moved(refs) for f, refs in unet.reference_frames(num_frames, "cpu", generator).items()}
