"""The shapes of buckets, and the bucket of a picture."""

import io
import math
import random
from typing import Any

import pytest
from PIL import Image, ImageFile

from lcm.core.errors import UserError
from lcm.data.buckets import SQUARE, STEPS, aspect, nearest, shapes_of


def picture(width: int, height: int, kind: str = "PNG", orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "red").save(file, kind, exif=exif)
    return file.getvalue()


def test_shapes_are_those_of_sdxl() -> None:
    shapes = set(shapes_of(4, 1024))
    of_sdxl = {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (512, 2048)}
    assert of_sdxl | {(width, height) for height, width in of_sdxl} <= shapes


@pytest.mark.parametrize(("resolution", "ratio"), [(256, 1), (1024, 4)])
def test_shapes_keep_to_pixels_ratio_and_grid(resolution: int, ratio: float) -> None:
    shapes = shapes_of(ratio, resolution)
    assert len(set(shapes)) == len(shapes)
    assert {(width, height) for height, width in shapes} == set(shapes)
    for shape in shapes:
        assert 0.7 * resolution**2 < math.prod(shape) <= resolution**2
        assert max(shape) / min(shape) <= ratio
        assert all(side % min(64, resolution // 8) == 0 for side in shape)
    assert (resolution, resolution) in shapes


def test_a_list_of_shapes_is_taken_as_it_is() -> None:
    assert shapes_of([[512, 512], [384, 640]], 512) == [(512, 512), (384, 640)]


@pytest.mark.parametrize("buckets", [True, 17, [512, 512], [[512, 0]], [[8, 8]] * 257])
def test_buckets_without_sense_are_refused(buckets: Any) -> None:
    with pytest.raises(UserError, match=r"data\.buckets=.*expected a ratio from 1 to 16"):
        shapes_of(buckets, 512)


@pytest.mark.parametrize(("kind", "orientation"), [("PNG", 1), ("JPEG", 8), ("WEBP", 6)])
def test_aspect_of_upright_picture_needs_no_decoding(kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    rng = random.Random(0)
    for _ in range(20):
        width, height = rng.randint(20, 300), rng.randint(20, 300)
        start = picture(*((height, width) if orientation > 4 else (width, height)), kind, orientation)
        assert 2 ** ((aspect(start) - SQUARE) / STEPS) == pytest.approx(width / height, rel=0.011)


def test_thread_and_broken_picture_have_an_aspect() -> None:
    assert (aspect(picture(2, 2000)), aspect(picture(2000, 2))) == (0, 255)
    assert aspect(b"<html>404</html>") == aspect(b"") == SQUARE


def test_nearest_shape_crops_least() -> None:
    """The code of an aspect ratio is one byte. Within its precision, no other shape keeps 3 % more of the picture."""
    shapes, rng = tuple(shapes_of(4, 512)), random.Random(0)

    def kept_part(shape: tuple[int, int], ratio: float) -> float:
        shape_ratio = shape[1] / shape[0]
        return min(shape_ratio / ratio, ratio / shape_ratio)

    for _ in range(300):
        ratio = 2 ** rng.uniform(-3, 3)
        chosen = shapes[nearest(SQUARE + round(STEPS * math.log2(ratio)), shapes)]
        assert kept_part(chosen, ratio) >= 0.97 * max(kept_part(shape, ratio) for shape in shapes)
