"""Weights on disk: Stable Diffusion's files, ours, and what is wrong with some."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from univid.model import ImageAdapter, UNet, UNetConfig, load_sd21
from univid.model import weights as weights_module
from univid.model.weights import CONFIG, NEW, TEMPORAL, WEIGHTS

SHAPE = {"channels": (32, 64, 64), "blocks_per_level": 1, "attention": (True, True, False), "head_dim": 16}
SHAPE |= {"context_dim": 24, "norm_groups": 8, "pstc_kernels": (3, 5, 7)}

# CompVis' modules of this shape, and diffusers', by hand. All levels but the innermost have transformers.
COMPVIS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0": "down_blocks.1.resnets.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "input_blocks.4.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.5.0": "down_blocks.2.resnets.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1",
    "output_blocks.3.1": "up_blocks.1.attentions.1",
    "output_blocks.3.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.4.0": "up_blocks.2.resnets.0",
    "output_blocks.4.1": "up_blocks.2.attentions.0",
    "output_blocks.5.0": "up_blocks.2.resnets.1",
    "output_blocks.5.1": "up_blocks.2.attentions.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def is_new(name: str, parts=NEW) -> bool:
    return not set(name.split(".")).isdisjoint(parts)


def to_compvis(name: str) -> str:
    old, new = next((old, new) for old, new in COMPVIS.items() if name.startswith(f"{new}."))
    inside = name.removeprefix(f"{new}.")
    if "resnets" in new:
        part, kind = inside.split(".")
        inside = f"{RESIDUAL[part]}.{kind}"
    return f"{old}.{inside}"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=[2, 4, 4],
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
    ).eval()


@pytest.fixture(scope="module")
def pipeline(theirs, tmp_path_factory):
    """A pipeline's folder, as far as the U-Net goes."""
    folder = tmp_path_factory.mktemp("sd")
    theirs.save_pretrained(folder / "unet")
    DDIMScheduler(prediction_type="epsilon").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def unet():
    torch.manual_seed(1)
    unet = UNet(UNetConfig.load("tiny"))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter)
    return unet


def equal(a, b, but=()) -> bool:
    """Whether two modules hold the same bits, but for the parameters of some parts."""
    a, b = ({name: x for name, x in m.state_dict().items() if not is_new(name, but)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


# --- Stable Diffusion 2.1 --------------------------------------------------------------------------------------------------------


def test_folders(theirs, pipeline):
    unet = load_sd21(pipeline)
    assert unet.config == UNetConfig(**SHAPE, prediction_type="epsilon")
    assert not unet.training
    ours = weights_module.to_file(unet.state_dict())
    assert {name: x.shape for name, x in ours.items() if not is_new(name)} == {
        name: x.shape for name, x in theirs.state_dict().items()
    }
    assert all(torch.equal(ours[name], x) for name, x in theirs.state_dict().items())
    folder = load_sd21(pipeline / "unet")
    assert folder.config == unet.config
    assert equal(folder, unet, but=TEMPORAL)


def test_what_a_u_net_predicts(pipeline, tmp_path, monkeypatch):
    """Its pipeline's scheduler says it, wherever one stands; without one it is v."""
    monkeypatch.chdir(pipeline / "unet")
    assert load_sd21(".").config.prediction_type == "epsilon"
    assert load_sd21(".", prediction_type="sample").config.prediction_type == "sample"
    alone = shutil.copytree(pipeline / "unet", tmp_path / "unet")
    assert load_sd21(alone).config.prediction_type == "v_prediction"


def test_what_is_new_changes_nothing(pipeline):
    unet = load_sd21(pipeline)
    for transformer in unet.transformers():
        attention = transformer.cross_attention
        assert torch.equal(attention.to_k_image.weight, attention.to_k.weight)
        assert torch.equal(attention.to_v_image.weight, attention.to_v.weight)
        assert attention.to_k_image.weight.data_ptr() != attention.to_k.weight.data_ptr()
        assert not any(p.any() for p in transformer.transformer_blocks[0].attn_temporal.to_out.parameters())
    assert not any(p.any() for name, p in unet.named_parameters() if "temporal_conv" in name)
    assert not any(p.any() for p in unet.fps_embedding.linear_2.parameters())
    assert all(p.isfinite().all() and p.is_contiguous() and p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("names", ["diffusers", "compvis"])
def test_single_file(theirs, pipeline, tmp_path, names):
    state = theirs.state_dict()
    if names == "compvis":
        state = {f"model.diffusion_model.{to_compvis(name)}": x for name, x in state.items()}
        back = convert_ldm_unet_checkpoint(dict(state), {"layers_per_block": 1})
        assert back.keys() == theirs.state_dict().keys()  # the table above is right
        state |= {"first_stage_model.encoder.conv_in.bias": torch.zeros(4), "betas": torch.zeros(1000)}
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "model.safetensors")
    unet = load_sd21(tmp_path / "model.safetensors", **SHAPE)
    assert equal(unet, load_sd21(pipeline), but=TEMPORAL)


def test_dtype(theirs, pipeline, tmp_path):
    assert {p.dtype for p in load_sd21(pipeline, torch_dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    (tmp_path / CONFIG).write_text((pipeline / "unet" / CONFIG).read_text())
    half = {name: x.half() for name, x in theirs.state_dict().items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert {p.dtype for p in load_sd21(tmp_path).parameters()} == {torch.float16}


# --- ours ------------------------------------------------------------------------------------------------------------------------


def test_round_trip(unet, tmp_path):
    unet.save_pretrained(tmp_path / "unet")
    again = UNet.from_pretrained(tmp_path / "unet", backend="reference")
    assert equal(again, unet)
    assert (again.config.backend, again.training) == ("reference", False)
    assert UNet.from_pretrained(tmp_path / "unet").config == unet.config
    assert {p.dtype for p in UNet.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == [CONFIG, WEIGHTS]


@torch.no_grad()
def test_the_image_part_loads_in_diffusers(unet, tmp_path):
    unet.eval().save_pretrained(tmp_path)
    theirs, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert info["unexpected_keys"]
    assert all(is_new(name) for name in info["unexpected_keys"])
    for parameter in unet.parameters():
        parameter.mul_(0.1)  # normal_(): too wild to compare
    unet.save_pretrained(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)
    x, t, text = torch.randn(2, 1, 4, 8, 8), torch.tensor([3, 999]), torch.randn(2, 7, 24)
    torch.testing.assert_close(unet(x, t, text)[:, 0], theirs(x[:, 0], t, text).sample, rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_the_old_files(unet, tmp_path, monkeypatch):
    unet.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()

    def save_half(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr(weights_module, "save_file", save_half)
    with pytest.raises(OSError, match="no space left"):
        UNet(unet.config).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


# --- bad files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(pipeline, tmp_path):
    """A copy of the U-Net's folder, to spoil."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((pipeline / "unet" / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop("conv_in.weight"), r"misses conv_in\.weight"),
        (lambda t: [t.pop(n) for n in list(t) if "conv1" in n], r"misses down_blocks\.0\.resnets\.0\.conv1\.bias, .*"),
        (lambda t: t.update({"extra.bias": torch.zeros(1)}), r"has left over extra\.bias$"),
        (
            lambda t: t.update({"mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv.weight": torch.zeros(1)}),
            r"has left over mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_qkv\.weight$",
        ),
        (
            lambda t: t.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}),
            r"has other shapes: conv_in\.weight \(32, 9, 3, 3\) for \(32, 4, 3, 3\)$",
        ),
        (
            lambda t: t.update({"conv_in.bias": torch.zeros(32, dtype=torch.int8), "extra": t.pop("conv_out.bias")}),
            r"misses conv_out\.bias and has left over extra and has no floating-point numbers in conv_in\.bias \(int8\)$",
        ),
    ],
)
def test_wrong_keys(folder, change, error):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=error):
        load_sd21(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"use_linear_projection": False}, "use_linear_projection: got false"),
        ({"attention_head_dim": 8}, r"attention_head_dim: got \[8, 8, 8\] heads at \(32, 64, 64\) channels"),
        ({"class_embed_type": "timestep"}, "class_embed_type: got 'timestep', needs None"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos: got False, needs True"),
        ({"timestep_post_act": "silu"}, "timestep_post_act: got 'silu', needs None"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn: got 'silu', needs None"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "down_block_types, up_block_types"),
        ({"norm_num_groups": 24}, "norm_num_groups: got 24, needs a divisor of 32"),
        ({"attention_head_dim": 0}, "attention_head_dim: got 0, needs numbers >= 1$"),
        ({"attention_head_dim": [2, 0, 2]}, r"attention_head_dim: got \[2, 0, 2\], needs numbers >= 1$"),
        ({"attention_head_dim": [2]}, r"attention_head_dim: got \[2\], needs a list of int, one for each of 3 levels$"),
        ({"attention_head_dim": None}, "attention_head_dim: got None, needs a list of int, one for each of 3 levels$"),
        ({"num_attention_heads": "x"}, "num_attention_heads: got 'x', needs a list of int, one for each of 3 levels$"),
        ({"block_out_channels": []}, r"block_out_channels: got \[\], needs a list of int$"),
        ({"down_block_types": None}, "down_block_types: got None, needs a list of str, one for each of 3 levels$"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block: got \[1, 2\], needs int$"),
        ({"cross_attention_dim": [1, 2]}, r"cross_attention_dim: got \[1, 2\], needs int$"),
    ],
)
def test_wrong_config(folder, change, error):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder / CONFIG))}: {error}"):
        load_sd21(folder)


def test_a_wrong_value_of_our_own_is_named_with_its_file(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["univid"]["max_frames"] = "16"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(tmp_path / CONFIG))}: univid: max_frames: got '16', needs int$"
    ):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("load", [load_sd21, UNet.from_pretrained, ImageAdapter.from_pretrained])
def test_a_dtype_that_no_model_computes_in_is_refused_before_anything_is_read(load, dtype):
    with pytest.raises(TypeError, match=rf"^torch_dtype: got {dtype!r}; torch\.float32, .* needed$"):
        load("nowhere", torch_dtype=dtype)


def test_wrong_files(folder, unet, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match="path: nowhere does not exist"):
        load_sd21("nowhere")
    with pytest.raises(ValueError, match=r"is not of a UniVid U-Net; univid\.model\.load_sd21"):
        UNet.from_pretrained(folder)
    with pytest.raises(TypeError, match="head_dim: got 'wide', needs int"):
        load_sd21(folder / WEIGHTS, head_dim="wide")
    with pytest.raises(ValueError, match="load_sd21: unknown key 'heads'"):
        load_sd21(folder / WEIGHTS, heads=3)
    saved = tmp_path_factory.mktemp("saved")
    unet.save_pretrained(saved)
    with pytest.raises(ValueError, match=r"has left over .*temporal"):
        load_sd21(saved)
    whole = (folder / WEIGHTS).read_bytes()
    for part in (whole[: len(whole) // 2], whole[:4], b""):
        (folder / WEIGHTS).write_bytes(part)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_sd21(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no diffusion_pytorch_model\.safetensors \(pickles"):
        load_sd21(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_sd21(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_sd21(folder)
