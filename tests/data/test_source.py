"""Counting usable samples once, and bringing remote shards here from servers that are slow, drop or lie."""

import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import json
import lzma
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.cache import ShardCache
from lcm.data.epochs import training_order
from lcm.data.filters import Filters
from lcm.data.shards import IMAGES, LATENTS, Shard
from lcm.data.source import Facts, Source
from tests.data.conftest import SIZES, keys, pairs, png, stream, take, write_shard, write_tar

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def test_counts_are_those_of_the_shards(urls: list[str]) -> None:
    assert Source(urls).facts() == [Facts(size, {}) for size in SIZES]


def test_shards_are_counted_once(urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Source(urls, index=str(tmp_path)).facts()
    monkeypatch.setattr(Source, "open", None)  # whoever opens a shard now, fails
    assert Source(urls, index=str(tmp_path)).facts() == first


def test_what_is_measured_is_kept_beside_the_counts(urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def source(measure: Any) -> Source:
        return Source(urls, measure=measure, index=str(tmp_path))

    source(None).facts()
    [plain] = tmp_path.iterdir()
    before = plain.read_text()
    first = source(lambda sample: int(sample["__key__"][2:])).facts()
    assert first == [Facts(size, {}, bytes(range(size))) for size in SIZES]
    assert plain.read_text() == before
    monkeypatch.setattr(Source, "open", None)  # whoever opens a shard now, fails
    assert source(len).facts() == first
    assert source(None).facts() == [Facts(size, {}) for size in SIZES]


def test_a_half_written_index_is_counted_again(urls: list[str], tmp_path: Path) -> None:
    first = Source(urls, index=str(tmp_path)).facts()
    [file] = tmp_path.iterdir()
    file.write_text(file.read_text()[:-20])
    for _ in range(2):  # also where the new line was appended to the torn one
        assert Source(urls, index=str(tmp_path)).facts() == first


def test_a_changed_shard_is_counted_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", pairs(0, 3))
    assert Source([shard], index=str(tmp_path / "index")).facts()[0].samples == 3
    write_shard(tmp_path / "a.tar", pairs(0, 30))
    assert Source([shard], index=str(tmp_path / "index")).facts()[0].samples == 30


@pytest.mark.parametrize("made_by", ["manifest.json", "000_stats.json"])
def test_a_cut_shard_is_found_out_by_its_manifest(tmp_path: Path, made_by: str, caplog: pytest.LogCaptureFixture) -> None:
    """A tar cut between two members reads without any error: only a count tells."""
    shard = write_shard(tmp_path / "000.tar", pairs(0, 5))
    entry = {"samples": {"000.tar": 8}} if made_by == "manifest.json" else {"successes": 8}
    (tmp_path / made_by).write_text(json.dumps(entry))
    assert Source([shard]).facts() == [Facts(5, {"missing": 3})]
    assert "holds 5 of its 8 samples" in caplog.text


def test_a_shard_of_another_length_is_named_when_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = Path(write_shard(tmp_path / "a.tar", pairs(0, 2)))
    (tmp_path / "manifest.json").write_text(json.dumps({"bytes": {"a.tar": shard.stat().st_size + 1}}))
    assert Source([str(shard)]).facts() == [Facts(2, {})]
    assert "it is cut, damaged or another" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_manifest_is_read_whatever_program_saved_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "manifest.json").write_bytes(json.dumps({"samples": {"a.tar": 9}}).encode(encoding))
    assert Source([write_shard(tmp_path / "a.tar", pairs(0, 2))]).facts() == [Facts(2, {"missing": 7})]


@pytest.mark.parametrize("content", ["", "[]", '{"samples": 3}', '{"samples": {"a.tar": "3"}, "bytes": {"a.tar": null}}'])
def test_a_manifest_of_another_make_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert Source([write_shard(tmp_path / "a.tar", pairs(0, 2))]).facts() == [Facts(2, {})]


def test_broken_samples_are_named_when_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_shard(tmp_path / "a.tar", [*pairs(0, 2), {"__key__": "bare", "png": png()}])
    assert Source([shard]).facts() == [Facts(2, {"no_caption": 1})]
    assert f"leaving out sample bare of {shard}" in caplog.text


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"png": png()}, "no captions"),
        ({"txt": "a cat"}, "no images"),
        ({"json": {"caption": "a cat"}, "npy": b""}, "no images"),
    ],
)
def test_shards_lacking_images_or_captions_are_refused(tmp_path: Path, members: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Source([write_shard(tmp_path / "a.tar", [{"__key__": "a", **members}])]).check()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(10240)], ids=["empty", "html", "no members"])
def test_what_is_not_a_shard_is_refused(tmp_path: Path, content: bytes) -> None:
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
        (bz2.compress, r"it is compressed \(bzip2\): bunzip2 it first"),
        (lzma.compress, r"it is compressed \(xz\): unxz it first"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, r"it is compressed \(zstd\): unzstd it first"),
        (zipped, "it is a zip archive: unzip it, and pack its files with tar --sort=name"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (lambda content: png(), "it is a picture: pack it and its caption"),
        (lambda content: b"", "it is empty"),
    ],
)
def test_what_is_taken_for_a_shard_by_mistake_is_named(tmp_path: Path, pack: Any, says: str) -> None:
    shard = Path(write_shard(tmp_path / "a.tar", pairs(0, 2)))
    shard.write_bytes(pack(shard.read_bytes()))
    with pytest.raises(UserError, match=f"a.tar is not a readable webdataset shard: {says}"):
        Source([str(shard)]).check()


@pytest.mark.parametrize("links", ["png txt", "png"])
def test_a_shard_of_links_is_told_how_to_pack(tmp_path: Path, links: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("png", "txt"):
            info = tarfile.TarInfo(f"0.{name}")
            if name in links:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    with pytest.raises(UserError, match="tar --dereference"):
        Source([str(tmp_path / "a.tar")]).check()


def test_kinds_of_members_are_listed_in_short(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"0.part{i}", b"") for i in range(300)])
    with pytest.raises(UserError, match=r"no images: its samples hold part0, .*, \.\.\., expected one of png") as error:
        Source([shard]).check()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("member", "needs", "says"),
    [
        ("latent.npy", IMAGES, r"holds latents, not pictures: set callbacks\.evaluation\.shards to shards of pictures"),
        ("sample.npy", IMAGES, "holds latents, not pictures"),
        ("jpg", LATENTS, "holds pictures, not latents: encode it with python -m lcm.encode, or choose data=shards"),
    ],
)
def test_latents_and_pictures_are_told_apart(tmp_path: Path, member: str, needs: tuple[str, ...], says: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"0.{member}", b""), ("0.txt", b"a cat")])
    with pytest.raises(UserError, match=says):
        Source([shard], needs=needs, option="callbacks.evaluation.shards").check()


def test_left_out_samples_are_named_a_few_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    apart = [
        write_tar(tmp_path / f"{s}.tar", [(f"{n}.{end}", png()) for end in ("png", "txt") for n in range(50)]) for s in "ab"
    ]
    source = Source(apart)
    assert [facts.dropped for facts in source.facts()] == [{"apart": 50}] * 2
    assert len(caplog.records) < 15
    assert "must follow each other under one name: pack them from one folder with tar --sort=name" in caplog.text
    with pytest.raises(UserError, match=r"no usable sample: .*'apart': 100.*; the files of a sample must follow each other"):
        training_order([source.facts()], [1.0], [], batch=4, seed=0, shuffle=4, lanes=1)


def test_samples_of_one_name_are_named_when_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Source([write_shard(tmp_path / "a.tar", [*pairs(0, 2), *pairs(0, 2)])]).facts() == [Facts(4, {})]
    assert "holds 2 samples under names that others of its samples have" in caplog.text


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_what_the_system_lacks_for_a_moment_is_no_damage(
    urls: list[str], monkeypatch: pytest.MonkeyPatch, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lcm.data.source.PAUSES", (0, 0))
    failures = [number] * 2

    def scarce(*args: Any, **options: Any) -> Shard:
        if failures:
            raise OSError(failures.pop(), "not now")
        return Shard(*args, **options)

    monkeypatch.setattr("lcm.data.source.Shard", scarce)
    assert Source(urls).facts() == [Facts(size, {}) for size in SIZES]
    failures += [number] * 100
    with pytest.raises(
        UserError, match=r"cannot be opened \(not now\): (raise the limit, `ulimit -n 4096`|run the same command)"
    ):
        Source(urls).facts()


def test_a_dead_first_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    sound = write_shard(tmp_path / "b.tar", [{"__key__": "a", "png": png(), "txt": "a cat"}])
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>")
    Source([str(tmp_path / "a.tar"), str(tmp_path / "gone.tar"), sound]).check()
    with pytest.raises(UserError, match=r"a\.tar is not a readable .*, nor can the 1 shards after it be read"):
        Source([str(tmp_path / "a.tar"), str(tmp_path / "gone.tar")]).check()


def test_shards_that_only_a_query_tells_apart_are_counted_apart() -> None:
    one, other = (Source.stamp(f"https://user:secret@host/get?shard={n}&token=secret") for n in (0, 1))
    assert one != other
    assert "secret" not in one
    assert Source.stamp("https://user:secret@host/0.tar") == "https://host/0.tar"


def test_remote_shards_need_a_cache() -> None:
    with pytest.raises(UserError, match=r"choose data=shards"):
        Source(["https://localhost/a.tar"]).check()


class Server:
    """HTTP on loopback; `answers` gives a path's behaviour, one after the other, the last one for ever."""

    def __init__(self, root: Path) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, list[Answer]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                file = root / self.path.lstrip("/").partition("?")[0]
                queue = outer.answers.get(self.path.lstrip("/"), [whole])
                answer = queue.pop(0) if len(queue) > 1 else queue[0]
                if not file.is_file():
                    self.send_error(404)
                else:
                    answer(self, file.read_bytes())

            def do_HEAD(self) -> None:
                self.send_error(405)

            def log_message(self, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def whole(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def dropped(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """The connection ends half-way."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.connection.close()


def stalled(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Nothing more comes, but the connection stays."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    threading.Event().wait(1.5)


def failing(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(503)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    for number in range(3):
        write_shard(tmp_path / f"www/{number}.tar", pairs(number, 8))
    server = Server(tmp_path / "www")
    yield server
    server.http.shutdown()


def cache(tmp_path: Path, **options: Any) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"), **{"pause": 0.01, "timeout": 0.5, "attempts": 3, **options})


@pytest.mark.parametrize("trouble", [dropped, stalled, failing])
def test_a_download_is_tried_again(server: Server, tmp_path: Path, trouble: Answer) -> None:
    server.answers["0.tar"] = [trouble, trouble, whole]
    path = cache(tmp_path).fetch(f"{server.url}/0.tar")
    assert Path(path).read_bytes() == (tmp_path / "www/0.tar").read_bytes()
    assert len(Shard(path)) == 8


@pytest.mark.parametrize("trouble", [dropped, failing])
def test_a_download_that_never_succeeds_leaves_nothing(server: Server, tmp_path: Path, trouble: Answer) -> None:
    server.answers["0.tar"] = [trouble]
    with pytest.raises(OSError, match=r"0\.tar"):
        cache(tmp_path).fetch(f"{server.url}/0.tar")
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
    assert len(server.asked) == 3


def test_a_shard_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=cache(tmp_path).fetch, args=(f"{server.url}/0.tar",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == ["/0.tar"]


def test_shards_of_one_name_do_not_mix(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www/other").mkdir()
    write_shard(tmp_path / "www/other/0.tar", pairs(9, 2))
    paths = [cache(tmp_path).fetch(f"{server.url}/{name}") for name in ("0.tar", "other/0.tar")]
    assert [len(Shard(path)) for path in paths] == [8, 2]


def test_the_cache_makes_room_for_what_is_new(server: Server, tmp_path: Path) -> None:
    size = (tmp_path / "www/0.tar").stat().st_size
    for number in range(3):
        cache(tmp_path, max_gb=2.5 * size / 1e9).fetch(f"{server.url}/{number}.tar")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_room_is_made_although_another_process_makes_it_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, known, glob = ShardCache.fetch, [], Path.glob

    def evicted_at_first(self: ShardCache, url: str, *args: Any) -> str:
        path = fetch(self, url, *args)
        if not known:
            Path(path).unlink()
        known.append(path)
        return path

    monkeypatch.setattr(ShardCache, "fetch", evicted_at_first)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [*glob(path, pattern), path / "evicted.tar"])
    assert len(Source([f"{server.url}/0.tar"], cache=cache(tmp_path)).open(0)) == 8
    assert server.asked.count("/0.tar") == 2
    with pytest.raises(FileNotFoundError):
        Source([str(tmp_path / "nowhere.tar")]).open(0)


def unending(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Without a length, as long as someone listens."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(2**20))


@pytest.mark.parametrize("trouble", [whole, unending])
def test_a_shard_larger_than_the_cache_is_asked_for_once_and_leaves_nothing(
    server: Server, tmp_path: Path, trouble: Answer
) -> None:
    server.answers["0.tar"] = [trouble]
    with pytest.raises(OSError, match=r"0\.tar: TooLarge: it is larger than 8e-06 GB, all that the cache may hold"):
        cache(tmp_path, max_gb=8e-6).fetch(f"{server.url}/0.tar")
    assert server.asked == ["/0.tar"]
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_no_secret_of_a_url_reaches_a_message(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.answers["0.tar?token=hunter2"] = [failing]
    with pytest.raises(OSError, match=r"0\.tar") as caught:
        cache(tmp_path).fetch(f"{server.url}/0.tar?token=hunter2")
    assert "hunter2" not in str(caught.value) + caplog.text
    assert "attempt 1 of 3" in caplog.text


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_stream_is_the_local_one_without_its_dead_shard(server: Server, tmp_path: Path, workers: int) -> None:
    remote = [f"{server.url}/{number}.tar" for number in (0, 1, 2)]
    source = Source(remote, cache=cache(tmp_path))
    of = stream([str(tmp_path / f"www/{number}.tar") for number in range(3)])
    of.sources, of.remote = [source], True
    server.answers["1.tar"] = [failing]
    batches = take(of, 6, workers)
    assert {key[0] for key in keys(batches)} == {"0", "2"}
    assert sum(batch["skipped"].get("shard", 0) for batch in batches) == 8


def test_counts_of_remote_shards_come_from_img2datasets_statistics(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www/0_stats.json").write_text(json.dumps({"count": 10, "successes": 8}))
    assert Source([f"{server.url}/0.tar"], cache=cache(tmp_path)).facts() == [Facts(8, {})]
    assert "/0.tar" not in server.asked


def test_remote_shards_are_measured_although_their_count_is_known(server: Server, tmp_path: Path) -> None:
    (tmp_path / "www/0_stats.json").write_text(json.dumps({"count": 10, "successes": 8}))
    assert Source([f"{server.url}/0.tar"], cache=cache(tmp_path), measure=len).facts() == [Facts(8, {}, bytes([4] * 8))]


def entry(file: Path) -> dict[str, Any]:
    size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    return {"samples": {file.name: 8}, "bytes": {file.name: size}, "sha256": {file.name: digest}}


def cut(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    whole(handler, content[: len(content) // 2])


def flipped(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    whole(handler, content[:600] + bytes([content[600] ^ 4]) + content[601:])


@pytest.mark.parametrize("trouble", [cut, flipped])
def test_a_download_is_checked_against_the_manifest(server: Server, tmp_path: Path, trouble: Answer) -> None:
    """A proxy that answers with another file, and says that this is all of it, looks like any other download."""
    (tmp_path / "www/manifest.json").write_text(json.dumps(entry(tmp_path / "www/0.tar")))
    server.answers["0.tar"] = [trouble, whole]
    source = Source([f"{server.url}/{n}.tar" for n in (0, 1)], cache=cache(tmp_path), filters=Filters())
    assert source.facts() == [Facts(8, {}), Facts(8, {})]
    assert Path(source.path(0)).read_bytes() == (tmp_path / "www/0.tar").read_bytes()


@pytest.mark.parametrize("trouble", [cut, flipped])
def test_a_remote_shard_that_never_is_what_its_manifest_says_is_left_out(
    server: Server, tmp_path: Path, trouble: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "www/manifest.json").write_text(json.dumps(entry(tmp_path / "www/0.tar")))
    server.answers["0.tar"] = [trouble]
    source = Source([f"{server.url}/{n}.tar" for n in (0, 1)], cache=cache(tmp_path), filters=Filters())
    assert source.facts() == [Facts(0, {"shard": 1}), Facts(8, {})]
    assert "bytes instead of" in caplog.text or "another sha256" in caplog.text
    assert server.asked.count("/0.tar") == 3


def test_a_manifest_that_cannot_be_had_is_missed_aloud(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for content, answer in (({}, failing), ([], whole)):
        (tmp_path / "www/manifest.json").write_text(json.dumps(content))
        server.answers["manifest.json"] = [answer]
        caplog.clear()
        assert Source([f"{server.url}/0.tar"], cache=cache(tmp_path)).facts() == [Facts(8, {})]
        assert ("manifest.json cannot be read" in caplog.text) == (answer is failing)


def test_a_dead_remote_shard_is_left_out_and_tried_again_next_time(server: Server, tmp_path: Path) -> None:
    server.answers["1.tar"] = [failing, failing, failing, whole]
    source = Source([f"{server.url}/{n}.tar" for n in (0, 1)], cache=cache(tmp_path), index=str(tmp_path / "index"))
    assert source.facts() == [Facts(8, {}), Facts(0, {"shard": 1})]
    assert source.facts() == [Facts(8, {}), Facts(8, {})]


@pytest.fixture(params=["/proc/nowhere", "file", "file/below"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "file").touch()
    return str(tmp_path / request.param)


def test_an_index_that_cannot_be_kept_is_no_reason_to_stop(
    urls: list[str], unwritable: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        source = Source(urls, index=unwritable)
        assert source.facts() == [Facts(size, {}) for size in SIZES]
    [record] = caplog.records
    assert f"{unwritable} cannot be written (" in record.getMessage()
    assert "data.index" in record.getMessage()
    monkeypatch.setattr(Source, "open", None)  # whoever opens a shard now, fails
    assert source.facts() == [Facts(size, {}) for size in SIZES]


def test_a_cache_that_cannot_be_written_is_one_sentence(server: Server, unwritable: str) -> None:
    with pytest.raises(UserError, match=rf"^cannot write to {unwritable} \(.*\): set data\.cache\.folder or paths\.data to a"):
        Source([f"{server.url}/0.tar"], cache=ShardCache(unwritable)).check()


def test_a_cache_that_can_only_be_read_serves_what_it_has(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache(tmp_path).fetch(f"{server.url}/0.tar")
    next((tmp_path / "cache").glob("*.lock")).unlink()
    next((tmp_path / "cache").iterdir()).with_suffix(".lock").mkdir()  # root may write anywhere: no file can be made here
    assert cache(tmp_path).fetch(f"{server.url}/0.tar") == path


def test_a_cache_without_file_handles_for_a_moment_is_tried_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcm.data.source.PAUSES", (0, 0))
    failures = [errno.EMFILE, errno.ESTALE]

    def scarce(*args: Any, **options: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "not now")
        return open(*args, **options)

    monkeypatch.setattr("lcm.data.cache.open", scarce, raising=False)
    assert len(Source([f"{server.url}/0.tar"], cache=cache(tmp_path)).open(0)) == 8
