"""Prompts, prompt files and output folders on the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcm.app.inputs import output_folder, read_adapters, read_prompts, read_requests, read_start
from lcm.core.errors import UserError


def read(prompts: Any) -> list[str]:
    return read_prompts(prompts, lambda: ["a caption"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "mark", "end"), [("P.TXT", "\ufeff", "\r\n"), ("p.txt", "", "\r")])
def test_prompt_file(here: Path, name: str, mark: str, end: str) -> None:
    lines = ["", " red apple ", "", "café\u2028au lait", "# 1 in a list", " ", ""]
    (here / name).write_bytes((mark + end.join(lines)).encode())
    assert read(name) == ["red apple", "café\u2028au lait", "# 1 in a list"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("red apple".encode("utf-16-le"), "looks like UTF-16 or UTF-32: save it as UTF-8"),
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


def test_output_folder_that_cannot_be_written(here: Path) -> None:
    (here / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write to file/below \(.*\): set out to a writable folder$"):
        output_folder("file/below", "out")


def test_table_of_prompts(here: Path) -> None:
    (here / "t.csv").write_text('\ufeffprompt, seed,w,steps\n"a cat, sleeping",7,2.5,\n\ndog,,,1\n,,,\n')
    texts, settings = read_requests("t.csv", lambda: [])
    assert texts == ["a cat, sleeping", "dog", ""]
    assert settings == [{"seed": 7, "w": 2.5}, {"steps": 1}, {}]
    assert read_requests("a cat", lambda: []) == (["a cat"], [{}])
    assert read_requests("draw t.csv", lambda: []) == (["draw t.csv"], [{}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,seed\na,1\n", "t.csv has the columns text, seed: its first line names prompt, and seed, w or steps"),
        ("", "t.csv has the columns none"),
        ("prompt,seed\n", "t.csv has no prompts"),
        ("prompt,seed\na,1\nb,one\n", "t.csv, line 3: invalid literal for int.*'one'"),
        ("prompt,steps\na,0\n", "t.csv, line 2: seed counts from 0 and steps from 1"),
        ("prompt,seed\na, b, 1\n", r"t.csv, line 2: it has more than 2 cells \(quote a prompt with commas\)"),
    ],
)
def test_wrong_table(here: Path, content: str, says: str) -> None:
    (here / "t.csv").write_text(content)
    with pytest.raises(UserError, match=says):
        read_requests("t.csv", lambda: [])


def test_adapters_have_a_weight() -> None:
    assert read_adapters(None) == {}
    assert read_adapters("a/b.safetensors") == {"a/b.safetensors": 1.0}
    assert read_adapters(["a:0.5", "c:d", "e:-1"]) == {"a": 0.5, "c:d": 1.0, "e": -1.0}
    for wrong, says in (("a:0", "has no effect"), ("a:nan", "has no effect"), (["a:1", "a"], "is given twice")):
        with pytest.raises(UserError, match=says):
            read_adapters(wrong)


@pytest.fixture
def photo(here: Path) -> Image.Image:
    """Save and return a red picture with a blue right half. It is wider than high."""
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (40, 0, 80, 40))
    picture.save(here / "photo.png")
    return picture


def test_picture_to_start_from(here: Path, photo: Image.Image) -> None:
    mask = Image.new("1", (80, 40))
    mask.paste(1, (0, 0, 40, 40))
    mask.save(here / "mask.png")
    assert read_start(None, None, None, (16, 16)) is None
    start, painted = read_start("photo.png", None, None, (16, 16)), read_start("photo.png", "mask.png", 0.5, (20, 40))
    assert start is not None
    assert painted is not None
    assert painted.mask is not None
    assert (tuple(start.image.shape), start.image.dtype, start.strength, start.mask) == ((3, 16, 16), torch.uint8, 0.6, None)
    assert start.image[:, 8, 2].tolist() == [255, 0, 0]
    assert start.image[:, 8, 13].tolist() == [0, 0, 255]
    assert (painted.strength, tuple(painted.mask.shape)) == (0.5, (1, 20, 40))
    assert painted.mask[0, 10, [5, 35]].tolist() == [1, 0]
    assert read_start("photo.png", "mask.png", None, (16, 16)).strength == 1
    turned = photo.getexif()
    turned[0x0112] = 6  # the file stores the picture on its side
    photo.save(here / "side.jpg", exif=turned)
    assert read_start("side.jpg", None, None, (32, 16)).image[0, 2, 8] > 200  # red is on top


def test_wrong_picture_to_start_from(here: Path, photo: Image.Image) -> None:
    Image.new("L", (80, 40)).save(here / "black.png")
    Image.new("L", (40, 40), 255).save(here / "small.png")
    (here / "text.png").write_text("no picture")
    for arguments, says in (
        ((None, "m.png", None), "^mask=m.png has no effect without a picture to start from: set image=<file>"),
        ((None, None, 0.5), "^strength=0.5 has no effect without a picture"),
        (("none.png", None, None), "^image=none.png: there is no such file"),
        (("text.png", None, None), "^image=text.png cannot be read as a picture"),
        (("photo.png", "small.png", None), "has 40 x 40 pixels and image=photo.png 80 x 40: paint the mask on a copy"),
        (("photo.png", "black.png", None), "^mask=black.png has no white pixels"),
    ):
        with pytest.raises(UserError, match=says):
            read_start(*arguments, (16, 16))
