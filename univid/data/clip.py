"""What a prompt or a picture tells the U-Net: the token sequences of a CLIP of open_clip's."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from univid.data.batch import to_device
from univid.data.tensors import (
    CLIP_WEIGHTS,
    LEFT_OUT,
    UNREAD,
    check_keys,
    clip_source,
    find_clip_weights,
    read_json,
    read_safetensors,
    reason,
)

CONFIG = "open_clip_config.json"
WEIGHTS = CLIP_WEIGHTS[0]
VOCABULARY = "bpe_vocab.txt.gz"  # of a folder that has its own; open_clip's else


class Clip(nn.Module):
    """Both towers of a CLIP.

    Text: all blocks but the last, then ``ln_final`` (as Stable Diffusion 2 reads it). Image: all blocks, then ``ln_post``, the class
    token kept.

    Args:
        model: an open_clip model. tokenizer: its tokenizer. config: open_clip's ``model_cfg``, from which it was built.
        vocabulary: the tokenizer's merges as a file has them, if they are not open_clip's.
    """

    model: Any  # open_clip's own kinds, of which PyTorch's type stubs know nothing

    def __init__(self, model: nn.Module, tokenizer: Any, config: dict, vocabulary: bytes | None = None):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        self.vocabulary = vocabulary

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def context_length(self) -> int:
        """Tokens of a prompt, 77 for every published CLIP."""
        return self.config["text_cfg"].get("context_length", 77)

    @property
    def text_dim(self) -> int:
        """Of a token of a text."""
        return self.config["text_cfg"].get("width", 512)

    @property
    def image_dim(self) -> int:
        """Of a token of an image."""
        return self.config["vision_cfg"].get("width", 768)

    @torch.no_grad()
    def text(self, prompts: list[str], negative: str | None = None) -> Tensor:
        """``(B, 77, width)``; a prompt too long for the context is cut, with a warning that shows what was lost.

        It calls the one that is ``negative`` the negative prompt.
        """
        for prompt in prompts:
            self._warn_if_cut("negative_prompt" if prompt == negative else "prompt", prompt)
        tokens = to_device(self.tokenizer(prompts), self.device)
        tower = getattr(
            self.model, "text", self.model
        )  # CLIP holds its text tower's parts itself, CustomTextCLIP a tower
        last = len(tower.transformer.resblocks) - 2
        result = self.model.forward_intermediates(
            text=tokens, text_indices=[last], normalize_intermediates=True, intermediates_only=True
        )
        return result["text_intermediates"][0]

    @torch.no_grad()
    def image(self, images: Tensor) -> Tensor:
        """``(B, 257, width)`` of images ``(B, 3, h, w)`` in [0, 1], resized without a crop (bicubic)."""
        visual = self.model.visual
        size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            to_device(torch.tensor(x), pixels.device)[:, None, None] for x in (visual.image_mean, visual.image_std)
        )
        result = visual.forward_intermediates(
            ((pixels - mean) / std).to(self.device, self.dtype),
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat((result["image_intermediates_prefix"][0], result["image_intermediates"][0]), 1)

    def save(self, folder: Path) -> None:
        """The folder that :func:`load_clip` reads, without what it does not."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps({"model_cfg": self.config}, indent=1) + "\n")
        tensors = {name: x.contiguous() for name, x in self.model.state_dict().items() if name not in UNREAD}
        save_file(tensors, folder / WEIGHTS)
        if self.vocabulary is not None:
            (folder / VOCABULARY).write_bytes(self.vocabulary)

    def _warn_if_cut(self, name: str, prompt: str) -> None:
        tokens = self.tokenizer.encode(prompt)
        room = self.context_length - 2  # besides start and end
        if len(tokens) > room:
            lost = self.tokenizer.decode(tokens[room:]).strip()
            warnings.warn(f"{name}: {len(tokens)} tokens, {room} fit; this was cut: {lost!r}", stacklevel=4)


def load_clip(source: str | Path, dtype: torch.dtype = torch.float32) -> Clip:
    """A CLIP with its weights.

    Args:
        source: a folder that holds ``open_clip_config.json`` and weights as safetensors (and, if its tokenizer is its own,
            ``bpe_vocab.txt.gz``); or the file or folder of weights of a configuration that open_clip knows, after its name and a
            colon: ``ViT-H-14:weights/open_clip_model.safetensors``. What is there under the whole name comes first.

    Raises:
        FileNotFoundError: nothing there. ValueError: not a CLIP, or its weights do not fit the configuration.
    """
    name, folder = clip_source(source)
    if name:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"clip: {name!r} is not a configuration of open_clip; open_clip.list_models() lists them")
    else:
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"clip: {folder} has no {CONFIG}, the configuration of an open_clip model")
        config = read_json(folder / CONFIG).get("model_cfg")
        if config is None:
            raise ValueError(f"clip: {folder / CONFIG} has no model_cfg, the configuration of an open_clip model")
        _check_preprocessing(folder / CONFIG)
    weights = find_clip_weights(folder)
    vocabulary = folder / VOCABULARY
    clip = build_clip(config, vocabulary if vocabulary.is_file() else None)
    for key in UNREAD & clip.model.state_dict().keys():  # rather than at random
        module, _, name = key.rpartition(".")
        setattr(clip.model.get_submodule(module), name, None)
    tensors = {key: x for key, x in read_safetensors(weights).items() if key not in LEFT_OUT}
    check_keys(weights, {key: x.shape for key, x in clip.model.state_dict().items()}, tensors)
    clip.model.load_state_dict(tensors)
    clip.model.to(dtype)
    return clip


def build_clip(config: dict, vocabulary: Path | None = None) -> Clip:
    """A CLIP with random weights, from open_clip's ``model_cfg``.

    Raises:
        ValueError: no such configuration, or one of towers other than plain ViTs, or of a tokenizer that is not BPE with
            the merges of open_clip or of ``vocabulary``.
    """
    _check_config(config)
    kind = open_clip.model.CustomTextCLIP if config.get("custom_text") else open_clip.model.CLIP
    try:
        model = kind(**{key: value for key, value in config.items() if key != "custom_text"})
    except Exception as error:  # open_clip checks few of the values
        raise ValueError(f"clip: its configuration is not that of an open_clip model: {reason(error)}") from None
    model.visual.image_mean = getattr(model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    model.visual.image_std = getattr(model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    merges = None if vocabulary is None else vocabulary.read_bytes()
    return Clip(model, _tokenizer(config["text_cfg"], vocabulary), config, merges)


def _tokenizer(text: dict, vocabulary: Path | None) -> open_clip.SimpleTokenizer:
    """Of as many tokens as the text tower has embeddings for."""
    own = {"bpe_path": str(vocabulary)} if vocabulary else {}
    try:
        tokenizer = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77), **own)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"clip: {vocabulary} is not a whole gzip file of merges: {error}") from None
    size = text.get("vocab_size", 49408)  # open_clip's own default
    if size != tokenizer.vocab_size:
        whose = vocabulary or f"as there is no {VOCABULARY}, open_clip's vocabulary"
        raise ValueError(f"clip: {whose} has {tokenizer.vocab_size} tokens; model_cfg's text_cfg.vocab_size is {size}")
    return tokenizer


# What open_clip would build another tower or tokenizer for than this file reads.
_UNSUPPORTED = {
    "vision_cfg": ("timm_model_name", "attentional_pool"),
    "text_cfg": ("hf_model_name", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "embed_cls"),
}


def _check_config(config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"clip: model_cfg: got {config!r}, needs an object with embed_dim, vision_cfg and text_cfg")
    for part, names in _UNSUPPORTED.items():
        tower = config.get(part)
        if not isinstance(tower, dict):
            raise ValueError(f"clip: model_cfg: {part}: got {tower!r}, needs an object, of a plain ViT")
        for name in names:
            if tower.get(name):
                own = f"; merges of its own stand in {VOCABULARY}" if name == "tokenizer_kwargs" else ""
                raise ValueError(
                    f"clip: model_cfg: {part}.{name}: got {tower[name]!r}, needs none (plain ViTs and BPE only){own}"
                )
        layers = tower.get("layers", 12)
        if not isinstance(layers, int):  # a list is a ResNet's
            raise ValueError(
                f"clip: model_cfg: {part}.layers: got {layers!r}, needs a number (plain ViTs and BPE only)"
            )


def _check_preprocessing(path: Path) -> None:
    """See that pictures are normalized as :meth:`Clip.image` does it."""
    given = read_json(path).get("preprocess_cfg") or {}
    if not isinstance(given, dict):
        raise ValueError(f"clip: {path}: preprocess_cfg: got {given!r}, needs an object")
    for name, built_in in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD)):
        if given.get(name) not in (None, list(built_in)):
            raise ValueError(f"clip: {path}: preprocess_cfg.{name}: got {given[name]!r}, needs {list(built_in)}")
