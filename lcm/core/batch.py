"""What every latent module trains on."""

from dataclasses import dataclass

from torch import Tensor

from lcm.core.condition import Condition


@dataclass
class LatentBatch:
    """Algorithm 1's `(z, c) ~ D_z`.

    z0: `[B, C, H/f, W/f]` float32, scaled to unit variance; cond: what is said of each, text states `[B, L, D]` or more;
    uncond: the same of the empty caption, `[1, L, D]`; captions: the B texts; keys: the B names of the samples.
    """

    z0: Tensor
    cond: Condition
    uncond: Condition
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.z0)
