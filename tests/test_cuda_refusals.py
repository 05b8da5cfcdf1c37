"""What the CUDA kernels take and what they refuse, and why, as on a card of their own; no kernel runs."""

from importlib import import_module

import pytest
import torch

from univid.kernels.calls import (
    DualStreamCall,
    GroupNormSiluCall,
    LinearGegluCall,
    PyramidCall,
    Stream,
    TemporalCall,
    TemporalConvCall,
)

pytest.importorskip("univid.kernels.cuda._csrc", reason="needs the CUDA kernels built")

BF16 = torch.bfloat16
B, T, N, H, D = 2, 5, 12, 3, 64


@pytest.fixture(autouse=True)
def on_their_card(monkeypatch):
    for name in ("pyramid", "dual_stream", "temporal", "temporal_conv", "group_norm", "linear_geglu"):
        monkeypatch.setattr(f"univid.kernels.cuda.{name}.unavailable", lambda *_, **__: None)


def new(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def pyramid(q=None, k=None, v=None):
    q = new(B, T, N, H, D) if q is None else q
    k, v = (torch.zeros_like(q) if x is None else x for x in (k, v))
    return PyramidCall(q, k, v, torch.zeros(1, T, 2, dtype=torch.int32), 1.0, False, False)


def dual_stream(q=None, text=77, image=257, weight=1.0):
    q = new(B, T, N, H, D) if q is None else q
    streams = (length and Stream(*new(2, B, length, *q.shape[3:], dtype=q.dtype), weight) for length in (text, image))
    return DualStreamCall(q, *(stream or None for stream in streams), 1.0)


def temporal(q=None):
    q = new(B, T, N, H, D) if q is None else q
    return TemporalCall(q, q, q, 1.0)


def temporal_conv(x=None, weight=None, channels_out=16, taps=3):
    x = new(B, T, N, 24) if x is None else x
    weight = new(channels_out, taps, x.shape[-1], dtype=x.dtype).transpose(1, 2) if weight is None else weight
    return TemporalConvCall(x, weight, None, None)


def group_norm(x=None, groups=4):
    x = new(B, N, 32) if x is None else x
    return GroupNormSiluCall(x, groups, new(x.shape[-1]), new(x.shape[-1]), 1e-5, True)


def linear_geglu(x=None, weight=None):
    x = new(B * T * N, 24) if x is None else x
    return LinearGegluCall(x, new(32, x.shape[1], dtype=x.dtype) if weight is None else weight, None)


QKV = new(B, T, N, 3, H, D)
PADDED = new(B, T, N, H, D + 8)[..., :D]
SHIFTED = new(B * T * N * H * D + 8)[8:].view(B, T, N, H, D)
TAKEN = {
    "pyramid": pyramid(),
    "pyramid, float16": pyramid(new(B, T, N, H, D, dtype=torch.float16)),
    "pyramid, packed": pyramid(*QKV.unbind(3)),
    "pyramid, sliced": pyramid(PADDED, PADDED, PADDED),
    "pyramid, 16 bytes on": pyramid(SHIFTED),
    "pyramid, other keys": pyramid(None, new(B, 1, 7, H, D), new(B, 1, 7, H, D)),
    "pyramid, clips expanded": pyramid(None, new(1, T, N, H, D).expand(B, -1, -1, -1, -1)),
    "dual_stream": dual_stream(),
    "dual_stream, packed": dual_stream(QKV[:, :, :, 0]),
    "dual_stream, most of two": dual_stream(None, 88, 264),
    "dual_stream, most of one": dual_stream(None, 352, 0),
    "dual_stream, weights": dual_stream(weight=new(B, T, 1)),
    "temporal": temporal(),
    "temporal, most": temporal(new(B, 64, N, H, 128)),
    "temporal, odd heads": temporal(new(B, T, N, H, 40)),
    "temporal, packed": temporal(QKV[:, :, :, 1]),
    "temporal_conv": temporal_conv(),
    "temporal_conv, sliced": temporal_conv(new(B, T, N, 48)[..., :24]),
    "temporal_conv, many taps": temporal_conv(taps=31),
    "temporal_conv, one frame": temporal_conv(new(B, 1, N, 24)),
    "group_norm": group_norm(),
    "group_norm, sliced": group_norm(new(B, N, 64)[..., :32]),
    "group_norm, f1": group_norm(new(B, 2880, 320), 32),
    "linear_geglu": linear_geglu(),
    "linear_geglu, float16": linear_geglu(new(N, 24, dtype=torch.float16)),
    "linear_geglu, sliced": linear_geglu(new(N, 48)[:, :24], new(32, 32)[:, :24]),
    "linear_geglu, one row": linear_geglu(new(1, 24)),
}
REFUSED = {
    "pyramid, float32": (pyramid(new(B, T, N, H, D, dtype=torch.float32)), "dtype torch.float32: bfloat16 or float16"),
    "pyramid, D": (pyramid(new(B, T, N, H, 128)), "head dimension 128: 64 needed"),
    "pyramid, address": (pyramid(new(B * T * N * H * D + 1)[1:].view(B, T, N, H, D)), "q: its address and strides"),
    "pyramid, strides": (pyramid(None, new(B, T, N, H, D + 4)[..., :D]), "k: its address and strides"),
    "pyramid, tokens": (pyramid(v=new(B, T, 1, H, D).expand(-1, -1, N, -1, -1)), "v: expanded along its tokens"),
    "dual_stream, float64": (dual_stream(new(B, T, N, H, D, dtype=torch.float64)), "dtype torch.float64: "),
    "dual_stream, D": (dual_stream(new(B, T, N, H, 32)), "head dimension 32: 64 needed"),
    "dual_stream, text": (dual_stream(None, 89, 257), "89 text and 257 image keys: at most 352 of one stream"),
    "dual_stream, image": (dual_stream(None, 0, 353), "0 text and 353 image keys: at most 352 of one stream"),
    "temporal, T": (temporal(new(B, 65, N, H, D)), "T = 65: at most 64 needed"),
    "temporal, D": (temporal(new(B, T, N, H, 44)), "head dimension 44: a multiple of 8, at most 128, needed"),
    "temporal, large D": (temporal(new(B, T, N, H, 136)), "head dimension 136: a multiple of 8, at most 128"),
    "temporal_conv, C": (temporal_conv(new(B, T, N, 28)), "C = 28 and C_out = 16: multiples of 8 needed"),
    "temporal_conv, C_out": (temporal_conv(channels_out=12), "C = 24 and C_out = 12: multiples of 8 needed"),
    "temporal_conv, rows": (temporal_conv(new(1).expand(1, 2**15, 2**15, 24)), "(T + K)·N = 1073840128: less than"),
    "temporal_conv, weight": (temporal_conv(weight=new(16, 24, 3)), "weight: C must be contiguous"),
    "temporal_conv, taps": (temporal_conv(weight=new(16, 24, 1).expand(-1, -1, 3)), "weight: "),
    "temporal_conv, frames": (temporal_conv(new(B, 2 * T, N, 24)[:, ::2]), "x: its frames must follow each other"),
    "group_norm, C": (group_norm(new(B, N, 36)), "C = 36: a multiple of 8 needed"),
    "group_norm, N": (group_norm(new(1).expand(B, 2**20, 320), 32), "N = 1048576 and 10 channels a group: what fits"),
    "linear_geglu, float32": (
        linear_geglu(new(N, 24, dtype=torch.float32)),
        "dtype torch.float32: bfloat16 or float16",
    ),
    "linear_geglu, C_in": (linear_geglu(new(N, 28)), "C_in = 28 and 2C = 32: multiples of 8 and 16 needed"),
    "linear_geglu, C": (linear_geglu(weight=new(24, 24)), "C_in = 24 and 2C = 24: multiples of 8 and 16 needed"),
    "linear_geglu, rows": (linear_geglu(new(1, 24).expand(2**30, -1)), "B·T·N = 1073741824 and 2C = 32: less than"),
    "linear_geglu, x": (linear_geglu(new(1, 24).expand(N, -1)), "x: expanded"),
    "linear_geglu, weight": (linear_geglu(weight=new(1, 24).expand(32, -1)), "weight: expanded"),
    "linear_geglu, strides": (linear_geglu(new(N, 28)[:, :24]), "x: its address and strides must be multiples of 16"),
}


def unsupported(name, call):
    return import_module(f"univid.kernels.cuda.{name.partition(',')[0]}").unsupported(call)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name):
    assert unsupported(name, TAKEN[name]) is None


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, reason = REFUSED[name]
    assert unsupported(name, call).startswith(reason)
