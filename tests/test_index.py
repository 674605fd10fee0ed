"""A manifest finds out a cut, a damaged and a lost shard."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from lcm.manifest import verify, write

from lcm import manifest
from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.source import Facts, Source
from tests.data.conftest import SIZES, pairs, png, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [Path(write_shard(tmp_path / f"{n:03d}.tar", pairs(n, size))) for n, size in enumerate(SIZES)]


def made(shards: list[Path]) -> dict[str, dict[str, object]]:
    assert write(shards[0].parent, shards) == []
    return json.loads(shards[0].with_name("manifest.json").read_text())


def verified(shards: list[Path]) -> list[str]:
    return verify(Source([str(shard) for shard in shards]))


def facts(shards: list[Path]) -> list[Facts]:
    return Source([str(shard) for shard in shards]).facts()


def cut(shard: Path, key: str) -> None:
    """At the beginning of a member: no reader sees an error."""
    with tarfile.open(shard) as tar:
        at = tar.getmember(f"{key}.png").offset
    os.truncate(shard, at)


def flip(shard: Path, key: str) -> None:
    """One bit within an image."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        content[tar.getmember(f"{key}.png").offset_data + 20] ^= 4
    shard.write_bytes(content)


def test_a_manifest_says_what_coreutils_and_tar_say(shards: list[Path]) -> None:
    content = made(shards)
    assert list(content["samples"].values()) == list(SIZES)
    assert content["bytes"] == {shard.name: shard.stat().st_size for shard in shards}
    lines = subprocess.run(["sha256sum", *shards], capture_output=True, text=True, check=True).stdout.splitlines()
    assert list(content["sha256"].values()) == [line.split()[0] for line in lines]
    assert verified(shards) == []
    assert facts(shards) == [Facts(size, {}) for size in SIZES]


def test_a_cut_and_a_damaged_shard_are_named(shards: list[Path]) -> None:
    made(shards)
    cut(shards[1], "1-06")
    flip(shards[2], "2-03")
    flaws = verified(shards)
    assert [flaw.partition(":")[0] for flaw in flaws] == [str(shards[1]), str(shards[2])]
    assert "bytes instead of" in flaws[0]
    assert "another sha256" in flaws[1]
    assert facts(shards)[1] == Facts(6, {"missing": 6})


def test_lost_and_unlisted_shards_are_named(shards: list[Path], tmp_path: Path) -> None:
    made(shards[:3])
    shards[1].unlink()
    flaws = verified([shards[0], *shards[2:]])
    assert flaws == [f"{shards[3]}: not in manifest.json", f"{shards[1]}: it is not there"]


def test_a_lost_shard_is_missed_when_training_starts(shards: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    made(shards)
    for lost in (False, True):
        data = ShardDataModule(f"{shards[0].parent}/*.tar", resolution=8, num_workers=0)
        data.setup("fit")
        assert (f"not there, such as {shards[2]}" in caplog.text) == lost
        shards[2].unlink(missing_ok=True)


def test_only_what_is_new_or_changed_is_measured_again(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(shards[:3])
    write_shard(shards[1], pairs(1, 20))
    measured: list[Path] = []
    original = manifest.measure
    monkeypatch.setattr(manifest, "measure", lambda shard, said: (measured.append(shard), original(shard, said))[1])
    again = made(shards)
    assert sorted(measured) == [shards[1], shards[3]]
    assert again["samples"] == {**first["samples"], "001.tar": 20, "003.tar": SIZES[3]}
    assert verified(shards) == []


@pytest.mark.parametrize("known_by", ["manifest", "img2dataset", "itself"])
def test_a_shard_that_is_cut_does_not_become_what_is_expected(shards: list[Path], known_by: str) -> None:
    shard = shards[1]
    if known_by == "manifest":
        made(shards)
    if known_by == "img2dataset":
        shard.with_name("001_stats.json").write_text(json.dumps({"successes": SIZES[1]}))
    if known_by == "itself":
        with tarfile.open(shard) as tar:
            os.truncate(shard, tar.getmember("1-06.png").offset_data + 10)
    else:
        cut(shard, "1-06")
    [flaw] = write(shard.parent, shards)
    assert flaw.startswith(f"{shard}: it {'ends within a sample' if known_by == 'itself' else 'holds 6 of its 12 samples'}")
    assert [flaw.partition(":")[0] for flaw in verified(shards)] == [str(shard)]


def test_what_others_wrote_in_a_manifest_stays(shards: list[Path]) -> None:
    shards[0].with_name("manifest.json").write_text('{"settings": {"style": "color"}, "samples": {"other.tar": 3}}')
    content = made(shards)
    assert content["settings"] == {"style": "color"}
    assert content["samples"]["other.tar"] == 3


def test_samples_that_a_reader_leaves_out_are_counted_too(tmp_path: Path) -> None:
    shard = Path(write_shard(tmp_path / "a.tar", [*pairs(0, 3), {"__key__": "bare", "png": png()}]))
    assert made([shard])["samples"] == {"a.tar": 4}
    assert facts([shard]) == [Facts(3, {"no_caption": 1})]


def test_what_was_measured_is_kept_when_it_is_stopped(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shard: Path, said: object) -> manifest.Expected:
        if shard == shards[2]:
            raise KeyboardInterrupt
        return manifest.Expected(1, 2, "3")

    monkeypatch.setattr(manifest, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        write(shards[0].parent, shards)
    assert set(json.loads(shards[0].with_name("manifest.json").read_text())["samples"]) == {"000.tar", "001.tar"}


def test_a_changed_shard_is_not_forgotten_by_a_stopped_run(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made(shards)
    flip(shards[2], "2-03")  # of the same size, and older than what the stopped run writes
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "each", lambda *_: (_ for _ in ()))
        write(shards[0].parent, shards)
    assert verified(shards) == [f"{shards[2]}: not in manifest.json"]
    made(shards)
    assert verified(shards) == []


def test_what_cannot_be_read_or_written_is_said(shards: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder.tar"
    folder.mkdir()
    assert write(tmp_path, [*shards, folder]) == [f"{folder}: it cannot be read (Is a directory)"]
    with pytest.raises(UserError, match="cannot write to"):
        manifest.save(tmp_path / "nowhere", {})
