"""Diversity of the images of one prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Diversity(Metric):
    """The mean cosine distance between the features of two images of one prompt.

    The mean is over the pairs of a prompt, then over the prompts with several images.
    """

    full_state_update = False
    features: list[Tensor]
    prompts: list[Tensor]

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("prompts", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, prompts: Tensor) -> None:
        """Add images. features: `[N, D]`. prompts: int64 `[N]`, equal for images of one prompt."""
        self.features.append(features)
        self.prompts.append(prompts)

    def compute(self) -> Tensor:
        unit = F.normalize(dim_zero_cat(self.features), dim=-1)
        _, group, counts = dim_zero_cat(self.prompts).unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), unit.shape[1], dtype=unit.dtype, device=unit.device).index_add_(0, group, unit)
        several = counts > 1
        n = counts[several]
        # |sum of unit vectors|^2 is n plus the cosines of all ordered pairs.
        return (1 - (sums[several].square().sum(1) - n) / (n * (n - 1))).mean()
