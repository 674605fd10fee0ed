"""A full-size pipeline folder with random weights, to measure speed and memory without a download."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from omegaconf import OmegaConf
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm.app.cli import build
from lcm.app.targets import CONF
from lcm.core.process import VP
from lcm.models.pipeline import find
from lcm.runtime.atomic_io import whole_folder

VAE: dict[str, Any] = {  # Stable Diffusion up to 2.1
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.18215,
}  # fmt: skip
VOCABULARY = 49408
TEXT: dict[int, dict[str, Any]] = {  # by width: CLIP ViT-L/14, OpenCLIP ViT-H/14 without its last layer, ViT-bigG/14
    768: {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    1024: {"num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096, "hidden_act": "gelu"},
    1280: {"num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120, "hidden_act": "gelu"},
}


def untrained_pipeline(net: str, folder: str) -> None:
    """Write the UNet of `conf/model/net/<net>.yaml`, its VAE and text encoders in float16, unless the folder exists."""
    target = Path(folder)
    if target.is_dir():
        return
    print(f"writing {folder}: random weights of {net}", flush=True)
    torch.manual_seed(0)
    unet: UNet2DConditionModel = build(OmegaConf.load(CONF / "model/net" / f"{net}.yaml"))
    tokenizer = full_size(CLIPTokenizer.from_pretrained(find("mini") / "tokenizer"))
    xl, width = unet.config["addition_embed_type"] == "text_time", unet.config["cross_attention_dim"]
    parts: dict[str, Any] = {
        "unet": unet, "vae": AutoencoderKL(**VAE), "scheduler": DDIMScheduler(**VP().config), "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(tower(tokenizer, 768 if xl else width)),
    }  # fmt: skip
    if xl:
        second = CLIPTextModelWithProjection(tower(tokenizer, width - 768))
        pipeline: Any = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with whole_folder(target) as partial:
        pipeline.to(torch.float16).save_pretrained(partial)


def full_size(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """Return a tokenizer with Stable Diffusion's vocabulary size and length. Pairs of symbols fill the vocabulary."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    symbols = [token for token in vocab if len(token) == 1]
    pairs = [(a, b) for a in symbols for b in (*symbols, *(f"{symbol}</w>" for symbol in symbols)) if a + b not in vocab]
    for a, b in pairs[: VOCABULARY - len(vocab)]:
        vocab[a + b] = len(vocab)
        merges.append((a, b))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def tower(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Return the config of the text encoder of this width."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": VOCABULARY}
    return CLIPTextConfig(hidden_size=width, projection_dim=width, **TEXT[width], **special)
