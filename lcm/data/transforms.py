"""Decoding of a sample: an RGB tensor of the training's size, and a caption."""

import io
import random
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from lcm.data.filters import number
from lcm.data.sample_fields import CaptionChoice, Sample, Skip, metadata, skipping
from lcm.data.tar import MAX_BYTES
from lcm.data.urls import IMAGES, first_of

MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: a 17 kB file can ask for gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # other formats, such as PostScript, run a program
ORIENTATION = 0x0112
SCAN, END = b"\xff\xda", b"\xff\xd9"  # markers of a JPEG
FILLER = random.Random(0).randbytes(512).replace(b"\xff", b"\xfe")
SPARED = 8  # bytes: a complete scan does not decode to the same pixels without its last 8 bytes
# The transposition that turns a picture upright, by EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # orientations in which width and height are exchanged


def open_image(content: bytes) -> Image.Image:
    """Open an image without decoding its pixels. Raises `Skip` if it is broken, too large or too small."""
    if len(content) > MAX_BYTES:
        raise Skip("bytes", f"{len(content)} are more than {MAX_BYTES}")
    with skipping("image", Exception), skipping("pixels", Image.DecompressionBombError, Image.DecompressionBombWarning):
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:  # its message is an object's address
            raise Skip("image", f"none of {', '.join(FORMATS)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Skip("pixels", f"{image.width} x {image.height} are more than {MAX_PIXELS}")
    if min(image.size) < 2:
        raise Skip("tiny", f"{image.width} x {image.height} pixels")
    with skipping("image", OSError):
        whole = with_end_marker(content) if image.format == "JPEG" else content
    return image if whole is content else Image.open(io.BytesIO(whole), formats=("JPEG",))


def with_end_marker(content: bytes) -> bytes:
    """Return a JPEG with its end marker. Raises OSError for a cut JPEG.

    The scan of a complete JPEG ends at the end of the file: appended bytes change no pixel, and its last bytes are needed.
    The scan of a cut JPEG continues into appended bytes, after a restart marker if it stops at a restart marker.
    """
    if content.endswith(END) or content.rfind(END) > (scan := content.rfind(SCAN)):
        return content
    body = content.rstrip(b"\0")  # zeros may fill up an unfinished download
    if body.endswith(b"\xff"):
        body = body[:-1] if len(body) == len(content) else body + b"\0"
    restarts = [marker[1] for marker in re.findall(rb"\xff[\xd0-\xd7]", body[scan:])]
    extended = FILLER + bytes([0xFF, 0xD0 + (restarts[-1] + 1) % 8 if restarts else 0xD0]) + FILLER + END
    whole = decode_jpeg(body + END)
    if whole is None or decode_jpeg(body + extended) != whole or decode_jpeg(body[:-SPARED] + extended) == whole:
        raise OSError("image file is truncated: its scan ends early")
    return body + END


def decode_jpeg(content: bytes) -> bytes | None:
    """Return the pixels of a JPEG, or None if it does not decode."""
    with suppress(Exception):  # a decoder may raise anything for a broken file
        return Image.open(io.BytesIO(content), formats=("JPEG",)).tobytes()
    return None


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if it is missing or damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # the picture is sound all the same
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits per channel, as img2dataset and browsers do. Transparency becomes white."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        layer, image = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_sideways(image: Image.Image) -> bool:
    """Return whether EXIF rotates the image by 90 degrees. No pixels are read: Pillow's `getexif` would decode a whole PNG."""
    return (image.format != "PNG" or "exif" in image.info) and orientation(image) in TURNED


def picture_of(sample: Sample) -> Image.Image:
    """Open the sample's image without decoding its pixels. Raises `Skip`."""
    name = first_of(sample, IMAGES)
    if name is None:
        raise Skip("no_image", f"only {', '.join(key for key in sample if not key.startswith('__'))}")
    return open_image(sample[name])


def stored_size(start: bytes) -> tuple[int, int] | None:
    """Return the upright (height, width) of an image from its first bytes, None for a broken one."""
    with suppress(Exception):  # a decoder may raise anything for a broken file
        image = Image.open(io.BytesIO(start), formats=FORMATS)
        return image.size if is_sideways(image) else (image.height, image.width)
    return None


class Cropped(NamedTuple):
    """A cropped RGB image.

    stored: upright (height, width) of the picture before scaling. turned: whether EXIF exchanged height and width. crop:
    (top, left) of the image in the resized (and mirrored) picture.
    """

    image: Image.Image
    stored: tuple[int, int]
    turned: bool
    crop: tuple[int, int]


def crop_and_resize(
    image: Image.Image, shape: tuple[int, int], *, random_crop: bool, flip: bool, rng: random.Random
) -> Cropped:
    """Return a picture as upright RGB, cropped to the proportions of `shape` (height, width), resized and maybe mirrored.

    flip: mirror with p = 0.5. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, if `shape` fits. libjpeg then skips the
    high frequencies of each block, which saves part of the decoding and most of the resizing.
    """
    stored = image.size
    draft = image.draft("RGB", shape if is_sideways(image) else shape[::-1])
    scale = draft[1][2] / stored[0] if draft else 1.0
    image.load()
    kind = orientation(image)
    turned = kind in TURNED
    width, height = reversed(stored) if turned else stored
    high, wide = shape
    # The crop has the whole width or the whole height of the picture. It is resized by new / old.
    new, old = (wide, width) if width * high <= height * wide else (high, height)
    used = (wide * old / new, high * old / new)
    left, top = int(width - used[0]) // 2, int(height - used[1]) // 2
    if random_crop:
        left, top = rng.randint(0, int(width - used[0])), rng.randint(0, int(height - used[1]))
    # Cropping before the rotation is less work, and a scaled JPEG's last row or column may stand for less than a pixel.
    # Cropping and resizing are one call, because a resized very thin image would be huge.
    x: float
    y: float
    lying, x, y = (used[::-1], top, left) if turned else (used, left, top)
    x = stored[0] - lying[0] - x if kind in (2, 3, 7, 8) else x
    y = stored[1] - lying[1] - y if kind in (3, 4, 6, 7) else y
    right, bottom = min((x + lying[0]) * scale, image.width), min((y + lying[1]) * scale, image.height)
    size = shape if turned else shape[::-1]
    image = to_rgb(image).resize(size, Image.Resampling.BICUBIC, box=(x * scale, y * scale, right, bottom), reducing_gap=2.0)
    if kind in UPRIGHT:
        image = image.transpose(UPRIGHT[kind])
    crop = top * new // old, left * new // old
    if flip and rng.random() < 0.5:
        image, crop = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (crop[0], (width - left) * new // old - wide)
    return Cropped(image, (height, width), turned, crop)


def original_size(meta: Mapping[str, Any], picture: Cropped) -> tuple[int, int]:
    """Return (height, width) of the published picture, from img2dataset's metadata, else of the stored picture."""
    height, width = number(meta, "original_height"), number(meta, "original_width")
    if height is None or width is None or not 1 <= min(height, width) <= max(height, width) < 2**31:
        return picture.stored
    return (int(width), int(height)) if picture.turned else (int(height), int(width))


class Decode:
    """`sample -> {"x": uint8 [3, H, W], "caption", "key", "original_size", "crop"}`.

    H, W: the sample's "__shape__" in a bucket, else both `resolution`.
    caption_dropout, captions: see `CaptionChoice`.
    original_size: upright (height, width) of the published picture. crop: (top, left) of x in the resized picture.
    original_size, crop and the size of x are SDXL's micro-conditioning (2307.01952, section 2.2). As in diffusers' SDXL scripts
    the picture is first mirrored, then cropped: `left` is counted in the mirrored picture.
    The rng of a sample makes all random choices. Raises `Skip` for an unusable sample.
    """

    needs = IMAGES

    def __init__(
        self,
        resolution: int,
        *,
        caption_dropout: float = 0.0,
        captions: Mapping[str, float] | None = None,
        random_crop: bool = False,
        flip: bool = False,
    ) -> None:
        self.resolution, self.random_crop, self.flip = resolution, random_crop, flip
        self.choose = CaptionChoice(caption_dropout, captions)

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        image, shape = picture_of(sample), sample.get("__shape__", (self.resolution, self.resolution))
        with skipping("image", Exception):  # a decoder may raise anything for a broken file
            picture = crop_and_resize(image, shape, random_crop=self.random_crop, flip=self.flip, rng=rng)
        return {
            "x": torch.from_numpy(np.asarray(picture.image).transpose(2, 0, 1).copy()),
            "caption": self.choose(sample, rng),
            "key": f"{sample['__url__']}/{sample['__key__']}",
            "original_size": original_size(metadata(sample), picture),
            "crop": picture.crop,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `{"x": uint8 [B, 3, H, W], "captions", "keys": list[str], "original_sizes", "crops": int64 [B, 2]}`."""
    return {
        "x": torch.stack([sample["x"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
        "original_sizes": torch.tensor([sample["original_size"] for sample in samples], dtype=torch.int64),
        "crops": torch.tensor([sample["crop"] for sample in samples], dtype=torch.int64),
    }
