"""Weights on disk: diffusers' names and layouts, Stable Diffusion 2.1's files, ours. Safetensors only, never pickle.

In memory q, k and v of a self-attention are one ``to_qkv``, a convolution's weight is ``(C_out, K, K, C)`` and a 1x1
convolution's ``(C_out, C)``. In files they are what diffusers' UNet2DConditionModel has, so that the image part of a
saved U-Net loads there, and Stable Diffusion's here, as they are. What Stable Diffusion does not have is `NEW`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from univid.data.tensors import WEIGHTS, check_keys, find_weights, read_json, read_safetensors
from univid.model.config import UNetConfig

CONFIG = "config.json"

# The modules that Stable Diffusion does not have, by a part of their parameters' names.
TEMPORAL = ("temporal_conv1", "temporal_conv2", "attn_temporal", "fps_embedding")
IMAGE = ("to_k_image", "to_v_image")
NEW = (*TEMPORAL, *IMAGE)


class Pretrained(nn.Module):
    """A module whose folder is ``config.json`` and one safetensors file."""

    def to_config(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str, **choices: Any) -> Self:
        """The module of a ``config.json``; ``source`` names it in errors."""
        raise NotImplementedError

    def save_pretrained(self, path: str | Path) -> None:
        """Write the folder ``path``. Files are written beside their names and renamed: none is ever half there."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        partial = {name: folder / f".{name}.partial" for name in (WEIGHTS, CONFIG)}
        try:
            save_file(to_file(self.state_dict()), partial[WEIGHTS], metadata={"format": "pt"})
            partial[CONFIG].write_text(json.dumps(self.to_config(), indent=2) + "\n")
            for name, file in partial.items():
                os.replace(file, folder / name)
        finally:
            for file in partial.values():
                file.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype | None = None, **choices: Any) -> Self:
        """Read what :meth:`save_pretrained` wrote, in eval mode.

        Args:
            torch_dtype: of the parameters; the file's by default.
            choices: fields of the config to replace, such as ``backend``.

        Raises:
            FileNotFoundError, ValueError: no such folder or file, a truncated one, or a wrong key or shape in it.
        """
        if torch_dtype is not None:
            check_dtype(torch_dtype)
        folder = Path(path)
        config = read_json(folder / CONFIG)
        with torch.device("meta"):
            module = cls.from_config(config, str(folder / CONFIG), **choices)
        return load(module, read_safetensors(find_weights(folder)), str(folder), torch_dtype)


def check_dtype(torch_dtype: Any) -> None:
    """Raises TypeError where that is no dtype that a model computes in."""
    if torch_dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"torch_dtype: got {torch_dtype!r}; torch.float32, torch.bfloat16 or torch.float16 needed")


def load_sd21(path: str | Path, torch_dtype: torch.dtype | None = None, **choices: Any) -> Any:
    """UniVid's U-Net with the weights of Stable Diffusion 2.1, in eval mode.

    What is new (`NEW`) starts so that nothing changes: temporal modules add zero, the image's keys and values are copies
    of the text's.

    Args:
        path: a local diffusers pipeline or U-Net folder (shape from its ``config.json``, ``prediction_type`` from the
            pipeline's ``scheduler/`` where there is one), or a single safetensors file with diffusers' or CompVis' key
            names, of which parts other than the U-Net are ignored.
        torch_dtype: of the parameters; the file's by default.
        choices: fields of :class:`UNetConfig` to replace, such as ``prediction_type`` for a single file of 2.1-base.

    Returns:
        A :class:`univid.model.UNet`.

    Raises:
        FileNotFoundError, ValueError: no such file, a truncated one, a U-Net of another kind, or a key that is missing or
            left over.
    """
    from univid.model.unet import UNet  # it stands on this file

    if torch_dtype is not None:
        check_dtype(torch_dtype)
    path = Path(path)
    if path.is_dir():
        folder = path / "unet" if (path / "unet" / CONFIG).is_file() else path
        whole = folder.absolute()
        scheduler = whole.parent / "scheduler" / "scheduler_config.json"
        if whole.name == "unet" and scheduler.is_file():
            choices = {"prediction_type": read_json(scheduler).get("prediction_type", "epsilon")} | choices
        config = UNetConfig.from_diffusers(read_json(folder / CONFIG), str(folder / CONFIG), **choices)
        tensors = read_safetensors(find_weights(folder))
    else:
        config = UNetConfig.of(choices, "load_sd21")
        tensors = read_safetensors(path)
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        tensors = from_compvis(tensors, config)
    with torch.device("meta"):
        unet = UNet(config)
    load(unet, tensors, str(path), torch_dtype, new=NEW)
    for transformer in unet.transformers():
        attention = transformer.cross_attention
        attention.to_k_image.load_state_dict(attention.to_k.state_dict())
        attention.to_v_image.load_state_dict(attention.to_v.state_dict())
    return unet


# --- names and layouts ------------------------------------------------------------------------------------------------


def to_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors as files hold them."""
    tensors: dict[str, Tensor] = {}
    for name, x in state.items():
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2)
        elif name.endswith("conv_shortcut.weight"):
            x = x[:, :, None, None]
        names = _file_names(name)
        tensors.update((n, part.contiguous()) for n, part in zip(names, x.chunk(len(names)), strict=True))
    return tensors


def from_file(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The parameter ``name`` of the tensors of a file."""
    x = torch.cat([tensors[n] for n in _file_names(name)]) if "to_qkv" in name else tensors[name]
    if name.endswith("conv_shortcut.weight"):
        return x.flatten(1)
    return x.permute(0, 2, 3, 1).contiguous() if x.ndim == 4 else x


def _file_names(name: str) -> list[str]:
    return [name.replace("to_qkv", f"to_{letter}") for letter in "qkv"] if "to_qkv" in name else [name]


def from_compvis(tensors: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The U-Net of a CompVis checkpoint, under diffusers' names; a key that has none keeps its own."""
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    names |= {
        f"middle_block.{i}": f"mid_block.{part}" for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    block, innermost = 1, len(config.channels) - 1
    for level in range(innermost + 1):
        for i in range(config.blocks_per_level):
            names[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{i}"
            names[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{i}"
            block += 1
        if level < innermost:
            names[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, attention in enumerate(reversed(config.attention)):
        for i in range(config.blocks_per_level + 1):
            names[f"output_blocks.{block}.0"] = f"up_blocks.{level}.resnets.{i}"
            names[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{i}"
            block += 1
        # The upsampler follows the last block's transformer, where it has one.
        names[f"output_blocks.{block - 1}.{1 + attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    inside = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
    inside |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
    names |= {f"{old}.{x}": f"{new}.{y}" for old, new in names.items() if "resnets" in new for x, y in inside.items()}

    unet = {}
    for key, x in tensors.items():
        if key.startswith("model.diffusion_model."):
            key = key.removeprefix("model.diffusion_model.")
            parts = key.split(".")
            known = [n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in names]  # the longest first
            unet[".".join((names[".".join(parts[: known[0]])], *parts[known[0] :])) if known else key] = x
    return unet


# --- files ------------------------------------------------------------------------------------------------------------


def load(
    module: nn.Module, tensors: dict[str, Tensor], source: str, dtype: torch.dtype | None, new: Iterable[str] = ()
) -> Any:
    """Give a module on the meta device the tensors of a file, and what is ``new`` its first values.

    Raises:
        ValueError: lists the keys that are missing, left over, or of another shape.
    """
    state = module.state_dict()
    expected = {name: x.shape for name, x in to_file({n: x for n, x in state.items() if not _is_new(n, new)}).items()}
    check_keys(source, expected, tensors)
    dtype = dtype or next(iter(tensors.values())).dtype
    loaded = {name: from_file(name, tensors).to(dtype) for name in state if not _is_new(name, new)}
    module.to(dtype).load_state_dict(loaded, strict=False, assign=True)
    parts: Iterable[Any] = module.modules()
    for part in parts:
        if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
            part.to_empty(device="cpu", recurse=False)
            part.reset_parameters()
    return module.eval()


def _is_new(name: str, new: Iterable[str]) -> bool:
    return not set(name.split(".")).isdisjoint(new)
