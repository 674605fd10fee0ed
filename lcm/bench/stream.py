"""The stream of training samples: the time to its first batch, and its rate beside webdataset's."""

import contextlib
import multiprocessing
import resource
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lcm.bench import peers
from lcm.bench.measure import Table
from lcm.bench.shards import photo_shard
from lcm.data.cache import ShardCache
from lcm.data.datamodule import ShardDataModule
from lcm.data.filters import Filters


def copies(shard: Path, folder: Path, count: int) -> Path:
    """Make a folder with `count` links to one shard, and return it."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.tar").symlink_to(shard.resolve())
    return folder


def first_batch(urls: list[str], folder: Path, *, workers: int, resolution: int) -> float:
    """Return the seconds from the shards' names to the first batch, with default filters and without any index."""
    started = time.perf_counter()
    data = ShardDataModule(
        urls,
        resolution=resolution,
        batch_size=64,
        num_workers=workers,
        filters=Filters(),
        index=str(folder / "index"),
        cache=ShardCache(str(folder / "cache")),
    )
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = time.perf_counter() - started
    del batches
    return seconds


def peer_first_batch(url: str, *, workers: int, resolution: int) -> float:
    started = time.perf_counter()
    next(peers.image_loader(url, size=resolution, batch_size=64, workers=workers))
    return time.perf_counter() - started


@contextlib.contextmanager
def server(shard: Path, latency: float) -> Iterator[tuple[str, Any]]:
    """Serve one file under every name, `latency` seconds late. Yield the address and the bytes served so far."""
    served = multiprocessing.Value("q", 0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            time.sleep(latency)
            if not self.path.endswith(".tar"):
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = shard.stat().st_size
            first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").partition("=")[2].partition("-")
            start, end = int(first), min(int(last or size - 1), size - 1)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - start + 1))
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.end_headers()
            if body:
                with shard.open("rb") as file:
                    file.seek(start)
                    self.wfile.write(file.read(end - start + 1))
                with served.get_lock():
                    served.value += end - start + 1

        def log_message(self, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    process = multiprocessing.get_context("fork").Process(target=httpd.serve_forever, daemon=True)
    process.start()
    httpd.socket.close()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", served
    finally:
        process.kill()
        process.join()


def start(*, folder: str, samples: int, size: int, resolution: int, counts: list[int], workers: int, latency: float) -> Table:
    """Measure the time to the first batch for numbers of shards, local ones and remote ones."""
    shard = Path(photo_shard(f"{folder}/crawl-{samples}-{size}.tar", count=samples, size=size, metadata=True))
    rows = []
    for count in counts:
        with TemporaryDirectory() as temporary, server(shard, latency) as (address, served):
            row: dict[str, Any] = {"shards": count}
            links = copies(shard, Path(temporary, "shards"), count)
            row["local, s"] = first_batch([f"{links}/*.tar"], Path(temporary, "local"), workers=workers, resolution=resolution)
            urls = [f"{address}/{{000000..{count - 1:06d}}}.tar"]
            row["http, s"] = first_batch(urls, Path(temporary, "http"), workers=workers, resolution=resolution)
            row["MB fetched"] = served.value / 1e6
            rows.append(row)
            print(row, flush=True)
    peer = peer_first_batch(str(shard), workers=workers, resolution=resolution)
    note = (
        f"Shards of {samples} JPEGs of {size} px ({shard.stat().st_size / 1e6:.0f} MB) decoded to {resolution} px in batches "
        f"of 64, {workers} workers, default filters, no index before. HTTP is a local server, {latency * 1000:.0f} ms late. "
        f"webdataset's first batch of one local shard takes {peer:.1f} s."
    )
    return Table("Time to the first batch", rows, note)


def rate(*, folder: str, samples: int, size: int, resolution: int, workers: list[int], shards: int, seconds: float) -> Table:
    """Measure samples/s and CPU time a sample, first without an index and then with it, beside webdataset."""
    shard = Path(photo_shard(f"{folder}/crawl-{samples}-{size}.tar", count=samples, size=size, metadata=True))
    rows = []
    with TemporaryDirectory() as temporary:
        links = copies(shard, Path(temporary, "shards"), shards)
        for count in workers:
            row: dict[str, Any] = {"workers": count}
            index = Path(temporary, f"index-{count}")
            for name in ("without index", "with index"):
                data = ShardDataModule(
                    f"{links}/*.tar",
                    resolution=resolution,
                    batch_size=64,
                    num_workers=count,
                    filters=Filters(),
                    index=str(index),
                )
                data.setup("fit")
                row[f"{name}, samples/s"], row[f"{name}, CPU ms"] = measured(data.train_dataloader(), "captions", seconds)
                if name == "without index":
                    for number in range(shards):
                        data.train_sources[0].notes(number)
            peer = peers.image_loader(str(shard), size=resolution, batch_size=64, workers=count)
            row["webdataset, samples/s"], _ = measured(peer, 1, seconds)
            rows.append(row)
            print(row, flush=True)
    note = (
        f"{shards} shards of {samples} JPEGs of {size} px to {resolution} px in batches of 64, default filters. The rate is "
        f"that after the first batch, over {seconds:g} s. CPU ms: CPU time of all processes for each sample, start-up included."
    )
    return Table("Rate of the stream", rows, note)


def measured(batches: Any, captions: Any, seconds: float) -> tuple[float, float]:
    """Return samples/s after the first batch, and milliseconds of CPU time for each sample."""
    before = cpu_seconds()
    iterator = iter(batches)
    total = len(next(iterator)[captions])
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += len(next(iterator)[captions])
    elapsed = time.perf_counter() - started
    del iterator, batches  # the workers end, and their time counts
    total += count
    return count / elapsed, (cpu_seconds() - before) / total * 1000


def cpu_seconds() -> float:
    usage = [resource.getrusage(scope) for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(entry.ru_utime + entry.ru_stime for entry in usage)
