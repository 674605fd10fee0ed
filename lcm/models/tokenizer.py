"""A CLIP tokenizer (byte-level BPE with end-of-word marks) learnt from a set of captions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(captions: Iterable[str], *, merges: int = 1500, max_length: int = 24) -> CLIPTokenizer:
    """The tokenizer class that Stable Diffusion uses, with a vocabulary of its own.

    Every byte is a token, within a word and at its end, so any prompt can be written; texts are cut to `max_length`, EOS kept.
    """
    empty = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer, bpe.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2 * len(symbols) + merges, end_of_word_suffix=END_OF_WORD, show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    learnt = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:merges]
    tokens = [BOS, EOS, *symbols, *(s + END_OF_WORD for s in symbols), *dict.fromkeys(a + b for a, b in learnt)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=learnt, model_max_length=max_length)
