"""Randomness as a pure function of where it is used, so that a resumed run draws what the uninterrupted one drew."""

import hashlib

import torch


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """A generator on `device` seeded by `keys` alone, e.g. `generator(device, seed, "train", batch)`."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def own_rows(drawn: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """One rank's of the rows drawn for all ranks, in the order in which they share a batch: what a sample is given then depends
    on its place in the batch, not on the number of ranks."""
    return drawn.chunk(world_size)[rank]


class ImageNoise:
    """Standard normals `[B, *shape]` float32 for a batch of images, each from its own seed.

    Image i is the same whatever batch it is in and whatever the device: the numbers are drawn on the CPU.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.generators = [generator("cpu", "image", seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
