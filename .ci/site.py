"""A hook of mkdocs: the README and the card of the mini model, which lie outside docs/, are pages of the site."""

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "lcm/assets/mini/README.md": "mini.md"}


def on_files(files: Any, config: Any) -> Any:
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text()
        for other, name in {**OUTSIDE, "docs/": ""}.items():
            text = text.replace(f"]({posixpath.relpath(other, Path(source).parent)}{'/' * other.endswith('/')}", f"]({name}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    for source, name in OUTSIDE.items():
        path = posixpath.relpath(source, posixpath.join("docs", folder))
        markdown = markdown.replace(f"]({path}", f"]({posixpath.relpath(name, folder or '.')}")
    return markdown
