"""Members of latent shards. A sample with a wrong array is skipped."""

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from lcm.data.encoding import npy
from lcm.data.latents import POSTERIOR, SIZES, DecodeLatents
from lcm.data.sample_fields import Skip

MOMENTS = np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float16)


def decode(content: bytes) -> dict[str, Any]:
    sample = {"__url__": "a.tar", "__key__": "k", "txt": b"caption", POSTERIOR: content}
    return DecodeLatents()(sample, random.Random(0))


def saved(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def test_one_of_the_variants_is_drawn_and_may_be_written_to():
    moments = decode(npy(MOMENTS))["moments"]
    assert any(torch.equal(moments, torch.from_numpy(variant)) for variant in MOMENTS)
    moments += 1


def zipped(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, values)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        npy(MOMENTS)[:9],
        npy(MOMENTS)[:-2],
        npy(MOMENTS[0]),
        npy(MOMENTS * np.float16(np.inf)),
        saved(np.array([[[[{}]]]], dtype=object), allow_pickle=True),
        saved(np.full((1, 8, 4, 4), "text")),
        npy(MOMENTS).replace(b"(2, 8, 4, 4)", b"(8, 9**12,4)"),
        npy(MOMENTS).replace(b"(2, 8, 4, 4), }         ", b"(2, 8, 4, 4000000000), }"),
        zipped(MOMENTS),
    ],
)
def test_wrong_array_is_skipped(content: bytes):
    with pytest.raises(Skip, match="latent"):
        decode(content)


@pytest.mark.parametrize("sizes", [np.zeros((1, 4), np.int64), np.zeros((2, 3), np.int64), np.zeros((2, 4))])
def test_sizes_that_are_not_one_row_a_variant_cost_that_sample(sizes: np.ndarray):
    sample = {"__key__": "a", "__url__": "0.tar", POSTERIOR: npy(MOMENTS), SIZES: npy(sizes), "txt": b"a"}
    with pytest.raises(Skip, match="latent"):
        DecodeLatents()(sample, random.Random(0))
    decoded = DecodeLatents()({**sample, SIZES: npy(np.arange(8).reshape(2, 4))}, random.Random(0))
    assert [*decoded["original_sizes"].tolist(), *decoded["crops"].tolist()] in ([0, 1, 2, 3], [4, 5, 6, 7])
