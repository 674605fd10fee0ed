"""Pictures in a folder: captions beside them or in a table, subfolders, filters, and the same order as shards."""

import csv
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from lcm.app.composition import compose
from lcm.core.errors import UserError
from lcm.data.captions import read_captions, read_images
from lcm.data.datamodule import ShardDataModule
from lcm.data.filters import Filters
from lcm.data.folder import FILES, FolderSource
from lcm.data.sample_fields import CaptionChoice, Skip
from lcm.data.source import Source
from tests.data.conftest import keys, png, samples_of, stream, take


def pictures(folder: Path, names: Sequence[str], text: str | None = "a {}") -> Path:
    """Write pictures, and a .txt with a caption for each unless `text` is None. Return the folder."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png())
        if text is not None:
            file.with_name(name.rpartition("/")[2].rpartition(".")[0] + ".txt").write_text(text.format(name))
    return folder


def captions(source: Source) -> dict[str, str]:
    """Return a caption of each usable sample by its key."""
    choose = CaptionChoice(weights=source.captions)
    samples = [sample for shard in range(len(source.urls)) for sample in samples_of(source, shard)]
    return {sample["__key__"]: choose(sample, random.Random(0)) for sample in samples}


def write_jsonl(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def write_csv(folder: Path, *rows: dict[str, Any]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "sub/b.JPG", "sub/v1.2 cat.webp"])
    pictures(tmp_path, ["c.png", "d.jpeg", "e.png"], text=None)
    (tmp_path / "c.caption").write_text("\ufeffa cap")
    (tmp_path / "d.json").write_text(json.dumps({"caption": ["one", "two"], "exif": {"a": [1]}}))
    (tmp_path / "notes.txt").write_text("no picture")
    source = FolderSource(str(tmp_path))
    source.check()
    expected = {"a": "a a.png", "sub/b": "a sub/b.JPG", "sub/v1.2 cat": "a sub/v1.2 cat.webp", "c": "a cap"}
    assert captions(source).items() >= expected.items()
    assert captions(source)["d"] in ("one", "two")
    assert source.notes(0) == (5, {"no_caption": 1}, 0)
    sample = next(sample for sample in samples_of(source) if sample["__key__"] == "sub/b")
    assert sample == {"__key__": "sub/b", "__url__": str(tmp_path), "jpg": png(), "txt": b"a sub/b.JPG"}


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_table_holds_captions_and_metadata(tmp_path: Path, write: Any) -> None:
    pictures(tmp_path, ["a.png", "sub/b.png", "c.png", "sub/own/d.png"], text=None)
    write(
        tmp_path,
        {"file_name": "a.png", "text": "a cat, red", "aesthetic": 7},
        {"file_name": "sub/b.png", "text": "a dog", "aesthetic": 5},
        {"file_name": "./c.png", "text": "zwei\nZeilen é", "aesthetic": 6.5},
        {"file_name": "gone.png", "text": "no picture", "aesthetic": 9},
    )
    write(tmp_path / "sub/own", {"file_name": "d.png", "text": "its own table", "aesthetic": 8})
    source = FolderSource(str(tmp_path), filters=Filters(min_aesthetic=6, missing="drop", max_unsafe=None))
    source.check()
    assert captions(source) == {"a": "a cat, red", "c": "zwei\nZeilen é", "sub/own/d": "its own table"}
    assert source.notes(0) == (3, {"aesthetic": 1}, 0)
    assert source.unused_filters() == []


def test_table_joins_files_beside_pictures(tmp_path: Path) -> None:
    """The caption in a text file takes precedence over the table. Metadata comes from files and the table."""
    pictures(tmp_path, ["a.png", "b.png"], text=None)
    (tmp_path / "a.caption").write_text("from the file")
    (tmp_path / "b.json").write_text(json.dumps({"caption": "unused", "long": "a long one", "punsafe": 0.1}))
    write_jsonl(
        tmp_path,
        {"file_name": "a.png", "text": "from the table", "blip": "a blip"},
        {"file_name": "b.png", "text": "from the table", "punsafe": 0.9},
    )
    assert captions(FolderSource(str(tmp_path))) == {"a": "from the file", "b": "from the table"}
    assert captions(FolderSource(str(tmp_path), captions={"blip": 1, "long": 1})) == {"a": "a blip", "b": "a long one"}
    assert captions(FolderSource(str(tmp_path), captions={"text": 1})) == {"a": "from the table", "b": "from the table"}
    assert FolderSource(str(tmp_path), filters=Filters()).notes(0) == (1, {"unsafe": 1}, 0)


def test_table_of_odd_texts(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{number}.png" for number in range(6)], text=None)
    texts: list[Any] = ["", None, ["one", None, "one"], 5, "\ud83d", {"en": "a cat"}]
    write_jsonl(tmp_path, *({"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)))
    source = FolderSource(str(tmp_path))
    source.check()
    assert captions(source) == {"0": "", "2": "one"}
    assert source.notes(0) == (2, {"no_caption": 3, "caption_encoding": 1}, 0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", '{"text": "a"}', r"metadata\.jsonl has a row without file_name"),
        ("metadata.jsonl", '{"file_name": ', r"metadata\.jsonl cannot be read \(.*\): write one JSON object per line"),
        ("metadata.jsonl", "[1]", r"cannot be read \(a line is not a JSON object\)"),
        ("sub/metadata.csv", "file_name,text\na.png,caf\udce9", r"sub/metadata\.csv cannot be read \(byte 0xe9"),
        ("metadata.csv", "f\0i\0l\0e\0", r"looks like UTF-16"),
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, r"cannot be read \(field larger than"),
        ("metadata.jsonl", "[" * 200_000, "cannot be read"),
    ],
)
def test_wrong_table_is_one_sentence(tmp_path: Path, name: str, content: str, says: str) -> None:
    pictures(tmp_path, ["a.png", "sub/a.png"], text=None)
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=says):
        FolderSource(str(tmp_path))


def test_table_of_other_programs(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"], text=None)
    (tmp_path / "metadata.csv").write_bytes("File_Name, TEXT \r\na.png,é\r\n".encode("utf-8-sig"))
    assert captions(FolderSource(str(tmp_path))) == {"a": "é"}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"data\.folder=.* is not a folder: give one with pictures"),
        ({"x/a.txt": b"a"}, r"data\.folder=.* holds no pictures \(png, jpg"),
        (
            {"x/a.png": png(), "x/b.txt": b"b"},
            r"no captions that can be read \(no_caption.*: put 1\.txt beside 1\.jpg, or a met",
        ),
        ({"x/a.png": png(), "x/a.json": b'{"blip": "a"}'}, r"no captions .*the \.json fields blip: see data\.captions"),
    ],
)
def test_folder_without_captions_is_refused(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    for name, content in files.items():
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        ShardDataModule(folder=str(tmp_path / "x"), resolution=8, num_workers=0).setup("fit")


def test_litter_is_no_picture(tmp_path: Path) -> None:
    litter = ["._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png", "sub/._b.png"]
    pictures(tmp_path, ["a.png", *litter])
    assert list(captions(FolderSource(str(tmp_path)))) == ["a"]


def test_pictures_of_one_name_are_told_apart(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "a.jpg", "b.png"])
    assert len(captions(FolderSource(str(tmp_path)))) == 3


def test_home_folder_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "elsewhere", ["a.png"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/linked").symlink_to(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere/a.png", tmp_path / "mine/b.png")
    (tmp_path / "mine/b.txt").write_text("b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert captions(FolderSource("~/mine")) == {"linked/a": "a a.png", "b": "b"}


def test_picture_that_is_gone_costs_itself(tmp_path: Path) -> None:
    source = FolderSource(str(pictures(tmp_path, ["a.png", "b.png"])))
    assert source.usable(0, 1) == (2, True)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Skip, match=r"^image: "):
        source.read(0, 0)
    assert source.read(0, 1)["__key__"] == "b"


def test_each_picture_comes_once_an_epoch(tmp_path: Path) -> None:
    names = [f"{number:03d}.png" for number in range(3 * FILES + 8)]
    source = FolderSource(str(pictures(tmp_path, names)))
    assert [source.notes(part).samples for part in range(4)] == [FILES, FILES, FILES, 8]
    assert sum(source.weight(part) for part in range(4)) == len(names)
    one_pass = keys(take(stream(source, shuffle=0)))
    assert one_pass == [name[:-4] for name in names]
    lane = keys(take(stream(source, lanes=1, shuffle=64), len(names) // 4))
    assert sorted(lane) == one_pass
    assert lane != one_pass
    part = source.subset([3, 1])
    assert [sample["__key__"] for sample in samples_of(part)] == one_pass[-8:]
    assert part.notes(1).samples == FILES


def test_folder_is_trained_on_by_one_command(tmp_path: Path) -> None:
    """The training has buckets, filters and captions. It resumes in the middle of an epoch."""
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png((16, 8) if number % 2 else (8, 16)))
    rows = ({"file_name": f"{n}.png", "text": f"{n}", "blip": f"blip {n}", "punsafe": n / 40} for n in range(20))
    write_jsonl(tmp_path, *rows)
    options = ["data.codec=null", "data.resolution=64", "data.num_workers=0", "data.batch_size=4"]
    options += ["data.buckets=[[64,128],[128,64]]"]
    options += ["data/filters=default", "data.filters.max_unsafe=0.4", "++data.captions.blip=1"]
    cfg = compose("train", ["experiment=autoencoder_mini", "data=folder", f"data.folder={tmp_path}", *options])

    def batches(count: int, state: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        data: ShardDataModule = instantiate(cfg.data)
        data.prepare_data()
        data.setup("fit")
        if state is not None:
            data.load_state_dict(state)
        loader = iter(data.train_dataloader())
        result = [next(loader) for _ in range(count)]
        data.position = result[-1]["position"]
        states.append(data.state_dict())
        return result

    states: list[dict[str, Any]] = []
    whole = batches(8)
    assert {caption for batch in whole[:4] for caption in batch["captions"]} <= {f"blip {n}" for n in range(17)}
    assert {tuple(batch["x"].shape[-2:]) for batch in whole} == {(64, 128), (128, 64)}
    batches(3)
    assert [batch["keys"] for batch in batches(5, states[-1])] == [batch["keys"] for batch in whole[3:]]


def test_folder_is_read_for_evaluation(tmp_path: Path) -> None:
    source = FolderSource(str(pictures(tmp_path, ["a.png", "b.png", "c.png"])))
    assert read_captions(source) == [caption for batch in read_images(source, resolution=8) for caption in batch["captions"]]
