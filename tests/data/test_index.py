"""One process writes the index of a shard once. All processes use it. A changed shard gets a new index."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcm.core.errors import UserError
from lcm.data import index
from lcm.data.filters import Filters
from lcm.data.index import Rules, ShardIndex
from lcm.data.left_out import take_left_out
from lcm.data.source import Source
from lcm.data.tar import LocalFile
from lcm.data.urls import IMAGES, LATENTS
from tests.data.conftest import SIZES, pairs, png, sample_keys, write_shard, write_tar

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def counts(source: Source) -> list[int]:
    return [source.notes(shard).samples for shard in range(len(source.urls))]


def no_scan(*args: Any) -> None:
    raise AssertionError("a shard was scanned again")


def test_usable_counts_are_those_of_the_shards(urls: list[str], tmp_path: Path) -> None:
    assert counts(Source(urls, index=str(tmp_path))) == list(SIZES)
    assert Source(urls, index=str(tmp_path / "new")).usable(0, 5)[0] >= 5
    assert Source(urls).usable(0, 10**6) == (SIZES[0], True)


def test_shards_are_scanned_once(urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts(Source(urls, index=str(tmp_path))) == list(SIZES)
    monkeypatch.setattr(index, "scan", no_scan)
    again = Source(urls, index=str(tmp_path))
    assert counts(again) == list(SIZES)
    assert sample_keys(again, 1) == [f"1-{i:02d}" for i in range(12)]


def test_other_rules_have_another_index(tmp_path: Path) -> None:
    members = {"__key__": "0", "png": png(), "latent.npy": b"", "txt": "cat", "blip": "a cat", "json": {"punsafe": 0.4}}
    shard = write_shard(tmp_path / "a.tar", [members, {"__key__": "1", "png": png(), "txt": "a dog"}])
    ways: list[tuple[dict[str, Any], int]] = [
        ({}, 2),
        ({"filters": Filters()}, 2),
        ({"filters": Filters(max_unsafe=0.3)}, 1),
        ({"filters": Filters(missing="drop")}, 1),
        ({"filters": Filters(min_caption=5, max_unsafe=None)}, 1),
        ({"filters": Filters(min_caption=5, max_unsafe=None), "captions": {"blip": 1}}, 1),
        ({"captions": {"blip": 1}}, 1),
        ({"captions": {"blip": 2}}, 1),
        ({"captions": {"caption": 1}}, 1),  # the metadata may hold a caption of any name
        ({"needs": LATENTS}, 1),
        ({"aspect": len}, 2),
    ]
    for _ in range(2):  # the second pass reads the index
        for way, count in ways:
            assert counts(Source([shard], index=str(tmp_path / "index"), **way)) == [count], way
    keys = {Source([shard], **way).key(0) for way, _ in ways}
    assert len(keys) == len(ways) - 1  # a caption's weight changes no index


def test_changed_shard_is_scanned_again(tmp_path: Path) -> None:
    for count in (3, 30, 3):
        shard = write_shard(tmp_path / "a.tar", pairs(0, count))
        os.utime(shard, ns=(count, count))
        assert counts(Source([shard], index=str(tmp_path / "index"))) == [count]


def test_shard_changed_while_read_costs_the_samples_that_are_gone(tmp_path: Path) -> None:
    source = Source([write_shard(tmp_path / "a.tar", pairs(0, 30))], index=str(tmp_path / "index"))
    source.read(0, 29)
    write_shard(tmp_path / "a.tar", pairs(1, 3))
    source.close()
    for again in (source, Source(source.urls, index=str(tmp_path / "index"))):
        with pytest.raises(index.Skip, match=r"^missing: sample 29 of .*a\.tar, which was changed since it was indexed"):
            again.read(0, 29)


def test_empty_and_repeated_samples_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = write_tar(tmp_path / "empty.tar", [("a.png", png())])
    twice = write_shard(tmp_path / "twice.tar", [*pairs(0, 2), *pairs(0, 2)])
    for _ in range(2):
        source = Source([empty, twice], index=str(tmp_path / "index"))
        assert source.notes(0) == (0, {"no_caption": 1}, 0)
        assert source.notes(1) == (4, {}, 2)
        assert len(set(sample_keys(source, 1))) == 4
    assert caplog.text.count("holds 2 samples with the names of other samples: all are used") == 1


def test_left_out_samples_are_reported_once(tmp_path: Path) -> None:
    take_left_out()
    shard = write_shard(tmp_path / "a.tar", [*pairs(0, 2), {"__key__": "bare", "png": png()}])
    for reported in ({"no_caption": 1}, {}):
        Source([shard], index=str(tmp_path / "index")).notes(0)
        assert take_left_out() == reported


def test_left_out_samples_are_named_a_few_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    apart = [
        write_tar(tmp_path / f"{s}.tar", [(f"{n}.{end}", png()) for end in ("png", "txt") for n in range(50)]) for s in "ab"
    ]
    source = Source(apart)
    assert source.left_out() == {"apart": 100}
    assert caplog.text.count("leaving out sample ") == 10
    assert "pack them from one folder with tar --sort=name" in caplog.text
    assert "leaving out more samples for the same reason" in caplog.text
    message = r"no usable sample: .*'apart': 100.*; the files of a sample must follow each other"
    with pytest.raises(UserError, match=message):
        raise source.nothing_usable()


# One writer


def shard_index(folder: Path, shard: str, judge: Callable[[str | None, Mapping[str, Any]], None]) -> ShardIndex:
    return ShardIndex(folder, "key", shard, lambda: LocalFile(shard), rules=Rules(IMAGES, judge=judge))


def test_processes_scan_a_shard_once(tmp_path: Path) -> None:
    shard, log = write_shard(tmp_path / "a.tar", pairs(0, 40)), tmp_path / "log"

    def judge(caption: str | None, meta: Mapping[str, Any]) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {caption}\n")
        time.sleep(0.005)

    def scan() -> None:
        shards = shard_index(tmp_path, shard, judge)
        assert shards.notes().samples == 40
        assert len({int(shards[number]["start"]) for number in range(40)}) == 40

    processes = [fork.Process(target=scan) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = log.read_text().splitlines()
    assert len(lines) == 40
    assert len({line.split()[0] for line in lines}) == 1


def test_sources_of_one_process_scan_a_shard_once(tmp_path: Path) -> None:
    """Training and validation may read the same shard. The lock file does not exclude threads of one process."""
    shard, judged = write_shard(tmp_path / "a.tar", pairs(0, 40)), []

    def judge(caption: str | None, meta: Mapping[str, Any]) -> None:
        judged.append(caption)
        time.sleep(0.002)

    readers = [shard_index(tmp_path, shard, judge) for _ in range(3)]
    for reader in readers:
        reader.ensure()
    readers[0].close()
    assert [reader.notes().samples for reader in readers] == [40] * 3
    assert len(judged) == 40


def test_index_of_a_killed_process_is_written_anew(tmp_path: Path) -> None:
    """A killed process leaves its .part file and its lock file. A reader of this .part file continues with the new one."""
    shard = write_shard(tmp_path / "a.tar", pairs(0, 40))
    reached = fork.Event()

    def stopping(caption: str | None, meta: Mapping[str, Any]) -> None:
        if caption == "sample 20 of 0":
            reached.set()
            time.sleep(60)

    process = fork.Process(target=lambda: shard_index(tmp_path, shard, stopping).notes())
    process.start()
    assert reached.wait(30)
    reader = shard_index(tmp_path, shard, lambda caption, meta: None)
    known, whole = reader.wait(10)
    assert 10 <= known <= 20
    assert not whole
    first = [reader[number].copy() for number in range(10)]
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert {path.suffix for path in tmp_path.iterdir()} - {".asked"} == {".tar", ".part", ".lock"}
    with (tmp_path / "key.part").open("ab") as file:
        file.write(b"torn")
    assert reader[39]["size"] > 0
    assert reader.notes() == (40, {}, 0)
    assert [reader[number] for number in range(10)] == first
    assert not (tmp_path / "key.part").exists()
    assert isinstance(reader.records, np.memmap)


def test_records_are_waited_for_while_an_index_is_written_anew(tmp_path: Path) -> None:
    """The reader holds the .part file of a killed process. The new .part file is shorter at first."""
    shard = write_shard(tmp_path / "a.tar", pairs(0, 40))
    whole = shard_index(tmp_path, shard, lambda caption, meta: None)
    whole.notes()
    content = (tmp_path / "key.index").read_bytes()
    (tmp_path / "key.index").unlink()
    (tmp_path / "key.part").write_bytes(content[: len(content) // 2])
    reader = shard_index(tmp_path, shard, lambda caption, meta: time.sleep(0.005))
    assert reader.wait(20) == (20, False)
    (tmp_path / "key.part").unlink()
    (tmp_path / "key.part").write_bytes(b"")
    assert reader[19].tobytes() == content[19 * index.RECORD.itemsize :][: index.RECORD.itemsize]


def test_reader_waits_between_the_files_of_two_writers(tmp_path: Path) -> None:
    """The second writer has removed the file of the first writer. It has not created its own file yet."""
    shard = write_shard(tmp_path / "0.tar", pairs(0, 4))
    reader = shard_index(tmp_path / "index", shard, lambda *args: None)
    reader.part.parent.mkdir()
    reader.part.write_bytes(b"")
    reader._look()
    reader.part.unlink()
    reader._look()
    reader._look()
    assert reader.wait(4)[0] == 4


# Folders and disks


def test_index_that_cannot_be_kept_is_no_reason_to_stop(
    urls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    unwritable = str(tmp_path / "file/below")
    for _ in range(2):
        assert counts(Source(urls, index=unwritable)) == list(SIZES)
        monkeypatch.setattr(index, "scan", no_scan)  # a process still scans a shard once
    [record] = caplog.records
    assert f"{unwritable} cannot be written (" in record.getMessage()
    assert "data.index" in record.getMessage()


def test_index_folder_may_be_removed_while_it_is_used(urls: list[str], tmp_path: Path) -> None:
    source = Source(urls, index=str(tmp_path / "index"))
    source.notes(0)
    shutil.rmtree(tmp_path / "index")
    assert source.read(0, 5)["__key__"] == "0-05"
    assert [source.notes(shard).samples for shard in (1, 2, 3)] == list(SIZES[1:])


def test_full_disk_is_one_sentence(urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index, "scan", full)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot hold the shards' indexes .*: make room, or set data\.index$"):
        Source(urls, index=str(tmp_path)).notes(0)


# Manifests and img2dataset's statistics


@pytest.mark.parametrize("made_by", ["manifest.json", "000_stats.json"])
def test_cut_shard_is_found_out_by_its_manifest(tmp_path: Path, made_by: str, caplog: pytest.LogCaptureFixture) -> None:
    """A tar that is cut between two members reads without any error. Only a sample count shows the cut."""
    shard = write_shard(tmp_path / "000.tar", pairs(0, 5))
    entry = {"samples": {"000.tar": 8}} if made_by == "manifest.json" else {"successes": 8}
    (tmp_path / made_by).write_text(json.dumps(entry))
    assert Source([shard]).notes(0) == (5, {"missing": 3}, 0)
    assert "holds 5 of its 8 samples" in caplog.text


def test_shard_of_another_length_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = Path(write_shard(tmp_path / "a.tar", pairs(0, 2)))
    (tmp_path / "manifest.json").write_text(json.dumps({"bytes": {"a.tar": shard.stat().st_size + 1}}))
    assert Source([str(shard)]).notes(0) == (2, {}, 0)
    assert "it is cut, damaged or another file" in caplog.text


def test_manifest_is_read_whatever_program_saved_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(json.dumps({"samples": {"a.tar": 9}}).encode("utf-16"))
    assert Source([write_shard(tmp_path / "a.tar", pairs(0, 2))]).notes(0) == (2, {"missing": 7}, 0)


@pytest.mark.parametrize("content", ["", '{"samples": {"a.tar": "3"}, "bytes": {"a.tar": null}}'])
def test_manifest_of_another_make_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert Source([write_shard(tmp_path / "a.tar", pairs(0, 2))]).notes(0) == (2, {}, 0)
