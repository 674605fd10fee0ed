"""OpenMoji as shards: the split by caption, the styles, and complete, missing or reused builds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate

from lcm.app.composition import compose
from lcm.core.errors import UserError
from lcm.data import openmoji
from lcm.data.captions import read_samples
from lcm.data.openmoji import (
    STYLE_SHEETS,
    all_captions,
    build,
    build_styles,
    draw,
    emojis,
    is_held_out,
    is_wanted,
)
from lcm.data.source import Source
from lcm.data.urls import expand_urls


def captions(folder: Path, split: str) -> list[str]:
    return [sample["txt"].decode() for sample in read_samples(Source(expand_urls(f"{folder}/{split}-*.tar")))]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw without starting processes."""

    def render(tasks: list[Any], description: str) -> Iterator[dict[str, Any]]:
        for task in tasks:
            yield from openmoji._samples_of(task)

    monkeypatch.setattr(openmoji, "_render", render)


def small(folder: Path, **settings: Any) -> Path:
    build(str(folder), **{"resolution": 16, "limit": 6, "samples_per_shard": 10, "held_out": 0.3, "pairs": 0.0, **settings})
    return folder


def test_about_a_twentieth_of_all_captions_is_held_out() -> None:
    held_out = [is_held_out(caption, 0.05) for caption in all_captions()]
    assert sum(held_out) / len(held_out) == pytest.approx(0.05, abs=0.005)


def test_no_held_out_caption_is_trained_on(shards: Path) -> None:
    train, val = captions(shards, "train"), captions(shards, "val")
    assert not set(train) & set(val)
    assert len(train + val) == 40 * 6
    assert all(is_held_out(caption, 0.05) for caption in val)


def test_the_shards_are_usable_and_counted_in_the_manifest(shards: Path) -> None:
    counts = json.loads((shards / "manifest.json").read_text())["samples"]
    for name, count in counts.items():
        assert len(list(read_samples(Source([str(shards / name)])))) == count


def test_an_emoji_has_as_many_captions_as_backgrounds(shards: Path) -> None:
    texts = captions(shards, "train") + captions(shards, "val")
    assert len(set(texts)) == len(texts)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds something else, .*: set data\.build\.root"):
        small(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.usefixtures("in_process")
def test_build_of_another_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render, drawn = openmoji._render, []

    def overtaken(tasks: list[Any], description: str) -> Iterator[dict[str, Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(openmoji, "_render", render)
            patch.setattr("os.getpid", lambda: 1)
            drawn.append((small(tmp_path / "a") / "manifest.json").stat().st_ino)
        yield from render(tasks, description)

    monkeypatch.setattr(openmoji, "_render", overtaken)
    assert [(small(tmp_path / "a") / "manifest.json").stat().st_ino] == drawn
    assert [folder.name for folder in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("in_process")
def test_skin_tones_are_drawn_on_fewer_backgrounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toned = [emoji for emoji in emojis() if emoji.toned][:2]
    monkeypatch.setattr(openmoji, "emojis", lambda: [toned[0]._replace(name="red apple"), *toned])
    build(str(tmp_path / "set"), resolution=16, held_out=0.0, pairs=0.0)
    assert len(captions(tmp_path / "set", "train")) == 7 + 2 + 2


def test_names_are_plain_english() -> None:
    names = [emoji.name for emoji in emojis()]
    assert len(names) > 3500
    assert "red apple" in names
    assert not any(":" in name or "_" in name for name in names)


def test_kinds_and_categories_grow_vaguer() -> None:
    """The kind and the category of an emoji are plain English words."""
    by_name = {emoji.name: emoji for emoji in emojis()}
    expected = {
        "red apple": ("fruit", "food"),
        "frog": ("frog", "animal"),
        "woman biking dark skin tone": ("person biking", "person"),
        "woman and man holding hands medium skin tone light skin tone": ("people holding hands", "person"),
        "france": ("country flag", "flag"),
        "crying face": ("sad face", "face"),
    }
    assert {name: (by_name[name].kind, by_name[name].category) for name in expected} == expected
    names, kinds, categories = (len(set(values)) for values in zip(*[emoji[:3] for emoji in emojis()], strict=True))
    assert names > 3500
    assert 150 < kinds < 500
    assert 10 < categories < 20
    assert not [emoji for emoji in emojis() if "skin tone" in emoji.kind and emoji.kind != "skin tone"]


@pytest.mark.usefixtures("in_process")
def test_every_picture_has_exact_and_vague_captions(tmp_path: Path) -> None:
    folder = small(tmp_path / "set", held_out=0.0, pairs=0.5)
    records = [json.loads(sample["json"]) for sample in read_samples(Source(expand_urls(f"{folder}/train-*.tar")))]
    things = {emoji.name: emoji for emoji in emojis()}
    pairs = [record for record in records if "+" in record["emoji"]]
    assert len(pairs) == len(records) / 3
    for record in records:
        colour = record["background"].removesuffix(" background")
        names = record["caption"].removesuffix(f" on a {colour} background").split(" and ")
        if record in pairs:
            assert record["kind"] == f"{' and '.join(things[name].kind for name in names)} on a {colour} background"
        else:
            assert record["category"] == f"{things[' and '.join(names)].category} on a {colour} background"


@pytest.mark.usefixtures("in_process")
def test_pictures_of_an_emoji_vary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two pictures of the same emoji on the same background are equal."""
    monkeypatch.setattr(openmoji, "emojis", lambda: [emojis()[100]] * 6)
    monkeypatch.setitem(openmoji.BACKGROUNDS, "color", {"white": "#ffffff"})
    folder = small(tmp_path / "set", held_out=0.0)
    pictures = [sample["png"] for sample in read_samples(Source(expand_urls(f"{folder}/train-*.tar")))]
    assert len(pictures) == len(set(pictures)) == 6


@pytest.mark.usefixtures("in_process")
class TestBuild:
    def test_the_same_settings_do_not_build_again(self, tmp_path: Path) -> None:
        folder = small(tmp_path / "set")
        times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        small(folder)
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times

    @pytest.mark.parametrize("settings", [{"held_out": 0.2}, {"style": "line"}])
    def test_other_settings_build_again(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        folder = small(tmp_path / "set")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        small(folder, **settings)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} != before
        assert json.loads((folder / "manifest.json").read_text())["settings"].items() >= settings.items()

    def test_builds_are_equal_byte_for_byte(self, tmp_path: Path) -> None:
        first, second = small(tmp_path / "a"), small(tmp_path / "b")
        assert [p.read_bytes() for p in sorted(first.iterdir())] == [p.read_bytes() for p in sorted(second.iterdir())]

    def test_an_interrupted_build_leaves_no_dataset(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = emojis()[:3]
        monkeypatch.setattr(openmoji, "emojis", lambda: [*real, real[0]._replace(path=tmp_path / "gone.svg")])
        with pytest.raises(BaseException):  # noqa: B017, PT011  whatever resvg raises
            small(tmp_path / "set")
        assert not (tmp_path / "set").exists()

    def test_an_interrupted_rebuild_keeps_the_old_dataset(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = small(tmp_path / "set")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr(openmoji, "draw", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small(folder, limit=5)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_styles_lie_side_by_side_and_split_alike(self, tmp_path: Path) -> None:
        build_styles(str(tmp_path / "emoji-16"), styles=["color", "line"], resolution=16, limit=6, held_out=0.3, pairs=0.0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji-16", "emoji-line-16"]
        color, line = (
            {s: sorted(captions(tmp_path / name, s)) for s in ("train", "val")} for name in ("emoji-16", "emoji-line-16")
        )
        assert color == line


@pytest.fixture(scope="module")
def drawings() -> list[dict[str, np.ndarray]]:
    """Return ten emojis of different code points, drawn in every style."""
    return [
        {style: np.array(draw(path, 48, style)) for style in STYLE_SHEETS}
        for path in [emoji.path for emoji in emojis()][30::400]
    ]


def test_every_style_draws_differently(drawings: list[dict[str, np.ndarray]]) -> None:
    for drawn in drawings:
        assert len({image.tobytes() for image in drawn.values()}) == len(STYLE_SHEETS)


def test_the_line_style_hides_colour(drawings: list[dict[str, np.ndarray]]) -> None:
    for drawn in drawings:
        inked = drawn["line"][drawn["line"][..., 3] > 0]
        assert len(inked)
        assert (inked[:, 0] == inked[:, 1]).all()
        assert (inked[:, 1] == inked[:, 2]).all()


def test_the_dark_style_has_light_outlines(drawings: list[dict[str, np.ndarray]]) -> None:
    for drawn in drawings:
        outline = (drawn["line"] == (0, 0, 0, 255)).all(-1)
        assert outline.any()
        assert drawn["dark"][outline, :3].mean() > 200


@pytest.mark.parametrize("experiment", ["clip_mini", "lcd_mini"])
def test_own_shards_need_no_openmoji(experiment, shards, tiny_pipeline, tmp_path, capsys):
    """The shards lie outside of paths.data. OpenMoji is not drawn with data.shards alone, nor with data=shards."""
    tars = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    base = [f"experiment={experiment}", f"paths.data={tmp_path}", "data.resolution=32"]
    base += [] if experiment == "clip_mini" else [f"model.pipeline={tiny_pipeline}"]
    for group in ([], ["data=shards"]):
        for urls in (tars[0], f"[{','.join(tars)}]"):
            data = instantiate(compose("train", [*base, *group, f"data.shards={urls}"]).data)
            data.prepare_data()
            assert data.val_shards is None
            assert not list(tmp_path.glob("openmoji*"))
            assert capsys.readouterr().out.count("there is no validation, data.val_shards=<shards> adds it") == (not group)
        cfg = compose("train", [*base, *group, f"data.shards={tars[0]}", f"data.val_shards={tars[1]}", "callbacks=evaluation"])
        assert cfg.callbacks.evaluation.shards == tars[1]
        instantiate(cfg.data).prepare_data()
        assert not list(tmp_path.glob("openmoji*"))
        assert "validation" not in capsys.readouterr().out


@pytest.mark.parametrize("data", ["openmoji_line", "openmoji_styles"])
def test_default_data_are_drawn_and_validated_on(data):
    cfg = compose("train", [f"data={data}", "paths.data=mine"]).data
    style = "line-" if data == "openmoji_line" else ""
    assert cfg.val_shards == f"mine/openmoji-{style}64/val-*.tar"
    assert is_wanted(cfg.build.root, cfg.build.wanted)
    others = compose("train", [f"data={data}", "paths.data=mine", "data.shards=other.tar", f"data.val_shards={cfg.val_shards}"])
    assert is_wanted(others.data.build.root, others.data.build.wanted)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write to .* \(.*\): set paths\.data to a writable folder$"):
        build(str(tmp_path / "file/openmoji-16"), resolution=16)
