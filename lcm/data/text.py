"""The frozen text encoders of a pipeline: captions in, what its UNet is told out."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lcm.core.condition import Condition, SizedText


class TextEncoder:
    """Stable Diffusion's: the last states of one tower.

    towers: as (tokenizer, text encoder). dtype: of the encoders; None keeps it.
    memory: megabytes of text states to remember on the device, those of the captions used last: 6 kB a caption of the mini
        model, 118 kB one of SD 1.5 (bfloat16), 318 kB one of SDXL.
    """

    parts: Sequence[str] = ("text",)  # what a caption is made into
    sized = False  # whether a condition says how large pictures are

    def __init__(self, *towers: tuple[CLIPTokenizer, nn.Module], dtype: torch.dtype | None = None, memory: float = 256) -> None:
        self.tokenizers = [tokenizer for tokenizer, _ in towers]
        self.towers = [tower.to(dtype=dtype).eval().requires_grad_(False) for _, tower in towers]
        self.memory = memory
        self.known: OrderedDict[str, list[Tensor]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return next(self.towers[0].parameters()).device

    def to(self, device: torch.device | str) -> "TextEncoder":
        for tower in self.towers:
            tower.to(device)
        self.known = OrderedDict((caption, [row.to(device) for row in rows]) for caption, rows in self.known.items())
        return self

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> list[Tensor]:
        """float32 `[B, ...]` of each of `parts`, captions cut to the tower's length (EOS kept); each one not remembered is
        encoded, once."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known]
        for caption, *rows in zip(new, *self.read(new), strict=True) if new else ():
            self.known[caption] = [row.clone() for row in rows]  # a view would keep all of its batch
        for caption in captions:
            self.known.move_to_end(caption)
        found = [torch.stack(rows) for rows in zip(*(self.known[caption] for caption in captions), strict=True)]
        size = sum(part[0].nbytes for part in found)
        while len(self.known) * size > self.memory * 1e6:
            self.known.popitem(last=False)
        return [part.float() for part in found]

    def read(self, captions: list[str]) -> list[Tensor]:
        """What `__call__` remembers: `[B, L, D]` states."""
        [output] = self.outputs(captions)
        return [output[0]]

    def outputs(self, captions: list[str], **options: Any) -> list[Any]:
        ids = [
            handed_over(tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids, self.device)
            for tokenizer in self.tokenizers
        ]
        return [tower(i, **options) for tower, i in zip(self.towers, ids, strict=True)]

    def condition(self, parts: list[Tensor], sizes: Tensor | None) -> Condition:
        """parts: as `__call__` gives them; sizes: see `SizedText`, where `sized`."""
        return parts[0]


class XLTextEncoder(TextEncoder):
    """Stable Diffusion XL's: the states of two towers before their last layer, side by side, and the second one's pooled text.

    zero_null: the empty caption is zeros, as SDXL was trained (`force_zeros_for_empty_prompt` of its pipeline).
    """

    parts = ("text", "pooled")
    sized = True

    def __init__(self, *towers: tuple[CLIPTokenizer, nn.Module], zero_null: bool = True, **options: Any) -> None:
        super().__init__(*towers, **options)
        self.zero_null = zero_null

    def read(self, captions: list[str]) -> list[Tensor]:
        """`[B, L, D1 + D2]` states, `[B, P]` pooled."""
        outputs = self.outputs(captions, output_hidden_states=True)
        parts = [torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds]
        if self.zero_null and "" in captions:
            for part in parts:
                part[captions.index("")] = 0
        return parts

    def condition(self, parts: list[Tensor], sizes: Tensor | None) -> SizedText:
        assert sizes is not None
        states, pooled = parts
        return SizedText(states, pooled, sizes)


def handed_over(values: Tensor, device: torch.device) -> Tensor:
    """CPU tensor on `device`, without waiting for what the device is busy with."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
