"""The trained model in shards: FSDP2 over every block, with activation checkpointing and compilation of each."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from univid.model import ImageAdapter, UNet, UNetConfig
from univid.model.blocks import ResidualBlock, Transformer

ATTENTION = ("pyramid_st_attn", "pyramid_st_attn_qkv", "dual_stream_attn", "temporal_attn", "temporal_attn_qkv")


class Denoiser(nn.Module):
    """All that is trained: the U-Net and the image adapter."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.unet = UNet(config)
        self.adapter = ImageAdapter(config.image_dim, config.context_dim, config.image_tokens)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None, image: Tensor | None, **choices: Any) -> Tensor:
        """As :meth:`UNet.forward`; image ``(B, L, image_dim)``: the image encoder's tokens."""
        return self.unet(x, t, text, None if image is None else self.adapter(image), **choices)

    def blocks(self) -> list[nn.Module]:
        """What is sharded, computed again and compiled on its own, in the network's order."""
        return [module for module in self.unet.modules() if isinstance(module, ResidualBlock | Transformer)]


def shard(model: Denoiser, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread the parameters over the mesh, as float32; compute in ``dtype``, and add gradients up in float32.

    A model on the meta device stays there; :func:`materialise` gives it memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    alone = mesh.size(mesh.ndim - 1) == 1  # nothing is gathered, so nothing is worth giving back
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not alone)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def checkpoint_activations(model: Denoiser) -> None:
    """Blocks keep their inputs and what attention returned (out, logsumexp); the rest is computed again in the backward."""
    kept = {getattr(torch.ops.univid, name).default for name in ATTENTION}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in model.blocks():
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )


def compile_blocks(model: Denoiser, backend: str, variants: int) -> None:
    """Compile the blocks whole, each for fixed shapes.

    Args:
        variants: how many kinds of steps there are: modality, T, size, and which conditions are there. Beyond as many graphs as
            that takes something is compiled again and again, which is an error, as is code that cannot be compiled.
    """
    blocks = model.blocks()
    # Blocks of one class share their code, and so the limit.
    limit = max(8, len(blocks) * variants)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = 4 * limit
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks:
        # The forward alone: FSDP's hooks stay outside.
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)


# --- values -----------------------------------------------------------------------------------------------------------


def materialise(model: nn.Module, device: torch.device, whole: Denoiser, seed: int) -> None:
    """Give a sharded model on the meta device its memory, and the values of ``whole``, of which each rank takes its shards.

    What is on the meta device in ``whole`` is drawn at random: layer by layer, so that no more than one is ever there whole,
    and from seeds of their own, so that the number of ranks makes no difference.
    """
    model.to_empty(device=device)
    shards = dict(model.named_parameters())
    for name, module in whole.named_modules():
        own = dict(module.named_parameters(recurse=False))
        random = any(parameter.is_meta for parameter in own.values())
        if random:
            _draw(module, device, stable_seed(seed, name))
        for key, value in module.named_parameters(name, recurse=False):
            copy_shard(shards[key], value.detach().to(device, torch.float32))
        if random:
            module.to_empty(device="meta", recurse=False)


def _draw(module: Any, device: torch.device, seed: int) -> None:
    module.to_empty(device=device, recurse=False)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module.reset_parameters()


def copy_shard(parameter: nn.Parameter, value: Tensor) -> None:
    """Write this rank's part of a whole tensor, which every rank has."""
    dtensor = parameter.detach()
    assert isinstance(dtensor, DTensor)
    part = distribute_tensor(value, dtensor.device_mesh, dtensor.placements, src_data_rank=None)
    dtensor.to_local().copy_(part.to_local())


@dataclass
class Shard:
    """This rank's part of a parameter: float32, its own memory."""

    name: str
    parameter: nn.Parameter  # the DTensor that it belongs to
    local: Tensor

    def whole(self, local: Tensor, mesh: DeviceMesh) -> DTensor:
        """A tensor that is laid out as the parameter, of this rank's part."""
        like = self.parameter.detach()
        assert isinstance(like, DTensor)
        return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def local_shards(model: nn.Module) -> Iterator[Shard]:
    for name, parameter in model.named_parameters():
        local = parameter.detach()
        assert isinstance(local, DTensor)
        yield Shard(name, parameter, local.to_local())


def stable_seed(*parts: object) -> int:
    """63 bits that depend on the parts alone, in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
