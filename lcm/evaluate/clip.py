"""CLIP as a backbone of metrics: embeddings of images and of captions."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from lcm.app.images import resized
from lcm.core.errors import UserError
from lcm.models.loading import load_part, load_tokenizer, read_json
from lcm.models.pipeline import find

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
HALF = (0.5, 0.5, 0.5)  # the mini CLIP


class ClipBackbone(nn.Module):
    """A CLIP with its preprocessing: uint8 images `[B, 3, H, W]` -> float32 image embeddings `[B, D]`.

    name: the name of the CLIP in the table's note. mean, std: normalise pixels in [0, 1]. antialias: resize to the size of the
    image tower by antialiased bicubic interpolation, else by plain bilinear interpolation, as older scores do.
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
        return self.embed(resized(images, self.size, antialias=self.antialias).float() / 255)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the embeddings `[B, D]` of images in [0, 1] that have the size of the image tower."""
        x = (pixels - self.mean) / self.std
        return self.clip.get_image_features(x.to(self.clip.dtype)).pooler_output.float()

    def score(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """Return the cosine `[B]` of images and their captions. pixels: see `embed`."""
        return F.cosine_similarity(self.embed(pixels), self.text(captions))

    def text(self, captions: list[str]) -> Tensor:
        """Return float32 text embeddings `[B, D]`. Captions are cut to the length of the text tower, and end with EOS."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.mean.device)).pooler_output.float()


def mini_clip(pipeline: str, *, antialias: bool = True) -> ClipBackbone:
    """Load the CLIP in the `clip` folder of a mini pipeline, trained on the pipeline's data."""
    folder: Path = find(pipeline)
    if not (folder / "clip").is_dir():
        raise UserError(f"{pipeline} has no folder clip, unlike the mini pipeline: set backbone=clip")
    clip = load_part(CLIPModel, folder / "clip", dtype=torch.float32)
    tokenizer = load_tokenizer(CLIPTokenizer, folder / "tokenizer", clip.config.text_config)
    return ClipBackbone(clip, tokenizer, name=str(pipeline), mean=HALF, std=HALF, antialias=antialias)


def pretrained_clip(model: str, *, antialias: bool = True) -> ClipBackbone:
    """Load a CLIP from a folder or by hub id, in transformers' format with safetensors. Raise UserError if it is missing."""
    folder = Path(model).expanduser()
    if model == "mini" or (folder / "model_index.json").is_file():
        raise UserError(f"{model} is a pipeline: choose its CLIP by backbone=mini backbone.pipeline={model}")
    folder = local_folder(
        model,
        f"there is no CLIP folder {model!r}: put config.json, model.safetensors and the tokenizer's files of, for example, "
        "openai/clip-vit-large-patch14 there, or give a hub id (owner/name)",
    )
    clip = load_part(CLIPModel, folder, dtype=torch.float32)
    tokenizer = load_tokenizer(CLIPTokenizer, folder, clip.config.text_config)
    return ClipBackbone(clip, tokenizer, name=model.rstrip("/"), antialias=antialias, **normalisation(folder))


def local_folder(model: str, missing: str) -> Path:
    """Return a folder, or the download of a hub id. missing: the message of the UserError for any other name."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if len(model.split("/")) != 2 or model.startswith((".", "/")):
        raise UserError(missing)
    return snapshot(model)


def snapshot(hub_id: str) -> Path:
    """Download a network or a head from the hub, without pickled weights."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "model*.safetensors"]))
    except Exception as error:  # the hub client raises many types
        raise UserError(
            f"cannot load {hub_id!r} ({type(error).__name__}): offline, copy its config.json, model.safetensors (a pickled "
            ".bin is not read) and, of a CLIP, its tokenizer files to a folder, and give this folder"
        ) from error


def normalisation(folder: Path) -> dict[str, Any]:
    """Return mean and standard deviation from `preprocessor_config.json`, by default those of OpenAI's CLIP."""
    config = read_json(folder / "preprocessor_config.json")
    return {"mean": config.get("image_mean", MEAN), "std": config.get("image_std", STD)}
