"""Shared fixtures, built once per session: tiny pipeline folders with random weights, and a few OpenMoji shards."""

import json
import os
import shutil

import lcm  # noqa: F401, it mutes bitsandbytes, which diffusers imports

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lcm.core.objectives.denoising import ddim_scheduler
from lcm.core.process import VP
from lcm.data.openmoji import build
from lcm.models.families import family_of
from lcm.models.saving import save_pipeline
from lcm.models.text import train_tokenizer


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Remove variables that a test added, so that programs started by later tests do not inherit them.

    Lightning's launcher sets MASTER_PORT, and start_run sets LCM_RUN_ID.
    """
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


CAPTIONS = ["red apple on a white background", "dog face on a pink background", "rocket on a gray background"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that parallel workers finish at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """Return a UNet of Stable Diffusion's class, with 30,000 parameters, 4 x 8 x 8 latents and text embeddings of width 16."""
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


def tiny_vae(blocks: int = 3, **changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": [8] * blocks,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "sample_size": 32,
    }
    return AutoencoderKL(**{**config, **changes})


def tiny_clip(tokenizer: CLIPTokenizer, **changes: object) -> CLIPModel:
    torch.manual_seed(0)
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    length = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**towers, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**towers, **special, **length}, vision_config=vision, projection_dim=8))


def tiny_projection(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    text = tiny_clip(tokenizer).config.text_config.to_dict()
    torch.manual_seed(1)
    changes = {"hidden_size": width, "num_hidden_layers": 2, "projection_dim": 8}
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict({**text, **changes}))


def tiny_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>"}
    unigram.train_from_iterator(20 * CAPTIONS, trainers.UnigramTrainer(vocab_size=80, show_progress=False, **special))
    vocab = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    torch.manual_seed(2)
    widths = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **widths))


def write_tiny_pipeline(folder: Path, prediction_type: str = "epsilon", **process: object) -> Path:
    """Write a teacher's pipeline for 32 px images, with a VAE of factor 4, and a CLIP model."""
    tokenizer = train_tokenizer(CAPTIONS, merges=50, max_length=16)
    clip = tiny_clip(tokenizer)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        unet=tiny_unet(),
        text_encoder=CLIPTextModel(clip.config.text_config),
        tokenizer=tokenizer,
        scheduler=ddim(prediction_type, **process),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.text_encoder.load_state_dict(clip.text_model.state_dict())
    parts = folder.with_name(folder.name + "-parts")
    pipeline.save_pretrained(parts)
    clip.save_pretrained(parts / "clip")
    return as_trained(parts, folder, pipeline.unet, pipeline.scheduler)


def as_trained(base: Path, folder: Path, net: Any, scheduler: DDIMScheduler) -> Path:
    """Write the pipeline that a training of `net` from `base` saves."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    options = {"family": family_of(base), "base": base, "scheduler": ("DDIMScheduler", config)}
    save_pipeline(folder, net, **options, metadata={"sampler": "ddim"}, dtype=torch.float32)
    return folder


def ddim(prediction_type: str = "epsilon", **process: object) -> DDIMScheduler:
    """Return the scheduler of a saved teacher."""
    name, config = ddim_scheduler(VP(**process), prediction_type)
    assert name == "DDIMScheduler"
    return DDIMScheduler(**config)


def write_tiny_xl_pipeline(folder: Path, tiny: Path) -> Path:
    """Write a Stable Diffusion XL teacher with two text encoders, pooled embeddings of width 8, and size embeddings."""
    first = StableDiffusionPipeline.from_pretrained(tiny)
    embedding = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 + 6 * 8}
    pipeline = StableDiffusionXLPipeline(
        vae=first.vae,
        unet=tiny_unet(cross_attention_dim=16 + 24, addition_embed_type="text_time", **embedding),
        text_encoder=first.text_encoder,
        tokenizer=first.tokenizer,
        text_encoder_2=tiny_projection(first.tokenizer, 24),
        tokenizer_2=first.tokenizer,
        scheduler=ddim(),
        add_watermarker=False,
    )
    parts = folder.with_name(folder.name + "-parts")
    pipeline.save_pretrained(parts)
    shutil.copytree(tiny / "clip", parts / "clip")
    return as_trained(parts, folder, pipeline.unet, pipeline.scheduler)


def write_tiny_pixart(folder: Path) -> Path:
    """Write a PixArt-alpha teacher for 256 px, the smallest size that diffusers' pipeline accepts. The VAE's factor is 8."""
    tokenizer, t5 = tiny_t5()
    torch.manual_seed(0)
    shape = {"sample_size": 32, "in_channels": 4, "out_channels": 8, "num_layers": 1, "patch_size": 2}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 32}
    transformer = PixArtTransformer2DModel(**shape, **heads)
    parts = {"vae": tiny_vae(4), "tokenizer": tokenizer, "text_encoder": t5, "transformer": transformer}
    PixArtAlphaPipeline(**parts, scheduler=ddim(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)).save_pretrained(folder)
    return folder


def write_tiny_sd3(folder: Path) -> Path:
    """Write a Stable Diffusion 3 teacher for 32 px, a flow with three text encoders.

    The VAE has factor 8 and shifted latents of 16 channels.
    """
    tokenizer, (t5_tokenizer, t5) = train_tokenizer(CAPTIONS, merges=50, max_length=77), tiny_t5()
    torch.manual_seed(0)
    shape = {"sample_size": 4, "in_channels": 16, "out_channels": 16, "num_layers": 1, "patch_size": 2, "pos_embed_max_size": 8}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    text = {"joint_attention_dim": 48, "pooled_projection_dim": 16}
    torch.manual_seed(2)
    t5_config = T5Config.from_dict({**t5.config.to_dict(), "d_model": 48})
    StableDiffusion3Pipeline(
        vae=tiny_vae(4, latent_channels=16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False,
                     use_post_quant_conv=False),
        transformer=SD3Transformer2DModel(**shape, **heads, **text),
        text_encoder=tiny_projection(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=tiny_projection(tokenizer, 24),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def pixart_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pixart(tmp_path_factory.mktemp("pipelines") / "pixart")


@pytest.fixture(scope="session")
def sd3_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd3(tmp_path_factory.mktemp("pipelines") / "sd3")


@pytest.fixture(scope="session")
def xl_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xl_pipeline(tmp_path_factory.mktemp("pipelines") / "xl", tiny_pipeline)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of OpenMoji at 32 px: about 150 training samples in shards of 32, and a few validation samples."""
    root = tmp_path_factory.mktemp("data") / "openmoji-32"
    build(str(root), resolution=32, backgrounds=6, pairs=0.0, held_out=0.05, limit=40, samples_per_shard=32)
    return root
