"""URLs of shards: globs, braces, list files, and their schemes."""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

from braceexpand import braceexpand

from lcm.core.errors import UserError
from lcm.data.samples import is_litter
from lcm.runtime.atomic_io import lines_of

IMAGES = ("png", "jpg", "jpeg", "webp", "img")
LATENTS = ("latent.npy", "sample.npy")  # in place of an image, see `lcm.data.latents`
SCHEMES = ("", "file", "http", "https", "s3", "gs", "hf")


def expand_urls(shards: str | Sequence[str], option: str = "data.shards", *, allow_pipe: bool = False) -> list[str]:
    """Return shard paths or URLs from globs, `{000..123}` braces and list files (`@shards.txt`, one per line).

    allow_pipe: also allow `pipe:<command that prints a shard>`, but never from a list file, which may be untrusted. Raises
    UserError for local shards that do not exist.
    """
    urls: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if pattern.startswith("@"):
            urls += expand_urls(list_file(os.path.expanduser(pattern[1:]), option), option)
            continue
        for url in map(os.path.expanduser, expand_braces(pattern, option)):
            scheme = scheme_of(url)
            if scheme == "pipe" and not allow_pipe:
                raise UserError(f"{option}: pipe: URLs run commands: set data.allow_pipe=true, list files cannot hold them")
            if scheme not in (*SCHEMES, "pipe"):
                raise UserError(f"{option}: {scheme}: URLs are not supported: use local paths or {', '.join(SCHEMES[2:])}")
            urls += [url] if is_remote(url) else local_files(url, option)
    if not urls:
        raise UserError(f"{option}={shards} names no shards: point it at webdataset .tar files (globs and braces work)")
    return [url for url in urls if not is_litter(url)] or urls


def expand_braces(pattern: str, option: str) -> Iterator[str]:
    """Yield the patterns without braces. `{00000}` is one shard. Raises UserError for braces that do not close."""
    try:
        for url in braceexpand(pattern):
            single = "{" in url and scheme_of(url) != "pipe" and (is_remote(url) or not os.path.exists(url))
            yield re.sub(r"\{(\d+)\}", r"\1", url) if single else url
    except ValueError:
        raise UserError(
            f"{option}: the braces of {pattern!r} do not close: write ranges as {{000..123}} and choices as {{a,b}}"
        ) from None


def local_files(url: str, option: str) -> list[str]:
    """Return the file of this name, else the files that match it as a glob. Raises UserError if there is none."""
    path = local(url)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        braces = "; ranges in braces are written {000..123}, choices {a,b}" if "{" in url else ""
        raise UserError(f"no shards match {url!r}: point {option} at webdataset .tar files (globs and braces work){braces}")
    if all(map(os.path.isdir, files)):
        raise UserError(f"{option}: {files[0]} is a folder{folder_advice(files[0], option)}")
    return files


def folder_advice(folder: str, option: str) -> str:
    """Return the end of a message for a folder instead of shards, by its content and the content of its subfolders."""
    escaped = glob.escape(folder.rstrip("/"))
    pattern = f"{escaped}/*.tar"
    if not glob.glob(pattern):
        files = [file.lower() for depth in ("*", "*/*") for file in glob.iglob(depth, root_dir=folder)]
        if any(file.endswith(".tar") for file in files):
            pattern = f"{escaped}/*/*.tar"
        elif any(file.rpartition(".")[2] in IMAGES for file in files):
            if option == "data.shards":
                return f" of pictures: train on it with data=folder data.folder={quote(folder)}"
            name = f"{os.path.basename(os.path.abspath(folder))}.tar"
            return (
                f" of pictures: pack it with `tar --sort=name -cf {quote(name)} -C {quote(folder)} .`, each picture with a "
                f"text file of the same name beside it, and set {option}={name}"
            )
    return f": give its shards, as in '{pattern}'"


def list_file(path: str, option: str) -> list[str]:
    """Return the lines of a list file, without comments. Raises UserError."""
    try:
        return [line for line in lines_of(path) if not line.startswith("#")]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}=@{path}: the list of shards cannot be read ({reason})") from error


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case, "" for a path."""
    head, colon, _ = url.partition(":")
    return head.lower() if colon and "/" not in head else ""


def is_remote(url: str) -> bool:
    return scheme_of(url) not in ("", "file")


def local(url: str) -> str:
    """Return the path of a local URL."""
    return url[len("file://") :] if url.startswith("file://") else url


def first_of(sample: Mapping[str, Any], extensions: Sequence[str]) -> str | None:
    """Return the first of the extensions that the sample has, or None."""
    return next((extension for extension in extensions if extension in sample), None)
