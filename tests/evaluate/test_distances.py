"""Each distance against an independent computation on the same features."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from lcm.evaluate import distances
from lcm.evaluate.features import scores


def features(count: int, seed: int, dimensions: int = 12) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=rng)
    return torch.randn(count, dimensions, generator=rng) @ mix + seed


@pytest.mark.parametrize("count", [60, 8])  # 8: fewer than dimensions, so the covariance is singular
def test_fid_is_the_frechet_distance_of_scipy(count):
    x, y = features(count, 0), features(50, 1)
    a, b = x.double().numpy(), y.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert distances.fid(x, y) == pytest.approx(expected, rel=1e-3)


def test_fid_is_that_of_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x

    x, y = features(60, 0), features(50, 1)
    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert distances.fid(x, y) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_kid_is_a_double_loop_over_pairs(monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 7)
    x, y = features(20, 0), features(15, 1)

    def k(a, b):
        return (float(a.double() @ b.double()) / 12 + 1) ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (20 * 19)
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (15 * 14)
    across = sum(k(a, b) for a in x for b in y) / (20 * 15)
    assert distances.kid(x, y) == pytest.approx(1000 * (within_x + within_y - 2 * across), rel=1e-9)


def test_kid_is_that_of_torchmetrics_on_one_subset_of_all():
    x, y = features(40, 0).double(), features(40, 1).double()
    kernels = [(a @ b.T / 12 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    from torchmetrics.image.kid import maximum_mean_discrepancy

    assert distances.kid(x, y) == pytest.approx(1000 * float(maximum_mean_discrepancy(*kernels)), rel=1e-9)
    assert distances.kid(x, y) == pytest.approx(1000 * float(poly_mmd(x, y)), rel=1e-9)


def test_kid_of_two_halves_of_one_distribution_is_zero_on_average():
    values = [
        distances.kid(*torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).split(20)) for seed in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert min(values) < 0


def test_cmmd_is_its_formula():
    x, y = features(20, 0), features(15, 1)
    a, b = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))

    def mean(u, v):
        return torch.exp(-(torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200).mean()

    assert distances.cmmd(x, y) == pytest.approx(float(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))), rel=1e-6)
    assert distances.cmmd(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", [distances.fid, distances.kid, distances.cmmd])
def test_a_distance_grows_with_the_shift_and_is_symmetric(distance):
    x, y = features(60, 0), features(60, 1)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-6)
    assert distance(x, x + 0.1) < distance(x, x + 1)


def test_scores_on_apples_gpus_are_computed_on_the_cpu() -> None:
    """Which have no float64."""
    real, made = ({"clip": torch.randn(9, 4), "text": torch.randn(9, 4)} for _ in range(2))
    assert scores(made, real, device="mps") == scores(made, real, device="cpu")
