"""The metrics of conf/metrics match closed forms, independent computations and the values of the first edition."""

import numpy as np
import pytest
import scipy.linalg
import torch
from omegaconf import OmegaConf

from lcm.app.cli import build
from lcm.app.targets import CONF, check_targets
from lcm.core.errors import UserError
from lcm.evaluate import kernels
from lcm.evaluate.metrics import FeatureMetric, scores

NODES = {file.stem: OmegaConf.load(file) for file in sorted((CONF / "metrics").glob("*.yaml"))}
METRICS = {name: build(node)[name] for name, node in NODES.items() if node[name]._target_.endswith("FeatureMetric")}
PROMPT = torch.tensor([0, 1, 2] * 20)


def features(count: int, seed: int, dimensions: int = 12) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=rng)
    return torch.randn(count, dimensions, generator=rng) @ mix + seed


def value(name: str, drawn: torch.Tensor, real: torch.Tensor) -> float:
    return METRICS[name]({"clip": drawn}, {"clip": real})


def test_golden_values():
    """The golden values come from the first edition's implementation on the same features."""
    drawn, real = {"clip": features(60, 0), "text": features(60, 2)}, {"clip": features(50, 1)}
    golden = {"fid": 97.81319506, "kid": 252307.2714, "cmmd": 1.267629406, "clip_score": -0.6100254033}
    metrics = {name: METRICS[name] for name in golden}
    assert scores(drawn, {"real": real}, metrics) == pytest.approx(golden, rel=1e-6)


def gaussian(mean: float, deviations: torch.Tensor, seed: int) -> torch.Tensor:
    """Return samples with exactly the mean `mean` and the covariance `deviations^2` on the diagonal."""
    x = torch.randn(200, len(deviations), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white * deviations + mean


def test_fid_of_gaussians():
    a, b = torch.linspace(0.5, 2, 6).double(), torch.linspace(3, 1, 6).double()
    expected = 6 * 1.5**2 + (a - b).square().sum()
    assert value("fid", gaussian(2.0, a, 0), gaussian(0.5, b, 1)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("count", [60, 8])  # 8 images are fewer than the 12 dimensions: the covariance is singular
def test_fid_matches_scipy(count):
    x, y = features(count, 0), features(50, 1)
    a, b = x.double().numpy(), y.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert value("fid", x, y) == pytest.approx(expected, rel=1e-3)


def test_kid_matches_double_loop(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 7)
    x, y = features(20, 0), features(15, 1)

    def k(a, b):
        return (float(a.double() @ b.double()) / 12 + 1) ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (20 * 19)
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (15 * 14)
    across = sum(k(a, b) for a in x for b in y) / (20 * 15)
    assert value("kid", x, y) == pytest.approx(1000 * (within_x + within_y - 2 * across), rel=1e-9)


def test_kid_is_unbiased():
    halves = [torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).split(20) for seed in range(200)]
    values = [value("kid", *half) for half in halves]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert min(values) < 0


def test_cmmd_matches_its_formula():
    x, y = features(20, 0), features(15, 1)
    a, b = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))

    def mean(u, v):
        return torch.exp(-(torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200).mean()

    assert value("cmmd", x, y) == pytest.approx(float(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))), rel=1e-6)
    assert value("cmmd", x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd"])
def test_distances_grow_and_are_symmetric(name):
    x, y = features(60, 0), features(60, 1)
    assert METRICS[name].lower_is_better
    assert value(name, x, y) == pytest.approx(value(name, y, x), rel=1e-6)
    assert value(name, x, x + 0.1) < value(name, x, x + 1)


def test_precision_and_recall_of_a_line():
    """The real images lie at 0, 1, ..., 9. The ball to the 3rd neighbour has radius 2, at both ends radius 3."""
    real = torch.arange(10.0)[:, None]
    drawn = torch.tensor([[4.2], [4.3], [4.4], [4.5], [-2.9], [-3.1], [12.1], [50.0]])
    assert value("precision", drawn, real) == 5 / 8
    # The balls of the images from 4.2 to 4.5 have a radius of at most 0.3. Only the real image at 4 is inside.
    assert value("recall", drawn[:4], real) == 0.1
    assert value("recall", drawn, real) == 1


def test_precision_and_recall_extremes():
    x = features(40, 0)
    one_mode = x[:1] + 1e-3 * features(40, 3)
    for name in ("precision", "recall"):
        assert value(name, x, x) == 1
        assert value(name, x + 1000, x) == 0
    assert value("precision", one_mode, x) == 1
    assert value("recall", one_mode, x) < 0.1
    with pytest.raises(UserError, match="at least 4 images, got 3"):
        value("precision", x, x[:3])


def test_statistics_give_the_same_fid_as_images():
    drawn, real = features(60, 0), features(50, 1)
    statistics = {"mu": real.double().mean(0), "sigma": real.double().T.cov()}
    assert METRICS["fid"]({"clip": drawn}, statistics) == pytest.approx(value("fid", drawn, real), rel=1e-9)
    assert [name for name, metric in METRICS.items() if metric.takes_statistics] == ["fid"]


def test_diversity_is_the_mean_distance_within_prompts():
    x, prompt = features(20, 0), torch.tensor([7, *[0, 1, 2] * 6, 1])  # the prompt 7 has one image
    distance = [[1 - float(torch.cosine_similarity(a, b, dim=0)) for b in x.double()] for a in x.double()]
    means = []
    for number in (0, 1, 2):
        rows = [i for i in range(20) if prompt[i] == number]
        means.append(np.mean([distance[i][j] for i in rows for j in rows if i != j]))
    drawn = {"clip": x, "prompt": prompt}
    assert METRICS["diversity"](drawn, drawn) == pytest.approx(100 * np.mean(means), rel=1e-6)
    same = {"clip": x[:1].repeat(6, 1), "prompt": PROMPT[:6]}
    assert METRICS["diversity"](same, same) == pytest.approx(0, abs=1e-6)


def test_scores_use_the_cpu_instead_of_mps():
    real, drawn = ({"clip": torch.randn(9, 4), "text": torch.randn(9, 4), "prompt": PROMPT[:9]} for _ in range(2))
    assert scores(drawn, {"real": real}, METRICS, device="mps") == scores(drawn, {"real": real}, METRICS, device="cpu")


def test_fid_features_have_their_own_network():
    fixed = {"text": features(20, 5), "prompt": PROMPT[:20]}
    drawn, real = ({"clip": features(20, s), "fid": features(20, s + 2, 4), **fixed} for s in (0, 1))
    changed = {**drawn, "fid": drawn["fid"] + 1}
    before, after = scores(drawn, {"real": real}, METRICS), scores(changed, {"real": real}, METRICS)
    assert {name for name in METRICS if before[name] != after[name]} >= {"fid", "kid"}
    assert all(before[name] == after[name] for name in ("cmmd", "clip_score"))


def test_captions_need_clip_features():
    with pytest.raises(UserError, match="set its features to clip"):
        FeatureMetric("A", True, "fid", torch.nn.Identity, against="captions")


def test_a_run_folder_cannot_unpickle_inception_weights():
    """torch-fidelity loads a file named in the arguments of torchmetrics' class without `weights_only`."""
    with pytest.raises(UserError, match="is not allowed"):
        check_targets({"_target_": "torchmetrics.image.fid.FrechetInceptionDistance"})
