"""Metrics as the tables report them: torchmetrics' `Metric` objects, computed from cached features."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from lcm.core.errors import NonFiniteError, UserError

Features = dict[str, Tensor]  # float32: "clip" and "text" [N, D]; "fid" [N, F] if FID has a network of its own


@dataclass(frozen=True)
class FeatureMetric:
    """A metric, its title and its direction: the content of one file in conf/metrics.

    metric: builds the `Metric`. Against real images or a teacher's images it is updated by `update(features, real=True)` and
    `update(features, real=False)`, against captions by `update(image_embeddings, text_embeddings)`, each `[N, D]` in float64.
    features: the network, `fid` or `clip`. scale: the factor of the reported value.
    """

    title: str
    lower_is_better: bool
    features: Literal["fid", "clip"]
    metric: Callable[..., Metric]
    against: Literal["real", "captions", "teacher"] = "real"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.against == "captions" and self.features != "clip":
            raise UserError(f"the metric {self.title} compares with captions: set its features to clip")

    def __call__(self, drawn: Features, reference: Features, device: str = "cpu") -> float:
        """Return the reported value for the features of the drawn images and of those they are compared with."""
        x, y = (features.get(self.features, features["clip"]).to(device).double() for features in (drawn, reference))
        options: dict[str, Any] = {"sync_on_compute": False}  # the features of all ranks are here already
        if "num_features" in inspect.signature(self.metric).parameters:
            options["num_features"] = x.shape[1]
        metric = self.metric(**options).to(device).set_dtype(torch.float64)
        if self.against == "captions":
            metric.update(x, drawn["text"].to(device).double())
        else:
            metric.update(y, real=True)
            metric.update(x, real=False)
        return self.scale * float(metric.compute())


def scores(
    drawn: Features, references: Mapping[str, Features], metrics: Mapping[str, FeatureMetric], device: str = "cpu"
) -> dict[str, float]:
    """Return `{name: value}`. Apple's GPUs have no float64: there the CPU computes. Raise NonFiniteError.

    references: features of the images that the metrics compare with, `real` and `teacher`.
    """
    for features in (drawn, *references.values()):
        finite(features)
    device = "cpu" if device.startswith("mps") else device
    return {name: metric(drawn, references.get(metric.against, drawn), device) for name, metric in metrics.items()}


def finite(features: Features) -> Features:
    """Return the features. Raise NonFiniteError for NaN and infinity."""
    for name, values in features.items():
        if not values.isfinite().all():
            raise NonFiniteError(
                f"the {name} features are not finite: the backbone's weights are damaged, get them again, and delete the "
                "cached features of earlier evaluations"
            )
    return features


class PassThrough(nn.Identity):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FID(FrechetInceptionDistance):
    """torchmetrics' Frechet distance, updated with features instead of images."""

    # The arguments for InceptionV3 are left out: torch-fidelity unpickles the file they name.
    def __init__(self, num_features: int, *, sync_on_compute: bool = True) -> None:
        super().__init__(feature=PassThrough(num_features), sync_on_compute=sync_on_compute)


class FeatureSets(Metric):
    """Base of metrics that need all features at once: `real_features` and `drawn_features`, lists of `[n, D]`."""

    full_state_update = False
    real_features: list[Tensor]
    drawn_features: list[Tensor]

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("drawn_features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        (self.real_features if real else self.drawn_features).append(features)

    def sets(self) -> tuple[Tensor, Tensor]:
        """Return the features of the real and of the drawn images."""
        return dim_zero_cat(self.real_features), dim_zero_cat(self.drawn_features)
