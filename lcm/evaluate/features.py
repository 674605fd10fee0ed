"""Features of images: extraction by the backbones, and their cache on disk."""

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
from lcm.core.errors import UserError
from lcm.data.captions import read_images
from lcm.data.source import Source, stamp
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.inception import InceptionBackbone
from lcm.evaluate.metrics import Features, finite
from lcm.models.text_to_image import fingerprint
from lcm.runtime.atomic_io import digest, whole_file, writable


class Extractor:
    """The backbones `clip` and `fid`. None: `clip` also computes the `fid` features."""

    def __init__(self, clip: ClipBackbone, fid: ClipBackbone | InceptionBackbone | None = None, *, resolution: int) -> None:
        self.clip, self.fid, self.resolution = clip, fid, resolution
        backbones = [backbone for backbone in (clip, fid) if backbone is not None]
        self.weights, self.names = [fingerprint(backbone) for backbone in backbones], [backbone.name for backbone in backbones]

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that features depend on besides the images."""
        return {"weights": self.weights, "backbones": self.names, "resolution": self.resolution}

    def to(self, device: torch.device | str) -> "Extractor":
        for backbone in (self.clip, self.fid):
            if backbone is not None:
                backbone.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str]) -> Features:
        """Return float32 features on the CPU for uint8 images `[B, 3, H, W]`, resized to `resolution`, and B captions.

        Raise NonFiniteError.
        """
        images = resized(images.to(self.clip.mean.device), self.resolution)
        features = {"clip": self.clip(images), "text": self.clip.text(captions)}
        if self.fid is not None:
            features["fid"] = self.fid(images)
        return finite({name: value.cpu() for name, value in features.items()})

    def reference(self, source: Source, folder: str | Path, option: str = "reference_cache") -> Features:
        """Return the features of all images of `source`, cached in `folder`. option: the configuration key of `folder`.

        Raise UserError for fewer than 2 images and for a folder that is not writable.
        """
        identity = {"shards": [stamp(url) for url in source.urls], "crop": "centre", **self.identity}
        if source.filters is not None and source.filters.limits:
            identity["filters"] = source.filters.signature()
        if source.captions is not None:
            identity["captions"] = source.captions
        file = Path(folder, f"{digest(identity)}.safetensors")
        if not file.is_file():
            writable(Path(folder), option)
            batches = tqdm(read_images(source, resolution=self.resolution), desc="real images", unit="batch")
            parts = [self(batch["x"], batch["captions"]) for batch in batches]
            if sum(len(part["clip"]) for part in parts) < 2:
                raise UserError(f"the {len(source.urls)} shards of real images hold fewer than two images: give others")
            save(file, joined(parts), identity)
        return load_file(file)


def joined(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {"clip": torch.empty(0)}


def save(file: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write safetensors atomically, with the description in the header. Several processes may write the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file, f".{os.getpid()}") as stream:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        stream.write(safetensors.torch.save(tensors, {"facts": json.dumps(description)}))
