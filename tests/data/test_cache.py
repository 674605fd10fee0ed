"""Shards that the user's own command prints."""

import sys
import time
from pathlib import Path

import pytest
import webdataset

from lcm.data.cache import ShardCache
from lcm.data.datamodule import ShardDataModule
from lcm.data.source import Facts, Source
from tests.data.conftest import SIZES


def cache(tmp_path: Path, attempts: int = 2, timeout: float = 5.0) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"), attempts=attempts, pause=0.01, timeout=timeout)


def test_what_a_command_prints_is_a_shard(urls: list[str], tmp_path: Path) -> None:
    commands = [f"pipe:cat {url}" for url in urls]
    for _ in range(2):  # the second time from the index: no shard is taken for another
        facts = Source(commands, cache=cache(tmp_path), index=str(tmp_path / "index")).facts()
        assert facts == [Facts(size, {}) for size in SIZES]


def test_the_flag_reaches_the_data(urls: list[str], tmp_path: Path) -> None:
    folder = Path(urls[0]).parent
    data = ShardDataModule(
        [f"pipe:cat {folder}/{{000..003}}.tar"], allow_pipe=True, cache=cache(tmp_path), resolution=8, num_workers=0
    )
    data.setup()
    assert data.sizes == [sum(SIZES)]


def test_there_is_no_shell_but_one_that_is_asked_for(urls: list[str], tmp_path: Path) -> None:
    harmless = f"pipe:echo ; touch {tmp_path}/ran | cat $(touch {tmp_path}/ran)"
    assert Path(cache(tmp_path).fetch(harmless)).read_text().startswith("; touch")
    assert not (tmp_path / "ran").exists()
    path = cache(tmp_path).fetch(f"pipe:sh -c 'gzip < {urls[0]} | gunzip'")
    assert Path(path).read_bytes() == Path(urls[0]).read_bytes()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            f"{sys.executable} -c \"import sys; print('half'); sys.exit('first\\nno hunter2 here\\n')\"",
            "exit code 1: no ... here",
        ),
        ("nowhere-to-be-found", "nowhere-to-be-found"),
        ("cat 'unclosed", "No closing quotation"),
    ],
)
def test_a_command_that_fails_is_a_failed_download(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str, says: str
) -> None:
    with pytest.raises(OSError, match=says) as caught:
        cache(tmp_path).fetch(f"pipe:{command}")
    assert "attempt 1 of 2" in caplog.text
    assert "hunter2" not in caplog.text + str(caught.value)
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_a_silent_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    command = f"sh -c 'echo one; (sleep 2; touch {tmp_path}/alive) & sleep 60'"
    with pytest.raises(OSError, match=r"nothing came for 0\.2 seconds"):
        cache(tmp_path, attempts=1, timeout=0.2).fetch(f"pipe:{command}")
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("command", ["head -c 9000 /dev/zero", "cat /dev/zero"])
def test_a_command_without_end_cannot_fill_the_disk(tmp_path: Path, command: str) -> None:
    small = ShardCache(str(tmp_path / "cache"), max_gb=8e-6, timeout=0.05)
    with pytest.raises(OSError, match=r"TooLarge: it is larger than 8e-06 GB, all that the cache may hold"):
        small.fetch(f"pipe:{command}")
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


@pytest.mark.parametrize("url", ["pipe:cat /dev/null", "a.tar"])
def test_webdataset_itself_opens_nothing(url: str) -> None:
    """It would run a command through a shell."""
    with pytest.raises(ValueError, match="unsafe_gopen is False"):
        webdataset.gopen(url, "rb")
