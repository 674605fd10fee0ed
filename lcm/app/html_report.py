"""A report of a run or an evaluation: one HTML file that needs no other file and no network."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from lcm.runtime.atomic_io import whole_file
from lcm.runtime.environment import environment
from lcm.runtime.redaction import redacted

TEMPLATE = Path(__file__).with_name("report.html")
MOST_PICTURES = 40  # the most pictures of a slider
WIDEST = 1600  # pixels of a picture
PANELS = 3  # curves side by side


@dataclass(frozen=True)
class Section:
    """A part of the page: pictures by label, a table or a text. A slider shows one picture at a time."""

    title: str
    pictures: Mapping[str, str] | None = None  # sources, as `picture_source` returns
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    text: str = ""


def write_report(file: Path, title: str, summary: str, sections: Sequence[Section], command: str) -> None:
    """Write the page, with the command and the environment at the end. Secrets are removed from all texts."""
    end = [Section("Command", text=command), Section("Environment", rows=list(environment().items()), header=("", "version"))]
    shown = [section for section in [*sections, *end] if section.pictures or section.rows or section.text]
    content = [
        {
            "id": redacted(section.title).lower().replace(" ", "-"),
            "title": redacted(section.title),
            "pictures": [{"label": redacted(name), "source": source} for name, source in (section.pictures or {}).items()],
            "header": redacted(list(section.header)),
            "rows": [[redacted(cell) if isinstance(cell, str) else number(cell) for cell in row] for row in section.rows],
            "text": redacted(section.text),
        }
        for section in shown
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    page = template.render(title=redacted(title), summary=redacted(summary), sections=content)
    with whole_file(file) as opened:
        opened.write(page.encode())


def number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def picture_source(picture: Image.Image) -> str:
    """Return a picture for `src`: a JPEG, at most `WIDEST` wide, because grids of photographs are large as PNG."""
    picture = picture.convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90)
    return source("image/jpeg", content.getvalue())


def source(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def evenly(files: Sequence[Path], most: int = MOST_PICTURES) -> list[Path]:
    """Return at most `most` of the files, evenly spaced, the first and the last among them."""
    if len(files) <= most:
        return list(files)
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def read_metrics(file: Path) -> dict[str, dict[int, float]]:
    """Return the values of a metrics.csv by metric and step. The last value counts if a resumed run logged a step again."""
    curves: dict[str, dict[int, float]] = {}
    if file.is_file():
        with file.open(newline="") as opened:
            for row in csv.DictReader(opened):
                for name, value in row.items():
                    if name != "step" and value and row["step"]:
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: dict(sorted(values.items())) for name, values in curves.items()}


def plot_curves(curves: Mapping[str, Mapping[int, float]]) -> str:
    """Plot each metric in a panel of its own over the steps, and return the source of an SVG."""
    rows = -(-len(curves) // PANELS)
    with matplotlib.rc_context({
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.fonttype": "none",
        "figure.facecolor": "none", "axes.facecolor": "none",  # the page is light or dark
    }):  # fmt: skip
        figure = Figure(figsize=(4 * PANELS, 2.4 * rows), layout="constrained")
        panels = figure.subplots(rows, PANELS, squeeze=False).flat
        for axes in list(panels)[len(curves) :]:
            axes.set_axis_off()
        for axes, (name, values) in zip(figure.axes, curves.items(), strict=False):
            axes.plot(list(values), list(values.values()), marker="." if len(values) < 30 else "", linewidth=1)
            axes.set_title(name, fontsize=9)
            axes.grid(alpha=0.25)
        content = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(content)
    return source("image/svg+xml", content.getvalue())


def curve_sections(curves: Mapping[str, Mapping[int, float]]) -> list[Section]:
    """Return the curves and a table of their last values. Metrics of the training come first, then those of the validation."""
    order = ("train", "val")
    names = sorted(curves, key=lambda name: [*order, ""].index(group if (group := name.partition("/")[0]) in order else ""))
    last = {
        name: (max(values), values[max(values)], min(values.values()), max(values.values())) for name, values in curves.items()
    }
    header = ("metric", "step", "last", "lowest", "highest")
    plot = {"curves": plot_curves({name: curves[name] for name in names})} if names else None
    return [
        Section("Curves", pictures=plot),
        Section("Last values", header=header, rows=[(name, *last[name]) for name in names]),
    ]
