"""The shipped mini pipeline on held-out captions: `pytest tests/e2e/test_mini.py -s` prints the model card's figures."""

import pytest
import torch
import torch.nn.functional as F

from lcm.data import openmoji
from lcm.data.captions import read_images
from lcm.data.source import Source
from lcm.data.urls import expand_urls
from lcm.evaluate.clip import mini_clip
from lcm.models.pipeline import load_codec
from lcm.modules.autoencoder import psnr

pytestmark = pytest.mark.slow


SHARE = 0.1


def with_held_out_captions(tasks, description):
    """Yield the samples of each task that has a held-out caption. Draw them in this process."""
    for task in tasks:
        captions = [openmoji.caption_of([thing.name for thing in task.things], colour) for colour in task.colours]
        if any(openmoji.is_held_out(caption, SHARE) for caption in captions):
            yield from openmoji._samples_of(task)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "openmoji-64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "_render", with_held_out_captions)
        openmoji.build(str(root), held_out=SHARE)
    batches = list(read_images(Source(expand_urls(f"{root}/val-*.tar")), resolution=64))
    return torch.cat([batch["x"] for batch in batches]), [caption for batch in batches for caption in batch["captions"]]


@torch.no_grad()
def test_autoencoder_rebuilds_images(held_out):
    x, vae = held_out[0].float() / 127.5 - 1, load_codec("mini").vae
    errors = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) - part for part in x.split(64)]
    decibels = float(psnr(torch.cat(errors)))
    print(f"VAE: PSNR {decibels:.1f} dB over {len(x)} images")
    assert decibels >= 27


@torch.no_grad()
def test_clip_finds_the_image_of_a_caption(held_out):
    (x, captions), clip = held_out, mini_clip("mini")
    images = F.normalize(clip(x[:256]), dim=-1)
    ids = clip.tokenizer(captions[:256], padding="max_length", truncation=True, return_tensors="pt").input_ids
    texts = F.normalize(clip.clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
    top1 = float(((texts @ images.T).argmax(1) == torch.arange(len(texts))).float().mean())
    print(f"CLIP: the right image of 256 for {top1:.1%} of the captions")
    assert top1 >= 0.6
