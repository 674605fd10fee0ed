"""Checks of shards against a dataset's records: `manifest.json` beside the shards, else img2dataset's `<shard>_stats.json`."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from lcm.data.fetch import connect
from lcm.data.urls import is_remote, local, scheme_of
from lcm.runtime.atomic_io import NO_HANDLES, os_error
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"  # {"samples": {<shard>: number}, "bytes": {<shard>: number}, "sha256": {<shard>: hex digits}}
TYPES = {"samples": int, "bytes": int, "sha256": str}
TIMEOUT = 60.0  # seconds


class Expected(NamedTuple):
    """The manifest's entry of one shard. None: unknown. samples: the number of usable and unusable samples."""

    samples: int | None = None
    bytes: int | None = None
    sha256: str | None = None

    def flaw(self, file: str) -> str | None:
        """Return the difference of a local copy from the entry, or None. A copy of another size is not read."""
        size = os.path.getsize(file)
        if self.bytes not in (None, size):
            return f"{size} bytes instead of {self.bytes}"
        return "another sha256 than in the manifest" if self.sha256 not in (None, sha256_of(file)) else None


class Manifests:
    """`manifests[url]` is the entry of a shard. Each folder's manifest is read once."""

    def __init__(self) -> None:
        self.columns: dict[str, dict[str, dict[str, Any]]] = {}

    def __getitem__(self, url: str) -> Expected:
        if scheme_of(url) == "pipe":
            return Expected()
        path, mark, query = url.partition("?") if is_remote(url) else (local(url), "", "")
        folder, slash, name = path.rpartition("/")
        file = f"{folder}{slash}{MANIFEST}{mark}{query}"
        if file not in self.columns:
            self.columns[file] = columns(read_json(file))
        entry = {field: column[name] for field, column in self.columns[file].items() if name in column}
        if "samples" not in entry:
            stats = read_json(f"{path.removesuffix('.tar')}_stats.json{mark}{query}")
            entry["samples"] = stats.get("successes")
        sound: dict[str, Any] = {field: value for field, value in entry.items() if isinstance(value, TYPES[field])}
        return Expected(**sound)

    def gone(self, urls: Iterable[str]) -> list[str]:
        """Return local shards that do not exist, but are in a manifest beside these URLs. A glob does not find them."""
        folders = sorted({local(url).rpartition("/")[0] or "." for url in urls if not is_remote(url)})
        listed = [
            f"{folder}/{name}" for folder in folders for name in columns(read_json(f"{folder}/{MANIFEST}")).get("samples", {})
        ]
        return [shard for shard in listed if not os.path.exists(shard)]


def columns(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the known fields of a manifest. A file of another program may have none."""
    return {field: content[field] for field in TYPES if isinstance(content.get(field), dict)}


def read_json(url: str) -> dict[str, Any]:
    """Return a JSON object, {} for a missing file. Warns of a file that may exist but cannot be read."""
    try:
        files, path = connect(url, TIMEOUT)
        content = json.loads(files.cat_file(path))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except Exception as error:  # a file system's client may raise anything
        if os_error(error, NO_HANDLES):
            raise
        if getattr(error, "status", None) not in (401, 403):  # some stores answer these for a missing file
            log.warning("%s cannot be read (%s): shards are not checked against it", redacted(url), type(error).__name__)
        return {}
    return content if isinstance(content, dict) else {}


def sha256_of(file: str) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
