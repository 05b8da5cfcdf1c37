"""UniVid: fast attention operators for video diffusion (``univid.ops``), and a model and a generator on top of them.

Importing this package imports no PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from univid.pipeline import UniVidPipeline

__version__ = "0.1.0"
__all__ = ["UniVidPipeline"]


def __getattr__(name: str) -> Any:
    if name == "UniVidPipeline":
        from univid.pipeline import UniVidPipeline

        return UniVidPipeline
    raise AttributeError(f"module 'univid' has no attribute {name!r}")
