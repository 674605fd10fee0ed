"""Improved precision and recall (1904.06991), with k-nearest-neighbour balls as the manifold of a set."""

import torch
from torch import Tensor

from lcm.core.errors import UserError
from lcm.core.numbers import Count
from lcm.evaluate.metrics import FeatureSets

ROWS = 2048  # rows of a distance matrix in memory at a time


class Precision(FeatureSets):
    """The share of drawn images inside the manifold of the real ones."""

    def __init__(self, k: Count = 3, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.k = k

    def compute(self) -> Tensor:
        real, drawn = self.sets()
        return share_inside(drawn, real, self.k)


class Recall(FeatureSets):
    """The share of real images inside the manifold of the drawn ones."""

    def __init__(self, k: Count = 3, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.k = k

    def compute(self) -> Tensor:
        real, drawn = self.sets()
        return share_inside(real, drawn, self.k)


def share_inside(x: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Return the share of the rows of `x` that lie in a ball around a row of `manifold`. A ball reaches to the k-th neighbour.

    Raises UserError if `manifold` has k rows or fewer.
    """
    if len(manifold) <= k:
        raise UserError(f"precision and recall with k={k} neighbours need at least {k + 1} images, got {len(manifold)}")
    distances = (torch.cdist(rows, manifold) for rows in manifold.split(ROWS))
    radii = torch.cat([rows.kthvalue(k + 1).values for rows in distances])  # the nearest one is the row itself
    inside = torch.cat([(torch.cdist(rows, manifold) <= radii).any(1) for rows in x.split(ROWS)])
    return inside.to(x.dtype).mean()
