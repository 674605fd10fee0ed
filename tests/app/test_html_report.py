"""The report is one page without external files. The tests check its content, size, secrets and look in a browser."""

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm.app.html_report import Section, curve_sections, evenly, picture_source, read_metrics, write_report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
COLOURS = ["red", "lime", "blue"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text("step,lr,train/loss,val/fid\n1,,0.5,\n2,,0.25,\n2,,,9\n2,1,0.2,\n")
    pictures = {f"step {i}": picture_source(Image.new("RGB", (60, 40), colour)) for i, colour in enumerate(COLOURS)}
    sections = [
        Section("Samples", pictures=pictures),
        *curve_sections(read_metrics(tmp_path / "metrics.csv")),
        Section("Configuration", text="a: <b>&\n"),
        Section("Empty"),
    ]
    write_report(tmp_path / "report.html", "Run x/0", "after 2 steps", sections, "python train.py name=x")
    return tmp_path / "report.html"


def test_a_logged_step_has_its_last_value(page: Path) -> None:
    assert read_metrics(page.with_name("metrics.csv")) == {"train/loss": {1: 0.5, 2: 0.2}, "val/fid": {2: 9.0}, "lr": {2: 1.0}}
    assert read_metrics(page.with_name("none.csv")) == {}


def test_page_holds_everything(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"<h2>(.*)</h2>", text) == [
        *("Samples", "Curves", "Last values", "Configuration", "Command", "Environment"),
    ]
    assert "a: &lt;b&gt;&amp;" in text
    assert "<td>train/loss</td><td>2</td><td>0.2</td><td>0.2</td><td>0.5</td>" in text
    assert "python train.py name=x" in text
    assert "<td>torch</td>" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # the page loads no external file
    images = [base64.b64decode(code) for code in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]
    assert [max(Image.open(io.BytesIO(image)).getpixel((5, 5))) > 240 for image in images] == [True] * 3
    [curves] = [base64.b64decode(code).decode() for code in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]
    assert curves.index(">train/loss</text>") < curves.index(">val/fid</text>") < curves.index(">lr</text>")


def test_page_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    secret = "x planted-secret https://user:planted-password@host/a?token=planted-query"
    table = Section(secret, header=[secret], rows=[[secret, 1.0]], pictures={secret: "data:,"}, text=secret)
    write_report(tmp_path / "report.html", secret, secret, [table], secret)
    assert "planted" not in (tmp_path / "report.html").read_text()


def test_a_long_training_keeps_the_page_small() -> None:
    files = [Path(f"{i}") for i in range(1000)]
    chosen = evenly(files)
    assert (len(chosen), chosen[0], chosen[-1]) == (40, files[0], files[-1])
    assert evenly(files[:3]) == files[:3]
    source = picture_source(Image.effect_noise((4000, 3000), 50))
    assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (1600, 1200)


def photograph(address: str, folder: Path, *options: str) -> np.ndarray:
    """Return the pixels `[H, W, 3]` of a page in a real browser."""
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *options)
    picture = folder / "page.png"
    command = [CHROMIUM, *options, "--window-size=1000,800", f"--screenshot={picture}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(picture).convert("RGB"), dtype=int)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("where", "shown"), [("", 2), ("#samples=1", 1)])
def test_slider_shows_one_picture_in_a_browser(page: Path, tmp_path: Path, where: str, shown: int) -> None:
    pixels = photograph(f"{page.as_uri()}{where}", tmp_path)
    pure = [np.array([255 * (i == channel) for i in range(3)]) for channel in range(3)]
    near = [(abs(pixels - colour).sum(axis=2) < 40).sum() > 1000 for colour in pure]  # the picture has 2400 pixels
    assert near == [i == shown for i in range(3)]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)], ids=["light", "dark"])
def test_page_follows_the_colour_scheme_of_the_browser(page: Path, tmp_path: Path, scheme: int, dark: bool) -> None:
    """The page and its curves have a light or dark background. Text and axes have the opposite brightness."""
    brightness = photograph(page.as_uri(), tmp_path, f"--blink-settings=preferredColorScheme={scheme}").mean(axis=2)
    paper, ink = (brightness < 60, brightness > 190) if dark else (brightness > 230, brightness < 90)
    assert paper.mean() > 0.9
    assert ink[300:].sum() > 1000  # titles and axes of the curves
