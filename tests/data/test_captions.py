"""Captions of other programs may have any name, be lists, begin with byte order marks or use other encodings."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.captions import read_captions, read_images
from lcm.data.datamodule import ShardDataModule
from lcm.data.encoding import Variants
from lcm.data.filters import Filters
from lcm.data.latents import DecodeLatents
from lcm.data.sample_fields import CaptionChoice, Skip, caption_of, captions_of
from lcm.data.source import Source
from lcm.data.transforms import Decode
from lcm.data.urls import expand_urls
from lcm.runtime.atomic_io import lines_of
from tests.data.conftest import png, samples_of, write_tar

Members = dict[str, bytes]


def shard(path: Path, *samples: Members) -> str:
    """Write a tar with these members and a picture for each sample. Return its path."""
    numbered = enumerate({"png": png(), **members} for members in samples)
    items = [(f"{number:03d}.{name}", content) for number, sample in numbered for name, content in sample.items()]
    return write_tar(path, items)


def fields(**fields: Any) -> Members:
    return {"json": json.dumps(fields).encode()}


@pytest.mark.parametrize(
    ("members", "captions", "text"),
    [
        (fields(blip="a cat", url="https://x.org"), {"blip": 1}, "a cat"),
        ({"blip": b"a cat"}, {".BLIP": 1}, "a cat"),
        ({"caption": b"a cat"}, None, "a cat"),
        (fields(cap="a cat"), None, "a cat"),
    ],
    ids=["field", "with its dot", "kohya unasked", "cap field"],
)
def test_captions_are_read_by_name(tmp_path: Path, members: Members, captions: Any, text: str) -> None:
    url, options = shard(tmp_path / "a.tar", *[members] * 8), {"resolution": 8, "batch_size": 8, "num_workers": 0}
    data = ShardDataModule(url, val_shards=url, captions=captions, filters=Filters(min_caption=3), **options)
    data.setup("fit")
    assert [source.notes(0).samples for source in data.train_sources] == [8]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["captions"] == [text] * 8
    source = data.make_source(url, "callbacks.evaluation.shards")
    assert read_captions(source) == [text] * 8
    assert next(read_images(source, resolution=8))["captions"] == [text] * 8


def test_prompts_are_the_captions_of_real_images(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", *[{"txt": b"short", "blip": b"long"}] * 40)
    source = Source([url], captions={"txt": 1, "blip": 1})
    captions = read_captions(source, 40)
    assert set(captions) == {"short", "long"}
    assert captions == next(read_images(source, resolution=8))["captions"]


@pytest.mark.parametrize(
    ("members", "captions", "says"),
    [
        (
            fields(blip="a cat", url="https://x.org"),
            None,
            r"none of txt, caption, cap among .* the .json fields blip, url: see",
        ),
        (fields(caption="a cat"), {"llava": 1}, r"none of llava among json, png and the .json fields caption"),
        (
            {"blip": b"a cat"},
            None,
            r"samples hold blip, png, expected one of txt, caption, cap, json, or others by data\.captions",
        ),
        (fields(caption=None), None, "no_caption"),
        (fields(caption=5), None, "caption holds a number, not text"),
        (fields(caption=[["a cat"]]), None, "caption holds a list in a list, not text"),
        ({"txt": b"caf\xe9"}, None, "byte 0xe9 at position 3 is not UTF-8"),
    ],
)
def test_unreadable_captions_are_refused_with_the_cause(tmp_path: Path, members: Members, captions: Any, says: str) -> None:
    url = shard(tmp_path / "a.tar", *[members] * 8)
    for filters in (None, Filters()):
        with pytest.raises(UserError, match=rf"a\.tar has no captions.*{says}"):
            ShardDataModule(url, captions=captions, filters=filters, resolution=8, num_workers=0).setup("fit")


def test_length_limits_hold_for_every_caption(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", {"txt": b"a", "blip": b"a cat"}, {"txt": b"a dog", "blip": b"a cat"}, {"blip": b"a cat"})
    source = Source([url], captions={"txt": 1, "blip": 1}, filters=Filters(min_caption=3))
    assert source.notes(0) == (2, {"caption_short": 1}, 0)


def test_one_of_a_list_of_captions_is_drawn() -> None:
    value = ["a cat", None, "", " a pet "]
    for captions in (None, {"caption": 1}):
        draw = CaptionChoice(weights=captions)
        assert {draw(fields(caption=value), random.Random(seed)) for seed in range(30)} == {"a cat", "a pet"}


def test_latents_keep_captions_and_metadata_but_no_picture() -> None:
    utf_16 = "ein Apfel".encode("utf-16")
    texts = {"txt": b"short", "blip": b"a long one", "llava": utf_16, "json": b'{"url": "x"}', "cap": b"c"}
    sample = {"__key__": "0", "__url__": "a.tar", "png": png(), "mask": png(), **texts}
    captions = {"txt": 1, "blip": 3, "LLaVA": 0.1}
    members = Variants(Decode(8), 1, False)({**sample, "llava": b"an apple"}, random.Random(0))["members"]
    assert members == {"__key__": "0", **texts, "llava": b"an apple"}
    with pytest.raises(Skip, match="llava: it looks like UTF-16"):
        Variants(Decode(8, captions=captions), 1, False)(sample, random.Random(0))
    assert "llava" not in Variants(Decode(8), 1, False)(sample, random.Random(0))["members"]


def test_absent_caption_names_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = shard(tmp_path / "a.tar", {"txt": b"a cat", **fields(long="a large cat")}, {"txt": b"a dog"})
    data = ShardDataModule(url, captions={"txt": 1, "blip": 3, "long": 1}, resolution=8, num_workers=0)
    data.setup("fit")
    assert "data.captions.blip is in no sample" in caplog.text
    assert "data.captions.long" not in caplog.text
    assert "data.captions.txt" not in caplog.text


def test_latents_say_which_captions_they_lack(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", {"latent.npy": b"", "txt": b"a cat"})
    source = Source([url], needs=DecodeLatents.needs, captions={"txt": 1, "blip": 1})
    source.check()
    assert source.absent_captions() == ["blip"]


MARKED = "\ufeff".encode()


@pytest.mark.parametrize(
    "members",
    [
        {"txt": MARKED + b"a red apple"},
        {"txt": b"\r\n\r\na red apple\r"},
        {"json": MARKED + b'{"caption": "a red apple"}'},
        fields(caption="\ufeffa red apple"),
        {"json": '{"caption": "a red apple"}'.encode("utf-16")},
    ],
    ids=["mark", "line ends", "json", "field", "utf-16 json"],
)
def test_byte_order_mark_is_no_part_of_a_caption(members: Members) -> None:
    assert caption_of(members) == "a red apple"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le"])
def test_other_unicode_encodings_are_refused_by_name(encoding: str, tmp_path: Path) -> None:
    content = "a red apple".encode(encoding)
    with pytest.raises(Skip, match=r"^caption_encoding: txt: it looks like UTF-16 or UTF-32"):
        captions_of({"txt": content})
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.shards=@.*looks like UTF-16"):
        expand_urls(f"@{tmp_path}/list.txt")
    with pytest.raises(UserError, match=r"^data\.filters\.removal_list=.*looks like UTF-16"):
        Filters(removal_list=str(tmp_path / "list.txt"))


@pytest.mark.parametrize("members", [{"txt": b"a\0b"}, {"txt": "café".encode("cp1252")}])
def test_other_encodings_are_damage(members: Members) -> None:
    with pytest.raises(Skip, match=r"^caption_encoding: .*: save it as UTF-8$"):
        captions_of(members)


def test_lists_of_any_program_are_read(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", {"txt": b"a cat"})
    for number, end in enumerate((b"\n", b"\r\n", b"\r")):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(MARKED + end.join([url.encode(), b"", b"# a comment", url.encode(), b" "]))
        assert expand_urls(f"@{file}") == [url, url]
        file.write_bytes(MARKED + b"https://x.org/1.jpg" + end + MARKED + b"AB" * 32)
        removed = Filters(removal_list=str(file))
        assert removed("c", {"url": "https://x.org/1.jpg"}) == removed("c", {"sha256": "ab" * 32}) == "removal"
    file.write_bytes("a\u2028b\x85c\x0cd\ne".encode())
    assert lines_of(file) == ["a\u2028b\x85c\x0cd", "e"]
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"list of shards cannot be read \(byte 0xe9 at position 3 is not UTF-8"):
        expand_urls(f"@{file}")


def test_images_of_dalle_pytorch_are_read(tmp_path: Path) -> None:
    [sample] = samples_of(Source([write_tar(tmp_path / "a.tar", [("0.img", png()), ("0.cap", b"a cat")])]))
    assert Decode(8)(sample, random.Random(0))["caption"] == "a cat"


@pytest.mark.parametrize("captions", ["blip", {"json": 1}])
def test_wrong_data_captions_are_refused(captions: Any) -> None:
    with pytest.raises(UserError, match=r"^data\.captions="):
        CaptionChoice(weights=captions)
