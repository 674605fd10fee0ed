"""Damage silently costs other stream readers samples. Here only damaged samples are lost, and each loss is reported."""

import io
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lcm
from lcm.data.sample_fields import REASONS
from lcm.data.transforms import Decode, collate
from tests.data.conftest import keys, pairs, stream, take, write_shard

COUNT, BAD = 20, 10  # samples per shard, and the damaged sample of the middle shard
EVERY = [f"{shard}-{i:02d}" for shard in range(3) for i in range(COUNT)]


def surviving(urls: list[str]) -> set[str]:
    """Return the keys of the samples that a validation pass decodes."""
    batches = take(stream(urls, shuffle=0, decode=Decode(8), collate=collate))
    return {key.rpartition("/")[2] for key in keys(batches)}


@pytest.fixture
def middle(tmp_path: Path) -> tuple[list[str], Path]:
    """Return the URLs of three shards, and the path of the middle shard, which the test damages."""
    urls = [write_shard(tmp_path / f"{number}.tar", pairs(number, COUNT)) for number in range(3)]
    return urls, Path(urls[1])


def member(shard: Path, extension: str = "png") -> tarfile.TarInfo:
    with tarfile.open(shard) as tar:
        return tar.getmember(f"1-{BAD:02d}.{extension}")


def test_flipped_bit_costs_one_sample_which_is_named(middle: Any, caplog: pytest.LogCaptureFixture) -> None:
    urls, shard = middle
    content, rng = shard.read_bytes(), random.Random(1)
    for number in range(40):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        shard.write_bytes(damaged)
        os.utime(shard, ns=(number, number))  # two writes within one tick of the clock would share an index
        caplog.clear()
        lost = set(EVERY) - surviving(urls)
        named = set(re.findall(r"(?:leaving out sample|skipping) (\S+) of", caplog.text))
        assert len(lost) <= 1
        assert lost == named


@pytest.mark.parametrize("part", ["content", "boundary"])
def test_cut_costs_the_rest_of_its_shard(middle: Any, part: str, caplog: pytest.LogCaptureFixture) -> None:
    urls, shard = middle
    info = member(shard)
    shard.write_bytes(shard.read_bytes()[: info.offset_data + info.size // 2 if part == "content" else info.offset])
    shard.with_name("1_stats.json").write_text(f'{{"successes": {COUNT}}}')  # img2dataset writes this file
    assert surviving(urls) == set(EVERY) - {f"1-{i:02d}" for i in range(BAD, COUNT)}
    assert f"holds {BAD + (part == 'content')} of its {COUNT} samples" in caplog.text
    assert (f"leaving out sample 1-{BAD:02d}" in caplog.text) == (part == "content")


@pytest.mark.parametrize("content", [b"<html>404</html>" * 99, bytes(10240)], ids=["html", "no members"])
def test_other_file_costs_itself_and_is_named(middle: Any, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    urls, shard = middle
    shard.write_bytes(content)
    assert surviving(urls) == {key for key in EVERY if not key.startswith("1-")}
    assert f"{shard} holds no samples" in caplog.text


def jpeg(side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda: {"png": jpeg()[:-40]}, "image"), (lambda: {"json": b"{"}, "json")],
    ids=["cut jpeg", "json"],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_bad_sample_costs_itself_and_is_named(
    middle: Any, make: Callable[[], dict[str, bytes]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    urls, shard = middle
    samples = pairs(1, COUNT)
    samples[BAD] |= make()
    write_shard(shard, samples)
    assert surviving(urls) == set(EVERY) - {f"1-{BAD:02d}"}
    assert f"skipping 1-{BAD:02d} of {shard}: {reason}" in caplog.text


def test_every_reason_is_documented() -> None:
    """The regular expression finds the reasons of `Skip` and of left-out samples in the source."""
    root = Path(lcm.__file__).parent
    source = "".join(file.read_text() for file in (root / "data").glob("*.py"))
    used = re.findall(r'(?:Skip\(|skipping\(|left_out\[|return |flaw = )"(\w+)"(?:[]),\s]| if)', source)
    assert {*used} == REASONS.keys()
    table = root.parent.joinpath("docs/data.md").read_text()
    assert {reason for reason in REASONS if f"`{reason}`" not in table} == set()
