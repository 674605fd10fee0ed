"""Randomness as a pure function of keys, so that a resumed run draws the same numbers as an uninterrupted run."""

import hashlib
from collections.abc import Iterator

import torch


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """Return a generator on `device` seeded by `keys` alone, e.g. `generator(device, seed, "train", batch)`."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


BLOCK = 64  # samples of a global batch that share a generator


class RankSlice:
    """This rank's slice of the noise of a global batch: samples `rank * count` to `(rank + 1) * count`.

    The noise of a sample depends on `keys`, the global batch size and the sample's position in the global batch, not on the
    world size. Block n of 64 samples has the generator (*keys, n), and a rank draws only the blocks that overlap its slice.
    """

    def __init__(self, device: torch.device | str, *keys: int | str, rank: int = 0, world_size: int = 1) -> None:
        self.device, self.keys, self.rank, self.world_size = device, keys, rank, world_size

    def blocks(self, count: int) -> Iterator[tuple[int, torch.Generator, slice]]:
        """Yield (size, generator, rows) of each block that overlaps this rank's slice. count: the samples of one rank.

        rows: the slice of the block that belongs to this rank.
        """
        start, stop, total = self.rank * count, (self.rank + 1) * count, self.world_size * count
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            rows = slice(max(start - first, 0), stop - first)
            yield min(BLOCK, total - first), generator(self.device, *self.keys, block), rows


def normal(shape: torch.Size, rng: RankSlice | torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Draw standard normals of this shape, float32. rng: a `RankSlice` gives this rank's rows of a global batch."""
    if not isinstance(rng, RankSlice):
        return torch.randn(shape, generator=rng, device=device)
    blocks = rng.blocks(shape[0])
    return torch.cat([torch.randn(size, *shape[1:], generator=block, device=device)[rows] for size, block, rows in blocks])


class ImageNoise:
    """Draws standard normals `[B, *shape]` float32 for a batch of images, one seed per image.

    The noise of an image does not depend on its batch. It is drawn on the CPU, so it does not depend on the device either.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.generators = [generator("cpu", "image", seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
