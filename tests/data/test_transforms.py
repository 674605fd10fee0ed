"""Images of every kind become upright RGB of one shape. Only the given rng makes random choices."""

import io
import json
import math
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from lcm.core.errors import UserError
from lcm.data import transforms
from lcm.data.sample_fields import Skip, caption_of
from lcm.data.transforms import Decode, collate

SIZE = 32
TRANSPOSE = Image.Transpose
# The transposition that stores a picture in an EXIF orientation. A viewer that obeys the orientation shows it upright.
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


def decoded(members: dict[str, bytes], *, seed: int = 0, size: int = SIZE, **options: Any) -> dict[str, Any]:
    return Decode(size, **options)({"__key__": "k", "__url__": "u", **members}, random.Random(seed))


def decode(content: bytes, *, name: str = "png", **options: Any) -> Tensor:
    return decoded({name: content, "txt": b"a cat"}, **options)["x"]


def skipped(members: dict[str, bytes], **options: Any) -> Skip:
    with pytest.raises(Skip) as caught:
        decoded(members, **options)
    return caught.value


def reason_of(content: bytes) -> str:
    """Return the reason of a skip, "" for none."""
    try:
        decode(content)
    except Skip as skip:
        return skip.reason
    return ""


def corner(width: int = 48, height: int = 48) -> Image.Image:
    """Return a blue image without symmetry: the red bar at its top left is half as wide and a quarter as high."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height // 4))
    return image


def photo(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """Return an image of soft shapes with some grain. No two parts of it are equal."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 3, (height, width, 3))
    return Image.fromarray(soft.clip(0, 255).astype(np.uint8)).convert(mode)


def rotated(image: Image.Image, orientation: int) -> bytes:
    """Return the image as a JPEG that is stored in this EXIF orientation."""
    transposition = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image if transposition is None else image.transpose(transposition), "JPEG", exif=exif, quality=95)


def noise(width: int = 96, height: int = 64) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)))


def test_bitmap_becomes_rgb() -> None:
    x = decode(encoded(corner().convert("1")))
    assert x.shape == (3, SIZE, SIZE)
    assert x.dtype == torch.uint8
    expected = decode(encoded(corner().convert("1").convert("RGB")))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_every_mode_of_jpeg_becomes_rgb(mode: str) -> None:
    x = decode(encoded(Image.new("RGB", (40, 40), (128, 128, 128)).convert(mode), "JPEG"), name="jpg")
    assert x.shape == (3, SIZE, SIZE)
    assert (x.int() - 128).abs().max() <= 4


def test_sixteen_bit_greys_keep_their_tones() -> None:
    image = Image.fromarray(np.full((40, 40), 0x4000, dtype=np.uint16))
    assert (decode(encoded(image)).int() - 0x40).abs().max() <= 1


@pytest.mark.parametrize("stored", ["LA", "P"])
def test_the_transparent_is_white(stored: str) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 40, 20))
    x = decode(encoded(image.convert(stored)))
    assert x[:, :15].eq(0).all()
    assert x[:, -15:].eq(255).all()


def test_the_half_transparent_is_blended_with_white() -> None:
    assert (
        decode(encoded(Image.new("RGBA", (40, 40), (200, 0, 0, 128)))).float().mean((1, 2)) - torch.tensor([227, 127, 127])
    ).abs().max() <= 1


def test_turned_file_is_cropped_like_its_upright_picture() -> None:
    """The file is a PNG. test_turned_and_drafted_file_is_cropped_like_its_upright has the other orientations."""
    upright, exif = photo(150, 90), Image.Exif()
    exif[0x0112] = 8
    turned = encoded(upright.transpose(STORED[8]), exif=exif)
    for seed in range(6):
        options = {"seed": seed, "random_crop": True, "flip": True}
        first, second = (decoded({"png": content, "txt": b""}, **options) for content in (encoded(upright), turned))
        assert (first["x"].int() - second["x"].int()).abs().max() <= 1
        assert (first["crop"], first["original_size"]) == (second["crop"], second["original_size"])


def test_damaged_exif_does_not_cost_the_picture() -> None:
    sound = encoded(photo(), "JPEG", dpi=(72, 72), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\1\0\0\0\0\0\0")
    damaged = sound.replace(b"Exif\0\0MM\0*", b"Exif\0\0XX??")
    assert damaged != sound
    assert torch.equal(decode(damaged, name="jpg"), decode(sound, name="jpg"))


def test_the_name_need_not_tell_the_format() -> None:
    """img2dataset's `disable_all_reencoding` stores files of every format as .jpg."""
    assert decode(encoded(Image.new("RGB", (40, 40), "red"), "WEBP"), name="jpg").float().mean(
        (1, 2)
    ).tolist() == pytest.approx([255, 0, 0], abs=2)


def without_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((64, 1000), 2), ((1000, 63), 1), ((256, 257), 8)],
)
def test_jpeg_is_decoded_at_the_smallest_scale_that_holds(
    shape: tuple[int, int], scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, *args, **kwargs: (seen.append(image.size), resize(image, *args, **kwargs))[1]
    )
    decode(encoded(Image.new("RGB", shape), "JPEG"), name="jpg")
    assert seen == [tuple(math.ceil(side / scale) for side in shape)]
    assert min(seen[0]) >= SIZE


@pytest.mark.parametrize(
    ("orientation", "mode", "shape"),
    [(5, "L", (517, 389)), (6, "CMYK", (1024, 70))],
)
def test_a_drafted_picture_is_the_same_picture(
    mode: str, shape: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter changes a pixel by less than 1 level on average. A shift of the result by one pixel makes more than 5."""
    content = rotated(photo(*shape, mode=mode), orientation)
    options = {"name": "jpg", "random_crop": True, "flip": True, "seed": orientation}
    drafted = decode(content, **options).float()
    without_draft(monkeypatch)
    whole = decode(content, **options).float()
    assert (drafted - whole).abs().mean() < 1
    assert (drafted[..., 1:] - whole[..., :-1]).abs().mean() > 5
    assert (drafted[:, 1:] - whole[:, :-1]).abs().mean() > 5


def test_a_fine_checkerboard_becomes_grey() -> None:
    """A resize that takes every second pixel would return an all black or all white image."""
    board = (np.indices((8 * SIZE, 8 * SIZE)).sum(0) % 2 * 255).astype(np.uint8)
    x = decode(encoded(Image.fromarray(board), "JPEG", quality=95), name="jpg").int()
    assert (x - 128).abs().max() <= 4


def test_thin_image_costs_no_more_memory_than_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resize before the crop would turn a 2 x 20000 image of 100 bytes into 32 x 320000 pixels."""
    areas = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    decode(encoded(Image.new("RGB", (2, 20000))))
    assert max(areas) <= 100 * SIZE**2


def test_random_crop_and_flip_depend_on_the_rng_alone() -> None:
    options = {"random_crop": True, "flip": True}
    random.seed(1)
    first = decode(noise(), seed=5, **options)
    random.seed(2)
    assert torch.equal(first, decode(noise(), seed=5, **options))
    assert len({decode(noise(), seed=seed, **options).numpy().tobytes() for seed in range(12)}) > 8


def test_without_crop_and_flip_the_rng_does_not_matter() -> None:
    assert torch.equal(decode(noise(), seed=1), decode(noise(), seed=2))


def test_picture_of_another_shape_is_cut_on_one_side() -> None:
    shape = (32, 48)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    same = decoded({"png": encoded(Image.fromarray(pixels)), "txt": b"", "__shape__": shape})
    assert np.array_equal(same["x"].permute(1, 2, 0).numpy(), pixels)
    higher = np.concatenate([pixels[:4], pixels, pixels[:6]])
    cut = decoded({"png": encoded(Image.fromarray(higher)), "txt": b"", "__shape__": shape})
    assert np.array_equal(cut["x"].permute(1, 2, 0).numpy(), higher[5 : 5 + shape[0]])
    assert cut["crop"] == (5, 0)


@pytest.mark.parametrize(("orientation", "shape"), [(number, ((24, 40), (40, 24), (16, 64))[number % 3]) for number in STORED])
def test_turned_and_drafted_file_is_cropped_like_its_upright(
    shape: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sizes, resize = rotated(photo(389, 517), orientation), [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, *args, **kwargs: (sizes.append(image.size), resize(image, *args, **kwargs))[1]
    )
    options = {"random_crop": True, "flip": True, "seed": orientation}
    turned = decoded({"jpg": content, "txt": b"", "__shape__": shape}, **options)
    [drafted] = sizes
    scale = 2 ** int(math.log2(min(517 / shape[0], 389 / shape[1], 8)))
    assert sorted(drafted) == [math.ceil(389 / scale), math.ceil(517 / scale)]
    without_draft(monkeypatch)
    upright = decoded({"png": encoded(photo(389, 517)), "txt": b"", "__shape__": shape}, **options)
    assert turned["x"].shape == (3, *shape)
    assert (turned["x"].float() - upright["x"].float()).abs().mean() < 3
    assert (turned["x"][..., 1:].float() - upright["x"][..., :-1].float()).abs().mean() > 5
    assert (turned["crop"], turned["original_size"]) == (upright["crop"], upright["original_size"])


def test_any_picture_becomes_any_shape() -> None:
    rng = random.Random(0)
    for seed in range(300):
        picture, shape = [rng.choice([2, 3, 17, 64, 129, 400]) for _ in "wh"], tuple(rng.randint(1, 50) for _ in "hw")
        content = rotated(Image.new("RGB", tuple(picture), "red"), rng.choice(list(STORED)))
        x = decoded({"jpg": content, "txt": b"", "__shape__": shape}, seed=seed, random_crop=True, flip=True)["x"]
        assert x.shape == (3, *shape)
        assert x[0].min() > 200
        assert x[1:].max() < 50


def test_a_flip_mirrors_half_of_the_images() -> None:
    plain, flipped = decode(noise()), [decode(noise(), flip=True, seed=seed) for seed in range(40)]
    mirrored = [torch.equal(x, plain.flip(2)) for x in flipped]
    assert all(m or torch.equal(x, plain) for m, x in zip(mirrored, flipped, strict=True))
    assert 10 < sum(mirrored) < 30


def ramps(width: int, height: int) -> bytes:
    """Return a picture whose red channel counts the columns and whose green channel counts the rows."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return encoded(Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)))


@pytest.mark.parametrize(
    ("width", "height", "high", "wide", "random_crop"),
    [(240, 96, SIZE, SIZE, False), (96, 240, 24, 40, True), (36, 24, 40, 24, True)],
)
def test_crop_says_where_the_image_lies(width: int, height: int, high: int, wide: int, random_crop: bool) -> None:
    unit = max(wide / width, high / height)  # pixels of the resized picture in a pixel of the stored one
    content = {"png": ramps(width, height), "txt": b"", "__shape__": (high, wide)}
    sides = set()
    for seed in range(24):
        sample = decoded(content, seed=seed, flip=True, random_crop=random_crop)
        (top, left), (red, green, _) = sample["crop"], sample["x"].float()
        mirrored = bool(red[0, 0] > red[0, -1])
        sides.add(mirrored)
        columns = (red.mean(0) + 0.5) * unit
        columns = width * unit - columns if mirrored else columns
        rows = (green.mean(1) + 0.5) * unit
        inner = slice(3, -3)  # pixels that the filter computes without the border
        down, right = torch.arange(high) + 0.5, torch.arange(wide) + 0.5
        torch.testing.assert_close(columns[inner], right[inner] + left, atol=max(1.25, unit), rtol=0)
        torch.testing.assert_close(rows[inner], down[inner] + top, atol=max(1.25, unit), rtol=0)
        assert 0 <= left <= width * unit - wide + 1e-6
        assert 0 <= top <= height * unit - high + 1e-6
    assert sides == {False, True}


@pytest.mark.parametrize(
    ("orientation", "meta", "expected"),
    [
        (6, {}, (200, 300)),
        (6, {"original_width": 3000, "original_height": "2000"}, (2000, 3000)),
        (1, {"ORIGINAL_WIDTH": 3000.0, "Original_Height": 2000.0}, (2000, 3000)),
        (1, {"original_width": 1e300, "original_height": 2}, (200, 300)),
    ],
)
def test_original_size_is_the_published_one_upright(orientation: int, meta: dict[str, Any], expected: tuple[int, int]) -> None:
    upright = photo(300, 200)
    if orientation >= 5 and meta:  # the .json holds the size of the stored picture
        meta = {
            "original_width": meta.get("original_height", meta.get("Original_Height")),
            "original_height": meta.get("original_width", meta.get("ORIGINAL_WIDTH")),
        }
    content = {"jpg": rotated(upright, orientation), "txt": b"", "json": json.dumps(meta).encode()}
    assert decoded(content)["original_size"] == expected


def test_a_batch_holds_sizes_and_crops_as_integers() -> None:
    samples = [decoded({"png": noise(*shape), "txt": b""}) for shape in ((96, 64), (64, 128), (32, 32))]
    batch = collate(samples)
    assert batch["original_sizes"].dtype == batch["crops"].dtype == torch.int64
    assert batch["original_sizes"].tolist() == [[64, 96], [128, 64], [32, 32]]
    assert batch["crops"].tolist() == [[0, 8], [16, 0], [0, 0]]


def test_too_many_bytes_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"png": noise(), "txt": b""}
    monkeypatch.setattr(transforms, "MAX_BYTES", len(content["png"]))
    decoded(content)
    monkeypatch.setattr(transforms, "MAX_BYTES", len(content["png"]) - 1)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert skipped(content).reason == "bytes"


def test_cut_jpeg_is_an_error() -> None:
    """The JPEG is progressive and is decoded whole. test_jpeg_that_is_cut_is_not_sound cuts the other kinds."""
    size = 256
    content = encoded(Image.open(io.BytesIO(noise(size, size))), "JPEG", quality=90, progressive=True)
    decode(content, name="jpg", size=size)
    for per_mille in (999, 900, 500, 100):
        skip = skipped({"jpg": content[: len(content) * per_mille // 1000], "txt": b""}, size=size)
        assert skip.reason == "image"
        assert "truncated" in str(skip)
        assert isinstance(skip.__cause__, OSError)


PNG = noise()
BROKEN = {
    "no_image": {"txt": b"a cat"},
    "image": {"png": b"<html>404</html>", "txt": b"a cat"},
    "image-cut": {"png": PNG[:200], "txt": b"a cat"},
    "image-format": {"jpg": encoded(corner(), "TIFF"), "txt": b"a cat"},
    "tiny-thread": {"png": encoded(Image.new("RGB", (400, 1))), "txt": b"a cat"},
    "no_caption-null": {"png": PNG, "json": b'{"caption": null}'},
    "caption_encoding": {"png": PNG, "txt": "caf\xe9".encode("latin-1")},
    "json": {"png": PNG, "txt": b"a cat", "json": b'{"caption": '},
    "json-list": {"png": PNG, "txt": b"a cat", "json": b"[1]"},
    "json-nested": {"png": PNG, "txt": b"a cat", "json": b"[" * 200_000},
    "json-digits": {"png": PNG, "txt": b"a cat", "json": b'{"width": ' + b"9" * 5000 + b"}"},
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sample_is_a_skip_with_its_reason(case: str) -> None:
    assert skipped(BROKEN[case], caption_dropout=1.0).reason == case.partition("-")[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_damaged_image_gives_a_picture_or_a_skip(kind: str) -> None:
    sound, rng, reasons = encoded(photo(), kind), random.Random(0), set()
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(rng.choice([1, 8, 64])):
            content[rng.randrange(min(len(content), rng.choice([64, 10**6])))] = rng.randrange(256)
        del content[rng.choice([rng.randrange(len(content)), len(content)]) :]
        reasons.add(reason_of(bytes(content)))
    assert reasons <= {"", "image", "pixels", "tiny"}
    assert {"", "image"} <= reasons


def test_a_skip_crosses_processes() -> None:
    skip = pickle.loads(pickle.dumps(Skip("image", "truncated")))
    assert (skip.reason, skip.detail, str(skip)) == ("image", "truncated", "image: truncated")


@pytest.mark.parametrize(
    "members",
    [
        {"json": json.dumps({"Caption": " a cat"}).encode()},
        {"txt": b"a cat", "json": json.dumps({"caption": "a dog"}).encode()},
        {"txt": b" ", "json": json.dumps({"caption": "a cat"}).encode()},
    ],
)
def test_the_caption_comes_from_txt_or_json(members: dict[str, bytes]) -> None:
    assert decoded({"png": PNG, **members})["caption"] == "a cat"
    assert caption_of(members) == "a cat"


def test_a_blank_caption_is_one() -> None:
    assert decoded({"png": PNG, "txt": b"\n"})["caption"] == ""


SEVERAL = {
    "png": encoded(photo(16, 12)),
    "txt": b"one",
    "blip": b"two",
    "json": json.dumps({"caption": "three", "LLaVA": "four"}).encode(),
}


def chosen(members: dict[str, bytes], captions: dict[str, float], **options: Any) -> Counter[str]:
    return Counter(decoded(members, seed=seed, captions=captions, size=8, **options)["caption"] for seed in range(300))


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ({"txt": 1, "blip": 3}, {"one": 0.25, "two": 0.75}),
        ({"txt": 2, "BLIP": 0, "llava": 2}, {"one": 0.5, "four": 0.5}),
        ({"txt": 1, "nowhere": 8, "caption": 1}, {"one": 0.5, "three": 0.5}),
    ],
)
def test_captions_are_chosen_by_weight_among_those_there(captions: dict[str, float], expected: dict[str, float]) -> None:
    counts = chosen(SEVERAL, captions)
    assert counts.keys() == expected.keys()
    assert {text: count / 300 for text, count in counts.items()} == pytest.approx(expected, abs=0.1)


def test_a_blank_caption_is_chosen_only_where_nothing_else_is() -> None:
    assert chosen({**SEVERAL, "txt": b" "}, {"txt": 9, "blip": 1}).keys() == {"two"}
    assert chosen({**SEVERAL, "txt": b" "}, {"txt": 1}).keys() == {""}


def test_dropout_empties_its_share_of_captions_and_nothing_else() -> None:
    counts = chosen(SEVERAL, {"txt": 1, "blip": 1}, caption_dropout=0.4)
    assert counts[""] / 300 == pytest.approx(0.4, abs=0.1)
    assert counts["one"] / 300 == pytest.approx(0.3, abs=0.1)


def test_captions_do_not_move_pixels() -> None:
    options = {"flip": True, "random_crop": True, "caption_dropout": 0.3, "captions": {"txt": 1, "blip": 1}}
    for seed in range(8):
        first, second = decoded(SEVERAL, seed=seed, **options), decoded(SEVERAL, seed=seed, **options)
        assert torch.equal(first.pop("x"), second["x"])
        assert all(second[name] == value for name, value in first.items())
        assert torch.equal(second["x"], decode(SEVERAL["png"], seed=seed, flip=True, random_crop=True))


@pytest.mark.parametrize("captions", [{"txt": 0}, {"txt": -1, "blip": 2}, {"txt": "much"}])
def test_wrong_caption_weights_are_refused(captions: Any) -> None:
    with pytest.raises(UserError, match=r"data\.captions"):
        Decode(SIZE, captions=captions)


def test_samples_of_different_shards_have_different_keys() -> None:
    samples = [{"__key__": "0", "__url__": url, "png": noise(), "txt": b""} for url in "ab"]
    assert len(set(collate([Decode(SIZE)(sample, random.Random(0)) for sample in samples])["keys"])) == 2


def blobs(side: int) -> Image.Image:
    pixels = np.random.default_rng(side).integers(0, 256, (side // 4 + 1, side // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side))


JPEGS = {
    "colour": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 4},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_without_its_end_marker_is_sound(kind: str) -> None:
    for side in (33, 200):
        content = encoded(blobs(side), "JPEG", **JPEGS[kind])
        whole = decode(content, name="jpg")
        for lost in (1, 2):
            assert torch.equal(decode(content[:-lost], name="jpg"), whole)


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind != "progressive"])
def test_jpeg_that_is_cut_is_not_sound(kind: str) -> None:
    """The scan is cut at every byte. Zeros may follow the cut, as in an unfinished download."""
    content = encoded(blobs(40), "JPEG", **JPEGS[kind])
    scan = content.rindex(b"\xff\xda") + 14
    assert len(content) - scan > 100
    for end in range(scan, len(content) - 3):
        for tail in (b"", b"\0" * 8, bytes(4096)):
            assert skipped({"jpg": content[:end] + tail, "txt": b"a"}).reason == "image"
