"""Prompts, prompt files and output folders on the command line."""

from pathlib import Path
from typing import Any

import pytest

from lcm.app.inputs import output_folder, read_prompts
from lcm.core.errors import UserError


def read(prompts: Any) -> list[str]:
    return read_prompts(prompts, lambda: ["a caption"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "mark", "end"), [("p.txt", "", "\n"), ("P.TXT", "\ufeff", "\r\n"), ("p.txt", "", "\r")])
def test_prompt_file(here: Path, name: str, mark: str, end: str) -> None:
    lines = ["", " red apple ", "", "café\u2028au lait", "# 1 in a list", " ", ""]
    (here / name).write_bytes((mark + end.join(lines)).encode())
    assert read(name) == ["red apple", "café\u2028au lait", "# 1 in a list"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("red apple".encode("utf-16-le"), "looks like UTF-16 or UTF-32: save it as UTF-8"),
        ("red apple".encode("utf-32-be"), "looks like UTF-16 or UTF-32: save it as UTF-8"),
        ("café".encode("cp1252"), "byte 0xe9 at position 3 is not UTF-8"),
        (b"\xef\xbb\xbf\r\n\r\n", "has no prompts"),
    ],
)
def test_unreadable_prompt_file(here: Path, content: bytes, says: str) -> None:
    (here / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"p\.txt .*{says}"):
        read("p.txt")


def test_name_of_file_is_refused(here: Path) -> None:
    (here / "a/dir").mkdir(parents=True)
    for name in ("list", "my list.csv"):
        (here / name).write_text("red apple")
    names = [
        "prompts.csv",
        "Prompts.JSON",
        "a/b.jsonl",
        ["prompts.txt"],
        ["red apple", "prompts.tsv"],
        "list",
        "my list.csv",
        "a/dir",
    ]
    for prompts in names:
        with pytest.raises(UserError, match=r"names a file: give a \.txt file with one prompt per line, or"):
            read(prompts)


def test_prompt_like_file_name_is_drawn(here: Path) -> None:
    (here / "cat").mkdir()
    (here / "p.txt").write_text("prompts.csv\n")
    for prompts in ("cat", "v1.5", "a logo of example.com", "a screenshot of package.json", "e.g. a cat", "x" * 5000):
        assert read(prompts) == [prompts]
    assert read("p.txt") == ["prompts.csv"]


def test_prompts_are_texts() -> None:
    for prompts, texts in ((2024, ["2024"]), (["a", 7], ["a", "7"]), ([""], [""]), ("val", ["a caption"])):
        assert read(prompts) == texts
    for wrong in (None, "", [], ["a", None], [["a", "b"]]):
        with pytest.raises(UserError, match=r"^prompts="):
            read(wrong)
    with pytest.raises(UserError, match="set prompts=val, or leave captions out"):
        read_prompts("a cat", lambda: [], {"blip": 1})


@pytest.mark.parametrize("folder", ["/proc/nowhere", "file/below"])
def test_output_folder_that_cannot_be_written(here: Path, folder: str) -> None:
    (here / "file").touch()
    with pytest.raises(UserError, match=rf"^cannot write to {folder} \(.*\): set out to a writable folder$"):
        output_folder(folder, "out")
