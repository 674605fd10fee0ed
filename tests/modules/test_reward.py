"""A score as a reward: its gradient raises the score, the student follows it, and no table shows it as a result."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcm.evaluate import report
from lcm.evaluate.clip import mini_clip
from lcm.evaluate.features import without_rewards
from lcm.evaluate.metrics import Score
from lcm.evaluate.reward import ScoreReward
from lcm.models.pipeline import load_vae
from tests.evaluate.test_metrics import METRICS

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture
def reward(tiny_pipeline: Any) -> ScoreReward:
    return ScoreReward(mini_clip(str(tiny_pipeline)), weight=2.0)


def test_reward_is_the_clip_score(reward: ScoreReward) -> None:
    x = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    captions = ["red apple", "rocket", "dog"]
    features = {"clip": reward.backbone(x), "text": reward.backbone.text(captions)}
    score = METRICS["clip_score"](features, features)
    assert 100 * reward(x.float() / 255, captions).mean().item() == pytest.approx(float(score), abs=1e-3)
    assert reward(torch.rand(2, 3, 48, 48), captions[:2]).shape == (2,)  # images of another size


def test_gradient_raises_the_score_of_decoded_latents(reward: ScoreReward, tiny_pipeline: Any) -> None:
    vae = load_vae(tiny_pipeline).eval().requires_grad_(False)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = []
    for _ in range(5):
        values.append(reward(((vae.decode(z).sample + 1) / 2).clamp(0, 1), ["rocket", "dog"]).mean())
        [gradient] = torch.autograd.grad(values[-1], z)
        z = (z + 0.5 * gradient / gradient.norm()).detach().requires_grad_()
    assert all(later > earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("kind", ["distillation", "finetuning", "dmd2"])
def test_student_follows_the_reward(kind: str, reward: ScoreReward, training: Any, data: Any, fit: Any) -> None:
    modules = [training(kind, reward=term) for term in (None, reward)]
    before = {name: value.clone() for name, value in reward.state_dict().items()}
    metrics = [fit(module, data(), 2).callback_metrics for module in modules]
    assert ["train/reward" in logged for logged in metrics] == [False, True]
    plain, rewarded = (torch.nn.utils.parameters_to_vector(module.net.parameters()) for module in modules)
    assert not torch.equal(plain, rewarded)
    assert all(torch.equal(value, before[name]) for name, value in reward.state_dict().items())
    assert modules[1].state_dict().keys() == modules[0].state_dict().keys()
    assert modules[1].lcm_json()["rewards"] == [reward.description]
    assert "rewards" not in modules[0].lcm_json()


def test_trained_score_is_no_result(reward: ScoreReward) -> None:
    scorer_weights = {"Pick": reward.description["weights"], "Other": "other"}
    extract: Any = SimpleNamespace(weights=[reward.description["weights"]], scorer_weights=scorer_weights)
    assert set(METRICS) - set(without_rewards(METRICS, extract, [reward.description])) == {"clip_score"}
    assert without_rewards(METRICS, extract, []) == METRICS
    networks = {title: Score(title, False, None) for title in scorer_weights}
    assert set(without_rewards(networks, extract, [reward.description])) == {"Other"}
    other: Any = SimpleNamespace(weights=["other"])
    assert without_rewards(METRICS, other, [reward.description]) == METRICS

    metrics = {name: METRICS[name] for name in ("fid", "clip_score")}
    rows = [{"name": name, "steps": 4, "w": 4.0, "fid": 9.0, "clip_score": value} for name, value in (("A", None), ("B", 31.0))]
    assert "| A | 9.00 |  |\n| B | 9.00 | 31.00 |" in report.table(rows, metrics, "note", 4.0)
    assert report.plot(rows, metrics, "steps", lambda row: row["name"]).size[0] > 100
