"""CLIP as a backbone of metrics: embeddings of images for distances, of captions for the CLIP score."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from lcm.app.images import resized
from lcm.core.errors import UserError
from lcm.models.loading import load_part, load_tokenizer, read_json
from lcm.models.pipeline import find

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
HALF = (0.5, 0.5, 0.5)


class ClipBackbone(nn.Module):
    """A CLIP with the preprocessing it was trained with: uint8 images `[B, 3, H, W]` -> image embeddings `[B, D]` float32.

    name: what a table calls it. mean, std: of the normalisation of [0, 1] pixels; the mini CLIP's is to [-1, 1].
    antialias: of the bicubic resize to the image tower's size; False is the plain bilinear one of old scores.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, clip: CLIPModel, tokenizer: CLIPTokenizer, *, name: str, mean: Any = MEAN, std: Any = STD, antialias: bool = True
    ) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.antialias = clip.eval().requires_grad_(False), tokenizer, antialias
        self.num_features, self.size = clip.config.projection_dim, clip.config.vision_config.image_size
        self.name = f"CLIP of {name} ({self.size} px, {'antialiased bicubic' if antialias else 'plain bilinear'} resize)"
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = resized(images, self.size, antialias=self.antialias).float() / 255
        return self.clip.get_image_features((x - self.mean) / self.std).pooler_output.float()

    def text(self, captions: list[str]) -> Tensor:
        """`[B, D]` float32; captions are cut to the text tower's length with EOS kept."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.mean.device)).pooler_output.float()


def mini_clip(pipeline: str, *, antialias: bool = True) -> ClipBackbone:
    """The CLIP in the `clip` folder of a mini pipeline, trained on the pipeline's own data."""
    folder: Path = find(pipeline)
    if not (folder / "clip").is_dir():
        raise UserError(f"{pipeline} has no folder clip, as the mini pipeline has: set backbone=clip")
    clip = load_part(CLIPModel, folder / "clip", dtype=torch.float32)
    tokenizer = load_tokenizer(CLIPTokenizer, folder / "tokenizer", clip.config.text_config)
    return ClipBackbone(clip, tokenizer, name=str(pipeline), mean=HALF, std=HALF, antialias=antialias)


def pretrained_clip(model: str, *, antialias: bool = True) -> ClipBackbone:
    """A CLIP by folder or hub id, in transformers' format with safetensors. Raises UserError if it is not there."""
    folder = Path(model).expanduser()
    if model == "mini" or (folder / "model_index.json").is_file():
        raise UserError(f"{model} is a pipeline: choose its CLIP by backbone=mini backbone.pipeline={model}")
    if not folder.is_dir() and (len(model.split("/")) != 2 or model.startswith((".", "/"))):
        raise UserError(
            f"there is no CLIP folder {model!r}: put config.json, model.safetensors and the tokenizer's files of, for example, "
            "openai/clip-vit-large-patch14 there, or give a hub id (owner/name)"
        )
    if not folder.is_dir():
        folder = snapshot(model)
    clip = load_part(CLIPModel, folder, dtype=torch.float32)
    tokenizer = load_tokenizer(CLIPTokenizer, folder, clip.config.text_config)
    return ClipBackbone(clip, tokenizer, name=model.rstrip("/"), antialias=antialias, **normalisation(folder))


def snapshot(hub_id: str) -> Path:
    """The CLIP of a hub repository, without its pickled weights."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "model*.safetensors"]))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"cannot load the CLIP {hub_id!r} ({type(error).__name__}): offline, copy its config.json, model.safetensors (a "
            "pickled .bin is not read) and tokenizer files to a folder and give that"
        ) from error


def normalisation(folder: Path) -> dict[str, Any]:
    """Mean and standard deviation of `preprocessor_config.json`, where a folder has one; else OpenAI's, which others share."""
    config = read_json(folder / "preprocessor_config.json")
    return {"mean": config.get("image_mean", MEAN), "std": config.get("image_std", STD)}
