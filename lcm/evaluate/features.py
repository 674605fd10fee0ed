"""Features of images: extraction by the backbones, and their cache on disk."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lcm.app.images import resized
from lcm.core.errors import UserError
from lcm.data.captions import read_images
from lcm.data.source import Source
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.inception import InceptionBackbone
from lcm.evaluate.metrics import Features, Score, TableMetric, finite
from lcm.models.text_to_image import fingerprint
from lcm.runtime.atomic_io import digest, whole_file, writable


class Extractor:
    """Computes the features of images by the backbones `clip` and `fid`, and the values of `scores`.

    fid: None: the features of `clip` take the place of `fid`. resolution: the pixels per side at which backbones see images.
    """

    def __init__(
        self,
        clip: ClipBackbone,
        fid: ClipBackbone | InceptionBackbone | None = None,
        *,
        resolution: int,
        scores: Iterable[Score] = (),
    ) -> None:
        self.clip, self.fid, self.resolution = clip, fid, resolution
        self.scorers = {score.title: score.network for score in scores}
        self.scorer_weights = {title: fingerprint(network) for title, network in self.scorers.items()}
        backbones = [backbone for backbone in (clip, fid) if backbone is not None]
        self.weights, self.names = [fingerprint(backbone) for backbone in backbones], [backbone.name for backbone in backbones]

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that the features of drawn images depend on, except the images."""
        scorers = {title: [network.name, self.scorer_weights[title]] for title, network in self.scorers.items()}
        return self.reference_identity | ({"scorers": scorers} if scorers else {})

    @property
    def reference_identity(self) -> dict[str, Any]:
        """Return everything that the features of real images depend on, except the images."""
        return {"weights": self.weights, "backbones": self.names, "resolution": self.resolution}

    def to(self, device: torch.device | str) -> "Extractor":
        for backbone in (self.clip, self.fid, *self.scorers.values()):
            if backbone is not None:
                backbone.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> Features:
        """Return float32 features on the CPU for uint8 images `[B, 3, H, W]`, resized to `resolution`, and B captions.

        Scores are computed from the images before this resize. Raise NonFiniteError.
        """
        images, values = images.to(self.clip.mean.device), {}
        for title, network in self.scorers.items():
            pixels = resized(images, network.size, antialias=network.antialias).float() / 255
            values[title] = network.score(pixels, captions).cpu()
        return finite({**self.features(images, captions), **values})

    @torch.no_grad()
    def features(self, images: Tensor, captions: list[str]) -> Features:
        """Return the features of `__call__` without scores."""
        images = resized(images.to(self.clip.mean.device), self.resolution)
        features = {"clip": self.clip(images), "text": self.clip.text(captions)}
        if self.fid is not None:
            features["fid"] = self.fid(images)
        return finite({name: value.cpu() for name, value in features.items()})

    def reference(self, source: Source, folder: str | Path, option: str = "reference_cache") -> Features:
        """Return the features of all images of `source`, cached in `folder`. option: the configuration key of `folder`.

        Raise UserError for fewer than 2 images and for a folder that is not writable.
        """
        identity = {"shards": source.stamps(), "crop": "centre", **self.reference_identity}
        if source.filters is not None and source.filters.limits:
            identity["filters"] = source.filters.signature()
        if source.captions is not None:
            identity["captions"] = source.captions
        file = Path(folder, f"{digest(identity)}.safetensors")
        if not file.is_file():
            writable(Path(folder), option)
            batches, parts, captioned = read_images(source, resolution=self.resolution), [], False
            for batch in tqdm(batches, desc="real images", unit="batch"):
                parts.append(self.features(batch["x"], batch["captions"]))
                captioned |= any(batch["captions"])
            if sum(len(part["clip"]) for part in parts) < 2:
                raise UserError(f"the {len(source.urls)} shards of real images hold fewer than two images: give others")
            features = joined(parts)
            if not captioned:
                del features["text"]
            save(file, features, identity)
        return load_file(file)


def without_rewards(metrics: Mapping[str, Any], extract: Extractor, rewards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics that no training of the model raised. A raised metric says nothing about the model.

    metrics: `TableMetric` by name. rewards: the rewards in the model's `lcm.json`.
    """
    trained = [reward["weights"] for reward in rewards]

    def is_trained(metric: TableMetric) -> bool:
        if metric.against == "network":
            return extract.scorer_weights[metric.title] in trained
        return metric.against == "captions" and extract.weights[0] in trained

    return {name: metric for name, metric in metrics.items() if not is_trained(metric)}


def read_statistics(file: str, dimensions: int) -> Features:
    """Return {"mu": [D], "sigma": [D, D]} in float64 of a .npz file, as pytorch-fid and clean-fid write it. Raises UserError.

    dimensions: D, the number of features of the network of FID.
    """
    try:
        with np.load(Path(file).expanduser(), allow_pickle=False) as content:
            statistics = {name: torch.from_numpy(np.asarray(content[name], dtype=np.float64)) for name in ("mu", "sigma")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"reference={file} cannot be read ({' '.join(str(error).split())}): expected a .npz file with the arrays mu and "
            "sigma and without pickled objects, as pytorch-fid writes it"
        ) from error
    shapes = [tuple(value.shape) for value in statistics.values()]
    if shapes != [(dimensions,), (dimensions, dimensions)]:
        raise UserError(
            f"reference={file} has mu {shapes[0]} and sigma {shapes[1]}, but the network of FID has {dimensions} features: "
            "choose the network that the statistics were made with, as in backbone@fid_backbone=inception"
        )
    if not all(value.isfinite().all() for value in statistics.values()):
        raise UserError(f"reference={file} holds values that are not finite: get the file again")
    return statistics


def joined(parts: Sequence[Features]) -> Features:
    """Return the concatenation of features. Without parts, `clip` is empty."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {"clip": torch.empty(0)}


def save(file: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write safetensors atomically, with the description in the header. Several processes may write the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file, f".{os.getpid()}") as stream:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        stream.write(safetensors.torch.save(tensors, {"facts": json.dumps(description)}))
