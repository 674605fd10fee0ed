"""Shared fixtures: a tiny pipeline folder of random weights and a handful of OpenMoji shards, made once a session."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from lcm.core.schedule import NoiseSchedule
from lcm.data.openmoji import build
from lcm.models.saving import save_pipeline
from lcm.models.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Lightning's launcher leaves MASTER_PORT behind, start_run LCM_RUN_ID: not for the programs that later tests start."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


CAPTIONS = ["red apple on a white background", "dog face on a pink background", "rocket on a gray background"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """30 k parameters of Stable Diffusion's UNet class, for 4 x 8 x 8 latents and 16-wide text states."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def write_tiny_pipeline(folder: Path, **schedule: object) -> Path:
    """A complete teacher folder: 32 px images, factor 4, with a CLIP beside it."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=32,
    )
    tokenizer = train_tokenizer(CAPTIONS, merges=50, max_length=16)
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**towers, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**towers, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    parts = folder.with_name(folder.name + "-parts")
    vae.save_pretrained(parts / "vae")
    clip.save_pretrained(parts / "clip")
    clip.text_model.save_pretrained(parts / "text_encoder")
    tokenizer.save_pretrained(parts / "tokenizer")
    save_pipeline(
        folder, tiny_unet(), NoiseSchedule(**schedule), base=str(parts), consistency=False, facts={}, dtype=torch.float32
    )
    return folder


def write_tiny_xl_pipeline(folder: Path, tiny: Path) -> Path:
    """The tiny teacher as Stable Diffusion XL has it: a second text encoder, pooled texts of 8 and sizes for the UNet."""
    parts = folder.with_name(folder.name + "-parts")
    shutil.copytree(tiny, parts)
    torch.manual_seed(1)
    first = CLIPTextConfig.from_pretrained(tiny / "text_encoder")
    second = CLIPTextConfig.from_dict({**first.to_dict(), "hidden_size": 24, "num_hidden_layers": 2, "projection_dim": 8})
    CLIPTextModelWithProjection(second).save_pretrained(parts / "text_encoder_2")
    shutil.copytree(tiny / "tokenizer", parts / "tokenizer_2")
    embedding = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 + 6 * 8}
    unet = tiny_unet(cross_attention_dim=16 + 24, addition_embed_type="text_time", **embedding)
    save_pipeline(folder, unet, NoiseSchedule(), base=str(parts), consistency=False, facts={}, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def xl_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xl_pipeline(tmp_path_factory.mktemp("pipelines") / "xl", tiny_pipeline)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 px OpenMoji: about 150 training samples in shards of 32, and a few held out."""
    root = tmp_path_factory.mktemp("data") / "openmoji-32"
    build(str(root), resolution=32, limit=40, samples_per_shard=32)
    return root
