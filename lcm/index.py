"""Indexes of shards ahead of a training: `python -m lcm.index data=shards data.shards='mine/*.tar'`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count, Seed

program = Program("index", checksums=bool, verify=bool, jobs=Count | None, seed=Seed)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.index import Notes
from lcm.data.manifest import MANIFEST, Expected, Manifests, read_json, sha256_of
from lcm.data.sample_fields import described
from lcm.data.source import Source
from lcm.data.urls import is_remote, local
from lcm.runtime.atomic_io import whole_file


@program
def main(cfg: DictConfig) -> None:
    """Scan shards into data.index, or write or verify checksums. After a stop, the same command continues."""
    data: ShardDataModule = build(cfg.data)
    data.prepare_data()
    sources = [*data.train_sources, *data.val_sources]
    shards = [(source, shard) for source in sources for shard in range(len(source.urls))][cfg.rank :: cfg.world_size]
    if cfg.verify:
        flaws = verify(shards)
    elif cfg.checksums:
        flaws = write_manifests(shards)
    else:
        scan(shards, cfg.jobs or os.cpu_count() or 1)
        return
    for flaw in flaws:
        print(flaw)
    if flaws:
        raise UserError(
            f"{len(flaws)} shards are not whole, or differ from {MANIFEST}: fetch them again; if they are correct, "
            f"remove {MANIFEST} and write it anew"
        )


Shard = tuple[Source, int]


def scan(shards: Sequence[Shard], jobs: int) -> None:
    """Write the index of every shard, in several processes, and print the counts."""
    left_out: Counter[str] = Counter()
    usable = 0
    context = get_context("fork")
    with ProcessPoolExecutor(jobs, context) as pool, tqdm(total=len(shards), unit="shard", desc="scanning") as bar:
        for notes in pool.map(notes_of, shards, chunksize=4):
            usable += notes.samples
            left_out.update(notes.left_out)
            bar.update()
    print(f"index:   {shards[0][0].folder if shards else ''}   ({len(shards)} shards, {usable} usable samples)")
    for reason, count in left_out.most_common():
        print(f"         {count} left out: {described(reason)}")


def notes_of(shard: Shard) -> Notes:
    source, number = shard
    notes = source.notes(number)
    source.release(number)
    return notes


def write_manifests(shards: Sequence[Shard]) -> list[str]:
    """Write `manifest.json` beside local shards: samples, bytes and sha256 of each. Return the flaws of cut shards.

    A shard that is in the manifest, and that was not written to since, is not measured again.
    """
    files: dict[Path, Shard] = {}
    for source, shard in shards:
        if is_remote(source.urls[shard]):
            raise UserError(
                f"{source.title(shard)} is remote: write the manifest where the shards lie, and upload it with them"
            )
        files[Path(local(source.urls[shard]))] = source, shard
    flaws: list[str] = []
    for folder, paths in groupby(sorted(files), lambda path: path.parent):
        flaws += write_manifest(folder, {path: files[path] for path in paths})
    return flaws


def write_manifest(folder: Path, files: Mapping[Path, Shard]) -> list[str]:
    """Write the manifest of one folder. Return the flaws of cut shards."""
    content, manifests = read_json(str(folder / MANIFEST)), Manifests()
    new = {path: path.stat().st_size for path in files if not is_listed(path, manifests[str(path)])}
    for path in new:
        for field in ("bytes", "sha256"):  # after a stop before the measurement, the shard must not count as measured
            content.get(field, {}).pop(path.name, None)
    save(folder, content)
    flaws = []
    try:
        with closing(
            each(lambda path: measure(path, files[path], manifests[str(path)]), new, f"measuring {folder}")
        ) as measured:
            for path, entry in measured:
                if isinstance(entry, str):
                    flaws.append(f"{path}: {entry}")
                    continue
                for field, value in entry._asdict().items():
                    content.setdefault(field, {})[path.name] = value
    finally:
        save(folder, content)
    print(f"manifest: {folder / MANIFEST}   ({len(files)} shards, {len(new) - len(flaws)} of them new or changed)")
    return flaws


def is_listed(path: Path, entry: Expected) -> bool:
    """Return whether the shard was measured, and not written to since."""
    status = path.stat()
    measured = None not in entry and status.st_size == entry.bytes
    return measured and status.st_mtime_ns <= (path.parent / MANIFEST).stat().st_mtime_ns


def measure(path: Path, shard: Shard, expected: Expected) -> Expected | str:
    """Return the entry of a manifest, or the flaw of a shard that is cut."""
    source, number = shard
    notes = source.notes(number)
    if "missing" in notes.left_out:
        scanned = notes.samples + sum(notes.left_out.values()) - notes.left_out["missing"]
        return f"it holds {scanned} of its {expected.samples} samples"
    if "cut" in notes.left_out:
        return "it ends within a sample"
    try:
        samples = notes.samples + sum(count for reason, count in notes.left_out.items() if reason != "shard")
        return Expected(samples, path.stat().st_size, sha256_of(str(path)))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def save(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest. Raises UserError if the folder cannot be written to."""
    try:
        with whole_file(folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=2).encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): a manifest lies beside its shards") from error


def verify(shards: Sequence[Shard]) -> list[str]:
    """Read every shard again. Return the flaws of shards that differ from the manifest or are not in the manifest."""

    def flaw(shard: Shard) -> str | None:
        source, number = shard
        expected = source.manifests[source.urls[number]]
        if expected.sha256 is None:
            return f"not in {MANIFEST}"
        try:
            return expected.flaw(source.local_path(number))
        except OSError as error:
            return str(error)
        finally:
            source.release(number)

    sizes = {(source, shard): source.manifests[source.urls[shard]].bytes or 0 for source, shard in shards}
    with closing(each(flaw, sizes, "verifying")) as results:
        flaws = [f"{source.title(shard)}: {flaw}" for (source, shard), flaw in results if flaw]
    for source in dict.fromkeys(source for source, _ in shards):
        flaws += [f"{shard}: it is not there" for shard in source.gone()]
    if not flaws:
        print(f"verified: {len(sizes)} shards are as {MANIFEST} says")
    return flaws


def each(work: Callable[[Any], Any], sizes: Mapping[Any, int], title: str) -> Generator[tuple[Any, Any], None, None]:
    """Yield `(item, work(item))` in order, from several threads, with progress in bytes."""
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=title, disable=not sizes)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        try:
            for item, result in zip(sizes, pool.map(work, sizes), strict=True):
                bar.update(sizes[item])
                yield item, result
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
