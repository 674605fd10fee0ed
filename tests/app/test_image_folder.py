"""The output folder holds complete pictures. No call draws a picture twice or overwrites a picture of another call."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lcm.app.image_folder import Pictures
from lcm.app.images import save_png, to_pil
from lcm.core.errors import UserError

SETTINGS = {"steps": 4, "w": 2.0, "sampler": "auto", "size": [8, 8], "dtype": "float32", "pipeline": "mini", "model": "a" * 16}


@pytest.fixture
def pictures() -> Pictures:
    return Pictures(["cat", "dog", "rocket"], 2, 5, SETTINGS)


def picture(i: int) -> torch.Tensor:
    return torch.full((3, 8, 8), i, dtype=torch.uint8)


def draw(pictures: Pictures, folder: Path, numbers: list[int] | None = None) -> Path:
    for i in pictures.missing(folder) if numbers is None else numbers:
        pictures.save(folder, i, picture(i))
    return folder


def test_picture_holds_its_settings(pictures: Pictures, tmp_path: Path) -> None:
    draw(pictures, tmp_path)
    info = Image.open(tmp_path / "00003.png").info
    assert (info["caption"], info["seed"], info["steps"], info["size"], info["model"]) == ("dog", "8", "4", "[8, 8]", "a" * 16)


def test_same_call_draws_missing_pictures(pictures: Pictures, tmp_path: Path) -> None:
    draw(pictures, tmp_path, [0, 1, 4])
    assert pictures.folder(str(tmp_path), "") == tmp_path
    assert pictures.missing(tmp_path) == [2, 3, 5]
    draw(pictures, tmp_path)
    pictures.save_grid(tmp_path, 16)
    more = replace(pictures, prompts=[*pictures.prompts, "apple"])
    assert more.folder(str(tmp_path), "") == tmp_path
    assert more.missing(tmp_path) == [6, 7]


def test_prompts_have_settings_of_their_own(pictures: Pictures, tmp_path: Path) -> None:
    """A row of a table has its own settings, for example. Pictures with equal settings share a batch."""
    row_settings = [{"seed": 100}, {"steps": 2}, {"steps": 2, "seed": 0}]
    pictures = replace(pictures, row_settings=row_settings)
    assert [pictures.seed_of(i) for i in range(6)] == [100, 101, 7, 8, 0, 1]
    assert [pictures.settings_of(i)["steps"] for i in range(6)] == [4, 4, 2, 2, 2, 2]
    assert list(pictures.batches(list(range(6)), 3)) == [[0, 1], [2, 3, 4], [5]]
    assert list(pictures.batches([1, 4, 5], 64)) == [[1], [4, 5]]
    draw(pictures, tmp_path)
    info = Image.open(tmp_path / "00004.png").info
    assert (info["caption"], info["seed"], info["steps"]) == ("rocket", "0", "2")
    assert pictures.folder(str(tmp_path), "") == tmp_path
    with pytest.raises(UserError, match=r"such as 00000\.png \(seed is 100 there, 101 here\)"):
        replace(pictures, row_settings=[{"seed": 101}, *row_settings[1:]]).folder(str(tmp_path), "")


def test_name_of_model_does_not_matter(pictures: Pictures, tmp_path: Path) -> None:
    draw(pictures, tmp_path)
    assert replace(pictures, settings={**SETTINGS, "pipeline": "./mini"}).folder(str(tmp_path), "") == tmp_path


def test_pictures_of_other_settings_are_refused(pictures: Pictures, tmp_path: Path) -> None:
    draw(pictures, tmp_path)
    changed = {"steps": 2, "w": 3.0, "size": [8, 16], "model": "b"}
    settings = [{"settings": {**SETTINGS, name: value}} for name, value in changed.items()]
    for change in [*settings, {"prompts": ["cat", "mouse", "rocket"]}, {"repeats": 3}, {"seed": 6}]:
        with pytest.raises(UserError, match=r"has pictures of other settings, such as 0000\d\.png .* there, .* here"):
            replace(pictures, **change).folder(str(tmp_path), "")


def test_foreign_files_are_refused(pictures: Pictures, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    draw(replace(pictures, settings={**SETTINGS, "steps": 1}), tmp_path / "a", [5])
    save_png(to_pil(picture(0)), tmp_path / "b/grid.png")
    (tmp_path / "c/00000.png").write_bytes(b"no picture")
    for folder in "abc":
        with pytest.raises(UserError, match="has pictures of other settings"):
            replace(pictures, prompts=["cat"]).folder(str(tmp_path / folder), "")


def test_call_finds_its_numbered_folder(pictures: Pictures, tmp_path: Path) -> None:
    parent = str(tmp_path / "sample")
    first = draw(pictures, pictures.folder(None, parent), [0, 1])
    other = replace(pictures, seed=9)
    second = draw(other, other.folder(None, parent))
    begun = replace(pictures, seed=20).folder(None, parent)  # this folder has no picture yet
    assert [folder.name for folder in (first, second, begun)] == ["0", "1", "2"]
    assert pictures.folder(None, parent) == first
    draw(pictures, first)
    pictures.save_grid(first, 16)
    for prompts in (["cat"], [*pictures.prompts, "apple"]):  # other calls with the same first pictures
        assert replace(pictures, prompts=prompts).folder(None, parent) not in (first, second)
    assert pictures.folder(None, parent) == first
    assert other.folder(None, parent) == second
    assert replace(pictures, seed=30).folder(None, parent).name == "5"


def test_calls_at_once_do_not_overwrite(pictures: Pictures, tmp_path: Path) -> None:
    missing = pictures.missing(pictures.folder(str(tmp_path), ""))
    draw(replace(pictures, seed=9), tmp_path)
    before = (tmp_path / "00000.png").read_bytes()
    with pytest.raises(UserError, match=r"another program has written .*00000\.png meanwhile"):
        draw(pictures, tmp_path, missing)
    assert (tmp_path / "00000.png").read_bytes() == before


def test_grid_is_read_from_files(pictures: Pictures, tmp_path: Path) -> None:
    draw(pictures, tmp_path)
    pictures.save_grid(tmp_path, 2)
    grid = Image.open(tmp_path / "grid.png")
    assert 2 * 128 < grid.height < 3 * 128
    assert grid.getpixel((grid.width - 10, grid.height - 10)) == (3, 3, 3)


def test_interrupted_write_leaves_no_picture(pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self, file, *args, **kwargs):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        draw(pictures, tmp_path, [0])
    assert not list(tmp_path.iterdir())
