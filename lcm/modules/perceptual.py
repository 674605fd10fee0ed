"""Distances of images in the features of a frozen network: the image tower of a pipeline's CLIP, or LPIPS (1801.03924)."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics.functional.image
from torch import Tensor, nn
from transformers import CLIPModel

from lcm.core.errors import UserError
from lcm.core.numbers import Positive
from lcm.models.loading import load_part, load_weights
from lcm.models.pipeline import find

VGG16 = "vgg16-397923af.pth"
# Channels of VGG16's convolutions; M: max pooling. The distance takes the features before each pooling and the last ones.
LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


class Perceptual(nn.Module):
    """Mean squared distance of unit feature vectors, for images `[B, 3, H, W]` in [-1, 1]. weight: the factor in the loss."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the features of each layer, with the channels in the last dimension."""
        raise NotImplementedError

    def distance(self, layer: int, square: Tensor) -> Tensor:
        """Return the distance in a layer. square: squared differences of unit vectors, `[..., C]`."""
        return square.sum(dim=-1).mean()

    def forward(self, x: Tensor, rebuilt: Tensor, step: int) -> Tensor:
        """Return the distance of the images, a scalar. step: the number of the step, which selects a shift of the images."""
        with torch.no_grad():
            targets = self.features(self.shifted(x, step))
        pairs = zip(targets, self.features(self.shifted(rebuilt, step)), strict=True)
        squares = [(F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)).square() for a, b in pairs]
        return torch.stack([self.distance(i, square) for i, square in enumerate(squares)]).sum()

    def shifted(self, x: Tensor, step: int) -> Tensor:
        return x


class ClipPerceptual(Perceptual):
    """Features of the CLIP in the `clip` folder of a mini pipeline. layers: numbers of hidden states; 0: the patch embedding.

    The images are shifted by less than a patch, by another distance in each step. Otherwise the edges of the patches show in
    rebuilt images.
    """

    def __init__(self, pipeline: str, *, weight: Positive = 1.0, layers: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__(weight)
        folder = find(pipeline) / "clip"
        if not folder.is_dir():
            raise UserError(f"{pipeline} has no folder clip, unlike the mini pipeline: set model.perceptual.pipeline=mini")
        self.tower, self.layers = load_part(CLIPModel, folder, dtype=torch.float32).vision_model, list(layers)
        if not set(self.layers) <= set(range(len(self.tower.encoder.layers) + 1)):
            raise UserError(f"model.perceptual.layers={self.layers}: give some of 0 to {len(self.tower.encoder.layers)}")
        self.tower.encoder.layers = self.tower.encoder.layers[: max(self.layers)]
        self.size, self.patch = self.tower.config.image_size, self.tower.config.patch_size

    def features(self, x: Tensor) -> list[Tensor]:
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        states = self.tower(x, output_hidden_states=True).hidden_states
        return [states[layer] for layer in self.layers]

    def shifted(self, x: Tensor, step: int) -> Tensor:
        return x.roll((step % self.patch, step // self.patch % self.patch), dims=(2, 3))


class Lpips(Perceptual):
    """LPIPS of VGG16. weights: a file of torchvision's VGG16. torchmetrics ships the weights of LPIPS' own layers."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str, *, weight: Positive = 1.0) -> None:
        super().__init__(weight)
        parts: list[nn.Module] = []
        channels = 3
        for width in LAYERS:
            if isinstance(width, int):
                parts += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                parts.append(nn.MaxPool2d(2))
        self.vgg = nn.Sequential(*parts)
        weights_by_name = load_weights(
            weights,
            "VGG16",
            f"get {VGG16} from torchvision's model downloads, put it there, or set model.perceptual.weights=<file>",
        )
        state = {name.removeprefix("features."): value for name, value in weights_by_name.items() if "features." in name}
        if state.keys() != self.vgg.state_dict().keys():
            raise UserError(f"{weights} does not hold torchvision's VGG16: get {VGG16} anew")
        self.vgg.load_state_dict(state)
        folder = Path(torchmetrics.functional.image.__path__[0]) / "lpips_models"
        for i, value in enumerate(torch.load(folder / "vgg.pth", weights_only=True, map_location="cpu").values()):
            self.register_buffer(f"channel_weights_{i}", value.flatten())
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def features(self, x: Tensor) -> list[Tensor]:
        h, features = (x - self.mean) / self.std, []
        for layer in self.vgg:
            if isinstance(layer, nn.MaxPool2d):
                features.append(h)
            h = layer(h)
        return [feature.movedim(1, -1) for feature in (*features, h)]

    def distance(self, layer: int, square: Tensor) -> Tensor:
        return (square * self.get_buffer(f"channel_weights_{layer}")).sum(dim=-1).mean()
