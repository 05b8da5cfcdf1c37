"""The model: configuration, U-Net, image adapter, and weights on disk."""

from univid.model.adapter import ImageAdapter
from univid.model.config import UNetConfig
from univid.model.unet import UNet
from univid.model.weights import load_sd21

__all__ = ["ImageAdapter", "UNet", "UNetConfig", "load_sd21"]
