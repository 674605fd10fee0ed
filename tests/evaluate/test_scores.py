"""Preference scores are metrics and rewards. The tests use tiny CLIPs with random weights. Pickled weights are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.core.errors import UserError
from lcm.evaluate.aesthetic import pretrained_aesthetic
from lcm.evaluate.clip import mini_clip, pretrained_clip
from lcm.evaluate.features import Extractor
from lcm.evaluate.metrics import Score
from lcm.evaluate.reward import ScoreReward
from tests.evaluate.test_clip import folder, images

__all__ = ["folder"]
CAPTIONS = ["red apple", "rocket", "dog"]


class Original(nn.Module):
    """The head with the names of weights in christophschuhmann/improved-aesthetic-predictor."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


@pytest.fixture(scope="module")
def head(folder: Path) -> Original:
    torch.manual_seed(0)
    return Original(CLIPModel.from_pretrained(folder).config.projection_dim).eval()


@pytest.fixture(scope="module")
def head_file(head: Original, tmp_path_factory: Any) -> Path:
    file = tmp_path_factory.mktemp("head") / "model.safetensors"
    save_file(head.state_dict(), file)
    return file


def test_aesthetic_score_matches_the_original(folder: Path, head: Original, head_file: Path) -> None:
    network = pretrained_aesthetic(str(folder), str(head_file.parent))
    x = images(3)
    embedding = pretrained_clip(str(folder))(x)
    with torch.no_grad():
        expected = head.layers(embedding / embedding.norm(dim=-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(network.score(x.float() / 255, ["", "", ""]), expected)
    file = head_file.with_name("bare.safetensors")
    save_file(head.layers.state_dict(), file)
    torch.testing.assert_close(pretrained_aesthetic(str(folder), str(file)).score(x.float() / 255, [""] * 3), expected)


def test_scores_see_images_at_their_drawn_size(folder: Path, tiny_pipeline: Path) -> None:
    network = pretrained_clip(str(folder))
    extract = Extractor(mini_clip(str(tiny_pipeline)), resolution=16, scores=[Score("Pick", False, network, scale=100)])
    x = images(3, 64)
    features = extract(x, CAPTIONS)
    embeddings, text = network(x), network.text(CAPTIONS)
    torch.testing.assert_close(features["Pick"], torch.cosine_similarity(embeddings, text))
    assert "Pick" not in extract.features(x, CAPTIONS)
    assert "scorers" in extract.identity
    assert "scorers" not in extract.reference_identity


@pytest.mark.parametrize("name", ["pick_score", "hpsv2", "aesthetic"])
def test_metric_and_reward_take_the_same_weights(name: str, folder: Path, head_file: Path) -> None:
    """Both configurations take a folder as the model. The gradient of the reward raises the metric."""
    options = {"model": str(folder)} | ({"head": str(head_file)} if name == "aesthetic" else {})
    metric_and_reward(name, options, CAPTIONS)


def metric_and_reward(name: str, options: dict[str, str], captions: list[str]) -> ScoreReward:
    """Check that a metric and a reward of the same options compute the same score. Return the reward."""
    metric = compose("evaluate", [f"metrics=[{name}]", *(f"metrics.{name}.network.{k}={v}" for k, v in options.items())])
    training = compose("train", [f"model/reward={name}", *(f"model.reward.backbone.{k}={v}" for k, v in options.items())])
    [score], reward = build(metric.metrics).values(), build(training.model.reward)
    assert isinstance(reward, ScoreReward)
    x = images(3).float().div(255).requires_grad_()
    values = reward(x, captions)
    torch.testing.assert_close(values, score.network.score(x, captions))
    [gradient] = torch.autograd.grad(values.sum(), x)
    assert reward(x + 1e-2 * gradient / gradient.abs().max(), captions).sum() > values.sum()
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    return reward


def test_pickled_weights_are_refused(folder: Path, head: Original, tmp_path: Path) -> None:
    pickled = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(head.state_dict(), pickled)
    with pytest.raises(UserError, match=r"a pickled \.pth is not read"):
        pretrained_aesthetic(str(folder), str(pickled))
    with pytest.raises(UserError, match=r"no \.safetensors file: .*\.pth may hold code"):
        pretrained_aesthetic(str(folder), str(tmp_path))
    hps = Path(shutil.copytree(folder, tmp_path / "hps"))
    (hps / "model.safetensors").unlink()
    torch.save({}, hps / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=r"HPS_v2.1_compressed.pt may hold code; .* save_pretrained\(\)"):
        pretrained_clip(str(hps))


def test_other_heads_are_refused(folder: Path, tmp_path: Path) -> None:
    save_file(Original(9).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is no aesthetic head for this CLIP: expected layers.0 to layers.7"):
        pretrained_aesthetic(str(folder), str(tmp_path))
    with pytest.raises(UserError, match=r"is no \.safetensors file, folder or hub id"):
        pretrained_aesthetic(str(folder), "nowhere/head.safetensors")
