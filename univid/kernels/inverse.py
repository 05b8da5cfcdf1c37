"""The inverse of a reference table: for every key frame, which rows of queries read it.

``(1 or B, 2·Tk + 1 + G·R)`` int32, of a table ``(1 or B, G, R)`` over Tk key frames; each row of it holds, one after
the other,

* ``offsets`` (Tk + 1): the readers of key frame j are ``readers[offsets[j] : offsets[j + 1]]`` (CSR);
* ``order`` (Tk): the key frames, the longest list first, so that a skewed table does not leave the card waiting for one
  frame;
* ``readers`` (G·R): row indices g, ascending in each list (so that sums over it are deterministic); a row that lists a
  frame twice stands there twice. What lies past ``offsets[Tk]`` are the skipped entries.

Built by torch operators of fixed shapes: on the device without a synchronisation, and inside a CUDA graph.
"""

import torch
from torch import Tensor


def inverse_table(table: Tensor, num_key_frames: int) -> Tensor:
    """Build the inverse of ``table`` (1 or B, G, R) integer, entries outside [0, num_key_frames) being skipped."""
    batches, _, num_refs = table.shape
    entries = table.reshape(batches, -1)
    outside = (entries < 0) | (entries >= num_key_frames)
    entries = torch.where(outside, num_key_frames, entries)
    frames, positions = entries.sort(dim=-1, stable=True)
    bounds = torch.arange(num_key_frames + 1, device=table.device, dtype=frames.dtype).expand(batches, -1).contiguous()
    offsets = torch.searchsorted(frames, bounds)
    order = offsets.diff(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    readers = positions // max(num_refs, 1)
    return torch.cat([offsets, order, readers], dim=-1).int()
