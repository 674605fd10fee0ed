"""LAION's aesthetic score: a small head on the image embeddings of a CLIP."""

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lcm.core.errors import UserError
from lcm.evaluate.clip import ClipBackbone, pretrained_clip, snapshot
from lcm.models.loading import check_finite, check_header, weight_files


def linear_head(features: int) -> nn.Sequential:
    """Return the head of the aesthetic score and of ImageReward. The names of its layers leave out the training's dropouts."""
    places, sizes = (0, 2, 4, 6, 7), (features, 1024, 128, 64, 16, 1)
    layers = (nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
    return nn.Sequential(OrderedDict(zip(map(str, places), layers, strict=True)))


class AestheticScorer(nn.Module):
    """Images -> scores `[B]`, about 1 to 10. The head has five linear layers and no activation functions.

    head: the weights by name, as in christophschuhmann/improved-aesthetic-predictor: `layers.0.weight`, or `0.weight`.
    """

    def __init__(self, backbone: ClipBackbone, head: dict[str, Tensor], *, name: str) -> None:
        super().__init__()
        self.backbone, self.size, self.antialias = backbone, backbone.size, backbone.antialias
        self.name = f"{name} on {backbone.name}"
        self.layers = linear_head(backbone.num_features)
        weights = {key.removeprefix("layers."): value.float() for key, value in head.items()}
        expected = {key: tuple(value.shape) for key, value in self.layers.state_dict().items()}
        if {key: tuple(value.shape) for key, value in weights.items()} != expected:
            raise UserError(
                f"{name} is no aesthetic head for this CLIP: expected layers.0 to layers.7 for its {backbone.num_features} "
                "features, as CLIP ViT-L/14 has them in sac+logos+ava1-l14-linearMSE"
            )
        check_finite(name, weights)
        self.layers.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def score(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """Return the scores `[B]` of images in [0, 1] that have the size of the image tower. Captions have no effect."""
        return self.layers(F.normalize(self.backbone.embed(pixels), dim=-1)).squeeze(-1)


def pretrained_aesthetic(model: str, head: str, *, antialias: bool = True) -> AestheticScorer:
    """Load a CLIP and a head, each from a folder or by hub id. The head may be a .safetensors file. Raises UserError."""
    path = Path(head).expanduser()
    if path.suffix in (".pth", ".pt", ".bin") or (not path.exists() and (len(head.split("/")) != 2 or path.suffix)):
        raise UserError(
            f"head={head} is no .safetensors file, folder or hub id: a pickled .pth is not read; if you trust it, save its "
            "tensors by safetensors.torch.save_file"
        )
    if not path.is_file():
        [path, *others] = weight_files(path if path.is_dir() else snapshot(head))[1]
        if others:
            raise UserError(f"head={head} holds several .safetensors files: give one of them")
    check_header(path)
    return AestheticScorer(pretrained_clip(model, antialias=antialias), load_file(path), name=head)
