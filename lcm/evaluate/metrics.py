"""Metrics as the tables report them: torchmetrics' `Metric` objects, computed from cached features."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from lcm.core.errors import NonFiniteError, UserError

# float32: "clip" and "text" [N, D]; "fid" [N, F] if FID has another network than "clip"; the title of a score: [N]. "prompt":
# int64 [N], equal for images of one prompt. A statistics file has "mu" [F] and "sigma" [F, F] instead.
Features = dict[str, Tensor]


class TableMetric(Protocol):
    """A column of the table: the content of one file in conf/metrics."""

    @property
    def title(self) -> str: ...

    @property
    def lower_is_better(self) -> bool: ...

    @property
    def against(self) -> str: ...


@dataclass(frozen=True)
class FeatureMetric:
    """A metric of features.

    metric: builds the `Metric`, whose `update` gets features `[N, D]` in float64.
    against: "real" and "teacher" compare two sets of images, by `update(features, real=True)` and `update(features,
        real=False)`. "captions" compares by `update(image_embeddings, text_embeddings)`. "prompt" compares images of one prompt
        with each other, by `update(features, prompts)` with int64 prompts `[N]`.
    features: the network, `fid` or `clip`. scale: the factor of the reported value.
    """

    title: str
    lower_is_better: bool
    features: Literal["fid", "clip"]
    metric: Callable[..., Metric]
    against: Literal["real", "captions", "teacher", "prompt"] = "real"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.against == "captions" and self.features != "clip":
            raise UserError(f"the metric {self.title} compares with captions: set its features to clip")

    @property
    def takes_statistics(self) -> bool:
        """Return whether a mean and a covariance can take the place of the real images."""
        return self.against == "real" and hasattr(getattr(self.metric, "func", self.metric), "update_statistics")

    def __call__(self, drawn: Features, reference: Features, device: str = "cpu") -> float:
        """Return the reported value. drawn, reference: the features of the drawn images and of the real or teacher's images."""

        def of_network(features: Features) -> Tensor:
            return features[self.features if self.features in features else "clip"].to(device).double()

        x = of_network(drawn)
        options: dict[str, Any] = {"sync_on_compute": False}  # the features of all ranks are here already
        if "num_features" in inspect.signature(self.metric).parameters:
            options["num_features"] = x.shape[1]
        metric = self.metric(**options).to(device).set_dtype(torch.float64)
        if self.against == "captions":
            metric.update(x, drawn["text"].to(device).double())
        elif self.against == "prompt":
            metric.update(x, drawn["prompt"].to(device))
        else:
            if "sigma" in reference:
                metric.update_statistics(reference["mu"].to(device), reference["sigma"].to(device))
            else:
                metric.update(of_network(reference), real=True)
            metric.update(x, real=False)
        return self.scale * float(metric.compute())


@dataclass(frozen=True)
class Score:
    """The mean of a score that a network gives to each drawn image, such as PickScore.

    network: has `score(pixels, captions)`, `[B, 3, S, S]` in [0, 1] and B captions -> `[B]`, and `name`, `size` and `antialias`
    as `ClipBackbone` has. Images are resized from their drawn size to `size`. scale: the factor of the reported value.
    """

    title: str
    lower_is_better: bool
    network: Any
    scale: float = 1.0
    against: Literal["network"] = "network"

    def __call__(self, drawn: Features, reference: Features, device: str = "cpu") -> float:
        return self.scale * float(drawn[self.title].double().mean())


def scores(
    drawn: Features, references: Mapping[str, Features], metrics: Mapping[str, FeatureMetric | Score], device: str = "cpu"
) -> dict[str, float]:
    """Return the value of each metric by name. Raise NonFiniteError. Apple's GPUs have no float64, so the CPU replaces them.

    references: the features of the images that the metrics compare with, by "real" and "teacher".
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

    def update_statistics(self, mu: Tensor, sigma: Tensor) -> None:
        """Take the mean `[D]` and the unbiased covariance `[D, D]` of the real images in place of their features."""
        count = 2  # any number of images gives the same mean and covariance
        self.real_features_num_samples += count
        self.real_features_sum += count * mu
        self.real_features_cov_sum += (count - 1) * sigma + count * mu.outer(mu)


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
