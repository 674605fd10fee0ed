"""Samples of tars: grouping of members, in tars of every kind, including damaged and growing ones."""

import contextlib
import io
import json
import os
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lcm.data import tar
from lcm.data.filters import Filters
from lcm.data.index import Rules, Verdict, scan
from lcm.data.source import Source
from lcm.data.tar import LocalFile, Memory, headers
from lcm.data.urls import IMAGES, LATENTS
from tests.data.conftest import SIZES, pairs, png, sample_keys, samples_of, write_shard, write_tar


def scanned(shard: str | Path, needs: Sequence[str] = IMAGES, **rules: Any) -> list[Verdict]:
    with contextlib.closing(LocalFile(str(shard))) as file:
        return list(scan(file, Rules(needs, **rules)))


def usable(shard: str | Path, **rules: Any) -> list[str]:
    return [verdict.sample.key for verdict in scanned(shard, **rules) if verdict.flaw is None]


def flaws(shard: str | Path, **rules: Any) -> dict[str, str]:
    return {verdict.sample.key: verdict.flaw for verdict in scanned(shard, **rules) if verdict.flaw is not None}


def reasons(shard: str | Path) -> dict[str, int]:
    return Source([str(shard)]).notes(0).left_out


def pair(name: str, caption: bytes = b"a cat") -> list[tuple[str, bytes]]:
    return [(f"{name}.png", png()), (f"{name}.txt", caption)]


def captions(shard: str) -> dict[str, bytes]:
    return {sample["__key__"]: sample["txt"] for sample in samples_of(Source([shard]))}


# Headers

SHORT = ["0.png", "a/b/1.png", "d" * 96 + ".png", "/".join(["d" * 60] * 2) + "/2.png"]
LONG = [*SHORT, "d" * 300 + ".png", "/".join(["deep"] * 40) + "/3.png", "été 红.png"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [(tarfile.PAX_FORMAT, LONG), (tarfile.GNU_FORMAT, LONG), (tarfile.USTAR_FORMAT, SHORT)],
    ids=["pax", "gnu", "ustar"],
)
def test_headers_match_tarfile(tmp_path: Path, kind: int, names: list[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
        for number, name in enumerate(names):
            for type_, target in (
                (tarfile.DIRTYPE, ""),
                (tarfile.REGTYPE, ""),
                (tarfile.LNKTYPE, name if names is LONG else "0.png"),
                (tarfile.SYMTYPE, f"../{name}" if names is LONG else "../0.png"),
            ):
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = type_, target, 511 * number * (type_ == tarfile.REGTYPE)
                archive.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = [(i.name, i.offset, i.offset_data, i.size, i.linkname or None) for i in archive if not i.isdir()]
    with contextlib.closing(LocalFile(str(tmp_path / "a.tar"))) as file:
        assert [(*member[:4], member.link) for member in headers(file)] == expected
    assert len(expected) == 3 * len(names)


def as_v7(content: bytes) -> bytes:
    """Turn ustar headers into headers of tar's first version. They have no magic, and the type of a file is NUL."""
    result, offset = bytearray(content), 0
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for offset in (info.offset for info in archive):
            block = bytearray(result[offset : offset + 512])
            block[156] = 0
            block[257:] = bytes(255)
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            result[offset : offset + 512] = block
    return bytes(result)


def test_v7_tars_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in [("cats/", b""), *pair("cats/0"), *pair("cats/1")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(as_v7((tmp_path / "a.tar").read_bytes()))
    assert usable(tmp_path / "a.tar") == ["cats/0", "cats/1"]


def test_signed_checksums_of_old_programs_hold() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("é.png"))
    block = bytearray(file.getvalue()[:512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in block)
    assert [member.name for member in headers(Memory(bytes(block)))] == ["é.png"]


# Members of a sample


def test_samples_are_read_by_number(urls: list[str]) -> None:
    source = Source(urls)
    assert source.notes(2) == (SIZES[2], {}, 0)
    assert source.read(2, 7) == {"__key__": "2-07", "__url__": urls[2], "png": png(), "txt": b"sample 7 of 2"}
    assert sample_keys(source, 2) == [f"2-{i:02d}" for i in range(13)]


def test_key_ends_at_first_dot(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"__key__": "in/a", "seg.PNG": b"1", "PNG": b"2", "txt": "x"}])
    [sample] = samples_of(Source([shard]))
    assert sample.items() >= {"__key__": "in/a", "seg.png": b"1", "png": b"2", "txt": b"x"}.items()


def test_incomplete_samples_are_left_out(tmp_path: Path) -> None:
    odd = [{"png": b""}, {"txt": "a"}, {"npy": b"", "json": {}}]
    odd = [{"__key__": f"odd{number}", **members} for number, members in enumerate(odd)]
    shard = write_shard(tmp_path / "a.tar", [*pairs(0, 3), *odd, *pairs(1, 2)])
    assert len(usable(shard)) == 5
    assert flaws(shard) == {"odd0": "no_caption", "odd1": "no_image", "odd2": "no_image"}
    assert reasons(shard) == {"no_caption": 1, "no_image": 2}


def test_filters_judge_captions_and_metadata(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "png": png(), "txt": f"{i}", "json": {"score": i}} for i in range(6)]
    samples.append({"__key__": "6", "png": png(), "json": {"caption": "six", "score": 9}})
    samples.append({"__key__": "7", "png": png(), "txt": "7", "json": b"{"})
    judged: list[str | None] = []

    def judge(caption: str | None, meta: Any) -> str | None:
        judged.append(caption)
        return "score" if meta["score"] < 4 else None

    verdicts = scanned(write_shard(tmp_path / "a.tar", samples), judge=judge)
    assert [verdict.flaw for verdict in verdicts] == [*["score"] * 4, None, None, None, "json"]
    assert [verdict.damaged for verdict in verdicts] == [False] * 7 + [True]
    assert judged == ["0", "1", "2", "3", "4", "5", "six"]


def test_nested_metadata_is_kept(tmp_path: Path) -> None:
    meta = {"caption": ["a cat", None, "a pet"], "exif": {"Model": [1, {"b": None}]}, "boxes": [[0.1, 2]], "AESTHETIC": "6.5"}
    shard = write_shard(tmp_path / "a.tar", [{"__key__": "0", "png": png(), "json": meta}])
    source = Source([shard], filters=Filters(min_aesthetic=6, missing="drop", max_unsafe=None, min_caption=5))
    [sample] = samples_of(source)
    assert json.loads(sample["json"]) == meta


class Counting(LocalFile):
    """A local file that records the spans of bytes that are read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.spans: list[tuple[int, int]] = []

    def read(self, start: int, size: int) -> bytes:
        self.spans.append((start, start + size))
        return super().read(start, size)


@pytest.mark.parametrize("aspect", [None, len], ids=["", "buckets"])
def test_filters_do_not_read_pictures(tmp_path: Path, aspect: Any) -> None:
    """Buckets need the size of a picture. It is in the first bytes of the picture."""
    picture, count = random.Random(0).randbytes(300_000), 20
    samples = [{"__key__": f"{i}", "png": picture, "txt": "a cat", "json": {"punsafe": i / count}} for i in range(count)]
    file = Counting(write_shard(tmp_path / "a.tar", samples))
    verdicts = list(scan(file, Rules(IMAGES, judge=Filters(), aspect=aspect)))
    assert Counter(verdict.flaw for verdict in verdicts) == {None: 11, "unsafe": 9}
    read = sum(end - start for start, end in file.spans)
    file.close()
    assert read < count * 4 * tar.WINDOW + (11 * 2**16 if aspect else 0)
    seen = tar.WINDOW + (2**16 if aspect else 0)
    for verdict in verdicts:
        member = verdict.sample.members["png"]
        inner = range(member.data + seen, member.data + member.size - 1)  # the last byte tells whether the tar is cut
        assert not any(start < inner.stop and end > inner.start for start, end in file.spans)


LITTER = ("._{}", ".{}", "__MACOSX/{}", ".AppleDouble/{}", ".ipynb_checkpoints/{}", "@eaDir/{}", "Thumbs.db", "desktop.ini")


def test_litter_is_no_member(tmp_path: Path) -> None:
    files = [(f"./{name}", content) for key in ("0", "1") for name, content in pair(key)]
    for litter in LITTER:
        items = [item for name, content in files for item in ((f"./{litter.format(name[2:])}", png()), (name, content))]
        shard = write_tar(tmp_path / "a.tar", items)
        assert usable(shard) == ["./0", "./1"], litter
        assert not flaws(shard), litter


def test_key_with_dots_ends_at_extension(tmp_path: Path) -> None:
    """The dot before the extension ends a key only if this gives samples."""
    keys = ["IMG 2.1 sunset", "IMG 2.10 sunset", "photo", "photo.001", "photo.k.1", "v1.5.Beta", "v1.5.beta"]
    shard = write_tar(tmp_path / "a.tar", sorted(item for key in keys for item in pair(key, key.encode())))
    assert captions(shard) == {key: key.encode() for key in keys}
    assert not flaws(shard)


def test_incomplete_sample_with_dots_has_its_own_name(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [*pair("p.1"), ("p.2.png", png()), *pair("p.3")])
    assert usable(shard) == ["p.1", "p.3"]
    assert flaws(shard) == {"p.2": "no_caption"}


def test_extensions_with_dots_stay_members(tmp_path: Path) -> None:
    items = [("0.blip.txt", b"{}"), ("0.seg.png", png()), *pair("0"), ("0.json", b"{}")]
    [sample] = samples_of(Source([write_tar(tmp_path / "a.tar", items)]))
    assert sample.keys() == {"__key__", "__url__", "png", "txt", "json", "seg.png", "blip.txt"}


@pytest.mark.parametrize(("name", "weights"), [("blip", {"blip": 1.0}), ("caption", None)])
def test_captions_of_any_name_make_samples(tmp_path: Path, name: str, weights: dict[str, float] | None) -> None:
    """The tar has keys with dots, repeated names, and samples whose members do not follow each other."""
    dotted = [(f"p.{i}.{end}", png()) for i in range(3) for end in ("png", name)]
    twice = [(f"b.{end}", png()) for _ in range(2) for end in ("png", name)]
    apart = [(f"{n:03d}.{end}", png()) for end in ("png", name) for n in range(4)]
    source = Source([write_tar(tmp_path / "a.tar", [*dotted, *twice, *apart])], captions=weights)
    assert [key.partition("@")[0] for key in sample_keys(source)] == ["p.0", "p.1", "p.2", "b", "b"]
    assert all(name in sample for sample in samples_of(source))
    assert source.notes(0) == (5, {"apart": 4}, 1)


def test_latents_of_a_key_with_dots(tmp_path: Path) -> None:
    items = [(f"p.{i}.{name}", b"") for i in range(3) for name in ("latent.npy", "sizes.npy", "txt")]
    source = Source([write_tar(tmp_path / "a.tar", items)], needs=LATENTS)
    assert sample_keys(source) == ["p.0", "p.1", "p.2"]
    assert source.read(0, 1).keys() >= {"latent.npy", "sizes.npy", "txt"}


@pytest.mark.parametrize("order", ["aab", "aba"])
def test_samples_of_one_name_are_all_used(tmp_path: Path, order: str) -> None:
    items = [item for i, key in enumerate(order) for item in pair(key, str(i).encode())]
    shard = write_tar(tmp_path / "a.tar", items)
    assert list(captions(shard).values()) == [b"0", b"1", b"2"]
    assert Source([shard]).notes(0) == (3, {}, 1)


@pytest.mark.parametrize("members", ["png png txt txt", "png txt png"])
def test_one_name_is_not_paired_by_chance(tmp_path: Path, members: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [*((f"a.{name}", png()) for name in members.split()), *pair("b")])
    assert usable(shard) == ["b"]
    assert flaws(shard) == {"a": "duplicate"}


@pytest.mark.parametrize(("ends", "folders"), [("txt png", True), ("json png txt", False)])
def test_members_apart_are_counted_as_such(tmp_path: Path, folders: bool, ends: str) -> None:
    files = [(f"{n:03d}.{end}", png()) for end in ends.split() for n in range(30)]
    items = [(f"{name.partition('.')[2]}/{name}" if folders else name, content) for name, content in files]
    shard = write_tar(tmp_path / "a.tar", [*items, *pair("x")])
    assert usable(shard) == ["x"]
    assert reasons(shard) == {"apart": 30}


def test_members_with_dots_far_apart_are_counted_as_such(tmp_path: Path) -> None:
    big = bytes(2**19)
    shard = write_tar(tmp_path / "a.tar", [(f"p.{n}.{end}", big) for end in ("png", "txt") for n in range(9)])
    assert reasons(shard) == {"apart": 9}


# Links


def linked(tmp_path: Path, link: Any, links: str = "png txt") -> str:
    """Write a tar of files, then of links to these files. `link` makes the links that `links` names. The others are copies."""
    (tmp_path / "real").mkdir()
    (tmp_path / "made").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in pair("0"):
            (tmp_path / "real" / name).write_bytes(content)
        for folder in ("real", "made"):
            for name in ("png", "txt"):
                if folder == "made":
                    (link if name in links else copied)(tmp_path / f"real/0.{name}", tmp_path / f"made/0.{name}")
                archive.add(tmp_path / f"{folder}/0.{name}", f"{folder}/0.{name}")
    return str(tmp_path / "a.tar")


def copied(target: Path, link: Path) -> None:
    link.write_bytes(target.read_bytes())


def relative(target: Path, link: Path) -> None:
    link.symlink_to(f"../{target.parent.name}/{target.name}")


def outside(target: Path, link: Path) -> None:
    link.symlink_to("/etc/passwd")


@pytest.mark.parametrize(("link", "links"), [(os.link, "png txt"), (relative, "txt")], ids=["hard", "symbolic"])
def test_links_within_a_tar_are_followed(tmp_path: Path, link: Any, links: str) -> None:
    source = Source([linked(tmp_path, link, links)], filters=Filters(min_caption=5))
    assert sample_keys(source) == ["real/0", "made/0"]
    first, second = samples_of(source)
    assert (first["png"], first["txt"]) == (second["png"], second["txt"]) == (png(), b"a cat")


@pytest.mark.parametrize("links", ["png txt", "txt"])
def test_links_out_of_a_tar_are_counted_as_such(tmp_path: Path, links: str) -> None:
    shard = linked(tmp_path, outside, links)
    assert usable(shard) == ["real/0"]
    assert reasons(shard) == {"link": 1}


# Damage: other readers silently end a shard at a header with one flipped bit.


def header(shard: str | Path, member: str) -> tarfile.TarInfo:
    with tarfile.open(shard) as archive:
        return archive.getmember(member)


@pytest.mark.parametrize(("member", "long"), [("png", True), ("txt", False)], ids=["pax", "short"])
def test_damaged_header_costs_one_sample(tmp_path: Path, member: str, long: bool) -> None:
    """A long name has two headers. The names after it are short. The test would see the long name on another sample."""
    keys = [f"{'d' * 120 * (long and i == 6)}{i:02d}" for i in range(12)]
    whole = Path(
        write_shard(tmp_path / "whole.tar", [{**sample, "__key__": k} for sample, k in zip(pairs(1, 12), keys, strict=True)])
    )
    info, rng = header(whole, f"{keys[6]}.{member}"), random.Random(0)
    for start in {info.offset, info.offset_data - 512}:
        for number in range(40):
            damaged = bytearray(whole.read_bytes())
            damaged[start + rng.randrange(345)] ^= 1 << rng.randrange(8)
            shard = tmp_path / f"{start}-{number}.tar"
            shard.write_bytes(damaged)
            left_out = flaws(shard)
            assert [key for key in usable(shard) if key in keys and key != keys[6]] == keys[:6] + keys[7:]
            assert set(left_out.values()) <= {"no_image", "no_caption"}
            assert len(usable(shard)) == 12 or left_out


def test_cut_header_costs_the_rest_of_a_shard(tmp_path: Path, urls: list[str]) -> None:
    """tests/data/test_damage.py has the other cuts."""
    (tmp_path / "cut.tar").write_bytes(Path(urls[1]).read_bytes()[: header(urls[1], "1-06.png").offset + 100])
    assert usable(tmp_path / "cut.tar") == [f"1-{i:02d}" for i in range(6)]


def test_too_large_sample_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm.data.index.MAX_BYTES", 5000)
    shard = write_shard(tmp_path / "a.tar", [*pairs(0, 2), {"__key__": "big", "png": bytes(6000), "txt": "x"}])
    assert flaws(shard) == {"big": "bytes"}


# Growing files


class Growing:
    """A file that another thread appends to. A read waits for its bytes."""

    def __init__(self, content: bytes) -> None:
        self.content, self.arrived, self.grown = content, 0, threading.Condition()

    def arrive(self, size: int) -> None:
        with self.grown:
            self.arrived = size
            self.grown.notify_all()

    def read(self, start: int, size: int) -> bytes:
        with self.grown:
            assert self.grown.wait_for(lambda: self.arrived >= min(start + size, len(self.content)), timeout=30)
        return self.content[start : start + size]

    def size(self) -> int:
        self.read(0, len(self.content))
        return len(self.content)


def test_samples_are_usable_while_a_tar_grows(urls: list[str]) -> None:
    file, first_came = Growing(Path(urls[1]).read_bytes()), threading.Event()

    def append() -> None:
        file.arrive(3 * tar.WINDOW)
        assert first_came.wait(30)
        for size in range(3 * tar.WINDOW, len(file.content) + 1000, 1000):
            file.arrive(min(size, len(file.content)))

    threading.Thread(target=append, daemon=True).start()
    verdicts = scan(file, Rules(IMAGES))
    keys = [next(verdicts).sample.key]
    assert file.arrived == 3 * tar.WINDOW < len(file.content)
    first_came.set()
    keys += [verdict.sample.key for verdict in verdicts]
    assert keys == usable(urls[1])
