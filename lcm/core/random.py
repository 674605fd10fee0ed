"""Randomness as a pure function of where it is used, so that a resumed run draws what the uninterrupted one drew."""

import hashlib
from collections.abc import Iterator

import torch


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """A generator on `device` seeded by `keys` alone, e.g. `generator(device, seed, "train", batch)`."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


BLOCK = 64  # rows of a global batch that share a generator; a batch of no more is drawn at once


class RankRows:
    """One rank's rows of what is drawn for a global batch, `rank * count` to `(rank + 1) * count` of `world_size * count`.

    A function of `keys`, of the global batch's size and of a sample's place in it, whatever the number of ranks. Block n of 64
    rows has the generator of (*keys, n), so that a rank draws the blocks that it has rows in.
    """

    def __init__(self, device: torch.device | str, *keys: int | str, rank: int = 0, world_size: int = 1) -> None:
        self.device, self.keys, self.rank, self.world_size = device, keys, rank, world_size

    def blocks(self, count: int) -> Iterator[tuple[int, torch.Generator, slice]]:
        """For each block that `count` rows of this rank lie in: its size, its generator and which of its rows they are."""
        start, stop, total = self.rank * count, (self.rank + 1) * count, self.world_size * count
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            rows = slice(max(start - first, 0), stop - first)
            yield min(BLOCK, total - first), generator(self.device, *self.keys, block), rows


def normal(shape: torch.Size, rng: RankRows | torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Standard normals `shape`, float32."""
    if not isinstance(rng, RankRows):
        return torch.randn(shape, generator=rng, device=device)
    blocks = rng.blocks(shape[0])
    return torch.cat([torch.randn(size, *shape[1:], generator=block, device=device)[rows] for size, block, rows in blocks])


class ImageNoise:
    """Standard normals `[B, *shape]` float32 for a batch of images, each from its own seed.

    Image i is the same whatever batch it is in and whatever the device: the numbers are drawn on the CPU.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.generators = [generator("cpu", "image", seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
