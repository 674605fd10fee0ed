"""FID and CLIP score against independent computations on the same images."""

import pytest
import scipy.linalg
import torch

from lcm.metrics.clip import clip_score, fid, mini_clip


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return mini_clip(str(tiny_pipeline))


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed)).byte()


def test_fid_is_the_frechet_distance_of_scipy(backbone):
    real, fake = images(60, 0), images(50, 1) // 2
    metric = fid(backbone)
    metric.update(real, real=True)
    metric.update(fake[:20], real=False)
    metric.update(fake[20:], real=False)
    a, b = backbone(real).double(), backbone(fake).double()
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root.trace()
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-3)


def test_fid_keeps_the_real_images_when_it_is_reset_for_the_next_model(backbone):
    metric, real = fid(backbone), images(30, 0)
    metric.update(real, real=True)
    for _ in range(2):
        metric.reset()
        metric.update(real, real=False)
        assert float(metric.compute()) == pytest.approx(0, abs=1e-4)


def test_clip_score_is_100_cosine(backbone):
    x, captions = images(4, 0), ["red apple", "rocket", "dog", "dog " * 40]
    metric = clip_score(backbone)
    metric.update(x, captions)
    ids = backbone.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    out = backbone.clip(pixel_values=x.float() / 127.5 - 1, **ids)
    expected = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).mean()
    assert float(metric.compute()) == pytest.approx(max(0.0, float(expected)), abs=1e-3)


def test_images_of_another_size_are_resized_before_the_backbone(backbone):
    assert backbone(torch.zeros(1, 3, 48, 48).byte()).shape == (1, 8)
