"""CLIP as torchmetrics takes it: image features for FID, a model and a processor for CLIP score."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPModel, CLIPTokenizer

from lcm.models.pipeline import find

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


class ClipBackbone(nn.Module):
    """A CLIP with the preprocessing it was trained with: uint8 images `[B, 3, H, W]` -> image embeddings `[B, D]`.

    mean, std: of the normalisation of [0, 1] pixels; the mini CLIP's is to [-1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, *, mean: Any = MEAN, std: Any = STD) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.config = clip.eval().requires_grad_(False), tokenizer, clip.config
        self.num_features = clip.config.projection_dim
        self.size = clip.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.get_image_features((images.float() / 255 - self.mean) / self.std)

    def get_image_features(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.clip.get_image_features(x).pooler_output.float()

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.clip.get_text_features(ids, mask).pooler_output.float()

    def process(self, images: list[Tensor] | None = None, text: list[str] | None = None, **_: Any) -> dict[str, Tensor]:
        """What torchmetrics asks of a processor; captions are cut to the tower's length with EOS kept."""
        if images is not None:
            x = torch.stack(images).to(self.mean.device)
            return {"pixel_values": (x.float() / 255 - self.mean) / self.std}
        return self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")


def mini_clip(pipeline: str) -> ClipBackbone:
    """The CLIP in the `clip` folder of a mini pipeline, trained on the pipeline's own data."""
    folder: Path = find(pipeline, "clip", "tokenizer")
    clip = CLIPModel.from_pretrained(folder / "clip", use_safetensors=True, dtype=torch.float32)
    half = (0.5, 0.5, 0.5)
    return ClipBackbone(clip, CLIPTokenizer.from_pretrained(folder / "tokenizer"), mean=half, std=half)


def fid(backbone: ClipBackbone) -> FrechetInceptionDistance:
    """Frechet distance between the backbone's image embeddings of real and generated images; its sums are float64."""
    return FrechetInceptionDistance(feature=backbone, reset_real_features=False)


def clip_score(backbone: ClipBackbone) -> CLIPScore:
    """100 x cosine between image and caption embeddings, averaged."""
    return CLIPScore(model_name_or_path=lambda: (backbone, backbone.process))
