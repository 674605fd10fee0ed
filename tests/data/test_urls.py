"""Paths and URLs of shards."""

import os
from pathlib import Path

import pytest

from lcm.core.errors import UserError
from lcm.data.urls import expand_urls


def test_patterns_are_concatenated(urls: list[str]) -> None:
    assert expand_urls([urls[3], str(Path(urls[0]).with_name("00[01].tar"))]) == [urls[3], urls[0], urls[1]]


def test_list_file_holds_one_pattern_a_line(urls: list[str], tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text(f"# mine\n{urls[2]}\n\n{Path(urls[0]).with_name('00{0..1}.tar')}\n")
    assert expand_urls(f"@{tmp_path}/all.txt") == [urls[2], urls[0], urls[1]]


def test_missing_list_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list of shards cannot be read"):
        expand_urls(f"@{tmp_path}/none.txt")


def test_remote_braces_expand_offline() -> None:
    assert expand_urls("s3://bucket/{08..10}.tar") == [f"s3://bucket/{n}.tar" for n in ("08", "09", "10")]


def test_file_urls_are_local(urls: list[str]) -> None:
    assert expand_urls(f"file://{urls[0]}") == [urls[0]]


def test_missing_shards_name_the_option(urls: list[str]) -> None:
    with pytest.raises(UserError, match=r"no shards match .*data\.val_shards"):
        expand_urls(str(Path(urls[0]).with_name("{000..004}.tar")), "data.val_shards")


@pytest.mark.parametrize(("url", "allow_pipe"), [("ftp://a/{}.tar", False), ("memory://{}", True)])
def test_unsafe_schemes_are_refused(url: str, allow_pipe: bool) -> None:
    with pytest.raises(UserError, match="URLs are not supported"):
        expand_urls(url, allow_pipe=allow_pipe)


@pytest.mark.parametrize("url", ["pipe:touch {}", "pipe:touch {} file://x.tar", "PIPE:touch {}; echo ://"])
def test_command_needs_a_flag_and_no_list_file(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path / "ran")
    (tmp_path / "list.txt").write_text(url)
    for patterns, allow_pipe in ((url, False), (f"@{tmp_path}/list.txt", False), (f"@{tmp_path}/list.txt", True)):
        with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
            expand_urls(patterns, allow_pipe=allow_pipe)
    assert expand_urls(url, allow_pipe=True) == [url]
    assert not (tmp_path / "ran").exists()


def test_braces_in_a_command_expand() -> None:
    assert expand_urls("pipe:cat {8..10}.tar", allow_pipe=True) == [f"pipe:cat {n}.tar" for n in (8, 9, 10)]


def test_litter_beside_shards_is_no_shard(tmp_path: Path, urls: list[str]) -> None:
    (tmp_path / "._000.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX").mkdir()
    os.link(urls[0], tmp_path / "000.tar")
    os.link(urls[0], tmp_path / "__MACOSX/000.tar")
    (tmp_path / "all.txt").write_text(f"{tmp_path}/._000.tar\n{tmp_path}/000.tar\n")
    assert expand_urls(f"@{tmp_path}/all.txt") == [f"{tmp_path}/000.tar"]
    assert expand_urls(f"{tmp_path}/**/*.tar") == [f"{tmp_path}/000.tar"]


@pytest.mark.parametrize("pattern", ["{0..1.tar", "0..1}.tar"])
def test_open_braces_are_a_user_error(pattern: str) -> None:
    with pytest.raises(UserError, match=r"^data\.val_shards: the braces of '.*' do not close: write ranges as \{000\.\.123\}"):
        expand_urls(f"train-{pattern}", "data.val_shards")


def test_braces_around_one_number_are_that_number(urls: list[str]) -> None:
    assert expand_urls(str(Path(urls[0]).with_name("{000}.tar"))) == urls[:1]
    assert expand_urls("s3://bucket/{00000}.tar") == ["s3://bucket/00000.tar"]


def test_other_ranges_are_told_the_right_spelling(urls: list[str]) -> None:
    with pytest.raises(UserError, match=r"no shards match .*; ranges in braces are written \{000\.\.123\}"):
        expand_urls(str(Path(urls[0]).with_name("{000-003}.tar")))


def test_names_may_hold_glob_characters(tmp_path: Path, urls: list[str]) -> None:
    (tmp_path / "a [v2]").mkdir()
    os.link(urls[0], tmp_path / "a [v2]/0.tar")
    assert expand_urls(f"{tmp_path}/a [v2]/0.tar") == [f"{tmp_path}/a [v2]/0.tar"]


@pytest.mark.parametrize("pattern", ["~/{0..0}.tar", "@~/all.txt"])
def test_tilde_is_the_users_folder(tmp_path: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    os.link(urls[0], tmp_path / "0.tar")
    (tmp_path / "all.txt").write_text("~/0.tar\n")
    assert expand_urls(pattern) == [f"{tmp_path}/0.tar"]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("0.tar", r"mine is a folder: give its shards, as in '.*mine/\*\.tar'"),
        ("part/0.tar", r"mine is a folder: give its shards, as in '.*mine/\*/\*\.tar'"),
        ("0.jpg", r"mine is a folder of pictures: train on it with data=folder data\.folder=.*/mine$"),
        ("notes.md", r"mine is a folder: give its shards, as in '.*mine/\*\.tar'"),
    ],
)
def test_folder_is_told_the_way(tmp_path: Path, file: str, says: str) -> None:
    (tmp_path / "mine" / file).parent.mkdir(parents=True)
    (tmp_path / "mine" / file).touch()
    with pytest.raises(UserError, match=says):
        expand_urls(f"{tmp_path}/mine")


def test_folder_of_validation_pictures_is_to_be_packed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/0.jpg").touch()
    message = r"pictures: pack it with `tar --sort=name -cf mine\.tar -C .*mine \.`.* and set data\.val_shards=mine\.tar"
    with pytest.raises(UserError, match=message):
        expand_urls(f"{tmp_path}/mine", "data.val_shards")
