"""AdamW and the average of the weights, on each rank's own shards, without a look at the device's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import Optimizer
from train.sharding import Shard, local_shards


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
    """Of step 0, 1, …: linear from 0, then a cosine from ``lr`` down to ``final · lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return config.lr * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)


class ShardedAdamW:
    """Fused AdamW with clipping, and an exponential average of the weights.

    A parameter without a gradient, as those of time in a step of images, is left alone: neither its weights, their decay, its
    moments, nor its average move. A step whose gradient is not finite does nothing but count.

    Every moment exists from the start, so that a checkpoint has the same tensors whatever steps came before it.

    Args:
        model: sharded; the parameters that ask for a gradient are trained. group: the ranks that hold one copy of them.
    """

    def __init__(self, model: nn.Module, config: Optimizer, group: Any):
        self.config, self.group = config, group
        self.shards = [shard for shard in local_shards(model) if shard.parameter.requires_grad]
        if not self.shards:
            raise ValueError("stage: trains no parameter of this model")
        self.average = [shard.local.clone() for shard in self.shards]
        # Vectors are biases and the scales of norms.
        self.adam = torch.optim.AdamW(
            [
                {"params": [s.local for s in self.shards if s.parameter.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [s.local for s in self.shards if s.parameter.ndim <= 1], "weight_decay": 0.0},
            ],
            config.lr,
            (config.beta1, config.beta2),
            config.eps,
            fused=True,
        )
        self.device = self.shards[0].local.device
        for shard in self.shards:
            self.adam.state[shard.local] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(shard.local),
                "exp_avg_sq": torch.zeros_like(shard.local),
            }
        self.skipped = torch.zeros((), device=self.device)  # steps so far

    @torch.no_grad()
    def step(self, lr: float, step: int) -> Tensor:
        """Step 0, 1, … with the parameters' gradients, which it clears; their norm before clipping, on the device."""
        trained = []
        for index, shard in enumerate(self.shards):
            gradient: Any = shard.parameter.grad
            shard.local.grad = None if gradient is None else gradient.to_local()
            shard.parameter.grad = None
            if gradient is not None:
                trained.append(index)
        norm = self._norm([self.shards[index].local.grad for index in trained])
        bad = (~norm.isfinite()).float()
        self.skipped += bad
        for group in self.adam.param_groups:
            group["lr"] = lr
        # AdamW divides gradients by grad_scale, and does nothing where found_inf is 1.
        self.adam.grad_scale = (norm / self.config.clip_norm).clamp(min=1)  # type: ignore[attr-defined]
        self.adam.found_inf = bad  # type: ignore[attr-defined]
        self.adam.step()
        decay = min(self.config.ema, (1 + step) / (10 + step))
        weight = (1 - decay) * (1 - bad)
        torch._foreach_lerp_(
            [self.average[index] for index in trained],
            [self.shards[index].local for index in trained],
            [weight] * len(trained),
        )
        for shard in self.shards:
            shard.local.grad = None
        return norm

    def _norm(self, gradients: list[Any]) -> Tensor:
        """Of all shards together; not finite on every rank if any entry is not."""
        if not gradients:
            raise RuntimeError("a step left no parameter a gradient")
        total = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(total, group=self.group)
        return total.sqrt()

    def tensors(self) -> Mapping[str, list[tuple[Shard, Tensor]]]:
        """The state to keep: each shard's average and moments, by kind."""
        kinds: dict[str, list[tuple[Shard, Tensor]]] = {"ema": list(zip(self.shards, self.average, strict=True))}
        for name in ("exp_avg", "exp_avg_sq"):
            kinds[name] = [(shard, self.adam.state[shard.local][name]) for shard in self.shards]
        return kinds

    def counts(self) -> Tensor:
        """How many steps were skipped, and how many each parameter has made: the same on all ranks."""
        return torch.stack([self.skipped, *(self.adam.state[shard.local]["step"] for shard in self.shards)])

    def set_counts(self, counts: Tensor) -> None:
        self.skipped.copy_(counts[0])
        for shard, count in zip(self.shards, counts[1:], strict=True):
            self.adam.state[shard.local]["step"].copy_(count)
