"""Images of every kind become upright square RGB; chance comes from the given rng alone."""

import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lcm.data.transforms import Decode, collate

SIZE = 32
TRANSPOSE = Image.Transpose
# How a picture is stored so that a viewer that obeys the EXIF orientation shows it upright.
STORED = {
    1: None,
    2: TRANSPOSE.FLIP_LEFT_RIGHT,
    3: TRANSPOSE.ROTATE_180,
    4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE,
    6: TRANSPOSE.ROTATE_90,
    7: TRANSPOSE.TRANSVERSE,
    8: TRANSPOSE.ROTATE_270,
}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(content: bytes, *, seed: int = 0, name: str = "png", size: int = SIZE, **options: Any) -> Tensor:
    sample = {"__key__": "k", "__url__": "u", name: content, "txt": b"a cat"}
    return Decode(size, **options)(sample, random.Random(seed))["x"]


def corner(width: int = 48, height: int = 48) -> Image.Image:
    """Blue, with a red bar half as wide and a quarter as high at the top left: no symmetry."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height // 4))
    return image


def noise(width: int = 96, height: int = 64) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_every_mode_of_png_becomes_rgb(mode: str) -> None:
    x = decode(encoded(corner().convert(mode)))
    assert x.shape == (3, SIZE, SIZE)
    assert x.dtype == torch.uint8
    expected = decode(encoded(corner().convert(mode).convert("RGB")))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_every_mode_of_jpeg_becomes_rgb(mode: str) -> None:
    x = decode(encoded(Image.new("RGB", (40, 40), (128, 128, 128)).convert(mode), "JPEG"), name="jpg")
    assert x.shape == (3, SIZE, SIZE)
    assert (x.int() - 128).abs().max() <= 4


def test_sixteen_bit_greys_keep_their_tones() -> None:
    image = Image.fromarray(np.full((40, 40), 0x4000, dtype=np.uint16))
    assert (decode(encoded(image)).int() - 0x40).abs().max() <= 1


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotations_are_undone(orientation: int) -> None:
    how = STORED[orientation]
    stored = corner() if how is None else corner().transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = decode(encoded(stored, "JPEG", exif=exif, quality=95), name="jpg").int()
    red = x[0] - x[2] > 0
    assert red[: SIZE // 4 - 2, : SIZE // 2 - 2].all()
    assert not red[SIZE // 4 + 2 :].any()
    assert not red[:, SIZE // 2 + 2 :].any()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (31, 200), (200, 31), (32, 32), (33, 32), (500, 400)])
def test_every_shape_becomes_the_square(shape: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("RGB", shape, "red"))).float().mean((1, 2)).tolist() == [255, 0, 0]


def test_a_thread_of_an_image_costs_no_more_memory_than_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1 x 20000 image of 60 bytes, resized before it is cropped, would be 32 x 640000."""
    asked = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        asked.append(size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    decode(encoded(Image.new("RGB", (1, 20000))))
    assert max(asked) <= 100 * SIZE**2


def test_an_image_of_the_right_size_is_not_touched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels))).permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("portrait", [False, True])
def test_the_centre_is_cropped(portrait: bool) -> None:
    image = Image.new("RGB", (96, 32), "red")
    image.paste("green", (32, 0, 64, 32))
    x = decode(encoded(image.transpose(TRANSPOSE.ROTATE_90) if portrait else image))
    assert x.float().mean((1, 2)).tolist() == [0, 128, 0]


def test_random_crop_and_flip_depend_on_the_rng_alone() -> None:
    options = {"random_crop": True, "flip": True}
    random.seed(1)
    first = decode(noise(), seed=5, **options)
    random.seed(2)
    assert torch.equal(first, decode(noise(), seed=5, **options))
    assert len({decode(noise(), seed=seed, **options).numpy().tobytes() for seed in range(12)}) > 8


def test_without_crop_and_flip_the_rng_does_not_matter() -> None:
    assert torch.equal(decode(noise(), seed=1), decode(noise(), seed=2))


def test_a_random_crop_is_a_window_of_the_resized_image() -> None:
    wide = decode(noise(96, 32), size=32, random_crop=True, seed=3)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(noise(96, 32))))).permute(2, 0, 1)
    assert any(torch.equal(wide, pixels[:, :, left : left + 32]) for left in range(65))


def test_a_flip_mirrors_half_of_the_images() -> None:
    plain, flipped = decode(noise()), [decode(noise(), flip=True, seed=seed) for seed in range(40)]
    mirrored = [torch.equal(x, plain.flip(2)) for x in flipped]
    assert all(m or torch.equal(x, plain) for m, x in zip(mirrored, flipped, strict=True))
    assert 10 < sum(mirrored) < 30


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_not_decoded(side: int) -> None:
    with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
        decode(bomb(side))


def test_a_truncated_image_is_an_error() -> None:
    with pytest.raises(OSError, match="truncated"):
        decode(noise()[:200])


@pytest.mark.parametrize("members", [{"txt": b" a cat\n"}, {"json": json.dumps({"caption": "a cat"}).encode()}])
def test_the_caption_comes_from_txt_or_json(members: dict[str, bytes]) -> None:
    sample = Decode(SIZE)({"__key__": "k", "__url__": "u", "png": noise(), **members}, random.Random(0))
    assert sample["caption"] == "a cat"


def test_samples_of_different_shards_have_different_keys() -> None:
    samples = [{"__key__": "0", "__url__": url, "png": noise(), "txt": b""} for url in "ab"]
    assert len(set(collate([Decode(SIZE)(sample, random.Random(0)) for sample in samples])["keys"])) == 2
