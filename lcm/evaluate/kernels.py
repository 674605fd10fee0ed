"""Maximum mean discrepancies: KID and CMMD."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel
from torchmetrics.utilities import dim_zero_cat

from lcm.evaluate.metrics import FeatureSets

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, D], [m, D] -> [n, m]
ROWS = 2048  # rows of a kernel matrix in memory at a time


class KID(KernelInceptionDistance):
    """Kernel distance (1801.01401): the unbiased MMD^2 with k(a, b) = (a b / D + 1)^3 over all pairs.

    torchmetrics takes the mean over random subsets. Its estimate has the same expectation, but more noise, and needs a seed.
    """

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        with warnings.catch_warnings(action="ignore"):  # "will save all extracted features"
            super().__init__(feature=nn.Identity(), sync_on_compute=sync_on_compute)

    def compute(self) -> Tensor:
        real, drawn = dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features)
        kernel = partial(poly_kernel, degree=self.degree, gamma=self.gamma, coef=self.coef)
        return unbiased_mean(kernel, real) + unbiased_mean(kernel, drawn) - 2 * mean(kernel, real, drawn)


class CMMD(FeatureSets):
    """CMMD (2401.09603): MMD^2 of unit embeddings with k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), sigma = 10.

    The estimate is biased, as in the authors' code: the pairs (x, x) count.
    """

    def compute(self) -> Tensor:
        real, drawn = (F.normalize(features, dim=-1) for features in self.sets())
        return mean(gaussian, real, real) + mean(gaussian, drawn, drawn) - 2 * mean(gaussian, real, drawn)


def gaussian(a: Tensor, b: Tensor, sigma: float = 10.0) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return (-squares / (2 * sigma**2)).exp()


def mean(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over all pairs of a row of `a` and a row of `b`."""
    return torch.stack([kernel(rows, b).sum() for rows in a.split(ROWS)]).sum() / (len(a) * len(b))


def unbiased_mean(kernel: Kernel, x: Tensor) -> Tensor:
    """Return the mean over all pairs of different rows."""
    n, diagonal = len(x), torch.stack([kernel(rows, rows).diagonal().sum() for rows in x.split(ROWS)]).sum()
    return (mean(kernel, x, x) * n**2 - diagonal) / (n * (n - 1))
