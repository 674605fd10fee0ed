"""The batch on which every latent module trains."""

from dataclasses import dataclass

from torch import Tensor

from lcm.core.denoiser import Condition


@dataclass
class LatentBatch:
    """Algorithm 1's `(z, c) ~ D_z`.

    z0: `[B, C, H/f, W/f]` float32, scaled to unit variance. cond: the condition of each of the B captions. uncond: the
    condition of the empty caption, one row. captions: the B texts. keys: the B sample names.
    """

    z0: Tensor
    cond: Condition
    uncond: Condition
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.z0)
