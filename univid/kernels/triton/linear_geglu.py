"""A linear layer, PyTorch's, and its GEGLU."""

import torch.nn.functional as F
from torch import Tensor

from univid.kernels.calls import GegluCall, LinearGegluCall
from univid.kernels.triton import geglu, launch


def unsupported(call: LinearGegluCall) -> str | None:
    return launch.unsupported(*call)


def forward(call: LinearGegluCall) -> Tensor:
    return geglu.forward(GegluCall(F.linear(*call)))
