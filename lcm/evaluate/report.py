"""Output of an evaluation: report.html, table.md, table.csv, table.json, plots and an image grid, also sent to loggers."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
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

from lcm.app.html_report import Section, picture_source, write_report
from lcm.app.images import columns_to_rows, grid, log_picture, steps_label
from lcm.evaluate.features import Extractor
from lcm.evaluate.latency import Latency
from lcm.evaluate.metrics import FeatureMetric, Features, TableMetric, scores
from lcm.runtime.environment import command_line, commit, device_name
from lcm.runtime.redaction import redacted

Row = dict[str, Any]  # name, steps, w, and one value per metric
Metrics = Mapping[str, TableMetric]
PER_TABLE = 2  # metrics side by side in a table and in a plot


def write(
    folder: Path,
    rows: Sequence[Row],
    note: str,
    columns: Sequence[Tensor],
    prompts: list[str],
    cfg: DictConfig,
    metrics: Metrics,
    trainings: Sequence[Row],
    loggers: Sequence[Any],
    sha256: str,
) -> None:
    """Write all files.

    columns: the images of the grid, uint8 `[grid_rows, 3, H, W]` per row of the table. trainings: the lengths of the trainings,
    see `training`. sha256: the digest of the prompts.
    """
    text = table(rows, metrics, f"{markdown(trainings)}{note}", cfg.w)
    (folder / "table.md").write_text(text)
    config = redacted(OmegaConf.to_container(cfg, resolve=True))
    record = {
        "rows": redacted(rows),
        "trainings": redacted(trainings),
        "note": redacted(note),
        "prompts_sha256": sha256,
        "config": config,
    }
    (folder / "table.json").write_text(json.dumps(record, indent=2))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    labels = [f"{label(row, cfg.w)}\n{steps_label(row['steps'])}" for row in rows]
    pictures = {"grid": grid(columns_to_rows(columns), prompts[: len(columns[0])], labels)}
    plotted = {name: metrics[name] for name in list(metrics)[:PER_TABLE]}
    pictures["plot"] = plot(rows, plotted, "steps", lambda row: label(row, cfg.w))
    names = {(row["name"], row["w"]) for row in rows}
    if several := [row for row in rows if sum(name == row["name"] for name, _ in names) > 1]:
        pictures["w"] = plot(several, plotted, "w", lambda row: f"{row['name']}, {steps_label(row['steps'])}")
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    sections = [
        Section(
            "Table",
            header=[metrics[name].title if name in metrics else name for name in rows[0]],
            rows=[[*row.values()] for row in rows],
        ),
        *([Section("Training", header=list(trainings[0]), rows=[[*row.values()] for row in trainings])] if trainings else []),
        *(Section(name.capitalize(), pictures={name: picture_source(picture)}) for name, picture in pictures.items()),
        Section("Configuration", text=OmegaConf.to_yaml(config)),
    ]
    write_report(folder / "report.html", "Evaluation", note, sections, command_line("-m lcm.evaluate"))
    for logger in loggers:
        log(logger, rows, pictures, cfg.w, metrics)
    print(f"\n{text}\nreport:  {folder}/report.html\ntable:   {folder}/table.md, .csv, .json")
    print(f"picture: {folder}/grid.png\nplot:    {', '.join(f'{folder}/{name}.png' for name in list(pictures)[1:])}")


def label(row: Row, w: Any) -> str:
    """Return a row's name, with the row's w if it differs from the w of the table."""
    return row["name"] if row["w"] == w else f"{row['name']}, w = {row['w']:g}"


def table(rows: Sequence[Row], metrics: Metrics, note: str, w: Any = None) -> str:
    """Return the paper's Table 1 in markdown: one line per method, two metrics at each step count, as many tables as needed."""
    steps = sorted({row["steps"] for row in rows})
    cells = {(label(row, w), row["steps"]): row for row in rows}
    names, lines = list(metrics), []
    for i in range(0, len(names), PER_TABLE):
        first, *others = names[i : i + PER_TABLE]
        heads = [f"{metrics[first].title}, {steps_label(n)}" for n in steps]
        heads += [f"{metrics[name].title}, {n}" for name in others for n in steps]
        lines += ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
        for line in dict.fromkeys(line for line, _ in cells):
            values = [cell_text(cells.get((line, n), {}).get(name)) for name in (first, *others) for n in steps]
            lines.append(f"| {line} | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join([*lines, note, ""])


def training(name: str, metadata: Mapping[str, Any]) -> Row | None:
    """Return the length of a model's training. None: the model was trained elsewhere. metadata: the content of `lcm.json`."""
    if "seconds" not in metadata:
        return None
    length = {"steps": metadata["steps"], "images": metadata["images"], "minutes": round(metadata["seconds"] / 60, 1)}
    return {"training": name, **length}


def markdown(trainings: Sequence[Row]) -> str:
    """Return the table of the trainings, "" without trainings."""
    if not trainings:
        return ""
    lines = [list(trainings[0]), ["---"] * len(trainings[0]), *([*row.values()] for row in trainings)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n\n"


def cell_text(value: float | None) -> str:
    """Return a cell of the table. None: the row is missing, or its model was trained to raise this metric."""
    if value is None:
        return ""
    return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def note(
    cfg: DictConfig,
    extract: Extractor,
    metrics: Metrics,
    *,
    real: Features | None,
    distinct: int,
    sha256: str,
    warnings: Sequence[str],
) -> str:
    """Return everything that a reader needs to repeat the numbers, in sentences.

    distinct: the number of different prompts. sha256: the digest of the prompts. real: features or statistics of real images.
    """
    suite = f", {cfg.suite.title}" if cfg.prompts == "val" else ""
    prompts = cfg.shards if cfg.prompts == "val" else cfg.prompts if isinstance(cfg.prompts, str) else "prompts"
    protocol = f"Protocol: {cfg.protocol_title}. " if cfg.protocol_title else ""
    repeated = "" if distinct == cfg.samples else f" of {distinct} captions, repeated with other seeds"
    w = f"w = {cfg.w:g} unless a row names another" if isinstance(cfg.w, int | float) else "w as the rows say"
    clip, fid = (f"{extract.names[i]}, weights {extract.weights[i]}" for i in (0, -1))
    of_features = [metric for metric in metrics.values() if isinstance(metric, FeatureMetric)]
    titles = {
        network: " and ".join(metric.title for metric in of_features if metric.features == network)
        for network in ("fid", "clip")
    }
    networks = f"Features: {clip}."
    if extract.fid is not None:
        networks = " ".join(f"{titles[key]}: {name}." for key, name in (("fid", fid), ("clip", clip)) if titles[key])
    for title, network in extract.scorers.items():
        networks += f" {title}: {network.name}, weights {extract.scorer_weights[title]}, on images at their drawn size."
    for metric in metrics.values():
        if isinstance(metric, Latency):
            batches = f"batches of {metric.batch_size}, the median of {metric.repeats} after a warm-up"
            networks += f" {metric.title}: from prompt to picture on {device_name(cfg.device)}, {batches}."
    models = ", ".join(f"{name} is {entry.pipeline}" for name, entry in cfg.entries.items())
    if (teacher := cfg.get("teacher")) is not None:
        compared = [metric.title for metric in metrics.values() if metric.against == "teacher"]
        verb = "compare" if len(compared) > 1 else "compares"
        drawn = f"{cfg.samples} images of {teacher.pipeline} ({teacher.steps} steps)"
        models += f". {' and '.join(compared)} {verb} with {drawn}"
    return redacted(
        f"{cfg.samples} images per cell{repeated} (`{prompts}`{suite}), seeds from {cfg.seed}; {w} (diffusers' "
        f"guidance_scale is w + 1). {protocol}SHA-256 of the prompts: {sha256}. {reference(cfg, real, of_features)} {networks} "
        f"UNet in {cfg.dtype}, features in float32, distances in float64. "
        + " ".join([f"{models}.", *(f"{sentence.rstrip('.')}." for sentence in warnings), f"Commit {commit()}."])
    )


def reference(cfg: DictConfig, real: Features | None, metrics: Sequence[FeatureMetric]) -> str:
    """Return a sentence about the images that the metrics compare with."""
    if real is None:
        return f"No real images. Images are compared at {cfg.resolution} px."
    path = cfg.reference or cfg.shards
    if "sigma" in real:
        return f"Reference: the mean and covariance in `{path}`; drawn images are resized to {cfg.resolution} px."
    against_captions = {metric.title: metric for metric in metrics if metric.against == "captions"} if "text" in real else {}
    values = scores(real, {"real": real}, against_captions)
    own_scores = "".join(f", whose own {title} is {value:.2f}" for title, value in values.items())
    resize = f"centre crop, antialiased bicubic resize to {cfg.resolution} px"
    return f"Reference: {len(real['clip'])} images of `{path}`{own_scores}; {resize}."


def plot(rows: Sequence[Row], metrics: Metrics, x: str, line: Callable[[Row], str]) -> Image.Image:
    """Plot one panel per metric against `x` ("steps", logarithmic, or "w"), and one curve per value of `line(row)`."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(4.6 * len(metrics), 3.8), dpi=150, layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, (name, metric) in zip(panels, metrics.items(), strict=True):
            for i, curve in enumerate(dict.fromkeys(map(line, rows))):
                points = sorted((row[x], row[name]) for row in rows if line(row) == curve and row[name] is not None)
                xs, ys = ([point[axis] for point in points] for axis in (0, 1))
                axes.plot(xs, ys, marker="osD^vP"[i % 6], markersize=5, label=curve)
            ticks = sorted({row[x] for row in rows})
            if x == "steps":
                axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            if metric.lower_is_better and min((row[name] for row in rows if row[name] is not None), default=0) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_locator(NullLocator())
            better = "lower" if metric.lower_is_better else "higher"
            axes.set(xlabel=x, ylabel=metric.title, title=f"{metric.title} ({better} is better)")
            axes.grid(alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def log(logger: Any, rows: Sequence[Row], pictures: dict[str, Image.Image], w: Any, metrics: Metrics) -> None:
    """Log the metrics over sampling steps, the pictures and the table."""
    for steps in sorted({row["steps"] for row in rows}):
        values = {f"{name}/{label(row, w)}": row[name] for row in rows if row["steps"] == steps for name in metrics}
        values = {name: value for name, value in values.items() if value is not None}
        logger.log_metrics(values, step=steps)
    for name, picture in pictures.items():
        log_picture(logger, f"evaluate/{name}", picture, step=0)
    if hasattr(logger, "log_table"):
        logger.log_table("evaluate/table", list(rows[0]), [list(row.values()) for row in rows])
    logger.finalize("success")
