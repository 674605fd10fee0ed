"""A node fetches a remote shard once, in parts. Its processes read the shard during the download. Commands give shards, too."""

import contextlib
import errno
import gc
import hashlib
import json
import multiprocessing
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import webdataset

from lcm.core.errors import UserError
from lcm.data.cache import ShardCache
from lcm.data.datamodule import ShardDataModule
from lcm.data.fetch import connect
from lcm.data.filters import Filters
from lcm.data.source import Source
from tests.data.conftest import SIZES, keys, pairs, stream, take, write_shard

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create")
Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


class Server:
    """An HTTP server on loopback.

    answers: the answers to the GET requests of each path, in order. The last answer repeats.
    asked: (path, first byte) of each GET request. sent: the bytes of all bodies.
    """

    def __init__(self, root: Path, ranges: bool) -> None:
        self.asked: list[tuple[str, int]] = []
        self.sent = 0
        self.answers: dict[str, list[Answer]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                file = root / self.path.lstrip("/").partition("?")[0]
                span = re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if ranges else None
                outer.asked.append((self.path, int(span[1]) if span else 0))
                queue = outer.answers.get(self.path.lstrip("/"), [whole])
                answer = queue.pop(0) if len(queue) > 1 else queue[0]
                if not file.is_file():
                    self.send_error(404)
                    return
                content = file.read_bytes()
                if answer is whole and span:
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(content)}")
                    content = content[int(span[1]) : int(span[2]) + 1]
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                else:
                    answer(self, content)
                outer.sent += len(content)

            def do_HEAD(self) -> None:
                file = root / self.path.lstrip("/").partition("?")[0]
                if not ranges or not file.is_file():
                    self.send_error(405)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(file.stat().st_size))
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def starts(self, path: str) -> list[int]:
        return [start for asked, start in self.asked if asked == path]


def whole(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    with contextlib.suppress(OSError):  # a client that needs only the length closes the connection
        handler.wfile.write(content)


def dropped(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Close the connection after half of the content."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.connection.close()


def stalled(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Send the headers but no content. The connection stays open."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    threading.Event().wait(1.5)


def failing(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(503)


def unending(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Send zeros without a length until the client closes the connection."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(2**20))


def cut(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    whole(handler, content[: len(content) // 2])


def flipped(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    whole(handler, content[:600] + bytes([content[600] ^ 4]) + content[601:])


def serving(tmp_path: Path, ranges: bool) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    for number in range(3):
        write_shard(tmp_path / f"www/{number}.tar", pairs(number, 8))
    server = Server(tmp_path / "www", ranges)
    yield server
    server.http.shutdown()
    server.http.server_close()
    gc.collect()  # also closes the HTTP clients, because a later test may need few open files


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Server]:
    """Start a server that refuses HEAD requests and ignores ranges."""
    yield from serving(tmp_path, False)


@pytest.fixture
def ranged(tmp_path: Path) -> Iterator[Server]:
    yield from serving(tmp_path, True)


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    yield from serving(tmp_path, request.param)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("fetch.FIRST_PART", 4096), ("fetch.LARGEST_PART", 16384), ("cache.AHEAD", 16384)):
        monkeypatch.setattr(f"lcm.data.{name}", size)


def cache(tmp_path: Path, **options: Any) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"), **{"pause": 0.01, "timeout": 0.5, "attempts": 3, **options})


def fetched(cache: ShardCache, url: str) -> bytes:
    with contextlib.closing(cache.open(url)) as file:
        assert file.size() == Path(file.path).stat().st_size
        return Path(file.path).read_bytes()


def leftovers(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "cache").iterdir() if file.suffix not in (".lock", ".failed", ".asked")]


def counts(source: Source) -> list[int]:
    return [source.notes(shard).samples for shard in range(len(source.urls))]


# Downloads


@pytest.mark.parametrize("trouble", [dropped, stalled, failing])
def test_download_is_tried_again(plain: Server, tmp_path: Path, trouble: Answer) -> None:
    plain.answers["0.tar"] = [trouble, trouble, whole]
    assert fetched(cache(tmp_path), f"{plain.url}/0.tar") == (tmp_path / "www/0.tar").read_bytes()


def test_download_goes_on_at_its_byte(ranged: Server, tmp_path: Path, small_parts: None) -> None:
    ranged.answers["0.tar"] = [whole, whole, failing, dropped, whole, failing, whole]
    content = (tmp_path / "www/0.tar").read_bytes()
    assert fetched(cache(tmp_path), f"{ranged.url}/0.tar") == content
    starts = ranged.starts("/0.tar")
    assert starts[:3] == [0, 4096, 12288]
    assert all(start >= 12287 for start in starts[3:])  # a new attempt requests only one byte again


@pytest.mark.parametrize("arrived", [0.9, 1.0])
def test_download_of_a_killed_process_goes_on(server: Server, tmp_path: Path, arrived: float) -> None:
    content = (tmp_path / "www/0.tar").read_bytes()
    first = cache(tmp_path).open(f"{server.url}/1.tar")
    partial = first.part.with_name(hashlib.sha256(f"{server.url}/0.tar".encode()).hexdigest()[:32] + first.part.suffix)
    partial.write_bytes(content[: int(arrived * len(content))])
    assert fetched(cache(tmp_path), f"{server.url}/0.tar") == content


def test_download_that_never_succeeds_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.answers["0.tar"] = [dropped]
    with pytest.raises(OSError, match=r"0\.tar"):
        fetched(cache(tmp_path), f"{server.url}/0.tar")
    assert not leftovers(tmp_path)


def count_samples(shards: list[str], folder: Path, results: Any) -> None:
    results.put(counts(Source(shards, cache=cache(folder), index=str(folder / "index"))))


def test_processes_of_a_node_fetch_a_shard_once(ranged: Server, tmp_path: Path, small_parts: None) -> None:
    results = fork.Queue()
    shards = [f"{ranged.url}/{number}.tar" for number in range(3)]
    processes = [fork.Process(target=count_samples, args=(shards, tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == 3 * [[8, 8, 8]]
    for process in processes:
        process.join()
    for number in range(3):
        assert len(set(ranged.starts(f"/{number}.tar"))) == len(ranged.starts(f"/{number}.tar")) > 2


def test_caches_of_a_process_fetch_a_shard_once(ranged: Server, tmp_path: Path, small_parts: None) -> None:
    """Training and evaluation may fetch a shard in two threads of a process. A POSIX lock does not exclude them."""
    shards = [f"{ranged.url}/{number}.tar" for number in range(3)]
    sources = [Source(shards, cache=cache(tmp_path), index=str(tmp_path / "index")) for _ in range(6)]
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda source=source: results.append(counts(source))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == 6 * [[8, 8, 8]]
    for number in range(3):
        assert len(set(ranged.starts(f"/{number}.tar"))) == len(ranged.starts(f"/{number}.tar"))


def collect(clients: list[Any], results: Any) -> None:
    clients.clear()
    started = time.monotonic()
    gc.collect()
    results.put(time.monotonic() - started)


def test_child_process_does_not_close_the_clients_of_its_parent(ranged: Server) -> None:
    """Closing a client in the child would take a second. The event loop of the clients runs only in the parent."""
    clients, results = [connect(f"{ranged.url}/0.tar", 1.0)[0] for _ in range(12)], fork.Queue()
    for client in clients:
        client.info(f"{ranged.url}/0.tar")
    process = fork.Process(target=collect, args=(clients, results))
    process.start()
    assert results.get(timeout=60) < 6
    process.join()


def test_shards_of_one_name_do_not_mix(plain: Server, tmp_path: Path) -> None:
    (tmp_path / "www/other").mkdir()
    write_shard(tmp_path / "www/other/0.tar", pairs(9, 2))
    assert counts(Source([f"{plain.url}/{name}" for name in ("0.tar", "other/0.tar")], cache=cache(tmp_path))) == [8, 2]


def test_no_secret_of_a_url_reaches_a_message(plain: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain.answers["0.tar?token=hunter2"] = [failing]
    with pytest.raises(OSError, match=r"0\.tar") as caught:
        fetched(cache(tmp_path), f"{plain.url}/0.tar?token=hunter2")
    assert "hunter2" not in str(caught.value) + caplog.text
    assert "attempt 1 of 3" in caplog.text


# Start and resume


def write_large(tmp_path: Path, server: Server, count: int) -> list[str]:
    """Write shards of 40 samples of 10 kB, and return their URLs."""
    for number in range(count):
        samples = [{**sample, "png": sample["png"] + bytes(10_000)} for sample in pairs(number, 40)]
        write_shard(tmp_path / f"www/large-{number}.tar", samples)
    return [f"{server.url}/large-{number}.tar" for number in range(count)]


@pytest.fixture
def large(tmp_path: Path, server: Server) -> list[str]:
    return write_large(tmp_path, server, 12)


def paths_asked(server: Server) -> set[str]:
    return {path for path, _ in server.asked if path.endswith(".tar")}


def test_first_batch_needs_the_beginnings_of_the_first_shards(
    server: Server, large: list[str], tmp_path: Path, small_parts: None, request: pytest.FixtureRequest
) -> None:
    size = (tmp_path / "www/large-0.tar").stat().st_size
    [batch] = take(stream(Source(large, cache=cache(tmp_path)), lanes=3, batch_size=6, shuffle=4), 1)
    asked = paths_asked(server)
    assert {path.removeprefix("/large-").removesuffix(".tar") for path in asked} == {key.split("-")[0] for key in batch["keys"]}
    assert len(asked) == 3
    if "no ranges" not in request.node.name:
        assert server.sent < 3 * size / 2


def test_resume_fetches_no_shard_that_it_passes(ranged: Server, tmp_path: Path) -> None:
    large = write_large(tmp_path, ranged, 12)
    index = str(tmp_path / "index")
    straight = take(stream(Source(large, cache=cache(tmp_path), index=index), lanes=3, batch_size=6), 74)
    ranged.asked.clear()
    source = Source(large, cache=ShardCache(str(tmp_path / "other")), index=index)
    assert take(stream(source, lanes=3, batch_size=6, start=72 * 6), 1) == straight[72:73]
    assert len(paths_asked(ranged)) <= 6  # the current shard and the next shard of each lane


def test_remote_stream_is_the_local_one(ranged: Server, tmp_path: Path) -> None:
    large = write_large(tmp_path, ranged, 12)
    local = [str(tmp_path / f"www/large-{number}.tar") for number in range(12)]
    remote = Source(large, cache=cache(tmp_path))
    assert take(stream(remote, lanes=3, batch_size=16), 40, workers=2) == take(stream(local, lanes=3, batch_size=16), 40)


# Dead shards


@pytest.mark.parametrize("workers", [0, 2])
def test_dead_shard_is_empty_and_named_once(
    plain: Server, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source([f"{plain.url}/{number}.tar" for number in range(3)], cache=cache(tmp_path))
    plain.answers["1.tar"] = [failing]
    batches = take(stream(source, batch_size=4), 20, workers)
    assert {key[0] for key in keys(batches)} == {"0", "2"}
    assert not any(batch["skipped"] for batch in batches)
    assert len(plain.starts("/1.tar")) == 3
    if not workers:
        assert caplog.text.count(f"leaving out shard {plain.url}/1.tar") == 1


def is_dead(cache: ShardCache, url: str, results: Any) -> None:
    results.put(Source([url], cache=cache).usable(0, 1))


def test_dead_shard_is_tried_once_by_all_processes_and_again_by_the_next_training(plain: Server, tmp_path: Path) -> None:
    plain.answers["1.tar"] = [failing]
    training, results, url = cache(tmp_path), fork.Queue(), f"{plain.url}/1.tar"
    for _ in range(2):
        process = fork.Process(target=is_dead, args=(training, url, results))
        process.start()
        assert results.get(timeout=30) == (0, True)
        process.join()
        assert len(plain.starts("/1.tar")) == 3
    plain.answers["1.tar"] = [whole]
    time.sleep(0.05)  # the next training starts after the marker of the dead shard was written
    assert counts(Source([url], cache=cache(tmp_path))) == [8]


# Size limit


def test_cache_removes_what_was_used_longest_ago(plain: Server, tmp_path: Path) -> None:
    size = (tmp_path / "www/0.tar").stat().st_size
    small = cache(tmp_path, max_gb=2.5 * size / 1e9)
    for number in (0, 1, 0, 2):
        fetched(small, f"{plain.url}/{number}.tar")
        time.sleep(0.02)
    assert len(leftovers(tmp_path)) == 2
    plain.asked.clear()
    for number in (0, 2):
        fetched(cache(tmp_path), f"{plain.url}/{number}.tar")
    assert plain.asked == []


def test_removed_shard_is_read_on_and_fetched_again(plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may remove files at the same time."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [*glob(path, pattern), path / "evicted.tar"])
    content, shared = (tmp_path / "www/0.tar").read_bytes(), cache(tmp_path)
    source = Source([f"{plain.url}/{number}.tar" for number in range(2)], cache=shared)
    open_file = shared.open(source.urls[0])
    assert counts(source) == [8, 8]
    assert source.read(0, 0)["txt"] == b"sample 0 of 0"
    assert open_file.size() == len(content)
    for file in (tmp_path / "cache").glob("*.tar"):
        file.unlink(missing_ok=True)
    assert source.read(0, 1)["txt"] == b"sample 1 of 0"
    assert open_file.read(0, len(content)) == content
    source.close()
    assert source.read(0, 2)["txt"] == b"sample 2 of 0"


@pytest.mark.parametrize("trouble", [whole, unending])
def test_shard_larger_than_the_cache_is_asked_for_once_and_leaves_nothing(
    plain: Server, tmp_path: Path, trouble: Answer
) -> None:
    plain.answers["0.tar"] = [trouble]
    with pytest.raises(OSError, match=r"0\.tar: TooLarge: it is larger than the 8e-06 GB that the cache may hold"):
        fetched(cache(tmp_path, max_gb=8e-6), f"{plain.url}/0.tar")
    assert plain.asked == [("/0.tar", 0)]
    assert not leftovers(tmp_path)


# Manifests


def entry(file: Path) -> dict[str, Any]:
    size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    return {"samples": {file.name: 8}, "bytes": {file.name: size}, "sha256": {file.name: digest}}


def test_download_is_checked_against_the_manifest(plain: Server, tmp_path: Path) -> None:
    """A proxy may answer with another file and the right length. Only the manifest shows this error."""
    (tmp_path / "www/manifest.json").write_text(json.dumps(entry(tmp_path / "www/0.tar")))
    plain.answers["0.tar"] = [flipped, whole]
    source = Source([f"{plain.url}/{n}.tar" for n in (0, 1)], cache=cache(tmp_path), filters=Filters())
    assert Path(source.local_path(0)).read_bytes() == (tmp_path / "www/0.tar").read_bytes()
    assert counts(source) == [8, 8]


@pytest.mark.parametrize("trouble", [cut, flipped])
def test_shard_that_never_is_what_its_manifest_says_is_left_out(
    plain: Server, tmp_path: Path, trouble: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "www/manifest.json").write_text(json.dumps(entry(tmp_path / "www/0.tar")))
    plain.answers["0.tar"] = [trouble]
    source = Source([f"{plain.url}/{n}.tar" for n in (0, 1)], cache=cache(tmp_path), filters=Filters())
    assert [source.notes(shard)[:2] for shard in (0, 1)] == [(0, {"shard": 1}), (8, {})]
    assert "bytes instead of" in caplog.text or "another sha256" in caplog.text
    assert len(plain.starts("/0.tar")) == 3


def test_manifest_that_cannot_be_had_is_named(plain: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content, answer in (({}, failing), ([], whole)):
        (tmp_path / "www/manifest.json").write_text(json.dumps(content))
        plain.answers["manifest.json"] = [answer]
        caplog.clear()
        assert counts(Source([f"{plain.url}/0.tar"], cache=cache(tmp_path))) == [8]
        assert ("manifest.json cannot be read" in caplog.text) == (answer is failing)


# The folder


def test_cache_that_cannot_be_written_is_one_sentence(plain: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unwritable = str(tmp_path / "file/below")
    with pytest.raises(UserError, match=rf"^cannot write to {unwritable} \(.*\): set data\.cache\.folder or paths\.data to a"):
        Source([f"{plain.url}/0.tar"], cache=ShardCache(unwritable)).check()


def test_cache_that_can_only_be_read_serves_what_it_has(plain: Server, tmp_path: Path) -> None:
    content = fetched(cache(tmp_path), f"{plain.url}/0.tar")
    lock = next((tmp_path / "cache").glob("*.lock"))
    lock.unlink()
    lock.mkdir()  # even root cannot open a folder as the lock file
    assert fetched(cache(tmp_path), f"{plain.url}/0.tar") == content


def test_cache_without_file_handles_for_a_moment_is_tried_again(
    plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcm.data.source.PAUSES", (0, 0))
    failures = [errno.EMFILE, errno.ESTALE]

    def scarce(*args: Any, **options: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "not now")
        return open(*args, **options)

    monkeypatch.setattr("lcm.data.growing.open", scarce, raising=False)
    assert counts(Source([f"{plain.url}/0.tar"], cache=cache(tmp_path))) == [8]


def test_full_disk_is_one_sentence_and_no_damage(plain: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lcm.data.cache.check_size", full)
    source = Source([f"{plain.url}/0.tar"], cache=cache(tmp_path))
    with pytest.raises(UserError, match=r"cache cannot hold the shards that are read now \(No space left on device\): make"):
        source.usable(0, 1)
    assert source.empty == set()


# Commands


def test_output_of_a_command_is_a_shard(urls: list[str], tmp_path: Path) -> None:
    commands = [f"pipe:cat {url}" for url in urls]
    for _ in range(2):  # the second pass reads the indexes: each command has its own
        assert counts(Source(commands, cache=cache(tmp_path), index=str(tmp_path / "index"))) == list(SIZES)


def test_data_option_allows_commands(urls: list[str], tmp_path: Path) -> None:
    folder = Path(urls[0]).parent
    data = ShardDataModule(
        [f"pipe:cat {folder}/{{000..003}}.tar"], allow_pipe=True, cache=cache(tmp_path), resolution=8, num_workers=0
    )
    data.setup()
    assert counts(data.train_sources[0]) == list(SIZES)


def test_there_is_no_shell_but_one_that_is_asked_for(urls: list[str], tmp_path: Path) -> None:
    harmless = f"pipe:echo ; touch {tmp_path}/ran | cat $(touch {tmp_path}/ran)"
    assert fetched(cache(tmp_path), harmless).startswith(b"; touch")
    assert not (tmp_path / "ran").exists()
    content = fetched(cache(tmp_path), f"pipe:sh -c 'gzip < {urls[0]} | gunzip'")
    assert content == Path(urls[0]).read_bytes()


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
def test_command_that_fails_is_a_failed_download(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str, says: str
) -> None:
    with pytest.raises(OSError, match=says) as caught:
        fetched(cache(tmp_path, attempts=2, timeout=30), f"pipe:{command}")
    assert "attempt 1 of 2" in caplog.text
    assert "hunter2" not in caplog.text + str(caught.value)
    assert not leftovers(tmp_path)


def test_silent_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    command = f"sh -c 'echo one; (sleep 2; touch {tmp_path}/alive) & sleep 60'"
    with pytest.raises(OSError, match=r"nothing came for 0\.2 seconds"):
        fetched(cache(tmp_path, attempts=1, timeout=0.2), f"pipe:{command}")
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_command_without_end_cannot_fill_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"TooLarge: it is larger than the 8e-06 GB that the cache may hold"):
        fetched(cache(tmp_path, max_gb=8e-6), "pipe:cat /dev/zero")
    assert not leftovers(tmp_path)


def test_webdataset_itself_opens_nothing() -> None:
    """webdataset would run a command through a shell."""
    with pytest.raises(ValueError, match="unsafe_gopen is False"):
        webdataset.gopen("pipe:cat /dev/null", "rb")
