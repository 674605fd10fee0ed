"""Where shards are looked for, and what of a damaged one is still found."""

import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.shards import Shard, expand_urls
from lcm.runtime.redaction import redacted
from tests.data.conftest import SIZES, pairs, png, write_shard, write_tar


def names(shard: Shard) -> list[str]:
    return [sample["__key__"] for sample in shard]


def test_braces_expand_in_order(urls: list[str]) -> None:
    assert expand_urls(str(Path(urls[0]).with_name("{000..003}.tar"))) == urls


def test_globs_expand_sorted(urls: list[str]) -> None:
    assert expand_urls(str(Path(urls[0]).with_name("*.tar"))) == urls


def test_lists_of_patterns_are_concatenated(urls: list[str]) -> None:
    assert expand_urls([urls[3], str(Path(urls[0]).with_name("00[01].tar"))]) == [urls[3], urls[0], urls[1]]


def test_a_list_file_holds_one_pattern_a_line(urls: list[str], tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text(f"# mine\n{urls[2]}\n\n{Path(urls[0]).with_name('00{0..1}.tar')}\n")
    assert expand_urls(f"@{tmp_path}/all.txt") == [urls[2], urls[0], urls[1]]


def test_a_missing_list_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list of shards cannot be read"):
        expand_urls(f"@{tmp_path}/none.txt")


def test_remote_braces_expand_without_a_look_at_the_remote() -> None:
    assert expand_urls("s3://bucket/{08..10}.tar") == [f"s3://bucket/{n}.tar" for n in ("08", "09", "10")]


def test_file_urls_are_local(urls: list[str]) -> None:
    assert expand_urls(f"file://{urls[0]}") == [urls[0]]


@pytest.mark.parametrize("pattern", ["nowhere.tar", "no*.tar", "{000..004}.tar"])
def test_missing_shards_are_a_user_error_that_names_the_option(urls: list[str], pattern: str) -> None:
    with pytest.raises(UserError, match=r"no shards match .*data\.val_shards"):
        expand_urls(str(Path(urls[0]).with_name(pattern)), "data.val_shards")


@pytest.mark.parametrize("url", ["ftp://a/{}.tar", "memory://{}"])
@pytest.mark.parametrize("allow_pipe", [False, True])
def test_schemes_that_are_not_known_to_be_safe_are_refused(url: str, allow_pipe: bool) -> None:
    with pytest.raises(UserError, match="URLs are not read"):
        expand_urls(url, allow_pipe=allow_pipe)


@pytest.mark.parametrize("url", ["pipe:touch {}", "pipe:touch {} file://x.tar", "PIPE:touch {}; echo ://"])
def test_a_command_needs_a_flag_and_is_never_read_from_a_list_file(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path / "ran")
    (tmp_path / "list.txt").write_text(url)
    for patterns, allow_pipe in ((url, False), (f"@{tmp_path}/list.txt", False), (f"@{tmp_path}/list.txt", True)):
        with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
            expand_urls(patterns, allow_pipe=allow_pipe)
    assert expand_urls(url, allow_pipe=True) == [url]
    assert not (tmp_path / "ran").exists()


def test_braces_in_a_command_make_one_of_each_shard() -> None:
    assert expand_urls("pipe:cat {8..10}.tar", allow_pipe=True) == [f"pipe:cat {n}.tar" for n in (8, 9, 10)]


def test_messages_hold_no_secret_of_a_url() -> None:
    assert redacted("https://me:secret@host/a/b.tar?X-Signature=secret") == "https://host/a/b.tar"
    assert redacted("a/b?c.tar") == "a/b?c.tar"
    commands = [redacted(f"pipe:curl -H 'token: secret' https://host/{n}.tar?secret") for n in (0, 1)]
    assert all(command.startswith("pipe:curl [") and "secret" not in command for command in commands)
    assert len(set(commands)) == 2, "an index knows shards by these"


def test_samples_are_found_by_number(urls: list[str]) -> None:
    shard = Shard(urls[2])
    assert len(shard) == SIZES[2]
    assert shard[7] == {"__key__": "2-07", "__url__": urls[2], "png": png(), "txt": b"sample 7 of 2"}
    assert names(shard) == [f"2-{i:02d}" for i in range(13)]


def test_keys_end_at_the_first_dot_and_extensions_ignore_case(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "a.tar", [{"__key__": "in/a", "seg.PNG": b"1", "PNG": b"2", "txt": "x"}]))
    [sample] = list(shard)
    assert sample.items() >= {"__key__": "in/a", "seg.png": b"1", "png": b"2", "txt": b"x"}.items()


def test_long_names_and_links_and_folders(tmp_path: Path) -> None:
    """pax headers come before a long name; what is no regular file is no member."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("d" * 150 + ".png", png()), ("d" * 150 + ".txt", b"long")]:
            (tmp_path / "file").write_bytes(content)
            tar.add(tmp_path / "file", name)
        link = tarfile.TarInfo("evil.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    shard = Shard(str(tmp_path / "a.tar"))
    assert names(shard) == ["d" * 150]
    assert shard[0]["txt"] == b"long"


@pytest.mark.parametrize(
    ("members", "reason"),
    [({"png": b""}, "no_caption"), ({"txt": "a"}, "no_image"), ({"npy": b"", "json": {}}, "no_image")],
)
def test_incomplete_samples_are_counted_and_named(tmp_path: Path, members: dict[str, Any], reason: str) -> None:
    shard = Shard(write_shard(tmp_path / "a.tar", [*pairs(0, 3), {"__key__": "odd", **members}, *pairs(1, 2)]))
    assert len(shard) == 5
    assert shard.dropped == {reason: 1}
    assert shard.broken == {"odd": reason}


def test_samples_are_kept_by_their_caption_and_metadata(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "png": png(), "txt": f"{i}", "json": {"score": i}} for i in range(6)]
    samples.append({"__key__": "6", "png": png(), "json": {"caption": "six", "score": 9}})
    samples.append({"__key__": "7", "png": png(), "txt": "7", "json": b"{"})
    seen: list[str | None] = []

    def few(caption: str | None, meta: Any) -> str | None:
        seen.append(caption)
        return "score" if meta["score"] < 4 else None

    shard = Shard(write_shard(tmp_path / "a.tar", samples), keep=few)
    assert names(shard) == ["4", "5", "6"]
    assert shard.dropped == {"score": 4, "json": 1}
    assert seen == ["0", "1", "2", "3", "4", "5", "six"]
    assert not shard.broken


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(10240)], ids=["empty", "html", "no members"])
def test_what_is_not_a_shard_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert len(Shard(str(tmp_path / "a.tar"))) == 0


# What ecosystem surveys measured of stream readers: one flipped header bit silently ends a shard.


def header(url: str, member: str) -> tarfile.TarInfo:
    with tarfile.open(url) as tar:
        return tar.getmember(member)


@pytest.mark.parametrize("member", ["1-06.png", "1-06.txt"])
def test_a_damaged_header_costs_one_sample_at_most(tmp_path: Path, urls: list[str], member: str) -> None:
    content = bytearray(Path(urls[1]).read_bytes())
    rng, start = random.Random(0), header(urls[1], member).offset
    for _ in range(40):
        damaged = bytearray(content)
        damaged[start + rng.randrange(345)] ^= 1 << rng.randrange(8)
        (tmp_path / "a.tar").write_bytes(damaged)
        shard = Shard(str(tmp_path / "a.tar"))
        assert [key for key in names(shard) if key != "1-06"] == [f"1-{i:02d}" for i in range(12) if i != 6]
        assert shard.broken in ({}, {"1-06": "no_image"}, {"1-06": "no_caption"})
        assert ("1-06" in names(shard)) != ("1-06" in shard.broken)


@pytest.mark.parametrize("member", ["1-06.png", "1-06.txt"])
@pytest.mark.parametrize("part", ["header", "content", "boundary"])
def test_of_a_cut_shard_only_the_rest_is_lost(tmp_path: Path, urls: list[str], member: str, part: str) -> None:
    info = header(urls[1], member)
    at = {"header": info.offset + 100, "content": info.offset_data + info.size // 2, "boundary": info.offset}[part]
    (tmp_path / "cut.tar").write_bytes(Path(urls[1]).read_bytes()[:at])
    shard = Shard(str(tmp_path / "cut.tar"))
    assert names(shard) == [f"1-{i:02d}" for i in range(6)]
    if part == "content":
        assert shard.broken == {"1-06": "cut"}


def test_a_flipped_bit_in_the_content_loses_no_other_sample(tmp_path: Path, urls: list[str]) -> None:
    content = bytearray(Path(urls[1]).read_bytes())
    content[header(urls[1], "1-03.png").offset_data + 20] ^= 4
    (tmp_path / "a.tar").write_bytes(content)
    assert names(Shard(str(tmp_path / "a.tar"))) == names(Shard(urls[1]))


def test_a_sample_too_large_to_be_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm.data.shards.MAX_BYTES", 5000)
    big = {"__key__": "big", "png": bytes(6000), "txt": "x"}
    assert Shard(write_shard(tmp_path / "a.tar", [*pairs(0, 2), big])).broken == {"big": "bytes"}


def test_json_captions_are_enough(tmp_path: Path) -> None:
    sample = {"__key__": "a", "png": png(), "json": {"caption": "a cat"}}
    assert json.loads(Shard(write_shard(tmp_path / "a.tar", [sample]))[0]["json"]) == {"caption": "a cat"}


def pair(name: str, caption: bytes = b"a cat") -> list[tuple[str, bytes]]:
    return [(f"{name}.png", png()), (f"{name}.txt", caption)]


def captions(shard: Shard) -> dict[str, bytes]:
    return {sample["__key__"]: sample["txt"] for sample in shard}


LITTER = ("._{}", ".{}", "__MACOSX/{}", ".AppleDouble/{}", ".ipynb_checkpoints/{}", "@eaDir/{}", "Thumbs.db", "desktop.ini")


@pytest.mark.parametrize("litter", LITTER)
def test_what_an_operating_system_leaves_in_a_tar_is_no_member(tmp_path: Path, litter: str) -> None:
    files = [(f"./{name}", content) for key in ("0", "1") for name, content in pair(key)]
    items = [item for name, content in files for item in ((f"./{litter.format(name[2:])}", png()), (name, content))]
    shard = Shard(write_tar(tmp_path / "a.tar", items))
    assert names(shard) == ["./0", "./1"]
    assert not shard.dropped


def test_what_an_operating_system_leaves_beside_shards_is_no_shard(tmp_path: Path, urls: list[str]) -> None:
    (tmp_path / "._000.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX").mkdir()
    os.link(urls[0], tmp_path / "000.tar")
    os.link(urls[0], tmp_path / "__MACOSX/000.tar")
    (tmp_path / "all.txt").write_text(f"{tmp_path}/._000.tar\n{tmp_path}/000.tar\n")
    assert expand_urls(f"@{tmp_path}/all.txt") == [f"{tmp_path}/000.tar"]
    assert expand_urls(f"{tmp_path}/**/*.tar") == [f"{tmp_path}/000.tar"]


def test_a_key_with_dots_ends_at_the_extension_where_only_that_gives_samples(tmp_path: Path) -> None:
    keys = ["IMG 2.1 sunset", "IMG 2.10 sunset", "photo", "photo.001", "photo.k.1", "v1.5.Beta", "v1.5.beta"]
    items = sorted(item for key in keys for item in pair(key, key.encode()))
    shard = Shard(write_tar(tmp_path / "a.tar", items))
    assert captions(shard) == {key: key.encode() for key in keys}
    assert not shard.dropped


def test_an_incomplete_sample_with_dots_is_counted_under_its_own_name(tmp_path: Path) -> None:
    shard = Shard(write_tar(tmp_path / "a.tar", [*pair("p.1"), ("p.2.png", png()), *pair("p.3")]))
    assert names(shard) == ["p.1", "p.3"]
    assert shard.broken == {"p.2": "no_caption"}


@pytest.mark.parametrize("labels", ["0.seg.json", "0.blip.txt"])
def test_members_with_dots_stay_members(tmp_path: Path, labels: str) -> None:
    items = [(labels, b"{}"), ("0.seg.png", png()), *pair("0"), ("0.json", b"{}")]
    [sample] = list(Shard(write_tar(tmp_path / "a.tar", items)))
    assert sample.keys() == {"__key__", "__url__", "png", "txt", "json", "seg.png", labels[2:]}


@pytest.mark.parametrize(("name", "weights"), [("blip", {"blip": 1.0}), ("caption", None), ("cap", None)])
def test_captions_of_any_name_make_samples(tmp_path: Path, name: str, weights: dict[str, float] | None) -> None:
    """Of keys with dots, of names that come again, and of members that lie apart."""
    dotted = [(f"p.{i}.{end}", png()) for i in range(3) for end in ("png", name)]
    twice = [(f"b.{end}", png()) for _ in range(2) for end in ("png", name)]
    apart = [(f"{n:03d}.{end}", png()) for end in ("png", name) for n in range(4)]
    shard = Shard(write_tar(tmp_path / "a.tar", [*dotted, *twice, *apart]), captions=weights)
    assert [key.partition("@")[0] for key in names(shard)] == ["p.0", "p.1", "p.2", "b", "b"]
    assert all(name in sample for sample in shard)
    assert shard.dropped == {"apart": 4}


def test_latents_of_a_key_with_dots(tmp_path: Path) -> None:
    items = [(f"p.{i}.{name}", b"") for i in range(3) for name in ("latent.npy", "sizes.npy", "txt")]
    shard = Shard(write_tar(tmp_path / "a.tar", items), needs=("latent.npy", "sample.npy"))
    assert names(shard) == ["p.0", "p.1", "p.2"]
    assert shard[1].keys() >= {"latent.npy", "sizes.npy", "txt"}


@pytest.mark.parametrize("order", ["aab", "aba", "baa"])
def test_samples_of_one_name_are_all_used_under_keys_of_their_own(tmp_path: Path, order: str) -> None:
    items = [item for i, key in enumerate(order) for item in pair(key, str(i).encode())]
    shard = Shard(write_tar(tmp_path / "a.tar", items))
    assert len(captions(shard)) == 3
    assert list(captions(shard).values()) == [b"0", b"1", b"2"]
    assert len(shard.repeated) == 1


@pytest.mark.parametrize("members", ["png png txt txt", "png txt txt", "png txt png"])
def test_pictures_and_captions_of_one_name_are_not_paired_by_chance(tmp_path: Path, members: str) -> None:
    items = [(f"a.{name}", png()) for name in members.split()]
    shard = Shard(write_tar(tmp_path / "a.tar", [*items, *pair("b")]))
    assert names(shard) == ["b"]
    assert shard.broken == {"a": "duplicate"}


@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.parametrize("ends", ["png txt", "txt png", "json png txt"])
def test_members_apart_are_counted_as_such(tmp_path: Path, folders: bool, ends: str) -> None:
    files = [(f"{n:03d}.{end}", png()) for end in ends.split() for n in range(30)]
    items = [(f"{name.partition('.')[2]}/{name}" if folders else name, content) for name, content in files]
    shard = Shard(write_tar(tmp_path / "a.tar", [*items, *pair("x")]))
    assert names(shard) == ["x"]
    assert shard.dropped == {"apart": 30}


def test_members_with_dots_apart_are_counted_as_such(tmp_path: Path) -> None:
    big = bytes(2**19)
    shard = Shard(write_tar(tmp_path / "a.tar", [(f"p.{n}.{end}", big) for end in ("png", "txt") for n in range(9)]))
    assert shard.dropped == {"apart": 9}


def pack(tmp_path: Path, link: Any, names: str = "png txt") -> Shard:
    """A tar of links to files, then of these files."""
    (tmp_path / "real").mkdir()
    (tmp_path / "made").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in pair("0"):
            (tmp_path / "real" / name).write_bytes(content)
        for folder in ("real", "made"):
            for name in names.split():
                if folder == "made":
                    link(tmp_path / f"real/0.{name}", tmp_path / f"made/0.{name}")
                archive.add(tmp_path / f"{folder}/0.{name}", f"{folder}/0.{name}")
    return Shard(str(tmp_path / "a.tar"))


def relative(target: Path, link: Path) -> None:
    link.symlink_to(f"../{target.parent.name}/{target.name}")


@pytest.mark.parametrize("link", [os.link, relative], ids=["hard", "symbolic"])
def test_links_to_files_of_the_same_tar_are_followed(tmp_path: Path, link: Any) -> None:
    shard = pack(tmp_path, link)
    assert names(shard) == ["real/0", "made/0"]
    assert shard[0]["png"] == shard[1]["png"] == png()


def test_links_to_files_elsewhere_are_counted_as_such(tmp_path: Path) -> None:
    shard = pack(tmp_path, lambda target, link: link.symlink_to("/etc/passwd"))
    assert names(shard) == ["real/0"]
    assert shard.dropped == {"link": 1}


@pytest.mark.parametrize("pattern", ["{0..1.tar", "0..1}.tar", "{a,{b}.tar"])
def test_braces_that_do_not_close_are_a_user_error(pattern: str) -> None:
    with pytest.raises(UserError, match=r"^data\.val_shards: the braces of '.*' do not close: write ranges as \{000\.\.123\}"):
        expand_urls(f"train-{pattern}", "data.val_shards")


def test_braces_around_one_number_are_that_number(urls: list[str]) -> None:
    assert expand_urls(str(Path(urls[0]).with_name("{000}.tar"))) == urls[:1]
    assert expand_urls("s3://bucket/{00000}.tar") == ["s3://bucket/00000.tar"]


@pytest.mark.parametrize("braces", ["{000-003}", "{000..}", "{000:003}", "{000...003}"])
def test_ranges_of_another_spelling_are_told_the_right_one(urls: list[str], braces: str) -> None:
    with pytest.raises(UserError, match=r"no shards match .*; ranges in braces are written \{000\.\.123\}"):
        expand_urls(str(Path(urls[0]).with_name(f"{braces}.tar")))


def test_names_with_the_characters_of_a_glob_are_names(tmp_path: Path, urls: list[str]) -> None:
    (tmp_path / "a [v2]").mkdir()
    os.link(urls[0], tmp_path / "a [v2]/0.tar")
    assert expand_urls(f"{tmp_path}/a [v2]/0.tar") == [f"{tmp_path}/a [v2]/0.tar"]


@pytest.mark.parametrize("pattern", ["~/0.tar", "~/{0..0}.tar", "~/*.tar", "@~/all.txt"])
def test_the_users_folder_has_a_short_name(
    tmp_path: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    os.link(urls[0], tmp_path / "0.tar")
    (tmp_path / "all.txt").write_text("~/0.tar\n")
    assert expand_urls(pattern) == [f"{tmp_path}/0.tar"]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("0.tar", r"mine is a folder: give its shards, as in '.*mine/\*\.tar'"),
        ("part/0.tar", r"mine is a folder: give its shards, as in '.*mine/\*/\*\.tar'"),
        ("0.jpg", r"mine is a folder of pictures: pack it with `tar --sort=name -cf mine\.tar -C .*mine \.`"),
        ("cats/0.PNG", r"mine is a folder of pictures: pack it with .* and set data\.shards=mine\.tar"),
        ("notes.md", r"mine is a folder: give its shards, as in '.*mine/\*\.tar'"),
    ],
)
def test_a_folder_is_told_the_way_to_shards(tmp_path: Path, file: str, says: str) -> None:
    (tmp_path / "mine" / file).parent.mkdir(parents=True)
    (tmp_path / "mine" / file).touch()
    with pytest.raises(UserError, match=says):
        expand_urls(f"{tmp_path}/mine")
