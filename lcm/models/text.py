"""The frozen text encoders of a pipeline, with a cache of text embeddings by caption."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcm.models.families import Family


class TextEncoder:
    """Captions in, text embeddings out, as the pipeline's family defines them.

    dtype: of the encoders; None keeps it. memory: megabytes of embeddings to cache on the device, least recently used first
    out: 6 kB a caption of the mini model, 118 kB of SD 1.5 (bfloat16), 318 kB of SDXL.
    """

    def __init__(
        self,
        family: Family,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        memory: float = 256,
    ) -> None:
        self.family, self.tokenizers, self.memory = family, list(tokenizers), memory
        self.encoders = [encoder.to(dtype=dtype).eval().requires_grad_(False) for encoder in encoders]
        self.cache: OrderedDict[str, list[Tensor]] = OrderedDict()

    def to(self, device: torch.device | str) -> "TextEncoder":
        for encoder in self.encoders:
            encoder.to(device)
        self.cache = OrderedDict((caption, [row.to(device) for row in rows]) for caption, rows in self.cache.items())
        return self

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """Return float32 embeddings `[B, ...]` by the family's names. Only captions that are not cached are encoded, once
        each.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.cache]
        if new:
            embeddings = self.family.encode(self.tokenizers, self.encoders, new)
            for caption, *rows in zip(new, *(embeddings[name] for name in self.family.text), strict=True):
                self.cache[caption] = [row.clone() for row in rows]  # a view would keep all of its batch
        for caption in captions:
            self.cache.move_to_end(caption)
        stacked = [torch.stack(rows) for rows in zip(*(self.cache[caption] for caption in captions), strict=True)]
        size = sum(part[0].nbytes for part in stacked)
        while len(self.cache) * size > self.memory * 1e6:
            self.cache.popitem(last=False)
        return {name: part.float() for name, part in zip(self.family.text, stacked, strict=True)}
