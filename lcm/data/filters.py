"""Filters by metadata: the .json members that img2dataset writes for LAION, COYO and CC12M."""

import hashlib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from lcm.core.errors import UserError
from lcm.runtime.atomic_io import digest, lines_of

Fields = Mapping[str, Any]
READING = 2  # raised when a rule reads other fields than before, so that shards are scanned again


def lowered(meta: Mapping[str, Any]) -> Fields:
    """Return the metadata under lower-case names: LAION's tables spell one field `aesthetic`, another `AESTHETIC_SCORE`."""
    return {str(name).lower(): value for name, value in meta.items()}


def number(fields: Fields, *names: str) -> float | None:
    """Return the first finite number under these names, also one stored as text. Null and NaN count as missing."""
    for name in names:
        try:
            value = float(fields.get(name))  # type: ignore[arg-type]  # float() refuses None and lists
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(value):
            return value
    return None


def sides(fields: Fields) -> tuple[float, float] | None:
    """Return the (shorter, longer) side in pixels of the published picture, else of the stored copy; None: unknown.

    img2dataset may have enlarged, padded or cropped the copy.
    """
    for prefix in ("original_", ""):
        width, height = number(fields, f"{prefix}width"), number(fields, f"{prefix}height")
        if width is not None and height is not None and min(width, height) > 0:
            return min(width, height), max(width, height)
    return None


def shorter_side(_: str | None, fields: Fields) -> float | None:
    return pair[0] if (pair := sides(fields)) else None


def aspect(_: str | None, fields: Fields) -> float | None:
    return pair[1] / pair[0] if (pair := sides(fields)) else None


def length(caption: str | None, _: Fields) -> int | None:
    return len(caption.strip()) if isinstance(caption, str) else None


def score(*names: str) -> Callable[[str | None, Fields], float | None]:
    return lambda _, fields: number(fields, *names)


def unsafe(_: str | None, fields: Fields) -> float | None:
    """Return a classifier's probability, else the number for LAION's textual NSFW column, else None."""
    probability = number(fields, "punsafe", "nsfw_score_opennsfw2")
    return NSFW.get(str(fields.get("nsfw")).strip().upper()) if probability is None else probability


def identities(_: str | None, fields: Fields) -> frozenset[str] | None:
    """Return the names that a removal list may have for the sample: `hash`, `sha256`, `md5`, `url`, and the url's sha256."""
    digests = (fields.get(name) for name in ("hash", "sha256", "md5"))
    names = {str(digest).lower() for digest in digests if isinstance(digest, str | int) and digest != ""}
    if isinstance(url := fields.get("url"), str) and url:
        names |= {url, hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()}
    return frozenset(names) or None


class Rule(NamedTuple):
    """A rule of `Filters`.

    reason: its name in counts. value: `(caption, fields) -> value`, None if missing. passes: `(value, limit) -> bool`. span:
    the smallest and the largest valid limit.
    """

    reason: str
    value: Callable[[str | None, Fields], Any]
    passes: Callable[[Any, Any], bool]
    span: tuple[float, float] = (0.0, math.inf)


NSFW = {"UNLIKELY": 0.0, "UNSURE": 0.75, "NSFW": 1.0}  # the default limit drops everything not called safe
AESTHETIC = score("aesthetic_score", "aesthetic", "aesthetic_score_laion_v2")
# A sample is counted under the first of these rules that it fails. The last name of a score is COYO's.
RULES = {
    "removal_list": Rule("removal", identities, frozenset.isdisjoint),
    "max_unsafe": Rule("unsafe", unsafe, operator.le, (0, 1)),
    "max_watermark": Rule("watermark", score("pwatermark", "watermark_score"), operator.le, (0, 1)),
    "min_aesthetic": Rule("aesthetic", AESTHETIC, operator.ge, (0, 10)),
    "min_similarity": Rule("similarity", score("similarity", "clip_similarity_vitb32"), operator.ge, (-1, 1)),
    "min_side": Rule("side", shorter_side, operator.ge),
    "max_aspect": Rule("aspect", aspect, operator.le, (1, math.inf)),
    "min_caption": Rule("caption_short", length, operator.ge),
    "max_caption": Rule("caption_long", length, operator.le),
}


class Filters:
    """Rules that choose samples by their metadata. None switches a rule off.

    min_side: pixels, max_aspect: longer / shorter side, both of the picture as published. min_aesthetic: LAION's predictor, 0
    to 10; the paper's recipes are 6 and 6.5. max_watermark, max_unsafe: probabilities; without them LAION's NSFW column counts:
    UNLIKELY as 0, UNSURE as 0.75, NSFW as 1. min_similarity: CLIP's cosine. min_caption, max_caption: characters. Limits are
    included. removal_list: a text file of samples to leave out, one per line: an img2dataset `sha256` or `md5` of
    the image, LAION's `hash`, the URL or its sha256 (`#` begins a comment line).
    missing: "keep" or "drop" a sample without the field of an active rule.
    Raises UserError for an invalid setting.
    """

    def __init__(
        self,
        *,
        min_side: int | None = None,
        max_aspect: float | None = None,
        min_aesthetic: float | None = None,
        max_watermark: float | None = None,
        # LAION-Aesthetics' limit, half-way on the classifier's scale; SD 2.0 was trained with 0.1, SD 2.1 with 0.98.
        max_unsafe: float | None = 0.5,
        min_similarity: float | None = None,
        min_caption: int | None = None,
        max_caption: int | None = None,
        removal_list: str | None = None,
        missing: Literal["keep", "drop"] = "keep",
    ) -> None:
        settings, defaults = dict(locals()), inspect.signature(Filters).parameters
        if missing not in ("keep", "drop"):
            raise UserError(f"data.filters.missing={missing!r}: expected keep or drop")
        self.missing = missing
        self.limits = {option: limit_of(option, settings[option]) for option in RULES if settings[option] is not None}
        self.chosen = [option for option in self.limits if settings[option] != defaults[option].default]

    def __call__(self, caption: str | None, meta: Mapping[str, Any]) -> str | None:
        """Return None to keep the sample, else the reason to leave it out, such as "aesthetic" or "missing_aesthetic".

        meta: the decoded .json member, {} without one; case of names is ignored.
        """
        fields = lowered(meta)
        for option, limit in self.limits.items():
            rule = RULES[option]
            value = rule.value(caption, fields)
            if value is None and self.missing == "drop":
                return f"missing_{rule.reason}"
            if value is not None and not rule.passes(value, limit):
                return rule.reason
        return None

    def unused(self, samples: Iterable[tuple[str | None, Mapping[str, Any]]]) -> list[str]:
        """Return the active rules whose field is missing in all of these (caption, metadata) pairs."""
        seen = [(caption, lowered(meta)) for caption, meta in samples]
        return [option for option in self.limits if seen and all(RULES[option].value(*sample) is None for sample in seen)]

    def signature(self) -> str:
        """Return a digest of the active rules and the removal list, for the key of an index."""
        limits = {option: sorted(limit) if isinstance(limit, frozenset) else limit for option, limit in self.limits.items()}
        return digest([READING, self.missing, limits])


def limit_of(option: str, setting: Any) -> float | frozenset[str]:
    """Return the limit of a rule: a number within the rule's span, or the entries of the removal list. Raises UserError."""
    if option == "removal_list":
        try:
            lines = lines_of(setting)
        except (OSError, TypeError, UnicodeError) as error:
            raise UserError(f"data.filters.removal_list={setting!r} cannot be read: {error}") from error
        return frozenset(line if "://" in line else line.lower() for line in lines if not line.startswith("#"))
    low, high = RULES[option].span
    if isinstance(setting, bool) or not isinstance(setting, int | float) or not low <= setting <= high:
        raise UserError(f"data.filters.{option}={setting!r}: expected a number from {low:g} to {high:g}, or null for no limit")
    return float(setting)
