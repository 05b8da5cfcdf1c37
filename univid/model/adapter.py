"""The image adapter: from the image encoder's tokens to the U-Net's context."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from univid.model.weights import Pretrained


class ImageAdapter(Pretrained):
    """Linear, GELU, Linear, LayerNorm on every token.

    Args:
        image_dim: of the image encoder's tokens. context_dim: of the U-Net's.
        image_tokens: "patch", the class token and all patches, or "global", the class token alone.
    """

    def __init__(self, image_dim: int = 1280, context_dim: int = 1024, image_tokens: str = "patch"):
        super().__init__()
        if image_tokens not in ("patch", "global"):
            raise ValueError(f"image_tokens: got {image_tokens!r}, needs patch or global")
        self.image_tokens = image_tokens
        self.linear_1 = nn.Linear(image_dim, image_dim)
        self.gelu = nn.GELU()
        self.linear_2 = nn.Linear(image_dim, context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, L, image_dim)``, the class token first, to ``(B, L, context_dim)``; "global": ``(B, 1, context_dim)``."""
        if self.image_tokens == "global":
            tokens = tokens[:, :1]
        return self.norm(self.linear_2(self.gelu(self.linear_1(tokens))))

    def to_config(self) -> dict[str, Any]:
        return {
            "image_dim": self.linear_1.in_features,
            "context_dim": self.linear_2.out_features,
            "image_tokens": self.image_tokens,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str, **choices: Any) -> Self:
        try:
            return cls(**config | choices)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"path: {source} is not an image adapter's: {error}") from None
