"""The docs site builds without a broken link to a page, heading or picture. `make docs` builds the site for a reader."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["mkdocs", "build", "--strict", "--config-file", str(ROOT / ".ci/mkdocs.yml"), "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").rglob("*.md")} | {"index", "mini"}
    assert {path.stem for path in tmp_path.rglob("*.html")} == pages | {"404"}
    start, gallery = ((tmp_path / name).read_text() for name in ("index.html", "gallery.html"))
    assert 'href="guide.html#sample"' in start  # README.md links to docs/guide.md#sample
    for picture in re.findall(r'src="(images/[^"]+)"', start + gallery):
        assert (tmp_path / picture).is_file()
    assert {path.name for path in (ROOT / "docs/images").iterdir()} == {*re.findall(r'src="images/([^"]+)"', gallery)}
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', start)
    assert loaded == []  # the page loads no file from another host
