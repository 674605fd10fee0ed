"""The CLIP backbone matches transformers for any image size and caption length."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from lcm.app.images import resized
from lcm.core.errors import UserError
from lcm.evaluate.clip import mini_clip, pretrained_clip
from tests.evaluate.test_metrics import METRICS


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return mini_clip(str(tiny_pipeline))


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


@torch.no_grad()
def test_clip_score_matches_transformers(backbone, tiny_pipeline):
    x, captions = images(4), ["red apple", "rocket", "dog", "dog " * 40]
    clip = CLIPModel.from_pretrained(tiny_pipeline / "clip")
    ids = backbone.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    out = clip(pixel_values=x.float() / 127.5 - 1, **ids)
    expected = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).mean()
    features = {"clip": backbone(x), "text": backbone.text(captions)}
    assert METRICS["clip_score"](features, features) == pytest.approx(float(expected), abs=1e-4)


def test_long_caption_keeps_eos(backbone):
    [cut] = backbone.tokenizer(["dog " * 40], truncation=True, max_length=16).input_ids
    assert len(cut) == 16
    assert cut[-1] == backbone.tokenizer.eos_token_id
    torch.testing.assert_close(backbone.text(["dog " * 40]), backbone.text(["dog " * 60]))


def test_resize_matches_pillow(backbone):
    x = images(1, 96)
    pillow = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)[None]
    assert (resized(x, 32).int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(backbone(x), backbone(resized(x, 32)))
    assert (resized(x, 32, antialias=False).int() - expected.int()).abs().max() > 50


def test_resize_overshoot_is_clamped():
    x = torch.zeros(1, 3, 8, 8).byte()
    x[..., 4:] = 255
    assert resized(x, 32)[0, 0, 0, 0] == 0
    assert resized(x, 32)[0, 0, 0, -1] == 255


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory):
    """Return a CLIP in the layout of the hub, with model and tokenizer in one folder."""
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    shutil.copytree(tiny_pipeline / "clip", folder)
    shutil.copytree(tiny_pipeline / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_normalisation_comes_from_the_folder(folder, backbone):
    clip, x = pretrained_clip(str(folder)), images(2)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (x.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(clip(x), clip.clip.get_image_features(pixel_values=pixels).pooler_output)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    torch.testing.assert_close(pretrained_clip(str(folder))(x), backbone(x))


@pytest.mark.parametrize("model", ["/nowhere/clip", "nobody/no-such-clip"])
def test_missing_clip_error_names_the_files(model):
    with pytest.raises(UserError, match=r"model\.safetensors"):
        pretrained_clip(model)


def test_pipeline_without_clip_is_an_error(pixart_pipeline):
    with pytest.raises(UserError, match="has no folder clip, unlike the mini pipeline: set backbone=clip"):
        mini_clip(str(pixart_pipeline))
