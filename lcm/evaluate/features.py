"""Features of images: what every metric is computed from, kept on disk so that no image is drawn or read twice."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lcm.app.images import resized
from lcm.core.errors import NonFiniteError, UserError
from lcm.data.captions import read_images
from lcm.data.source import Source, stamp
from lcm.evaluate import distances
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.inception import InceptionBackbone
from lcm.models.text_to_image import fingerprint
from lcm.runtime.atomic_io import digest, whole_file, writable

Features = dict[str, Tensor]  # "clip" and "text" [N, D], "fid" [N, F] where that backbone is another one; float32
DISTANCES = ("fid", "kid", "cmmd")  # the lower the better
METRICS = (*DISTANCES, "clip_score")


class Extractor:
    """The backbones of all metrics: `clip` for CMMD and CLIP score, `fid` for FID and KID (None: `clip` for these, too)."""

    def __init__(self, clip: ClipBackbone, fid: ClipBackbone | InceptionBackbone | None = None, *, resolution: int) -> None:
        self.clip, self.fid, self.resolution = clip, fid, resolution
        self.weights = [fingerprint(backbone) for backbone in (clip, fid) if backbone is not None]
        self.names = [backbone.name for backbone in (clip, fid) if backbone is not None]

    @property
    def facts(self) -> dict[str, Any]:
        """What features depend on besides the images."""
        return {"weights": self.weights, "backbones": self.names, "resolution": self.resolution}

    def to(self, device: torch.device | str) -> "Extractor":
        for backbone in (self.clip, self.fid):
            if backbone is not None:
                backbone.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> Features:
        """uint8 `[B, 3, H, W]` and B captions -> features on the CPU; images of another size are first made `resolution`.

        Raises NonFiniteError.
        """
        images = resized(images.to(self.clip.mean.device), self.resolution)
        features = {"clip": self.clip(images), "text": self.clip.text(captions)}
        if self.fid is not None:
            features["fid"] = self.fid(images)
        return finite({name: value.cpu() for name, value in features.items()})

    def reference(self, source: Source, folder: str | Path, option: str = "reference_cache") -> Features:
        """Return the features of all its images, kept in `folder` under what they depend on. option: what names that folder.

        Raises UserError for fewer than 2 images, and for a folder that can be neither read nor written.
        """
        facts = {"shards": [stamp(url) for url in source.urls], "crop": "centre", **self.facts}
        if source.filters is not None and source.filters.limits:
            facts["filters"] = source.filters.signature()
        if source.captions is not None:
            facts["captions"] = source.captions
        file = Path(folder, f"{digest(facts)}.safetensors")
        if not file.is_file():
            writable(Path(folder), option)
            bar = tqdm(read_images(source, resolution=self.resolution), desc="real images", unit="batch")
            parts = [self(batch["x"], batch["captions"]) for batch in bar]
            if sum(len(part["clip"]) for part in parts) < 2:
                raise UserError(f"the {len(source.urls)} shards of real images hold fewer than two of them: give others")
            save(file, joined(parts), facts)
        return load_file(file)


def scores(features: Features, real: Features, metrics: Sequence[str] = METRICS, device: str = "cpu") -> dict[str, float]:
    """`{metric: value}`; device: where the distances are computed, always in float64, which Apple's GPUs lack.

    Raises NonFiniteError.
    """
    device = "cpu" if device.startswith("mps") else device
    finite(features), finite(real)
    made, real = ({name: value.to(device) for name, value in part.items()} for part in (features, real))
    pairs = {
        "fid": (made.get("fid", made["clip"]), real.get("fid", real["clip"])),
        "kid": (made.get("fid", made["clip"]), real.get("fid", real["clip"])),
        "cmmd": (made["clip"], real["clip"]),
        "clip_score": (made["clip"], made["text"]),
    }
    return {metric: getattr(distances, metric)(*pairs[metric]) for metric in metrics}


def finite(features: Features) -> Features:
    """Return the features. Raises NonFiniteError for NaN and infinite ones, which no metric can use."""
    for name, values in features.items():
        if not values.isfinite().all():
            raise NonFiniteError(
                f"the {name} features are not finite: the backbone's weights are damaged, get them again, and remove features "
                "that an earlier evaluation kept"
            )
    return features


def joined(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {"clip": torch.empty(0)}


def save(file: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write safetensors, whole or not at all, with the facts in its header; other processes may write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file, f".{os.getpid()}") as stream:
        stream.write(
            safetensors.torch.save({name: v.contiguous() for name, v in tensors.items()}, {"facts": json.dumps(facts)})
        )
