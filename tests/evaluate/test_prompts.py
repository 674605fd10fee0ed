"""The tests read captions in COCO's format. They check the choice of captions, the digest, and errors before any work."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcm.core.errors import UserError
from lcm.evaluate.prompts import as_lines, make_prompts, read_coco, sha256_of


def write_coco(file: Path, images: int = 40, captions: int = 5, order: int = 0) -> Path:
    """Write captions in the format of COCO's annotations_trainval2014.zip, and return the file."""
    rows = [
        {"image_id": 1000 + 7 * i, "id": 50 + 11 * i + j, "caption": f"Image {i}  seen\nby writer {j}. "}
        for i in range(images)
        for j in range(captions)
    ]
    random.Random(order).shuffle(rows)
    pictures = [{"id": 1000 + 7 * i, "file_name": f"COCO_val2014_{1000 + 7 * i:012d}.jpg"} for i in range(images)]
    file.write_text(json.dumps({"info": {}, "licenses": [], "images": pictures, "annotations": rows}))
    return file


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "captions_val2014.json")


def prompts_of(**options: Any) -> tuple[list[str], int]:
    defaults = {"prompts_seed": None, "prompts_sha256": None, "per_prompt": None, "samples": 8, "shards": "", "captions": None}
    return make_prompts(OmegaConf.create({**defaults, **options}), None)


def test_coco_rule(coco: Path, tmp_path: Path) -> None:
    prompts = read_coco(str(coco), 0)
    assert len({prompt.partition(" seen")[0] for prompt in prompts}) == len(prompts) == 40
    assert all(prompt.endswith(".") and "\n" not in prompt and "  " not in prompt for prompt in prompts)
    assert read_coco(str(write_coco(tmp_path / "shuffled.json", order=1)), 0) == prompts
    assert sorted(read_coco(str(coco), 1)) != sorted(prompts)
    first = min(range(1000, 1280, 7), key=lambda image: hashlib.sha256(f"0/{image}".encode()).hexdigest())
    assert prompts[0].startswith(f"Image {(first - 1000) // 7} seen")


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    prompts = ["a cat", "ein Bär"]
    (tmp_path / "prompts.txt").write_text(as_lines(prompts))
    assert sha256_of(prompts) == hashlib.sha256((tmp_path / "prompts.txt").read_bytes()).hexdigest()
    assert prompts_of(prompts=str(tmp_path / "prompts.txt"), samples=2, prompts_sha256=sha256_of(prompts))[0] == prompts


def test_images_of_a_prompt(coco: Path) -> None:
    prompts, different = prompts_of(prompts=str(coco), per_prompt=4)
    assert different == 2
    assert prompts == prompts[:2] * 4
    assert prompts_of(prompts=str(coco), samples=80)[1] == 40


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": "nowhere/captions_val2014.json"}, "no caption file nowhere/captions_val2014.json: it is in COCO's"),
        ({"per_prompt": 3}, "samples=8 is not a multiple of per_prompt=3"),
        ({"samples": 100, "per_prompt": 1}, "has 40 prompts, but samples=100 .* set samples=40"),
        ({"prompts_sha256": "0" * 64}, "the SHA-256 of the 8 prompts is [0-9a-f]{64}, not prompts_sha256=000"),
        ({"prompts": ["a cat"], "prompts_seed": 1}, "prompts_seed chooses among COCO's captions"),
    ],
)
def test_wrong_prompts_are_refused(coco: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        prompts_of(**{"prompts": str(coco), **options})


@pytest.mark.parametrize(
    "content", ["{", '{"annotations": [{"id": 1}]}', '{"annotations": [{"id": 1, "image_id": 2, "caption": 3}]}']
)
def test_other_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json is no caption file of COCO"):
        read_coco(str(tmp_path / "a.json"), 0)
