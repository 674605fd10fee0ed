"""Each rule applies to every spelling of its fields. `missing` decides on samples without the field."""

import hashlib
import json
import math
import pickle
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.filters import RULES, Filters

URL = "https://example.org/Cat.jpg"
URL_HASH = hashlib.sha256(URL.encode()).hexdigest()
GOOD: dict[str, Any] = {
    "url": URL,
    "hash": -1234567890123456789,
    "sha256": "ab" * 32,
    "md5": "cd" * 16,
    "width": 512,
    "height": 512,
    "original_width": 900,
    "original_height": 600,
    "AESTHETIC_SCORE": 6.2,
    "pwatermark": 0.3,
    "punsafe": 0.1,
    "similarity": 0.32,
}
CAPTION = "a cat on a mat"
# (option, a limit that GOOD passes, a limit that GOOD fails, fields that the rule reads, reason to leave GOOD out)
CASES = [
    ("min_side", 600, 601, ("original_width", "width"), "side"),
    ("max_aspect", 1.5, 1.49, ("original_height", "height"), "aspect"),
    ("min_aesthetic", 6.2, 6.5, ("AESTHETIC_SCORE",), "aesthetic"),
    ("max_watermark", 0.3, 0.29, ("pwatermark",), "watermark"),
    ("max_unsafe", 0.1, 0.09, ("punsafe",), "unsafe"),
    ("min_similarity", 0.32, 0.33, ("similarity",), "similarity"),
    ("min_caption", 14, 15, (), "caption_short"),
    ("max_caption", 14, 13, (), "caption_long"),
]
IDS = [case[0] for case in CASES]


def judge(meta: dict[str, Any], caption: str | None = CAPTION, **settings: Any) -> str | None:
    return Filters(**{"max_unsafe": None, **settings})(caption, meta)


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name not in names}


def listed(folder: Path, *lines: str) -> str:
    path = folder / "removed.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_every_rule_has_a_case() -> None:
    assert {*IDS, "removal_list"} == RULES.keys()


@pytest.mark.parametrize(("option", "passed", "failed", "names", "reason"), CASES, ids=IDS)
def test_rule_drops_what_is_beyond_its_limit(option, passed, failed, names, reason) -> None:
    assert judge(GOOD, **{option: passed}) is None
    assert judge(GOOD, **{option: failed}) == reason
    assert judge(GOOD, **{option: None}) is None


@pytest.mark.parametrize(("option", "passed", "failed", "names", "reason"), [CASES[0]], ids=[IDS[0]])
def test_fields_are_read_in_any_case_and_from_text(option, passed, failed, names, reason) -> None:
    for change in (str.upper, str.lower, str.title):
        spelt = {change(name): str(value) for name, value in GOOD.items()}
        assert judge(spelt, **{option: passed}) is None
        assert judge(spelt, **{option: failed}) == reason


@pytest.mark.parametrize(("option", "passed", "failed", "names", "reason"), [CASES[2]], ids=[IDS[2]])
def test_missing_field_is_kept_or_dropped(option, passed, failed, names, reason) -> None:
    wrong = [{**GOOD, **dict.fromkeys(names, value)} for value in (None, math.nan, "nan", "", "n/a", math.inf, [], {})]
    for meta in (without(*names), *wrong):
        for limit in (passed, failed):
            assert judge(meta, **{option: limit}) is None
            assert judge(meta, **{option: limit}, missing="drop") == f"missing_{reason}"
        assert judge(meta, missing="drop") is None  # no active rule reads the field


def test_a_missing_caption_is_kept_or_dropped_as_told() -> None:
    assert judge(GOOD, None, min_caption=1) is None
    assert judge(GOOD, None, min_caption=1, missing="drop") == "missing_caption_short"
    assert judge(GOOD, "  ", min_caption=1) == "caption_short"


def test_zero_is_the_best_watermark_not_a_missing_one() -> None:
    assert judge({"pwatermark": 0}, max_watermark=0.5, missing="drop") is None
    assert judge({"pwatermark": 0}, max_watermark=0.0, missing="drop") is None
    assert judge({"aesthetic": 0}, min_aesthetic=5) == "aesthetic"


@pytest.mark.parametrize(
    ("name", "option", "limit", "bad"),
    [
        ("aesthetic_score_laion_v2", "min_aesthetic", 6, 5.9),
        ("watermark_score", "max_watermark", 0.5, 0.6),
        ("nsfw_score_opennsfw2", "max_unsafe", 0.5, 0.6),
        ("clip_similarity_vitb32", "min_similarity", 0.3, 0.2),
    ],
)
def test_a_score_is_found_under_its_other_names(name, option, limit, bad) -> None:
    assert judge({name: bad}, **{option: limit}) == RULES[option].reason
    assert judge({name: limit}, **{option: limit}, missing="drop") is None


def test_unsafe_samples_are_dropped_by_default() -> None:
    assert Filters()(CAPTION, {"punsafe": 0.51}) == "unsafe"
    assert Filters()(CAPTION, {"punsafe": 0.5}) is None
    assert Filters()(CAPTION, {}) is None
    assert Filters(missing="drop")(CAPTION, {}) == "missing_unsafe"


@pytest.mark.parametrize(
    ("tag", "limit", "reason"),
    [
        ("UNLIKELY", 0.0, None),
        ("UNSURE", 0.5, "unsafe"),
        ("NSFW", 0.98, "unsafe"),
        ("?", 0.0, "missing_unsafe"),
    ],
)
def test_textual_tag_of_laion_is_read(tag, limit, reason) -> None:
    for name in ("NSFW", "nsfw"):
        assert judge({name: tag}, max_unsafe=limit, missing="drop") == reason
        assert judge({name: "NSFW", "punsafe": 0.1}, max_unsafe=0.5) is None, "a probability says more"


def test_sides_are_those_of_the_published_picture() -> None:
    blown_up = {"width": 512, "height": 512, "original_width": 100, "original_height": 300}
    assert judge(blown_up, min_side=256) == "side"
    assert judge(blown_up, max_aspect=2) == "aspect"
    assert judge({"width": 300, "height": 256}, min_side=256, missing="drop") is None
    assert judge({"width": 300, "height": 256}, min_side=257) == "side"
    assert judge({"width": 0, "height": 256}, max_aspect=2, missing="drop") == "missing_aspect"


@pytest.mark.parametrize("option", ["min_side", "max_caption"])
def test_a_tighter_limit_keeps_a_part_of_what_a_looser_one_keeps(option) -> None:
    rng = random.Random(option)
    samples = [
        (
            "x" * rng.randint(0, 40),
            {
                "original_width": rng.randint(1, 2000),
                "original_height": rng.randint(1, 2000),
                "aesthetic": rng.uniform(0, 10),
                **{name: rng.random() for name in ("punsafe", "pwatermark", "similarity")},
            },
        )
        for _ in range(200)
    ]
    low, high = {"side": (1, 2000), "aspect": (1, 20), "aesthetic": (0, 10)}.get(RULES[option].reason, (0, 1))
    limits = range(0, 41, 4) if "caption" in option else [low + (high - low) * step / 10 for step in range(11)]
    limits = sorted(limits, reverse=option.startswith("max"))
    passed = [{i for i, (text, meta) in enumerate(samples) if judge(meta, text, **{option: limit}) is None} for limit in limits]
    assert all(tight <= loose for loose, tight in pairwise(passed))
    assert len(passed[0]) > len(passed[-1])


@pytest.mark.parametrize("entry", [URL, URL_HASH.upper(), "AB" * 32, "cd" * 16, "-1234567890123456789"])
def test_removal_list_holds_any_name_of_a_sample(entry, tmp_path) -> None:
    removal = Filters(removal_list=listed(tmp_path, "# takedowns", "", f"  {entry} ", "https://example.org/other.jpg"))
    assert removal(CAPTION, GOOD) == "removal"
    assert removal(CAPTION, {name.upper(): value for name, value in GOOD.items()}) == "removal"
    assert removal(CAPTION, {**GOOD, "sha256": GOOD["sha256"].upper(), "md5": GOOD["md5"].upper()}) == "removal"
    others = {"url": URL.lower(), "hash": 1, "sha256": "ef" * 32, "md5": "01" * 16}
    assert removal(CAPTION, others) is None
    assert removal(CAPTION, {}) is None


def test_a_sample_without_a_name_is_missing_for_a_removal_list(tmp_path) -> None:
    strict = Filters(removal_list=listed(tmp_path, URL), max_unsafe=None, missing="drop")
    assert strict(CAPTION, {"url": None, "hash": ""}) == "missing_removal"
    assert strict(CAPTION, {"hash": 1}) is None


def test_the_removal_list_is_read_once(tmp_path) -> None:
    path = listed(tmp_path, URL)
    removal = Filters(removal_list=path)
    Path(path).unlink()
    assert removal(CAPTION, GOOD) == "removal"
    assert pickle.loads(pickle.dumps(removal))(CAPTION, GOOD) == "removal"


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("min_aesthetic", "high"),
        ("min_aesthetic", 65),
        ("min_side", -1),
        ("missing", "maybe"),
        ("removal_list", "nowhere.txt"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(option, setting) -> None:
    with pytest.raises(UserError, match=rf"^data\.filters\.{option}="):
        Filters(**{option: setting})


def test_a_removal_list_that_is_not_text_is_named(tmp_path) -> None:
    (tmp_path / "list").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "list", tmp_path):
        with pytest.raises(UserError, match=r"^data\.filters\.removal_list="):
            Filters(removal_list=str(path))


def test_the_signature_is_that_of_the_rules_in_force(tmp_path) -> None:
    plain = [{option: limit} for option, *limits, _, _ in CASES for limit in limits]
    settings = [{}, {"missing": "drop"}, {"max_unsafe": None}, *plain]
    settings += [{"removal_list": listed(tmp_path, URL)}]
    signatures = [Filters(**setting).signature() for setting in settings]
    assert len(set(signatures)) == len(settings)
    assert signatures == [Filters(**setting).signature() for setting in settings]
    assert Filters(min_side=512).signature() == Filters(min_side=512.0).signature()  # type: ignore[arg-type]


def test_the_signature_follows_what_the_removal_list_says(tmp_path) -> None:
    first = Filters(removal_list=listed(tmp_path, URL, URL_HASH)).signature()
    assert Filters(removal_list=listed(tmp_path, "# the same", URL_HASH, URL)).signature() == first
    assert first not in [Filters(removal_list=listed(tmp_path, entry)).signature() for entry in (URL, URL_HASH)]


def test_the_signature_does_not_change_from_run_to_run() -> None:
    """The key of an index on disk depends on the signature."""
    assert Filters(min_side=512, min_aesthetic=6.5).signature() == "6b3e1b134d76d19f"


def test_metadata_as_json_has_it() -> None:
    meta = json.loads('{"pwatermark": NaN, "punsafe": null, "similarity": 3.1e-1, "width": 1e999, "9": [{}]}')
    assert judge(meta, max_watermark=0.1, max_unsafe=0.1, min_similarity=0.3, min_side=9) is None
