"""Distances between two sets of features, and the CLIP score: float64 arithmetic on features `[N, D]` and `[M, D]`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, D], [m, D] -> [n, m]
ROWS = 2048  # of a kernel matrix that are in memory at a time


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussians (1706.08500): |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), S unbiased.

    tr (S_x S_y)^(1/2) is taken from the symmetric S_x^(1/2) S_y S_x^(1/2), which has the same eigenvalues, all real.
    """
    x, y = x.double(), y.double()
    s_x, s_y = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(s_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_y @ root).clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + s_x.trace() + s_y.trace() - 2 * cross)


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel distance (1801.01401): the unbiased estimate of MMD^2 with k(a, b) = (a b / D + 1)^3, times 1000.

    It is taken over all pairs. The usual mean over random subsets estimates the same with more noise, and needs a seed.
    """
    x, y, n, m = x.double(), y.double(), len(x), len(y)
    within_x = (kernel_sum(cubic, x, x) - (x.square().mean(1) + 1).pow(3).sum()) / (n * (n - 1))
    within_y = (kernel_sum(cubic, y, y) - (y.square().mean(1) + 1).pow(3).sum()) / (m * (m - 1))
    return float(1000 * (within_x + within_y - 2 * kernel_sum(cubic, x, y) / (n * m)))


def cmmd(x: Tensor, y: Tensor) -> float:
    """CMMD (2401.09603): MMD^2 of unit CLIP embeddings with a Gaussian kernel of sigma 10, times 1000.

    As its authors compute it the pairs (x, x) count, too: the biased estimate of least variance.
    """
    x, y = F.normalize(x.double(), dim=-1), F.normalize(y.double(), dim=-1)
    n, m = len(x), len(y)
    within = kernel_sum(gaussian, x, x) / n**2 + kernel_sum(gaussian, y, y) / m**2
    return float(1000 * (within - 2 * kernel_sum(gaussian, x, y) / (n * m)))


def clip_score(images: Tensor, captions: Tensor) -> float:
    """100 x the cosine between image i and caption i (`[N, D]` each), averaged."""
    return float(100 * F.cosine_similarity(images.double(), captions.double()).mean())


def cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[-1] + 1).pow(3)


def gaussian(a: Tensor, b: Tensor, sigma: float = 10.0) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return (-squares / (2 * sigma**2)).exp()


def kernel_sum(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:
    """Sum over all pairs; the matrix is made a block of rows at a time."""
    return torch.stack([kernel(rows, b).sum() for rows in a.split(ROWS)]).sum()
