"""Aspect-ratio buckets: the shapes of batches, and the shape nearest to a picture."""

import math
from collections.abc import Sequence
from functools import lru_cache

from lcm.core.errors import UserError
from lcm.data.transforms import stored_size

Shape = tuple[int, int]  # (height, width) in pixels
SQUARE, STEPS = 128, 32  # the code of a square, and the codes per doubling of width / height: precise to 1 %, up to 16:1


def shapes_of(buckets: float | Sequence[Sequence[int]], resolution: int, factor: int = 1) -> list[Shape]:
    """Return the shapes of `data.buckets`. buckets: a list of [height, width], or the ratio of `shapes_up_to`.

    factor: must divide every side. Raises UserError.
    """
    hint = f"data.buckets={buckets}: expected a ratio from 1 to 16, or at most 256 shapes such as [[512, 512], [640, 384]]"
    if isinstance(buckets, int | float):
        if isinstance(buckets, bool) or not 1 <= buckets <= 16:
            raise UserError(hint)
        buckets = shapes_up_to(buckets, resolution)
    try:
        shapes = [(height, width) for height, width in buckets]
    except (TypeError, ValueError) as error:
        raise UserError(hint) from error
    if not 1 <= len(shapes) <= 256 or not all(isinstance(side, int) and side > 0 for shape in shapes for side in shape):
        raise UserError(hint)
    for height, width in shapes:
        if height % factor or width % factor:
            raise UserError(
                f"data.buckets: {height} x {width} has a side that is not a multiple of the VAE's factor {factor}: change it"
            )
    return shapes


def shapes_up_to(ratio: float, resolution: int) -> list[Shape]:
    """Return SDXL's shapes (2307.01952, appendix I): at most `resolution` squared pixels, and at most this ratio of sides.

    The first shape is the square. Each longer side has one shape, with the longest possible shorter side. Sides are multiples
    of 64 px, or of an eighth of a resolution below 512 px.
    """
    step = max(1, min(64, resolution // 8))
    longer = range(resolution - resolution % step + step, int(ratio * resolution) + 1, step)
    sides = [(long, resolution**2 // long // step * step) for long in longer]
    tall = [(long, short) for long, short in sides if long <= ratio * short]
    return [(resolution, resolution), *tall, *((short, long) for long, short in tall)]


def aspect(start: bytes) -> int:
    """Return the code of a picture's width / height, 0 to 255. start: its first bytes. A broken picture counts as square."""
    size = stored_size(start)
    if size is None or min(size) < 1:
        return SQUARE
    return min(max(SQUARE + round(STEPS * math.log2(size[1] / size[0])), 0), 255)


@lru_cache(4096)
def nearest(code: int, shapes: tuple[Shape, ...]) -> int:
    """Return the index of the shape with the nearest aspect ratio (by quotient). code: the value of `aspect`."""
    ratio = (code - SQUARE) / STEPS
    return min(range(len(shapes)), key=lambda number: abs(math.log2(shapes[number][1] / shapes[number][0]) - ratio))
