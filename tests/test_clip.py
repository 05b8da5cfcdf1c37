"""Conditioning: the tokens of a small CLIP with random weights, saved and loaded."""

import gzip
import json

import numpy as np
import pytest
import torch
from open_clip import tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from univid.data.cache import _hash, fingerprint
from univid.data.clip import VOCABULARY, WEIGHTS, Clip, build_clip, load_clip

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 64, "head_width": 32, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return build_clip(CONFIG)


def test_text_is_all_blocks_but_the_last_then_the_final_norm(clip):
    tokens = clip.tokenizer(["a cat", "a dog on a hill"])
    x = clip.model.token_embedding(tokens) + clip.model.positional_embedding
    for block in clip.model.transformer.resblocks[:-1]:
        x = block(x, attn_mask=clip.model.attn_mask)
    expected = clip.model.ln_final(x)
    assert expected.shape == (2, 77, 48)
    torch.testing.assert_close(clip.text(["a cat", "a dog on a hill"]), expected)


def test_image_keeps_the_class_token(clip):
    pixels = torch.rand(2, 3, 28, 28)
    x = clip.image(pixels)
    assert x.shape == (2, 1 + 4, 64)
    visual = clip.model.visual
    mean, std = (torch.tensor(v)[:, None, None] for v in (visual.image_mean, visual.image_std))
    pooled, tokens = visual.eval()._pool(visual.ln_post(visual.transformer(visual._embeds((pixels - mean) / std))))
    torch.testing.assert_close(x, torch.cat((pooled[:, None], tokens), 1))


def test_images_of_any_size_are_not_cropped(clip):
    pixels = torch.zeros(1, 3, 40, 80)
    marked = pixels.clone()
    marked[..., :4, :4] = 1  # a corner that a centre crop would lose
    assert not torch.allclose(clip.image(pixels), clip.image(marked))


def test_images_are_resized_as_pillow_does(clip):
    """Bicubic, antialiased, and nothing blacker than black, smaller and larger."""
    for size in ((90, 50), (14, 20)):
        rgb = np.random.default_rng(0).integers(2, size=(*size, 3), dtype=np.uint8) * 255
        resized = np.asarray(Image.fromarray(rgb).resize((28, 28), Image.Resampling.BICUBIC))
        a, b = (clip.image(torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 255) for x in (rgb, resized))
        assert (
            a - b
        ).norm() < 0.06 * b.norm()  # pillow rounds in between; bilinear is 0.13 away, unclamped values 0.085


def test_save_and_load(clip, tmp_path):
    clip.save(tmp_path / "clip")
    again = load_clip(tmp_path / "clip")
    assert torch.equal(again.text(["a cat"]), clip.text(["a cat"]))
    named = load_clip(tmp_path / "clip", torch.bfloat16)
    assert named.text(["a cat"]).dtype == torch.bfloat16


def test_a_folder_with_a_colon(clip, tmp_path):
    folder = tmp_path / "10:00" / "ViT-Z:clip"
    clip.save(folder)
    assert torch.equal(load_clip(folder).text(["a cat"]), clip.text(["a cat"]))
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert fingerprint(tmp_path, folder)["clip"] == _hash(folder / WEIGHTS, "")


def test_what_only_compares_texts_with_pictures_is_not_kept(clip, tmp_path):
    """Nor asked of a file, in which it changes nothing, its fingerprint neither; what tokens need is."""
    unread = {"visual.proj", "text_projection", "logit_scale"}
    clip.save(tmp_path)
    kept, every = load_file(tmp_path / WEIGHTS), clip.model.state_dict()
    assert every.keys() - kept.keys() == unread
    small, mark = load_clip(tmp_path), _hash(tmp_path / WEIGHTS, "")
    save_file({name: x.contiguous() for name, x in every.items()}, tmp_path / WEIGHTS)
    whole, pixels = load_clip(tmp_path), torch.rand(2, 3, 28, 28)
    for one in (small, whole):
        assert not unread & one.model.state_dict().keys()
        assert torch.equal(one.text(["a cat"]), clip.text(["a cat"]))
        assert torch.equal(one.image(pixels), clip.image(pixels))
    assert _hash(tmp_path / WEIGHTS, "") == mark
    for name in ("ln_final.weight", "positional_embedding", "visual.class_embedding"):
        save_file({other: x for other, x in kept.items() if other != name}, tmp_path / WEIGHTS)
        assert _hash(tmp_path / WEIGHTS, "") != mark
        with pytest.raises(ValueError, match=rf"misses {name}$"):
            load_clip(tmp_path)


def test_own_vocabulary(tmp_path):
    with gzip.open(tokenizer.default_bpe(), "rt") as file:
        merges = file.read().split("\n")[:200]
    with gzip.open(tmp_path / VOCABULARY, "wt") as file:
        file.write("\n".join(merges))
    config = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": 512 + 199 + 2}}
    clip = build_clip(config, tmp_path / VOCABULARY)
    clip.save(tmp_path / "clip")
    again = load_clip(tmp_path / "clip")
    (tmp_path / "clip").rename(tmp_path / "away")  # what was loaded does not need the folder any more
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / VOCABULARY).read_bytes() == (tmp_path / VOCABULARY).read_bytes()
    assert again.tokenizer.vocab_size == clip.tokenizer.vocab_size == 512 + 199 + 2
    assert torch.equal(again.text(["a red circle"]), clip.text(["a red circle"]))


def test_a_vocabulary_that_is_not_the_models(tmp_path):
    """A file that is missing, of another model, cut or something else: no token without an embedding, or with another's."""
    merges = gzip.compress("\n".join(["#version", "a b</w>", "c d</w>"]).encode())
    (tmp_path / VOCABULARY).write_bytes(merges)
    config = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": 512 + 2 + 2}}
    build_clip(config, tmp_path / VOCABULARY).save(tmp_path / "clip")
    path = tmp_path / "clip" / VOCABULARY
    for content, error in [
        (None, f"as there is no {VOCABULARY}, open_clip's vocabulary has 49408 tokens; .*vocab_size is 516$"),
        (b"", "has 514 tokens; model_cfg's text_cfg.vocab_size is 516$"),
        (merges[:-12], "is not a whole gzip file of merges"),
        (b"junk", "is not a whole gzip file of merges"),
    ]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^clip: .*{error}"):
            load_clip(tmp_path / "clip")
        path.touch()


def test_long_prompts_are_cut_with_a_warning(clip):
    with pytest.warns(UserWarning, match="100 tokens, 75 fit; this was cut: 'dog"):
        cut = clip.text(["cat " * 75 + "dog " * 25])
    assert torch.equal(cut, clip.text(["cat " * 75]))


def test_errors(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config\.json"):
        load_clip(tmp_path)
    clip.save(tmp_path / "clip")
    with pytest.raises(ValueError, match="'ViT-Z' is not a configuration of open_clip"):
        load_clip(f"ViT-Z:{tmp_path / 'clip'}")
    for config, more, error in [
        ([], {}, r"model_cfg: got \[\], needs an object"),
        (CONFIG | {"text_cfg": 3}, {}, "text_cfg: got 3, needs an object"),
        (CONFIG, {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, r"preprocess_cfg\.mean: got \[0\.5"),
        (CONFIG, {"preprocess_cfg": {"std": 3}}, r"preprocess_cfg\.std: got 3, needs \[0\.2"),
        (CONFIG, {"preprocess_cfg": [1]}, r"preprocess_cfg: got \[1\], needs an object$"),
    ]:
        (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config} | more))
        with pytest.raises(ValueError, match=error):
            load_clip(tmp_path / "clip")
    for vision, error in [
        ({"layers": 3}, r"misses visual\.transformer\.resblocks\.2"),
        ({"layers": 1}, r"has left over visual\.transformer\.resblocks\.1"),
        ({"patch_size": 7}, r"has other shapes: visual\.conv1\.weight"),
        ({"depth": 3}, r"its configuration is not that of an open_clip model"),
        ({"patch_size": 0}, r"its configuration is not that of an open_clip model"),
        ({"head_width": 7}, r"its configuration is not that of an open_clip model"),
    ]:
        config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | vision}
        (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        with pytest.raises(ValueError, match=error):
            load_clip(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights as safetensors"):
        load_clip(tmp_path / "clip")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_cfg", "tokenizer_kwargs", {"bpe_path": "merges.txt.gz"}),
        ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "tokenizer_mode", "clips"),
        ("text_cfg", "embed_cls", True),
        ("vision_cfg", "timm_model_name", "convnext_base"),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
    ],
)
def test_other_towers_and_tokenizers_are_refused(part, name, value):
    config = CONFIG | {part: CONFIG[part] | {name: value}}
    with pytest.raises(ValueError, match=rf"{part}\.{name}: got .* \(plain ViTs and BPE only\)"):
        build_clip(config)
