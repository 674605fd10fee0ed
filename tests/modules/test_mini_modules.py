"""The two modules that build the mini pipeline's parts: training and saved folders."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from lcm.models.text import train_tokenizer
from lcm.modules.autoencoder import Autoencoder, psnr
from lcm.modules.clip import Clip, contrastive_loss
from lcm.modules.lr_schedules import constant

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
OPTIONS = {"optimizer": partial(torch.optim.AdamW, lr=2e-3, fused=True), "lr_schedule": constant}
EVERY = {"val_check_interval": 4, "check_val_every_n_epoch": None}


@pytest.fixture
def pixels(data: Make, shards: Path) -> Any:
    return data(codec=None, val_shards=f"{shards}/val-*.tar", batch_size=8)


@pytest.fixture
def autoencoder(tiny_pipeline: Path) -> Autoencoder:
    return Autoencoder(AutoencoderKL.from_pretrained(tiny_pipeline, subfolder="vae"), **OPTIONS)


@pytest.fixture
def clip() -> Clip:
    torch.manual_seed(0)
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    tokenizer = train_tokenizer(["red apple on a white background"], merges=20, max_length=16)
    return Clip(text=towers, vision={**towers, "image_size": 32, "patch_size": 8}, tokenizer=tokenizer, **OPTIONS)


def parameters(folder: Path, kind: Any) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(kind.from_pretrained(folder).float().parameters())


def test_autoencoder_learns(autoencoder: Autoencoder, pixels: Any, fit: Make) -> None:
    first = fit(autoencoder, pixels, 4, **EVERY).callback_metrics["val/psnr"]
    assert fit(autoencoder, pixels, 40, **EVERY).callback_metrics["val/psnr"] > first + 1


def test_saved_vae_has_unit_variance_latents(autoencoder: Autoencoder, pixels: Any, fit: Make, tmp_path: Path) -> None:
    fit(autoencoder, pixels, 4, **EVERY).save_checkpoint(tmp_path / "4.ckpt")
    assert torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]["latent_std"] == autoencoder.latent_std != 1
    autoencoder.save_model(str(tmp_path))
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae").float().eval()
    x = torch.cat([batch["x"] for batch in pixels.val_dataloader()]).float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean * vae.config["scaling_factor"]
    assert float(z.std()) == pytest.approx(1, abs=0.02)


def test_psnr_of_a_known_error() -> None:
    assert float(psnr(torch.full((2, 3, 4, 4), 0.02))) == pytest.approx(40)


def test_clip_trains_and_validates(clip: Clip, pixels: Any, fit: Make) -> None:
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    metrics = fit(clip, pixels, 4, **EVERY).callback_metrics
    assert 0 <= metrics["val/retrieval_top1"] <= 1
    assert all(not torch.equal(value, before[name]) for name, value in clip.named_parameters() if "k_proj.bias" not in name)


def test_clip_overfits_a_batch(clip: Clip, pixels: Any, fit: Make) -> None:
    pixels.setup()
    batch = next(iter(pixels.train_dataloader()))
    batch = {**batch, "x": batch["x"].float() / 127.5 - 1}
    fit(clip, torch.utils.data.DataLoader([batch] * 60, batch_size=None), 60)
    with torch.no_grad():
        assert contrastive_loss(*clip.embed(batch), clip.clip.logit_scale.exp()) < 0.5


def test_clip_saves_towers_and_tokenizer(clip: Clip, pixels: Any, fit: Make, tmp_path: Path) -> None:
    fit(clip, pixels, 2)
    trained = torch.nn.utils.parameters_to_vector(clip.clip.parameters()).half().float()
    clip.save_model(str(tmp_path))
    assert torch.equal(parameters(tmp_path / "clip", CLIPModel), trained)
    assert CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").model_max_length == 16
    ids = clip.tokenizer(["red apple"], padding="max_length", return_tensors="pt").input_ids
    tower = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").float().eval()
    whole = CLIPModel.from_pretrained(tmp_path / "clip").float().eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(ids)[0], whole.text_model(ids)[0])


@pytest.mark.parametrize("name", ["autoencoder", "clip"])
def test_saving_keeps_the_module(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    module = request.getfixturevalue(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.save_model(str(tmp_path))
    after = module.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


def test_contrastive_loss_of_orthogonal_pairs() -> None:
    """The loss of B matching pairs at scale s is log(1 + (B - 1) e^-s)."""
    eye = torch.eye(4)
    expected = torch.log1p(3 * torch.exp(torch.tensor(-2.0)))
    torch.testing.assert_close(contrastive_loss(eye, eye, torch.tensor(2.0)), expected)
