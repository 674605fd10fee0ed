"""A folder of pictures with captions, in the layout of Hugging Face's ImageFolder and kohya's trainers."""

import contextlib
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lcm.core.errors import UserError
from lcm.data.checks import LOOKED_AT
from lcm.data.index import Notes
from lcm.data.left_out import left_out_log
from lcm.data.sample_fields import CAPTIONS, Sample, Skip, captions_of, metadata, skipping
from lcm.data.samples import is_litter
from lcm.data.source import Source, stamp
from lcm.data.urls import IMAGES
from lcm.runtime.atomic_io import text_of

FILES = 64  # pictures of a part, which counts as a shard
TABLES = ("metadata.jsonl", "metadata.csv")
NAME, TEXT = "file_name", "text"  # columns of a table


class FolderSource(Source):
    """Pictures in a folder and its subfolders. Each `FILES` pictures, sorted by name, count as a shard.

    The caption of `a/1.jpg` is in `a/1.txt`, `a/1.caption` or a field of `a/1.json`. The caption may also be the `text` of a
    row in `metadata.jsonl` or `metadata.csv`, whose `file_name` is relative to the table. Filters read the other columns.
    Raises UserError for a missing folder or an unreadable table.
    """

    def __init__(self, folder: str, **options: Any) -> None:
        self.root = Path(folder).expanduser()
        option = options.get("option", "data.folder")
        if not self.root.is_dir():
            raise UserError(f"{option}={folder} is not a folder: give one with pictures and their captions")
        names = (os.path.join(place, name) for place, _, files in os.walk(self.root, followlinks=True) for name in files)
        paths = sorted(os.path.relpath(name, self.root) for name in names)
        self.pictures = [path for path in paths if extension_of(path) in IMAGES and not is_litter(path)]
        if not self.pictures:
            raise UserError(f"{option}={folder} holds no pictures ({', '.join(IMAGES)}): give another folder")
        self.stems = Counter(path.rpartition(".")[0] for path in self.pictures)
        self.rows: dict[str, dict[str, Any]] = {}
        for path in paths:
            if os.path.basename(path) in TABLES:
                self.rows |= read_table(self.root, path)
        self.parts = list(range(-(-len(self.pictures) // FILES)))
        super().__init__([f"{self.root.name or 'pictures'}-{part:05d}.tar" for part in self.parts], **options)
        self.chosen: dict[int, list[str]] = {}
        self.reasons: dict[int, Counter[str]] = {}

    def title(self, shard: int) -> str:
        return str(self.root)

    def subset(self, shards: Sequence[int]) -> Self:
        part = super().subset(shards)
        part.parts = [self.parts[shard] for shard in shards]
        part.chosen, part.reasons = {}, {}
        return part

    def paths(self, shard: int) -> list[str]:
        return self.pictures[self.parts[shard] * FILES : (self.parts[shard] + 1) * FILES]

    def usable(self, shard: int, count: int) -> tuple[int, bool]:
        return len(self._choose(shard)), True

    def _choose(self, shard: int) -> list[str]:
        """Return the paths of the usable pictures of a part. Their captions and metadata are read each time."""
        if shard not in self.chosen:
            self.chosen[shard], self.reasons[shard] = [], Counter()
            for path in self.paths(shard):
                if reason := self._reason(path):
                    self.reasons[shard][reason] += 1
                else:
                    self.chosen[shard].append(path)
        return self.chosen[shard]

    def _reason(self, path: str) -> str | None:
        """Return the reason to leave a picture out, else None."""
        try:
            texts = self.texts(path)
            meta = metadata(texts)
            captions = captions_of(texts, self.captions, meta)
        except Skip as skip:
            left_out_log.add(skip.reason, path, str(self.root))
            return skip.reason
        if self.rules.judge is None:
            return None
        verdicts = (self.rules.judge(text, meta) for values in captions.values() for text in values)
        return next(filter(None, verdicts), None)

    def texts(self, path: str) -> Sample:
        """Return the captions and metadata of a picture in the form of a shard's members."""
        stem, sample = path.rpartition(".")[0], {}
        for extension in self.rules.text_extensions:
            with contextlib.suppress(FileNotFoundError), skipping("no_caption", IsADirectoryError, PermissionError):
                sample[extension] = (self.root / f"{stem}.{extension}").read_bytes()
        row = self.rows.get(path)
        if row is not None:
            meta = {**metadata(sample), **{name: value for name, value in row.items() if name != NAME}}
            if TEXT in meta and sample.keys() <= {"json"}:
                meta[CAPTIONS[0]] = meta[TEXT]
            sample["json"] = json.dumps(meta).encode()
        return sample

    def read(self, shard: int, number: int) -> Sample:
        path = self._choose(shard)[number]
        with skipping("image", OSError):
            picture = (self.root / path).read_bytes()
        stem, _, extension = path.rpartition(".")
        key = stem if self.stems[stem] == 1 else f"{stem}@{extension}"  # 1.jpg and 1.png are two samples
        return {"__key__": key, "__url__": str(self.root), **self.texts(path), extension.lower(): picture}

    def aspect(self, shard: int, sample: int) -> int:
        assert self.rules.aspect is not None
        with contextlib.suppress(OSError), open(self.root / self._choose(shard)[sample], "rb") as file:
            return self.rules.aspect(file.read(2**16))
        return self.rules.aspect(b"")

    def weight(self, shard: int) -> float:
        return float(len(self.paths(shard)))

    def prefetch(self, shard: int) -> None:
        pass

    def notes(self, shard: int) -> Notes:
        return Notes(len(self._choose(shard)), dict(self.reasons[shard]))

    def gone(self) -> list[str]:
        return []

    def check(self) -> None:
        """Raise UserError for a folder whose first pictures have no captions."""
        self.first_samples, readable, flaw = [], False, None
        for path in self.pictures[:LOOKED_AT]:
            try:
                sample = {"__key__": path, extension_of(path): b"", **self.texts(path)}
                self.first_samples.append(sample)
                readable = bool(captions_of(sample, self.captions)) or readable
            except Skip as skip:
                flaw = flaw or skip
        if readable:
            return
        raise UserError(
            f"{self.option}={self.root}: its first pictures have no captions that can be read ({flaw}): put 1.txt beside "
            f"1.jpg, or a metadata.jsonl or metadata.csv with the columns {NAME} and {TEXT} into the folder, or name others by "
            "data.captions"
        )


class PictureSource(FolderSource):
    """Pictures in a folder and its subfolders, without captions: the real images of an evaluation."""

    def texts(self, path: str) -> Sample:
        return {CAPTIONS[0]: b""}

    def stamps(self) -> list[str]:
        return [stamp(str(self.root / path)) for path in self.pictures]


def extension_of(path: str) -> str:
    return path.rpartition(".")[2].lower()


def read_table(root: Path, path: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by the picture's path. Raises UserError for a table that cannot be read."""
    folder, rows = os.path.dirname(path), {}
    try:
        content = text_of((root / path).read_bytes())
        reader: Callable[[str], Any] = lines_of_json if path.endswith(".jsonl") else lines_of_csv
        for row in reader(content):
            row = {str(name).strip().lower(): value for name, value in row.items()}
            if not row[NAME]:
                raise KeyError(NAME)
            rows[os.path.normpath(os.path.join(folder, str(row[NAME])))] = row
    except KeyError:
        raise UserError(f"{root / path} has a row without {NAME}: give each row the picture's {NAME} and its {TEXT}") from None
    except (OSError, UnicodeError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{root / path} cannot be read ({error}): write one JSON object per line, or a CSV with a header"
        ) from None
    return rows


def lines_of_json(content: str) -> list[Mapping[str, Any]]:
    rows = [json.loads(line) for line in io.StringIO(content, newline=None) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def lines_of_csv(content: str) -> list[Mapping[str, Any]]:
    return list(csv.DictReader(io.StringIO(content, newline=None)))
