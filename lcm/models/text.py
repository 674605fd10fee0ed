"""The frozen text encoders of a pipeline with a cache of text embeddings, and the training of a CLIP tokenizer."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lcm.models.families import Family


class TextEncoder:
    """Encodes captions as the pipeline's family defines.

    dtype: the dtype of the encoders; None keeps their own. memory: the megabytes of text embeddings that are cached on the
    device. The least recently used captions are dropped. A caption takes 6 kB in the mini model, 118 kB in SD 1.5 (bfloat16)
    and 318 kB in SDXL.
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
        self.encoders: list[Any] = [encoder.to(dtype=dtype).eval().requires_grad_(False) for encoder in encoders]
        self.cache: OrderedDict[str, list[Tensor]] = OrderedDict()

    def to(self, device: torch.device | str) -> "TextEncoder":
        for encoder in self.encoders:
            encoder.to(device)
        self.cache_to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device

    def cache_to(self, device: torch.device | str) -> None:
        self.cache = OrderedDict((caption, [row.to(device) for row in rows]) for caption, rows in self.cache.items())

    @torch.no_grad()
    def __call__(self, captions: list[str], device: torch.device | None = None) -> dict[str, Tensor]:
        """Return float32 text embeddings `[B, ...]` by the family's names. Each uncached caption is encoded once.

        device: the device of the embeddings and of the cache; None: the device of the encoders.
        """
        device = device or self.device
        if self.cache and next(iter(self.cache.values()))[0].device != device:
            self.cache_to(device)
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.cache]
        if new:
            embeddings = self.family.encode(self.tokenizers, self.encoders, new)
            for caption, *rows in zip(new, *(embeddings[name] for name in self.family.text), strict=True):
                self.cache[caption] = [row.to(device, copy=True) for row in rows]  # a view would keep the batch in memory
        for caption in captions:
            self.cache.move_to_end(caption)
        stacked = [torch.stack(rows) for rows in zip(*(self.cache[caption] for caption in captions), strict=True)]
        size = sum(rows[0].nbytes for rows in stacked)
        while len(self.cache) * size > self.memory * 1e6:
            self.cache.popitem(last=False)
        return {name: rows.float() for name, rows in zip(self.family.text, stacked, strict=True)}


BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(captions: Iterable[str], *, merges: int = 1500, max_length: int = 24) -> CLIPTokenizer:
    """Train a CLIP tokenizer (byte-level BPE with end-of-word marks) on captions.

    The vocabulary has every byte, within a word and at the end of a word, so the tokenizer can encode any prompt. It truncates
    texts to `max_length` tokens, including EOS.
    """
    empty = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer, bpe.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2 * len(symbols) + merges, end_of_word_suffix=END_OF_WORD, show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:merges]
    tokens = [BOS, EOS, *symbols, *(s + END_OF_WORD for s in symbols), *dict.fromkeys(a + b for a, b in pairs)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, model_max_length=max_length)
