"""The U-Net as it runs: backends, dtypes, compiled, captured, on the CPU and on a card."""

from dataclasses import replace

import pytest
import torch

from tests.test_model import TINY, inputs, random_unet, relative
from univid.model import UNet

# --- backends --------------------------------------------------------------------------------------------------------------------


def test_backends_agree():
    x, t, text, image = inputs(dtype=torch.float64)
    weight = torch.tensor([0.3, 1.5], dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("reference", "torch"):
        unet = random_unet(backend=backend).double().train()
        torch.manual_seed(3)  # draws reference frames
        out = unet(x, t, text, image, text_weight=weight, fps=12.0)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*unet.parameters(), weight])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("UNIVID_BACKEND", "triton")
    with torch.no_grad():
        random_unet(backend="torch")(*inputs())  # the config comes first
        with pytest.raises(RuntimeError, match="'triton' cannot run"):
            random_unet()(*inputs())


# --- dtypes and compilation ------------------------------------------------------------------------------------------------------


def test_bfloat16():
    x, t, text, image = inputs()
    expected = random_unet()(x, t, text, image, fps=8)
    unet = random_unet().bfloat16().train()
    refs = unet.eval().reference_frames(5)
    out = unet.train()(x.bfloat16(), t, text.bfloat16(), image.bfloat16(), fps=8, refs=refs)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), expected) < 0.03
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in unet.parameters())


@torch.no_grad()
def test_autocast():
    unet = random_unet()
    x, t, text, image = inputs()
    expected = unet(x, t, text, image, fps=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(unet(x, t, text, image, fps=8).float(), expected) < 0.03


@pytest.fixture
def compiled():
    """Without code generation, which costs a minute on a CPU: what counts is the one graph."""
    torch.compiler.reset()
    unet = random_unet(backend="torch")
    yield unet, torch.compile(unet, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@torch.no_grad()
def test_compiled(compiled):
    unet, function = compiled
    for frames in (5, 3):  # another T is another graph
        x, t, text, image = inputs(frames=frames)
        keys = unet.condition(text)
        options = {"text_weight": {2: 0.5}, "image_weight": [0.5] * frames, "fps": 8}
        torch.testing.assert_close(function(x, t, keys[0], image, **options), unet(x, t, text, image, **options))


def test_compiled_training(compiled):
    unet, function = compiled
    unet.train()
    arguments, refs = inputs(), unet.reference_frames(5)
    gradients = []
    for model in (unet, function):
        model(*arguments, refs=refs).square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
        unet.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Exception, match="refs: got None in a compiled training step"):
        function(*arguments)


def test_from_the_meta_device():
    with torch.device("meta"):
        unet = UNet(TINY)
    unet.to_empty(device="cpu").reset_parameters()
    out = unet.eval()(*inputs())
    assert out.isfinite().all()
    zero = {name for name, parameter in unet.named_parameters() if not parameter.any()}
    begins = ("temporal_conv", "attn_temporal.to_out", "fps_embedding.linear_2")  # as the identity
    norms = {name for name in zero if name.endswith("bias") and "norm" in name}
    assert zero - norms == {name for name, _ in unet.named_parameters() if any(part in name for part in begins)}
    assert all(parameter.is_contiguous() for parameter in unet.parameters())  # FSDP asks for it


# --- on a card -------------------------------------------------------------------------------------------------------------------

CARD = replace(TINY, channels=(64, 128), head_dim=64, norm_groups=32)  # a head dimension that every kernel takes


def on_card(dtype=torch.bfloat16, **choices):
    """A U-Net, and arguments for it."""
    unet = random_unet(CARD, **choices).to("cuda", dtype)
    return unet, [x.to("cuda", dtype if x.is_floating_point() else None) for x in inputs(size=(6, 10), config=CARD)]


def gradients(unet, x, *rest):
    x = x.detach().requires_grad_()
    out = unet(x, *rest, fps=8, refs=unet.reference_frames(x.shape[1], x.device, torch.Generator().manual_seed(0)))
    names, parameters = zip(*unet.named_parameters(), strict=True)
    results = torch.autograd.grad(out.float().pow(2).mean(), (x, *parameters))
    return {"out": out.detach(), "x": results[0], **dict(zip(names, results[1:], strict=True))}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton", "torch"])
def test_backends_agree_on_a_card(backend):
    """None: the CUDA kernels where there are some. Their error is that of the definition rounded to bfloat16, twice at most."""
    unet, given = on_card(backend="reference")
    yardstick = gradients(unet, *given)
    exact = gradients(unet.float(), *(x.float() if x.is_floating_point() else x for x in given))
    results = gradients(on_card(backend=backend)[0], *given)
    for name, expected in exact.items():
        size = expected.norm()
        allowed = 2 * (yardstick[name].float() - expected).norm() + 2**-7 * size
        assert (results[name].float() - expected).norm() <= allowed, name


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graph():
    unet, (x, t, text, image) = on_card()
    keys = unet.condition(text, image)
    static = x.clone(), t.clone()
    unet(*static, *keys, fps=8.0)  # compiles, and builds the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = unet(*static, *keys, fps=8.0)
    for seed in (1, 2):
        static[0].copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        static[1].fill_(100 * seed)
        graph.replay()
        assert torch.equal(out, unet(*static, *keys, fps=8.0))


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_on_a_card():
    unet, given = on_card()
    compiled = torch.compile(unet, fullgraph=True)
    assert relative(compiled(*given, fps=8.0).float(), unet(*given, fps=8.0).float()) < 2e-2
