"""Samples, bytes and sha256 of each shard: `python -m lcm.manifest data=shards data.shards='mine/*.tar'`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Seed

program = Program("manifest", verify=bool, seed=Seed)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, product
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig
from tqdm import tqdm

from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.expected import MANIFEST, Expected, Manifests, read_json, sha256_of
from lcm.data.shards import Shard, expand_urls, is_remote, local
from lcm.data.source import Source
from lcm.runtime.atomic_io import whole_file
from lcm.runtime.redaction import redacted

SAVED_EVERY = 30.0  # seconds
Item = TypeVar("Item")
Result = TypeVar("Result")


@program
def main(cfg: DictConfig) -> None:
    """Write `manifest.json` beside the shards; stopped at any moment, the same command goes on. Or verify what it says."""
    data: ShardDataModule = build(cfg.data)
    if data.build is not None:
        data.build()
    given = [(urls, "data.shards") for urls, _ in data.weighted]
    given += [] if data.val_shards is None else [(data.val_shards, "data.val_shards")]
    urls = sorted({url for urls, option in given for url in expand_urls(urls, option, allow_pipe=data.allow_pipe)})
    if cfg.verify:
        flaws = verify(Source(urls, cache=data.cache))
    elif remote := [url for url in urls if is_remote(url)]:
        raise UserError(f"{redacted(remote[0])} is remote: write the manifest where the shards lie, and upload it with them")
    else:
        files = sorted(Path(local(url)) for url in urls)
        flaws = [flaw for folder, shards in groupby(files, lambda file: file.parent) for flaw in write(folder, list(shards))]
    for flaw in flaws:
        print(flaw)
    if flaws:
        raise UserError(
            f"{len(flaws)} shards are not whole, or not what {MANIFEST} says: fetch them again; if they are as they should be, "
            f"remove {MANIFEST} and write it anew"
        )


def write(folder: Path, shards: list[Path]) -> list[str]:
    """List what is new or changed in the folder's manifest. Returns what is wrong with shards that lack samples: of them it
    says no more than how many they should have."""
    content, manifests, saved = read_json(str(folder / MANIFEST)), Manifests(), time.monotonic()
    new = {shard: shard.stat().st_size for shard in shards if not is_listed(shard, manifests[str(shard)])}
    flaws = []
    for field, shard in product(("bytes", "sha256"), new):
        content.get(field, {}).pop(shard.name, None)  # stopped before it is measured, it shall not pass for unchanged
    save(folder, content)
    try:
        with closing(each(lambda shard: measure(shard, manifests[str(shard)]), new, f"measuring {folder}")) as measured:
            for shard, found in measured:
                if isinstance(found, str):
                    flaws.append(f"{shard}: {found}")
                    continue
                for field, value in found._asdict().items():
                    content.setdefault(field, {})[shard.name] = value
                if time.monotonic() - saved > SAVED_EVERY:
                    save(folder, content)
                    saved = time.monotonic()
    finally:
        save(folder, content)
    print(f"manifest: {folder / MANIFEST}   ({len(shards)} shards, {len(new) - len(flaws)} of them new or changed)")
    return flaws


def is_listed(shard: Path, entry: Expected) -> bool:
    """Whether the shard was measured, and not written to since."""
    stat = shard.stat()
    measured = None not in entry and stat.st_size == entry.bytes
    return measured and stat.st_mtime_ns <= (shard.parent / MANIFEST).stat().st_mtime_ns


def measure(shard: Path, said: Expected) -> Expected | str:
    """What the manifest is to say, or what is wrong with the shard."""
    try:
        opened = Shard(str(shard))
        opened.close()
        found = Expected(len(opened) + opened.dropped.total(), shard.stat().st_size, sha256_of(str(shard)))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if said.samples is not None and (found.samples or 0) < said.samples:
        return f"it holds {found.samples} of its {said.samples} samples"
    return "it ends within a sample" if "cut" in opened.dropped else found


def save(folder: Path, content: Mapping[str, Any]) -> None:
    try:
        with whole_file(folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=2).encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): a manifest lies beside its shards") from error


def verify(source: Source) -> list[str]:
    """Read every shard again. Returns what is wrong with those that differ from their manifest or are not in it."""

    def flaw(shard: int) -> str | None:
        said = source.manifests[source.urls[shard]]
        if said.sha256 is None:
            return f"not in {MANIFEST}"
        try:
            return said.flaw(source.path(shard))
        except OSError as error:
            return str(error)

    sizes = {shard: source.manifests[url].bytes or 0 for shard, url in enumerate(source.urls)}
    with closing(each(flaw, sizes, "verifying")) as found:
        flaws = [f"{redacted(source.urls[shard])}: {flaw}" for shard, flaw in found if flaw]
    flaws += [f"{shard}: it is not there" for shard in source.manifests.gone(source.urls)]
    if not flaws:
        print(f"verified: {len(sizes)} shards are what {MANIFEST} says")
    return flaws


def each(work: Callable[[Item], Result], sizes: Mapping[Item, int], title: str) -> Generator[tuple[Item, Result], None, None]:
    """`(item, work(item))` in order, from several threads, with progress in bytes."""
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
