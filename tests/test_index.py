"""`python -m lcm.index` writes indexes ahead of a training. Its manifests reveal cut, damaged and lost shards."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from lcm import index
from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.manifest import Expected
from lcm.data.source import Source
from lcm.index import scan, verify, write_manifests
from tests.data.conftest import SIZES, pairs, png, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [Path(write_shard(tmp_path / f"{n:03d}.tar", pairs(n, size))) for n, size in enumerate(SIZES)]


def listed(shards: list[Path], **options: str) -> list[tuple[Source, int]]:
    source = Source([str(shard) for shard in shards], **options)
    return [(source, shard) for shard in range(len(shards))]


def made(shards: list[Path]) -> dict[str, dict[str, object]]:
    assert write_manifests(listed(shards)) == []
    return json.loads(shards[0].with_name("manifest.json").read_text())


def verified(shards: list[Path]) -> list[str]:
    return verify(listed(shards))


def notes(shards: list[Path]) -> list[tuple[int, dict[str, int]]]:
    return [source.notes(shard)[:2] for source, shard in listed(shards)]


def cut(shard: Path, key: str) -> None:
    """Cut the shard at the beginning of a member. A reader sees no error there."""
    with tarfile.open(shard) as tar:
        offset = tar.getmember(f"{key}.png").offset
    os.truncate(shard, offset)


def flip(shard: Path, key: str) -> None:
    """Flip one bit of an image."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        content[tar.getmember(f"{key}.png").offset_data + 20] ^= 4
    shard.write_bytes(content)


def test_manifest_agrees_with_coreutils(shards: list[Path]) -> None:
    content = made(shards)
    assert list(content["samples"].values()) == list(SIZES)
    assert content["bytes"] == {shard.name: shard.stat().st_size for shard in shards}
    lines = subprocess.run(["sha256sum", *shards], capture_output=True, text=True, check=True).stdout.splitlines()
    assert list(content["sha256"].values()) == [line.split()[0] for line in lines]
    assert verified(shards) == []
    assert notes(shards) == [(size, {}) for size in SIZES]


def test_cut_and_damaged_shards_are_named(shards: list[Path]) -> None:
    made(shards)
    cut(shards[1], "1-06")
    flip(shards[2], "2-03")
    flaws = verified(shards)
    assert [flaw.partition(":")[0] for flaw in flaws] == [str(shards[1]), str(shards[2])]
    assert "bytes instead of" in flaws[0]
    assert "another sha256" in flaws[1]
    assert notes(shards)[1] == (6, {"missing": 6})


def test_lost_and_unlisted_shards_are_named(shards: list[Path], tmp_path: Path) -> None:
    made(shards[:3])
    shards[1].unlink()
    flaws = verified([shards[0], *shards[2:]])
    assert flaws == [f"{shards[3]}: not in manifest.json", f"{shards[1]}: it is not there"]


def test_lost_shard_is_named_when_training_starts(shards: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    made(shards)
    for lost in (False, True):
        data = ShardDataModule(f"{shards[0].parent}/*.tar", resolution=8, num_workers=0)
        data.setup("fit")
        assert (f"do not exist, such as {shards[2]}" in caplog.text) == lost
        shards[2].unlink(missing_ok=True)


def test_only_new_or_changed_shards_are_measured(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(shards[:3])
    write_shard(shards[1], pairs(1, 20))
    measured: list[Path] = []
    original = index.measure
    monkeypatch.setattr(index, "measure", lambda path, *args: (measured.append(path), original(path, *args))[1])
    again = made(shards)
    assert sorted(measured) == [shards[1], shards[3]]
    assert again["samples"] == {**first["samples"], "001.tar": 20, "003.tar": SIZES[3]}
    assert verified(shards) == []


@pytest.mark.parametrize("known_by", ["manifest", "img2dataset", "itself"])
def test_cut_shard_does_not_become_the_expected_one(shards: list[Path], known_by: str) -> None:
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
    [flaw] = write_manifests(listed(shards))
    assert flaw.startswith(f"{shard}: it {'ends within a sample' if known_by == 'itself' else 'holds 6 of its 12 samples'}")
    assert [flaw.partition(":")[0] for flaw in verified(shards)] == [str(shard)]


def test_other_content_of_a_manifest_stays(shards: list[Path]) -> None:
    shards[0].with_name("manifest.json").write_text('{"settings": {"style": "color"}, "samples": {"other.tar": 3}}')
    content = made(shards)
    assert content["settings"] == {"style": "color"}
    assert content["samples"]["other.tar"] == 3


def test_left_out_samples_are_counted_in_a_manifest(tmp_path: Path) -> None:
    shard = Path(write_shard(tmp_path / "a.tar", [*pairs(0, 3), {"__key__": "bare", "png": png()}]))
    assert made([shard])["samples"] == {"a.tar": 4}
    assert notes([shard]) == [(3, {"no_caption": 1})]


def test_stopped_run_keeps_measured_shards(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(path: Path, *_: object) -> Expected:
        if path == shards[2]:
            raise KeyboardInterrupt
        return Expected(1, 2, "3")

    monkeypatch.setattr(index, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        write_manifests(listed(shards))
    assert set(json.loads(shards[0].with_name("manifest.json").read_text())["samples"]) == {"000.tar", "001.tar"}


def test_stopped_run_forgets_no_changed_shard(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made(shards)
    flip(shards[2], "2-03")  # the size stays, and the stopped run writes a newer manifest
    with monkeypatch.context() as patch:
        patch.setattr(index, "each", lambda *_: (_ for _ in ()))
        write_manifests(listed(shards))
    assert verified(shards) == [f"{shards[2]}: not in manifest.json"]
    made(shards)
    assert verified(shards) == []


def test_unwritable_folder_and_remote_shards_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to"):
        index.save(tmp_path / "nowhere", {})
    with pytest.raises(UserError, match=r"0\.tar is remote: write the manifest where the shards lie"):
        write_manifests([(Source(["https://host/0.tar"]), 0)])


def test_scan_writes_indexes_that_a_training_finds(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_shard(shards[1], [*pairs(1, 3), {"__key__": "bare", "png": png()}])
    scan(listed(shards, index=str(tmp_path / "index")), 2)
    out = capsys.readouterr().out
    assert f"(4 shards, {sum(SIZES) - SIZES[1] + 3} usable samples)" in out
    assert "1 left out: no_caption (it has no text under the names of data.captions)" in out
    monkeypatch.setattr(Source, "_open", lambda *_: pytest.fail("opened"))
    source = Source([str(shard) for shard in shards], index=str(tmp_path / "index"))
    assert [source.notes(shard).samples for shard in range(4)] == [SIZES[0], 3, *SIZES[2:]]
