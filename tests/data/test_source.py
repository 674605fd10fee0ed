"""A source refuses wrong files with a reason. It survives temporary failures of the system. It reads samples by number."""

import errno
import gzip
import io
import resource
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.filters import Filters
from lcm.data.sample_fields import Skip
from lcm.data.source import Source, stamp
from lcm.data.tar import LocalFile
from lcm.data.urls import IMAGES, LATENTS
from tests.data.conftest import SIZES, pairs, png, sample_keys, write_shard, write_tar


@pytest.mark.parametrize(
    ("members", "complaint"),
    [({"png": png()}, "no captions"), ({"json": {"caption": "a cat"}, "npy": b""}, "no images")],
)
def test_shards_lacking_images_or_captions_are_refused(tmp_path: Path, members: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Source([write_shard(tmp_path / "a.tar", [{"__key__": "a", **members}])]).check()


@pytest.mark.parametrize("content", [b"<html>404</html>", bytes(10240)], ids=["html", "no members"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="not a readable webdataset shard"):
        Source([str(tmp_path / "a.tar")]).check()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("0.png", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("pack", "says"),
    [
        (gzip.compress, r"it is compressed \(gzip\): gunzip it first"),
        (zipped, "it is a zip archive: unzip it, and pack its files with tar --sort=name"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (lambda content: png(), "it is a picture: pack it and its caption"),
        (lambda content: b"", "it is empty"),
    ],
)
def test_files_taken_for_shards_are_named(tmp_path: Path, pack: Any, says: str) -> None:
    shard = Path(write_shard(tmp_path / "a.tar", pairs(0, 2)))
    shard.write_bytes(pack(shard.read_bytes()))
    with pytest.raises(UserError, match=f"a.tar is not a readable webdataset shard: {says}"):
        Source([str(shard)]).check()


def test_shard_of_links_is_told_how_to_pack(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("png", "txt"):
            info = tarfile.TarInfo(f"0.{name}")
            if name == "png":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    with pytest.raises(UserError, match="tar --dereference"):
        Source([str(tmp_path / "a.tar")]).check()


def test_extensions_are_listed_in_short(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"0.part{i}", b"") for i in range(300)])
    with pytest.raises(UserError, match=r"no images: its samples hold part0, .*, \.\.\., expected one of png") as error:
        Source([shard]).check()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("member", "needs", "says"),
    [
        ("latent.npy", IMAGES, r"holds latents, not pictures: set callbacks\.evaluation\.shards to shards of pictures"),
        ("jpg", LATENTS, "holds pictures, not latents: encode it with python -m lcm.encode, or choose data=shards"),
    ],
)
def test_latents_and_pictures_are_told_apart(tmp_path: Path, member: str, needs: tuple[str, ...], says: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"0.{member}", b""), ("0.txt", b"a cat")])
    with pytest.raises(UserError, match=says):
        Source([shard], needs=needs, option="callbacks.evaluation.shards").check()


def test_filters_and_captions_that_no_sample_has_are_named(tmp_path: Path) -> None:
    members = {"__key__": "0", "png": png(), "txt": "a cat", "json": {"long": "a large cat", "pwatermark": 0.1}}
    shard = write_shard(tmp_path / "a.tar", [members, {**members, "__key__": "1", "json": b"{"}])
    source = Source([shard], captions={"txt": 1, "long": 1, "blip": 1}, filters=Filters(max_watermark=0.5, min_side=64))
    source.check()
    assert sorted(source.unused_filters()) == ["max_unsafe", "min_side"]
    assert source.absent_captions() == ["blip"]
    strict = Source([shard], filters=Filters(min_side=64, missing="drop"))
    strict.check()
    assert strict.unused_filters() == strict.absent_captions() == []


def test_check_reads_no_pictures_and_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, read = bytes(500_000), []
    shards = [write_shard(tmp_path / f"{i}.tar", [{**pair, "png": picture} for pair in pairs(i, 20)]) for i in range(3)]

    class Counting(LocalFile):
        def read(self, start: int, size: int) -> bytes:
            read.append((self.path, size))
            return super().read(start, size)

    monkeypatch.setattr("lcm.data.source.LocalFile", Counting)
    Source([*shards, *(str(tmp_path / f"gone{i}.tar") for i in range(1000))]).check()
    assert {path for path, _ in read} == {shards[0]}
    assert sum(size for _, size in read) < 300_000


# Temporary failures


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("source.LocalFile", errno.ESTALE),
        ("growing.locked", errno.EMFILE),
        ("growing.open", errno.EBUSY),
        ("index.open", errno.ENOMEM),
    ],
)
def test_trouble_of_a_moment_is_no_damage(
    urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    monkeypatch.setattr("lcm.data.source.PAUSES", (0, 0))
    if where.endswith(".open"):
        monkeypatch.setattr(f"lcm.data.{where}", open, raising=False)
    module, name = where.split(".")
    sound, failures = getattr(__import__(f"lcm.data.{module}", fromlist=[name]), name), [number] * 2

    def scarce(*args: Any, **options: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "not now")
        return sound(*args, **options)

    monkeypatch.setattr(f"lcm.data.{where}", scarce)
    source = Source(urls, index=str(tmp_path))
    assert [source.notes(shard).samples for shard in range(4)] == list(SIZES)
    assert not failures
    failures += [number] * 2
    source.close()
    assert sample_keys(source, 3) == [f"3-{i:02d}" for i in range(9)]


def test_trouble_that_stays_is_one_sentence(urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm.data.source.PAUSES", (0, 0))

    for number, way in ((errno.EMFILE, r"raise the limit, `ulimit -n 4096`"), (errno.ESTALE, "run the same command again")):

        def scarce(path: str, number: int = number) -> None:
            raise OSError(number, "not now")

        monkeypatch.setattr("lcm.data.source.LocalFile", scarce)
        source = Source(urls, index=str(tmp_path))
        for work in (source.check, lambda source=source: source.usable(0, 1)):
            with pytest.raises(UserError, match=rf"000\.tar cannot be opened \(not now\): {way}"):
                work()


@pytest.mark.parametrize("others", [False, True], ids=["", "that others take"])
def test_more_shards_than_open_files(tmp_path: Path, others: bool, caplog: pytest.LogCaptureFixture) -> None:
    shards = [write_shard(tmp_path / f"{number:03d}.tar", pairs(number, 2)) for number in range(120)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    source = Source(shards) if others else None  # it expects more file handles than the limit below allows
    resource.setrlimit(resource.RLIMIT_NOFILE, (90, hard))
    try:
        source = source or Source(shards)
        assert [source.read(shard, i)["__key__"] for i in (0, 1) for shard in range(120)] == [
            f"{shard}-{i:02d}" for i in (0, 1) for shard in range(120)
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not caplog.records


def test_lost_file_handle_is_opened_again(urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, sound, failures = Source(urls), LocalFile.read, [errno.ESTALE]
    source.read(0, 0)

    def stale(file: LocalFile, start: int, size: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return sound(file, start, size)

    monkeypatch.setattr(LocalFile, "read", stale)
    assert source.read(0, 3)["__key__"] == "0-03"
    failures += [errno.EIO] * 2
    with pytest.raises(Skip, match=r"^shard: OSError"):
        source.read(0, 3)


# Shards that cannot be read


def test_dead_first_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    sound = write_shard(tmp_path / "b.tar", [{"__key__": "a", "png": png(), "txt": "a cat"}])
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>")
    Source([str(tmp_path / "a.tar"), str(tmp_path / "gone.tar"), sound]).check()
    with pytest.raises(UserError, match=r"a\.tar is not a readable .*, nor can the 1 shards after it be read"):
        Source([str(tmp_path / "a.tar"), str(tmp_path / "gone.tar")]).check()


def test_queries_tell_shards_apart() -> None:
    first, second = (stamp(f"https://user:secret@host/get?shard={n}&token=secret") for n in (0, 1))
    assert first != second
    assert "secret" not in first
    assert stamp("https://user:secret@host/0.tar") == "https://host/0.tar"


def test_shard_that_is_gone_counts_as_empty(urls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Source([urls[0], str(tmp_path / "gone.tar"), urls[1]])
    assert source.usable(1, 1) == source.usable(1, 1) == (0, True)
    assert source.notes(1) == (0, {"shard": 1}, 0)
    assert caplog.text.count(f"leaving out shard {tmp_path}/gone.tar") == 1
    with pytest.raises(Skip, match=r"^shard: "):
        source.read(1, 0)
    source.prefetch(1)
    assert source.left_out() == {"shard": 1}
