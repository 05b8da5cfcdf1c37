"""The U-Net: equal to diffusers' where it should be, and what the paper adds to it."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from univid.model import ImageAdapter, UNet, UNetConfig, load_sd21
from univid.model.blocks import GEGLU, ResidualBlock, Transformer, sinusoids
from univid.model.weights import NEW, TEMPORAL, to_file
from univid.ops import ReferenceFrames

TINY = UNetConfig.load("tiny")


def is_new(name: str, parts=NEW) -> bool:
    return not set(name.split(".")).isdisjoint(parts)


def random_unet(config: UNetConfig = TINY, **choices) -> UNet:
    """No parameter is 0, so that every module counts."""
    torch.manual_seed(0)
    unet = UNet(replace(config, **choices)).eval()
    for name, parameter in unet.named_parameters():
        if is_new(name):
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(clips=2, frames=5, size=(4, 6), config: UNetConfig = TINY, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(clips, frames, config.in_channels, *size, dtype=dtype)
    t = torch.randint(1000, (clips,))
    text = torch.randn(clips, 7, config.context_dim, dtype=dtype)
    image = torch.randn(clips, 11, config.context_dim, dtype=dtype)
    return x, t, text, image


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- Stable Diffusion ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Diffusers' U-Net of four levels with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        attention_head_dim=[2, 4, 6, 6],  # numbers of heads
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
    ).eval()
    with torch.no_grad():  # small activations, in which each norm's eps counts
        theirs.conv_in.weight.mul_(1e-2)
    folder = tmp_path_factory.mktemp("sd")
    theirs.save_pretrained(folder)
    return theirs, load_sd21(folder)


@pytest.mark.parametrize("frames", [1, 5, 24])
@torch.no_grad()
def test_is_stable_diffusion(pair, frames):
    theirs, ours = pair
    x, t, text, _ = inputs(
        frames=frames, size=(8 * 5, 8 * 9) if frames < 24 else (8, 16), config=ours.config
    )  # 5x9 at f = 8
    t[0] = 999
    expected = theirs(
        x.flatten(0, 1), t.repeat_interleave(frames), encoder_hidden_states=text.repeat_interleave(frames, 0)
    ).sample.view_as(x)
    refs = {f: ReferenceFrames.window(frames, 0) for f in (1, 2, 4, 8)} if frames > 1 else None
    out = ours(x, t, text, fps=8, refs=refs)
    assert relative(out, expected) < 1e-5
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sizes():
    with torch.device("meta"):
        unet = UNet(UNetConfig.load("sd21"))
        theirs = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        shapes = UNet(UNetConfig.load("shapes"))
    shape = {name: x.shape for name, x in to_file(unet.state_dict()).items() if not is_new(name)}
    assert shape == {name: x.shape for name, x in theirs.state_dict().items()}
    assert len(shape) == 686
    assert sum(s.numel() for s in shape.values()) == 865_910_724
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(1.29e9, rel=0.005)
    assert len(unet.transformers()) == 16
    assert [unet.config.num_refs(f, 24) for f in unet.config.factors] == [3, 6, 12, 24]
    assert sum(p.numel() for p in shapes.parameters()) == pytest.approx(8e6, rel=0.05)
    assert [shapes.config.num_refs(f, 16) for f in shapes.config.factors] == [4, 8, 16]


def test_flops():
    """On the meta device: 24 frames of 320x576 pixels, two clips."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.load("sd21")).eval()
        x, t, text, image = inputs(2, 24, (40, 72), unet.config)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        assert unet(x, t, text, image, fps=8).shape == x.shape
    assert counted.get_total_flops() == pytest.approx(40e12, rel=0.05)


def test_norms():
    unet = UNet(TINY)
    eps = {name: module.eps for name, module in unet.named_modules() if hasattr(module, "num_groups")}
    assert eps == {name: 1e-6 if "attentions" in name else 1e-5 for name in eps}
    assert {m.eps for m in unet.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_cosine_comes_first():
    t = torch.tensor([0.0, 1, 37, 999])
    assert torch.equal(sinusoids(t, 32)[0], torch.tensor([1.0] * 16 + [0.0] * 16))
    torch.testing.assert_close(sinusoids(t, 32), get_timestep_embedding(t, 32, True, 0), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
@torch.no_grad()
def test_is_stable_diffusion_at_full_size(tmp_path, monkeypatch):
    """With the weights of a file; float32 without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device("cuda"):
        theirs = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_sd21(tmp_path).cuda()
    frames = 24
    x, text = torch.randn(1, frames, 4, 40, 72, device="cuda"), torch.randn(1, 77, 1024, device="cuda")
    t = torch.tensor([999], device="cuda")
    apart = {f: ReferenceFrames.window(frames, 0).to("cuda") for f in (1, 2, 4, 8)}

    def both(dtype):
        given = x.to(dtype), text.to(dtype)
        by_frame = theirs.to(dtype)(given[0][0], t, given[1].expand(frames, -1, -1)).sample.float()
        clip = ours.to(dtype)(given[0], t, given[1], refs=apart)[0].float()
        picture = ours(given[0][:, :1], t, given[1])[0].float()
        return by_frame, clip, picture

    expected, clip, picture = both(torch.float32)
    assert relative(clip, expected) < 1e-4
    assert relative(picture, expected[:1]) < 1e-4
    rounded, clip, picture = both(torch.bfloat16)
    assert relative(clip, expected) < 1.5 * relative(rounded, expected)
    assert relative(picture, expected[:1]) < 1.5 * relative(rounded[:1], expected[:1])


# --- what the paper adds ---------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("change", ["a hook", "a hook before", "a forward", "a kind"])
def test_a_projection_with_more_to_it_is_called(change):
    """As by offloading, quantisation or LoRA: what hangs on it is not gone round."""
    gated = GEGLU(UNetConfig.load("tiny"), 8, 12)
    x, called = torch.randn(1, 2, 3, 8), []
    expected = gated(x)
    plain = gated.proj
    if change == "a hook before":
        plain.register_forward_pre_hook(lambda *_: called.append(1))
    elif change == "a forward":
        forward = plain.forward
        plain.forward = lambda x: (called.append(1), forward(x))[1]
    else:
        plain.register_forward_hook(lambda *_: called.append(1))
    if change == "a kind":
        gated.proj = torch.nn.Sequential(plain)
    torch.testing.assert_close(gated(x), expected)
    assert called == [1]


@torch.no_grad()
def test_order_of_the_operators():
    unet = random_unet(backend="reference")
    x, t, *conditions = inputs()
    with Operators() as ran:
        unet(x, t, *conditions, fps=8)
    block = ["group_norm_silu", "add_bias", "temporal_conv"] * 2  # with the time embedding after the first
    attention = [
        "group_norm_silu",
        *("add_layer_norm", "pyramid_st_attn_qkv"),
        *("add_layer_norm", "dual_stream_attn"),
        *("add_layer_norm", "temporal_attn_qkv"),
        *("add_layer_norm", "linear_geglu"),
    ]
    order = [name.removeprefix("univid.") for name in ran.names if name.startswith("univid.")]
    outside, inside, conv = block + attention, block, ["add_bias"]
    down, mid = conv + outside + conv + inside, block + attention + block
    up = ["concat", *inside] * 2 + conv + ["concat", *outside] * 2
    assert order == down + mid + up + ["group_norm_silu"] + conv
    assert not [name for name in ran.names if "scaled_dot_product" in name or "conv3d" in name]


@torch.no_grad()
def test_activations_are_channels_last():
    unet = random_unet()
    outputs = []
    for module in unet.modules():
        if isinstance(module, ResidualBlock | Transformer):
            module.register_forward_hook(lambda module, args, out: outputs.extend((args[0], out)))
    with Operators() as ran:
        out = unet(*inputs())
    assert len(outputs) == 2 * (8 + 4)
    assert all(x.is_contiguous() for x in (*outputs, out))
    assert ran.names.count("aten.clone") == 3  # the latents in, a nearest neighbour's upsampling, the latents out


def test_an_image_leaves_temporal_parameters_alone():
    unet = random_unet().train()
    x, t, *conditions = inputs(frames=1)
    unet(x, t, *conditions, fps=8).sum().backward()
    without = {name for name, parameter in unet.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in unet.named_parameters() if is_new(name, TEMPORAL)}
    unet(*inputs(frames=2), fps=8).sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


@torch.no_grad()
def test_starts_as_pictures():
    """Zero-initialised modules: with frames kept apart a clip is its frames, whatever the fps."""
    unet = UNet(TINY).eval()
    x, t, *conditions = inputs()
    refs = {f: ReferenceFrames.window(5, 0) for f in (1, 2)}
    out = unet(x, t, *conditions, refs=refs, fps=30)
    apart = torch.cat([unet(frame, t, *conditions) for frame in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(out, apart, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_temporal_attention_knows_the_order_of_frames():
    x, t, *conditions = inputs()
    refs = {f: ReferenceFrames.all(5) for f in (1, 2)}
    change = []
    for temporal_attention in (False, True):
        unet = random_unet(pstc_kernels=(0, 0), temporal_attention=temporal_attention)
        backwards = unet(x.flip(1), t, *conditions, refs=refs).flip(1)
        change.append(relative(backwards, unet(x, t, *conditions, refs=refs)))
    assert change[0] < 1e-5 < 1e-3 < change[1]
    attention, x = unet.transformers()[0].transformer_blocks[0].attn_temporal, torch.randn(1, 5, 3, 32)
    position = sinusoids(torch.arange(5), 32)[:, None]
    norm = torch.nn.functional.layer_norm(x, (32,), attention.norm.weight, attention.norm.bias) + position
    q, k, v = attention.to_qkv(norm).view(1, 5, 3, 3, 2, 16).unbind(3)
    p = (torch.einsum("btnhd,bsnhd->bnhts", q, k) / 4).softmax(-1)
    expected = attention.to_out(torch.einsum("bnhts,bsnhd->btnhd", p, v).flatten(-2))
    _, y = attention.norm(x, offset=position)
    torch.testing.assert_close(attention(y), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fps():
    unet = random_unet()
    arguments = inputs()
    slow, fast = unet(*arguments, fps=4), unet(*arguments, fps=24)
    assert relative(slow, fast) > 1e-3
    assert torch.equal(unet(*arguments, fps=torch.tensor([4.0, 4.0])), slow)
    image = inputs(frames=1)
    assert torch.equal(unet(*image, fps=4), unet(*image))


# --- conditions ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weight_zero_is_no_condition():
    unet = random_unet()
    x, t, text, image = inputs()
    zeros = {1: 0, 2: 0.0}
    for weight in (0, 0.0, zeros):
        assert torch.equal(unet(x, t, text, image, text_weight=weight), unet(x, t, None, image))
        assert torch.equal(unet(x, t, text, image, image_weight=weight), unet(x, t, text))
    nothing = unet(x, t, text, image, text_weight=0, image_weight=0)
    computed = unet(x, t, text, image, text_weight=torch.zeros(()), image_weight=torch.zeros(2))
    torch.testing.assert_close(nothing, computed, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_weights():
    unet = random_unet()
    x, t, text, image = inputs()

    def out(**weights):
        return unet(x, t, text, image, **weights)

    def same(a, b):
        return torch.testing.assert_close(out(**a), out(**b), rtol=1e-5, atol=1e-6)

    half = torch.full((), 0.5)
    for alike in (half, half.expand(2), half.expand(1, 5), half.expand(2, 5), [0.5] * 5, (0.5,) * 5, {1: 0.5, 2: half}):
        same({"image_weight": alike}, {"image_weight": 0.5})
    assert torch.equal(out(text_weight={2: 0.5}), out(text_weight={1: 1.0, 2: 0.5}))
    assert relative(out(text_weight={2: 0.5}), out(text_weight={1: 0.5})) > 1e-4
    regions = {1: torch.full((2, 5, 24), 0.5), 2: torch.full((2, 5, 6), 0.5)}
    same({"text_weight": regions}, {"text_weight": 0.5})
    fade = torch.linspace(0, 1, 5)
    assert torch.equal(out(image_weight=fade.tolist()), out(image_weight=fade[None]))
    each = torch.tensor([0.2, 1.0])
    both = out(image_weight=each)
    for i in range(2):
        one = unet(x[i : i + 1], t[i : i + 1], text[i : i + 1], image[i : i + 1], image_weight=each[i].item())
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_kept_keys_are_recomputed_ones():
    unet = random_unet()
    x, t, text, image = inputs()
    keys = unet.condition(text, image)
    assert torch.equal(unet(x, t, *keys), unet(x, t, text, image))
    assert torch.equal(unet(x, t, *unet.condition(image=image)), unet(x, t, None, image))
    assert torch.equal(unet(x, t, keys[0], image, text_weight={1: 0}), unet(x, t, text, image, text_weight={1: 0}))


# --- reference frames ------------------------------------------------------------------------------------------------------------


def test_reference_frames():
    unet = random_unet()
    refs = unet.reference_frames(9)
    assert torch.equal(refs[1].table, ReferenceFrames.pyramid(9, 5).table)
    assert torch.equal(refs[2].table, ReferenceFrames.all(9).table)
    assert unet.reference_frames(9)[1] is refs[1]  # built once
    unet.train()
    draws = {tuple(unet.reference_frames(9)[1].table.flatten().tolist()) for _ in range(8)}
    assert len(draws) > 1
    a, b = (unet.reference_frames(9, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a[1].table, b[1].table)
    shared = UNet(replace(TINY, own_frame=False, psta_refs=(2, 40))).eval().reference_frames(9)
    assert torch.equal(shared[1].table, ReferenceFrames.pyramid(9, 2, own_frame=False).table)
    assert shared[2].num_refs == 9


def test_training_draws_and_eval_takes_centers():
    unet = random_unet()
    arguments = inputs(frames=9)
    with torch.no_grad():
        center = unet(*arguments)
        assert torch.equal(unet(*arguments, refs=unet.reference_frames(9)), center)
        assert torch.equal(unet(*arguments, refs={2: ReferenceFrames.all(9)}), center)
        assert relative(unet(*arguments, refs={2: ReferenceFrames.window(9, 0)}), center) > 1e-4
        unet.train()
        a, b = unet(*arguments), unet(*arguments)
        assert not torch.equal(a, b)
        assert torch.equal(unet(*arguments, refs=unet.eval().reference_frames(9)), center)


def test_after_inference_mode_it_trains():
    unet = random_unet()
    arguments = inputs()
    with torch.inference_mode():
        unet(*arguments)
    unet(*arguments).sum().backward()
    copied = copy.deepcopy(unet)
    assert torch.equal(copied(*arguments), unet(*arguments))


# --- configuration ---------------------------------------------------------------------------------------------------------------


def test_configs():
    assert UNetConfig.load("sd21") == UNetConfig()
    with torch.device("meta"):
        bare = UNet(replace(TINY, pstc_kernels=(0, 0), temporal_attention=False, fps_conditioning=False))
    assert not [name for name, _ in bare.named_parameters() if is_new(name, TEMPORAL)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("chanels = [32]", "unknown key 'chanels'"),
        ("channels = 32", r"channels: got 32, needs a list of int"),
        (
            "channels = [33, 64]\nnorm_groups = 1\nhead_dim = 1",
            r"channels: got \(33, 64\), needs the first of them even",
        ),
        ("channels = [", "is not TOML"),
        ("head_dim = 48", "head_dim: got 48, needs a divisor of 320 channels"),
        ("norm_groups = 48", "norm_groups: got 48, needs a divisor of 320"),
        ("pstc_kernels = [3, 5, 7, 8]", "pstc_kernels: got .*8.*, needs odd numbers"),
        ("pstc_kernels = [3]", "pstc_kernels: got .* needs 4 entries"),
        ("psta_refs = [1, 2]", "psta_refs: got .* needs 4 entries"),
        ("image_tokens = 'all'", "image_tokens: got 'all'"),
        ("prediction_type = 'noise'", "prediction_type: got 'noise'"),
        ("max_frames = 0", "max_frames: got 0"),
        ("own_frame = 1", "own_frame: got 1, needs bool"),
        ("backend = 'cpu'", "backend: got 'cpu'"),
    ],
)
def test_bad_config(tmp_path, text, error):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises((ValueError, TypeError), match=error):
        UNetConfig.load(tmp_path / "x.toml")


def test_missing_config():
    with pytest.raises(FileNotFoundError, match=r"config: got 'sd15', needs a TOML file or one of sd21, shapes, tiny"):
        UNetConfig.load("sd15")


# --- bad input -------------------------------------------------------------------------------------------------------------------

X, T, TEXT, IMAGE = inputs()
BAD = {
    "x is no tensor": (([1], T, TEXT), {}, TypeError, "x: got list"),
    "rank": ((X[0], T, TEXT), {}, ValueError, r"x: got shape \(5, 4, 4, 6\)"),
    "channels": ((X[:, :, :3], T, TEXT), {}, ValueError, r"x: got shape \(2, 5, 3, 4, 6\), needs \(B, T, 4, h, w\)"),
    "size": ((X[..., :3, :5], T, TEXT), {}, ValueError, "x: got h x w = 3x5, needs multiples of 2, of which 4x4"),
    "frames": (
        (X.repeat(1, 5, 1, 1, 1), T, TEXT),
        {},
        ValueError,
        "x: got T = 25 frames, needs at most max_frames = 24",
    ),
    "dtype": ((X.bfloat16(), T, TEXT), {}, TypeError, "x: got .*bfloat16, needs the parameters' dtype"),
    "device": ((X.to("meta"), T, TEXT), {}, ValueError, "x: got a tensor on meta, needs the parameters' device, cpu"),
    "t": ((X, T[:1], TEXT), {}, ValueError, r"t: got \(1,\), needs a tensor \(B,\) = \(2,\)"),
    "t is no tensor": ((X, 3, TEXT), {}, ValueError, r"t: got int"),
    "neither": ((X, T), {}, ValueError, "text, image: got neither, needs at least one"),
    "text": ((X, T, TEXT[..., :5]), {}, ValueError, r"text: got shape \(2, 7, 5\), needs \(2, 7, 24\)"),
    "text's clips": ((X, T, TEXT[:1]), {}, ValueError, r"text: got shape \(1, 7, 24\), needs \(2, 7, 24\)"),
    "image": ((X, T, None, IMAGE[0]), {}, ValueError, r"image: got shape \(11, 24\)"),
    "image's dtype": ((X, T, None, IMAGE.double()), {}, TypeError, "image: got float64, needs x's dtype, float32"),
    "keys": ((X, T, []), {}, ValueError, "text: got keys of 0 cross-attentions, needs 4"),
    "weights": ((X, T, TEXT), {"text_weight": [1.0] * 4}, ValueError, "text_weight: got 4 numbers, needs one for .* 5"),
    "weight": ((X, T, TEXT), {"text_weight": float("nan")}, ValueError, "text_weight: got nan, needs a finite number"),
    "weight's shape": ((X, T, TEXT), {"text_weight": torch.ones(5)}, ValueError, r"text_weight: got shape \(5,\)"),
    "weight's type": ((X, T, TEXT), {"image_weight": None}, TypeError, "image_weight: got NoneType, needs a number"),
    "weight's level": (
        (X, T, TEXT),
        {"image_weight": {3: 1.0}},
        ValueError,
        r"image_weight: got level 3, needs levels of",
    ),
    "refs": ((X, T, TEXT), {"refs": ReferenceFrames.all(5)}, TypeError, "refs: got ReferenceFrames, needs a dict"),
    "refs' level": ((X, T, TEXT), {"refs": {8: ReferenceFrames.all(5)}}, ValueError, "refs: got level 8"),
    "refs' frames": ((X, T, TEXT), {"refs": {1: ReferenceFrames.all(6)}}, ValueError, "refs: got a table over 6"),
    "fps": ((X, T, TEXT), {"fps": "8"}, TypeError, "fps: got str, needs a number"),
    "fps's clips": ((X, T, TEXT), {"fps": torch.ones(3)}, ValueError, r"fps: got shape \(3,\), needs \(2,\)"),
}


@pytest.mark.parametrize("case", BAD)
@torch.no_grad()
def test_bad_input(case):
    arguments, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message) as error:
        UNet(TINY).eval()(*arguments, **options)
    assert "\n" not in str(error.value)


# --- the image adapter -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_image_adapter(tmp_path):
    tokens = torch.randn(2, 257, 40)
    adapter = ImageAdapter(40, 24).eval()
    out = adapter(tokens)
    assert out.shape == (2, 257, 24)  # the class token and 256 patches
    expected = torch.nn.functional.gelu(tokens @ adapter.linear_1.weight.T + adapter.linear_1.bias)
    expected = expected @ adapter.linear_2.weight.T + adapter.linear_2.bias
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(expected, (24,)), rtol=1e-4, atol=1e-5)
    only = ImageAdapter(40, 24, "global").eval()
    only.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(only(tokens), out[:, :1])
    only.save_pretrained(tmp_path)
    again = ImageAdapter.from_pretrained(tmp_path)
    assert torch.equal(again(tokens), only(tokens))
    assert sum(p.numel() for p in ImageAdapter().parameters()) == 1280 * 1281 + 1280 * 1024 + 3 * 1024
