"""Remote shards without a cache on a disk pass through memory. The last process of a node leaves no shard there."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data import memory
from lcm.data.cache import ShardCache
from lcm.data.datamodule import ShardDataModule
from lcm.data.memory import MemoryCache, hold
from lcm.data.source import Source
from tests.data.conftest import keys, stream, take
from tests.data.test_cache import Server, failing, serving, write_large

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create")
LANES = 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from serving(tmp_path, True)


@pytest.fixture
def shards(tmp_path: Path, server: Server) -> list[str]:
    return write_large(tmp_path, server, 15)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use `tmp_path` in place of /dev/shm. Release the held folders after the test."""
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(memory, "held", {})
    (tmp_path / "memory").mkdir()
    yield tmp_path / f"memory/lcm-{os.getuid()}"
    for opened in memory.held.values():
        os.close(opened)
    memory.held.clear()


def shard_count(folder: Path) -> int:
    return len(list(folder.glob("*.tar")))


def fetches(server: Server) -> int:
    """Return how often a shard was fetched from its beginning."""
    return sum(start == 0 and path.endswith(".tar") for path, start in server.asked)


def gone(folder: Path) -> bool:
    for _ in range(500):
        if not folder.exists():
            return True
        time.sleep(0.01)
    return False


def test_order_is_that_of_local_shards(server: Server, shards: list[str], tmp_path: Path, folder: Path) -> None:
    local = [str(tmp_path / "www" / url.rpartition("/")[2]) for url in shards]
    batches = 2 * 15 * 40 // 12  # two epochs
    options = {"lanes": LANES, "batch_size": 12}
    streamed = take(stream(Source(shards), **options), batches, workers=2)
    assert keys(streamed) == keys(take(stream(local, **options), batches))
    # A lane still has the last two shards of its first epoch. Its second epoch may begin with one of them.
    assert 2 * 15 - 2 * LANES <= fetches(server) <= 2 * 15 + LANES
    assert shard_count(folder) <= 4 * LANES


def test_a_lane_keeps_three_shards(shards: list[str], folder: Path) -> None:
    source = Source(shards)
    batches = iter(stream(source, lanes=LANES, batch_size=12))
    for _ in range(15 * 40 // 12):
        next(batches)
        assert shard_count(folder) <= 3 * LANES
        assert len(source.files) <= 3 * LANES


def test_resume_is_as_with_a_cache(server: Server, shards: list[str], tmp_path: Path) -> None:
    index, options = str(tmp_path / "index"), {"lanes": LANES, "batch_size": 12}
    straight = keys(take(stream(Source(shards, index=index), **options), 60))
    server.asked.clear()
    assert keys(take(stream(Source(shards, index=index), **options, start=40 * 12), 20, 2)) == straight[40 * 12 :]
    assert fetches(server) <= 4 * LANES
    cached = Source(shards, cache=ShardCache(str(tmp_path / "cache")))
    assert keys(take(stream(cached, **options, start=40 * 12), 20)) == straight[40 * 12 :]


def test_damage_costs_what_it_costs_with_a_cache(server: Server, shards: list[str], tmp_path: Path) -> None:
    server.answers["large-1.tar"] = [failing]
    damaged = bytearray((tmp_path / "www/large-2.tar").read_bytes())
    damaged[10] ^= 4  # in the header of a picture
    (tmp_path / "www/large-2.tar").write_bytes(damaged)
    quick = {"pause": 0.01, "attempts": 2}
    cached = Source(shards, cache=ShardCache(str(tmp_path / "cache"), **quick))
    streamed = Source(shards)
    for name, value in quick.items():
        setattr(streamed.cache, name, value)
    results = [keys(take(stream(source, lanes=LANES, batch_size=12), 60)) for source in (cached, streamed)]
    assert results[0] == results[1]
    assert [source.left_out() for source in (cached, streamed)] == 2 * [{"shard": 1, "no_image": 1}]


def count(shards: list[str], index: str, results: Any) -> None:
    source = Source(shards, index=index)
    results.put([source.notes(shard).samples for shard in range(len(shards))])


def test_processes_of_a_node_fetch_a_shard_once(server: Server, shards: list[str], tmp_path: Path, folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=count, args=(shards, str(tmp_path / "index"), results)) for _ in range(3)]
    hold(folder)  # the folder stays when the first process ends
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == 3 * [15 * [40]]
    for process in processes:
        process.join()
    assert fetches(server) == 15


PROGRAM = """
import sys
from pathlib import Path
from lcm.data import memory
memory.MEMORY = Path(sys.argv[1])
from lcm.data.source import Source
from tests.data.conftest import stream
from torch.utils.data import DataLoader
batches = iter(DataLoader(stream(Source(sys.argv[2:])), batch_size=None, num_workers=1))
next(batches)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["end", "kill"])
def test_nothing_is_left_when_the_last_process_of_a_node_ends(shards: list[str], folder: Path, way: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folder.parent), *shards]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(subprocess.Popen(command, **options)) for _ in range(2)]
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == b"ready\n"
        for rank in ranks:
            assert shard_count(folder)
            if way == "kill":
                os.killpg(rank.pid, signal.SIGKILL)
            assert rank.stdin is not None
            rank.stdin.close()
            rank.wait(30)
    assert gone(folder)


def test_next_start_removes_the_folder_of_a_killed_guard(folder: Path) -> None:
    folder.mkdir()
    (folder / "old.tar").touch()
    hold(folder)
    assert list(folder.iterdir()) == []
    (folder / "new.tar").touch()
    memory.held.clear()  # the next call acts as another process, while the handle of this process is open
    hold(folder)
    assert shard_count(folder) == 1


def test_shards_that_do_not_fit_are_one_sentence_before_training(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SHARE", 0.0)
    data = ShardDataModule(shards, resolution=8, num_workers=0, lanes=2)
    with pytest.raises(
        UserError, match=r"^data\.cache=null keeps up to 6 shards in memory, such as http.*set a smaller data\."
    ):
        data.setup()


def test_system_without_such_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^data\.cache=null streams remote shards .* \(No such file or directory\): choose da"):
        MemoryCache()
    (tmp_path / "nowhere").mkdir()
    folder = tmp_path / f"nowhere/lcm-{os.getuid()}"
    folder.symlink_to(tmp_path)  # another user may have created this link
    with pytest.raises(UserError, match=r"^data\.cache=null streams remote shards"):
        MemoryCache()
