"""What an evaluation writes: table.md, .csv and .json, plots, a grid of pictures; all of it also to loggers."""

import csv
import json
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from lcm.app.images import columns_to_rows, grid, steps_label
from lcm.callbacks.samples import log_picture
from lcm.evaluate.features import DISTANCES, Extractor, Features, scores
from lcm.runtime.redaction import redacted

Row = dict[str, Any]  # name, steps, w, and a value a metric
TITLES = {"fid": "FID", "clip_score": "CLIP", "kid": "KID x 1000", "cmmd": "CMMD"}


def write(
    folder: Path, rows: Sequence[Row], footer: str, columns: Sequence[Tensor], prompts: list[str], cfg: DictConfig, loggers: Any
) -> None:
    """rows: a table's cells; columns: of the grid, uint8 `[grid_rows, 3, H, W]` a cell."""
    text = table(rows, cfg.metrics, footer, cfg.w)
    (folder / "table.md").write_text(text)
    record = {"rows": rows, "note": footer, "config": OmegaConf.to_container(cfg, resolve=True)}
    (folder / "table.json").write_text(json.dumps(redacted(record), indent=2))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    labels = [f"{label(row, cfg.w)}\n{steps_label(row['steps'])}" for row in rows]
    pictures = {"grid": grid(columns_to_rows(columns), prompts[: len(columns[0])], labels)}
    shown = [metric for metric in ("fid", "clip_score") if metric in cfg.metrics] or list(cfg.metrics)
    pictures["plot"] = plot(rows, shown, "steps", lambda row: label(row, cfg.w))
    if several := [row for row in rows if len({other["w"] for other in rows if other["name"] == row["name"]}) > 1]:
        pictures["w"] = plot(several, shown, "w", lambda row: f"{row['name']}, {steps_label(row['steps'])}")
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    for logger in loggers:
        log(logger, rows, pictures, cfg)
    print(f"\n{text}\ntable:   {folder}/table.md, .csv, .json")
    print(f"picture: {folder}/grid.png\nplot:    {', '.join(f'{folder}/{name}.png' for name in list(pictures)[1:])}")


def label(row: Row, w: Any) -> str:
    """A row's name, with its w where that is not the table's one w."""
    return row["name"] if row["w"] == w else f"{row['name']}, w = {row['w']:g}"


def table(rows: Sequence[Row], metrics: Sequence[str], footer: str, w: Any = None) -> str:
    """The paper's Table 1 in markdown: a line a method, two metrics at each step count; further metrics in further tables."""
    steps = sorted({row["steps"] for row in rows})
    cells = {(label(row, w), row["steps"]): row for row in rows}
    lines = []
    for i in range(0, len(metrics), 2):
        heads = [f"{TITLES[metrics[i]]}, {steps_label(n)}" for n in steps]
        heads += [f"{TITLES[m]}, {n}" for m in metrics[i + 1 : i + 2] for n in steps]
        lines += ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
        for name in dict.fromkeys(name for name, _ in cells):
            values = [f"{cells[name, n][m]:.2f}" if (name, n) in cells else "" for m in metrics[i : i + 2] for n in steps]
            lines.append(f"| {name} | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join([*lines, footer, ""])


def footer(
    cfg: DictConfig, extract: Extractor, *, real: Features, different: int, reference: str, warnings: Sequence[str]
) -> str:
    """All that a reader needs to repeat the numbers, in sentences."""
    known = cfg.shards if cfg.prompts == "val" else cfg.prompts if isinstance(cfg.prompts, str) else "prompts"
    again = "" if different == cfg.samples else f" of {different} captions, each again with other seeds"
    w = f"w = {cfg.w:g} where a row says nothing else" if isinstance(cfg.w, int | float) else "w as the rows say"
    clip, fid = (f"{extract.names[i]}, weights {extract.weights[i]}" for i in (0, -1))
    networks = f"All metrics: {clip}." if extract.fid is None else f"FID and KID: {fid}. CMMD and CLIP score: {clip}."
    models = ", ".join(f"{name} is {entry.pipeline}" for name, entry in cfg.entries.items())
    own = scores(real, real, ["clip_score"])["clip_score"]
    return redacted(
        f"{cfg.samples} images a cell{again} (`{known}`), seeds from {cfg.seed} on; {w} (diffusers' guidance_scale is w + 1). "
        f"Reference: {len(real['clip'])} images of `{reference}`, whose own CLIP score is {own:.2f}; centre crop, antialiased "
        f"bicubic resize to {cfg.resolution} px. {networks} UNet in {cfg.dtype}, features in float32, distances in float64. "
        + " ".join([f"{models}.", *(f"{sentence.rstrip('.')}." for sentence in warnings), f"Commit {commit()}."])
    )


def commit() -> str:
    """Of the working tree this code runs from, with a + if it has changes; the package's version where there is none."""
    root = str(Path(__file__).parents[2])
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return f"unknown, version {version('latent-consistency')}"
    return head.stdout.strip() + "+" * bool(changes.stdout.strip())


def plot(rows: Sequence[Row], metrics: Sequence[str], x: str, line: Callable[[Row], str]) -> Image.Image:
    """A panel a metric against `x` ("steps", logarithmic, or "w"), a line a value of `line`."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(4.6 * len(metrics), 3.8), dpi=150, layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for i, name in enumerate(dict.fromkeys(map(line, rows))):
                points = sorted((row[x], row[metric]) for row in rows if line(row) == name)
                axes.plot(*zip(*points, strict=True), marker="osD^vP"[i % 6], markersize=5, label=name)
            ticks = sorted({row[x] for row in rows})
            if x == "steps":
                axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            if metric in DISTANCES and min(row[metric] for row in rows) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_locator(NullLocator())
            axes.set(
                xlabel=x,
                ylabel=TITLES[metric],
                title=f"{TITLES[metric]} ({'lower' if metric in DISTANCES else 'higher'} is better)",
            )
            axes.grid(alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def log(logger: Any, rows: Sequence[Row], pictures: dict[str, Image.Image], cfg: DictConfig) -> None:
    """Metrics over sampling steps, and the pictures."""
    for steps in sorted({row["steps"] for row in rows}):
        here = [row for row in rows if row["steps"] == steps]
        logger.log_metrics({f"{m}/{label(row, cfg.w)}": row[m] for row in here for m in cfg.metrics}, step=steps)
    for name, picture in pictures.items():
        log_picture(logger, f"evaluate/{name}", picture, step=0)
    if hasattr(logger, "log_table"):
        logger.log_table("evaluate/table", list(rows[0]), [list(row.values()) for row in rows])
    logger.finalize("success")
