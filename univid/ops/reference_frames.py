"""Which frames every frame attends to: the immutable table that ``pyramid_st_attn`` takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from univid.kernels.inverse import inverse_table
from univid.ops.checks import check_size


@dataclass(frozen=True, eq=False)
class ReferenceFrames:
    """The reference frames of every query frame, validated on the host, with what the backward needs, built once.

    Make one with :meth:`pyramid`, :meth:`first`, :meth:`previous`, :meth:`sparse_causal`, :meth:`window`, :meth:`all`
    or :meth:`from_table`. Move it with :meth:`to` before capturing a CUDA graph; elsewhere the operators move it (and
    remember the copy).
    """

    table: Tensor  # (1 or B, T, R) int32: entries in [0, num_key_frames), or -1 for padding
    num_key_frames: int  # Tk
    padded: bool  # whether -1 occurs
    rows: Tensor = field(repr=False)  # the table, or its first row (1 or B, 1, R) where all T rows are equal
    inverse: Tensor = field(repr=False)  # of rows: who reads each key frame (kernels/inverse.py)
    # Where every row lists all frames, each once: the table that says so of one long key frame, which they all are.
    joined: ReferenceFrames | None = field(default=None, repr=False, compare=False)
    _copies: dict[torch.device, ReferenceFrames] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple:
        # Without the copies: a table that was used on a GPU is loaded on a machine that has none.
        return ReferenceFrames, (self.table, self.num_key_frames, self.padded, self.rows, self.inverse, self.joined)

    @classmethod
    def from_table(cls, table: Tensor, num_key_frames: int) -> ReferenceFrames:
        """A table of one's own.

        Args:
            table: integer tensor ``(T, R)`` or ``(1 or B, T, R)``; entries in [0, num_key_frames), -1 skips an entry.
            num_key_frames: Tk, the number of frames of k and v.

        Raises:
            TypeError: the table is not an integer tensor. ValueError: its rank, or an entry out of range.
        """
        check_size("num_key_frames", num_key_frames)
        if (
            not isinstance(table, Tensor)
            or table.is_floating_point()
            or table.is_complex()
            or table.dtype == torch.bool
        ):
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"table: got {got}, needs an integer tensor")
        if table.ndim not in (2, 3) or table.shape[-2] == 0 or table.shape[0] == 0:
            raise ValueError(f"table: got shape {tuple(table.shape)}, needs (T, R) or (B, T, R) with T >= 1")
        with _recordable():
            return cls._from_checked(table, num_key_frames)

    @classmethod
    def _from_checked(cls, table: Tensor, num_key_frames: int) -> ReferenceFrames:
        device, table = table.device, table.detach().long().cpu()
        check_entries("table", table, num_key_frames)
        table = (table if table.ndim == 3 else table[None]).int().contiguous()
        rows = table[:, :1].contiguous() if bool((table == table[:, :1]).all()) else table
        padded = bool((table < 0).any())
        joined = None
        lists_all = rows.shape[1:] == (1, num_key_frames) and bool((rows.sort().values.diff() == 1).all())
        if lists_all and not padded and num_key_frames > 1:
            joined = cls.from_table(torch.zeros(table.shape[1], 1, dtype=torch.long), 1)
        frames = cls(table, num_key_frames, padded, rows, inverse_table(rows, num_key_frames), joined)
        return frames.to(device)

    @classmethod
    def pyramid(
        cls,
        num_frames: int,
        num_refs: int,
        sample: str = "center",
        own_frame: bool = True,
        generator: torch.Generator | None = None,
    ) -> ReferenceFrames:
        """The paper's sampler: the frames are cut into R segments [⌊iT/R⌋, ⌊(i+1)T/R⌋), one frame of each stands for
        it.

        Args:
            num_frames: T. num_refs: R <= T; R = T is full attention over the clip.
            sample: "center", the frame start + (length - 1) // 2 of a segment, or "random", for training.
            own_frame: in its own segment every frame stands for itself, so that each row has exactly R different
                frames, sorted, its own among them. False gives the paper's one set, shared by all frames.
            generator: a CPU generator for "random".
        """
        check_size("num_frames", num_frames)
        check_size("num_refs", num_refs)
        if num_refs > num_frames:
            raise ValueError(f"num_refs: got {num_refs}, needs at most num_frames = {num_frames}")
        if sample not in ("center", "random"):
            raise ValueError(f"sample: got {sample!r}, needs 'center' or 'random'")
        bounds = torch.arange(num_refs + 1) * num_frames // num_refs
        start, length = bounds[:-1], bounds.diff()
        if sample == "center":
            chosen = start + (length - 1) // 2
        else:
            chosen = start + (torch.rand(num_refs, generator=generator, dtype=torch.float64) * length).long()
        table = chosen.repeat(num_frames, 1)
        if own_frame:
            frame = torch.arange(num_frames)
            segment = torch.searchsorted(bounds, frame, right=True) - 1
            table[frame, segment] = frame
        return cls.from_table(table, num_frames)

    @classmethod
    def first(cls, num_frames: int) -> ReferenceFrames:
        """Every frame attends to frame 0."""
        check_size("num_frames", num_frames)
        return cls.from_table(torch.zeros(num_frames, 1, dtype=torch.long), num_frames)

    @classmethod
    def previous(cls, num_frames: int) -> ReferenceFrames:
        """Every frame attends to the one before it; frame 0 to itself."""
        check_size("num_frames", num_frames)
        return cls.from_table((torch.arange(num_frames) - 1).clamp(min=0)[:, None], num_frames)

    @classmethod
    def sparse_causal(cls, num_frames: int) -> ReferenceFrames:
        """Every frame attends to the first and to the previous one (Tune-A-Video); frames 0 and 1 thus list frame 0
        twice."""
        check_size("num_frames", num_frames)
        previous = (torch.arange(num_frames) - 1).clamp(min=0)
        return cls.from_table(torch.stack([torch.zeros_like(previous), previous], dim=1), num_frames)

    @classmethod
    def window(cls, num_frames: int, k: int) -> ReferenceFrames:
        """Every frame attends to the frames at most ``k`` away; past the ends the entry is -1. k = 0 is attention
        within each frame."""
        check_size("num_frames", num_frames)
        check_size("k", k, at_least=0)
        table = torch.arange(num_frames)[:, None] + torch.arange(-k, k + 1)
        return cls.from_table(torch.where((table >= 0) & (table < num_frames), table, -1), num_frames)

    @classmethod
    def all(cls, num_frames: int) -> ReferenceFrames:
        """Every frame attends to all frames: full spatial-temporal attention."""
        check_size("num_frames", num_frames)
        return cls.from_table(torch.arange(num_frames).repeat(num_frames, 1), num_frames)

    @property
    def num_frames(self) -> int:
        """T, the number of query frames."""
        return self.table.shape[1]

    @property
    def num_refs(self) -> int:
        """R, the entries of a row."""
        return self.table.shape[2]

    @property
    def device(self) -> torch.device:
        return self.table.device

    def to(self, device: torch.device | str) -> ReferenceFrames:
        """The same table on ``device``; the copy is remembered, so that a table on the host costs one transfer."""
        device = torch.device(device)
        if device == self.device:
            return self
        device = torch.empty(0, device=device).device  # "cuda" becomes the current one, such as "cuda:0"
        if device == self.device:
            return self
        if device in self._copies:
            return self._copies[device]
        with _recordable():
            table, rows, inverse = (t.to(device) for t in (self.table, self.rows, self.inverse))
        joined = self.joined and self.joined.to(device)
        copy = ReferenceFrames(table, self.num_key_frames, self.padded, rows, inverse, joined)
        if type(table) is Tensor:  # not one that stands in for it while PyTorch traces
            self._copies[device] = copy
        return copy


def _recordable() -> AbstractContextManager:
    """What is made within may be saved for a backward: the same table serves a sampler today and training tomorrow."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def check_entries(name: str, table: Tensor, num_key_frames: int) -> None:
    """Raise ValueError where an entry is neither -1 nor a frame. ``table`` is on the CPU."""
    wrong = table[(table < -1) | (table >= num_key_frames)]
    if wrong.numel():
        raise ValueError(f"{name}: got entry {int(wrong[0])}, needs frames in [0, {num_key_frames}) or -1 (padding)")
