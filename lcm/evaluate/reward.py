"""A metric's score as a reward of a training, such as CLIP's cosine of an image and its caption (RG-LCD, 2403.11027)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lcm.core.numbers import Positive
from lcm.evaluate.aesthetic import AestheticScorer
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.image_reward import ImageRewardScorer
from lcm.models.text_to_image import fingerprint


class ScoreReward(nn.Module):
    """A reward: the score of a CLIP, of a model of preferences (PickScore, HPSv2.1, ImageReward) or of an aesthetic head.

    weight: the factor of the reward in the loss, RG-LCD's beta. description: the reward's entry in `lcm.json`.
    """

    def __init__(self, backbone: ClipBackbone | AestheticScorer | ImageRewardScorer, *, weight: Positive = 1.0) -> None:
        super().__init__()
        self.backbone, self.weight = backbone, weight
        self.description: dict[str, Any] = {"name": backbone.name, "weights": fingerprint(backbone)}

    def forward(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """Return the score `[B]` of images `[B, 3, H, W]` in [0, 1], with gradients to the pixels."""
        side, mode = (self.backbone.size,) * 2, "bicubic" if self.backbone.antialias else "bilinear"
        if pixels.shape[-2:] != side:
            pixels = F.interpolate(pixels, side, mode=mode, antialias=self.backbone.antialias, align_corners=False).clamp(0, 1)
        return self.backbone.score(pixels, captions)
