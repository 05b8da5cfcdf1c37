"""UniVid: fast attention operators for video diffusion (``univid.ops``). Importing this package imports no PyTorch."""

__version__ = "0.1.0"
