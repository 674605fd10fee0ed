"""A training has the model's size by default. Images, saved models and exports have the size of the training."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.callbacks.samples import ImageGrid
from lcm.core.errors import UserError
from lcm.export import trained
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec, load_network
from lcm.models.text_to_image import TextToImage
from lcm.runtime.checkpoint_io import AtomicCheckpointIO

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def side(folder: object, name: str = "unet") -> int:
    return load_network(str(folder), name=name).config["sample_size"]


@pytest.mark.parametrize("kind", ["distillation", "lora", "guided"])
def test_model_is_saved_at_the_training_size(
    kind: str, training: Make, data: Make, fit: Make, codec: LatentCodec, tmp_path: Path
) -> None:
    module = training(kind)
    fit(module, data(resolution=64), 8 if kind == "guided" else 1)  # guided: at least one step for each of its stages
    assert module.text_to_image(codec).size() == (64, 64)
    module.save_model(str(tmp_path / "model"))
    assert side(tmp_path / "model") == 16
    assert not module.frozen or module.frozen["teacher"].config["sample_size"] == 8
    if kind == "guided":
        assert side(tmp_path / "model", "unet_4") == 16
    [image] = next(TextToImage.load(str(tmp_path / "model")).images(["rocket"], [0], steps=1, w=0.0))
    assert image.shape == (3, 64, 64)


@pytest.mark.parametrize("options", [{"resolution": None}, {"resolution": 32, "buckets": 2}])
def test_own_size_is_the_default(
    options: dict[str, Any], training: Make, data: Make, fit: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, source = training("distillation"), data(**options)
    assert source.resolution == 32
    with caplog.at_level(logging.WARNING):
        fit(module, source, 1)
    assert "px" not in caplog.text
    module.save_model(str(tmp_path / "model"))
    assert side(tmp_path / "model") == 8


def test_another_size_warns_once(training: Make, data: Make, fit: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(training("distillation", eval_ema=0.9), data(resolution=64, buckets=2), 2)
    [message] = [record.message for record in caplog.records if "px" in record.message]
    assert message.startswith("training at 64 px a model of 32 px images:")


def test_resumed_training_has_the_given_size(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    fit(training("distillation"), data(resolution=64), 2).save_checkpoint(tmp_path / "2.ckpt")
    for resolution in (64, 48):
        module = training("distillation")
        fit(module, data(resolution=resolution), 4, ckpt_path=tmp_path / "2.ckpt")
        module.save_model(str(tmp_path / "model"))
        assert side(tmp_path / "model") == resolution // 4


def test_export_has_the_training_size(data: Make, fit: Make, tiny_pipeline: Path, tmp_path: Path) -> None:
    cfg = compose("train", ["experiment=lcd_lora_mini", f"model.pipeline={tiny_pipeline}", "data.resolution=64"])
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    trainer = fit(build(cfg.model), data(resolution=64), 1, plugins=[AtomicCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "checkpoints/last.ckpt")
    trained(tmp_path, "last").save_model(str(tmp_path / "model"))
    assert side(tmp_path / "model") == 16
    with pytest.raises(UserError, match="nowhere is not the folder of a run, it has no"):
        trained(tmp_path / "nowhere", "last")


@pytest.mark.parametrize("experiment", ["lcf_sd15", "lcd_sd15"])
def test_shards_are_read_at_the_model_size(experiment: str, tiny_pipeline: Path, shards: Path) -> None:
    """The recipe of a model that is trained at another size sets its own resolution."""
    cfg = compose(
        "train", [f"experiment={experiment}", "data=shards", f"model.pipeline={tiny_pipeline}", f"data.shards={shards}/*"]
    )
    assert build(cfg.data).resolution == (512 if experiment == "lcf_sd15" else 32)


def test_pipeline_without_a_size_needs_one(data: Make, codec: LatentCodec, tiny_pipeline: Path) -> None:
    silent = load_codec(str(tiny_pipeline))
    silent.resolution = None
    with pytest.raises(UserError, match=r"set data\.resolution=<pixels>"):
        data(codec=silent, resolution=None)
    assert data(codec=None, resolution=None).resolution == 512


def test_sample_grids_have_the_training_size(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    grids = ImageGrid(str(tmp_path), ["rocket", "dog"], steps=[1, 2], w=3.0)
    fit(training("distillation"), data(resolution=160), 1, callbacks=[grids])
    assert [images.shape for images in grids.history.values()] == 2 * [(2, 3, 160, 160)]
    assert Image.open(tmp_path / "step-000000.png").height > 2 * 160


def test_network_for_other_latents_is_refused(tiny_pipeline: Path) -> None:
    cfg = compose("train", ["experiment=teacher_mini", f"model.pipeline={tiny_pipeline}"]).model
    with pytest.raises(UserError, match=r"takes latents of 8 channels, and the VAE of .* makes 4: use model/net=pipeline"):
        build(cfg)
