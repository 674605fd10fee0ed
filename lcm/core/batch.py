"""What every latent module trains on."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LatentBatch:
    """Algorithm 1's `(z, c) ~ D_z`.

    z0: `[B, C, H/f, W/f]` float32, scaled to unit variance; cond: `[B, L, D]` float32 text states; uncond: `[1, L, D]`,
    those of the empty caption; captions: the B texts; keys: the B names of the samples.
    """

    z0: Tensor
    cond: Tensor
    uncond: Tensor
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.z0)
