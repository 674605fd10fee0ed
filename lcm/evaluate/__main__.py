"""Compare models by FID, KID, CMMD and CLIP score: `python -m lcm.evaluate entries.LCM.pipeline=<folder>`.

The features of drawn images are cached in chunks. Each chunk is a file, whose name is a digest of everything that the features
depend on. Several processes share the chunks and coordinate through these files only. A restart, or another choice of metrics,
draws only missing chunks.
"""

from types import GenericAlias
from typing import Annotated, Any, Literal

from lcm.app.cli import Program, build, build_all
from lcm.core.numbers import Count, Dtype, Limit, NonNegative, Seed

TEXTS = str | list[str]
program = Program(
    "evaluate",
    grid_rows=Count,
    batch_size=Count,
    chunk=Count,
    resolution=Count | None,
    draw_at=Literal["resolution", "model"],
    entries=GenericAlias(dict, (str, "lcm.evaluate.jobs.Entry")),
    teacher="lcm.evaluate.jobs.Entry",
    w=float | list[float],
    metrics=dict[str, Any],
    shards=TEXTS,
    reference=TEXTS | None,
    prompts=TEXTS,
    prompts_seed=Seed | None,
    prompts_sha256=str | None,
    per_prompt=Count | None,
    samples=Annotated[int, Limit(2)],
    seed=Seed,
    output=str,
    dtype=Dtype,
    patience=NonNegative,
    name=str,
)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lcm.app.images import resized
from lcm.app.inputs import output_folder, pick_device
from lcm.core.errors import UserError
from lcm.data.folder import PictureSource
from lcm.data.source import Source
from lcm.evaluate import report
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.features import Extractor, joined, read_statistics, without_rewards
from lcm.evaluate.inception import InceptionBackbone
from lcm.evaluate.jobs import GRID_IMAGES, Chunk, Job, choose_resolution, load_models, make_jobs
from lcm.evaluate.metrics import Features, TableMetric, scores
from lcm.evaluate.prompts import as_lines, make_prompts, sha256_of

log = logging.getLogger(__name__)


def draw(chunks: Sequence[Chunk], extract: Extractor, batch_size: int, quiet: bool) -> None:
    """Draw the chunks that are not cached."""
    missing = [chunk for chunk in chunks if not chunk.file.is_file()]
    total = sum(len(chunk.prompts) * chunk.job.steps for chunk in missing)
    with tqdm(total=total, unit="network step", desc="drawing", disable=quiet or not missing) as bar:
        for chunk in missing:
            bar.set_postfix_str(f"{chunk.job.name}, {chunk.job.steps} steps")
            chunk.draw(extract, batch_size, bar)


def wait(chunks: Sequence[Chunk], patience: float) -> None:
    """Wait for the chunks of other processes. Raise UserError if no chunk arrives for `patience` seconds."""
    missing = [chunk.file for chunk in chunks if not chunk.file.is_file()]
    deadline = time.monotonic() + patience
    with tqdm(total=len(missing), unit="chunk", desc="other processes", disable=not missing) as bar:
        while missing:
            time.sleep(0.2)
            before, missing = len(missing), [file for file in missing if not file.is_file()]
            bar.update(before - len(missing))
            if len(missing) < before:
                deadline = time.monotonic() + patience
            elif time.monotonic() > deadline:
                raise UserError(
                    f"no other process has finished a chunk for {patience:g} s, and {len(missing)} chunks are missing: "
                    "run the same command again, finished chunks are not drawn again"
                )


def load(job: Job, chunks: Sequence[Chunk], distinct: int) -> tuple[Features, Tensor]:
    """Return the features of a job's images, and its images for the grid. distinct: the number of prompts before repetition."""
    parts = [load_file(chunk.file) for chunk in chunks if chunk.job is job]
    images = torch.cat([part.pop("images") for part in parts if "images" in part])
    features = joined(parts)
    return {**features, "prompt": torch.arange(len(features["clip"])) % distinct}, images


def open_reference(
    cfg: DictConfig, metrics: Mapping[str, TableMetric], network: ClipBackbone | InceptionBackbone, cache: Any
) -> Source | Features | None:
    """Return the real images, or their statistics; None if no metric compares with real images. Raise UserError.

    network: the network of FID.
    """
    compared = {name: metric for name, metric in metrics.items() if metric.against == "real"}
    path = cfg.reference
    if not compared and path is not None:
        raise UserError(f"reference={path} is used by no metric: leave it out, or choose a metric such as fid")
    if not compared:
        return None
    if isinstance(path, str) and path.lower().endswith(".npz"):
        if unfit := [name for name, metric in compared.items() if not getattr(metric, "takes_statistics", False)]:
            raise UserError(
                f"reference={path} holds a mean and a covariance, but metrics={unfit} compare images: give a folder of images "
                "or shards, or leave these metrics out"
            )
        return read_statistics(path, network.num_features)
    if isinstance(path, str) and Path(path).is_dir():
        return PictureSource(path, option="reference")
    return Source.from_option(cfg, "reference" if path else "shards", cache)


def check_teacher(cfg: DictConfig, metrics: Mapping[str, TableMetric]) -> None:
    """Raise UserError for a metric without its teacher, and for a teacher without a metric."""
    compared = [name for name, metric in metrics.items() if metric.against == "teacher"]
    if compared and cfg.teacher is None:
        raise UserError(f"metrics={compared} compare with a teacher's images: set 'teacher={{pipeline: mini, steps: 50}}'")
    if cfg.teacher is not None and not compared:
        raise UserError("teacher is used by no metric: choose one that compares with it, as in metrics=[fid,fid_teacher]")


def check(cfg: DictConfig) -> None:
    """Raise UserError for settings that measure nothing, and for a reference that does not exist."""
    if not cfg.get("metrics"):
        raise UserError("metrics=[] measures nothing: choose metrics of conf/metrics, as in metrics=[fid,clip_score]")
    if cfg.samples < 2 or cfg.grid_rows > GRID_IMAGES:
        raise UserError(f"samples={cfg.samples} and grid_rows={cfg.grid_rows}: at least 2 samples, at most {GRID_IMAGES} rows")
    path = cfg.reference
    if isinstance(path, str) and not (set(path) & set("*?[{@:") or path.endswith(".tar") or Path(path).exists()):
        raise UserError(
            f"reference={path}: there is no such folder or file: give a folder of images, shards or statistics (.npz with mu "
            "and sigma)"
        )


def warnings(extract: Extractor, samples: int, real: int | None, jobs: Sequence[Job]) -> list[str]:
    """Log and return the warnings that belong in the table's note. real: the number of real images, None if it is unknown."""
    dimensions = (extract.fid or extract.clip).num_features
    sizes = {job.name: job.size for job in jobs if job.size != extract.resolution}
    sentences = [f"{name} is drawn at {size} px and resized to {extract.resolution} px." for name, size in sizes.items()]
    if (fewest := min(samples, real or samples)) <= dimensions:
        sentences.append(f"{fewest} images do not fill the {dimensions} dimensions of the features: FID is too high")
    if real is not None and real < samples:
        sentences.append(f"The reference set has {real} images, fewer than the {samples} drawn.")
    for sentence in sentences:
        log.warning(sentence)
    return sentences


def rewards_of(job: Job) -> list[dict[str, Any]]:
    """Return the rewards that trainings of the job's model raised."""
    return job.model.metadata.get("rewards", [])


def evaluate(cfg: DictConfig) -> None:
    """Draw the missing chunks, compute the metrics and write the report. Processes of `rank` > 0 only draw their share."""
    check(cfg)
    cache = build(cfg.cache)
    folder, device = output_folder(cfg.output), pick_device(cfg.device, cfg.local_rank)
    cfg.device = device
    output_folder(cfg.features, "features")
    prompts, distinct = make_prompts(cfg, cache)
    metrics, backbone, fid_backbone = build(cfg.metrics), build(cfg.backbone), build(cfg.get("fid_backbone"))
    check_teacher(cfg, metrics)
    if distinct == cfg.samples and (names := [name for name, metric in metrics.items() if metric.against == "prompt"]):
        raise UserError(f"metrics={names} compare images of one prompt, and each prompt has one: set per_prompt=4, for example")
    reference = open_reference(cfg, metrics, fid_backbone or backbone, cache)
    models = load_models(cfg, device)
    cfg.resolution = choose_resolution(cfg, models)
    networks = [metric for metric in metrics.values() if metric.against == "network"]
    extract = Extractor(backbone, fid_backbone, resolution=cfg.resolution, scores=networks).to(device)
    jobs = make_jobs(cfg, models, extract)
    chunks = [chunk for job in jobs for chunk in job.chunks(prompts, cfg.chunk)]
    teacher = next((job for job in jobs if job.option == "teacher"), None)
    if cfg.rank:
        return draw(chunks[cfg.rank :: cfg.world_size], extract, cfg.batch_size, quiet=True)
    sha256 = sha256_of(prompts[:distinct])
    (folder / "prompts.txt").write_text(as_lines(prompts[:distinct]))
    log.info("SHA-256 of the %d prompts: %s", distinct, sha256)
    real = extract.reference(reference, cfg.reference_cache) if isinstance(reference, Source) else reference
    sentences = warnings(extract, cfg.samples, len(real["clip"]) if real and "clip" in real else None, jobs)
    for name in dict.fromkeys(job.name for job in jobs):
        measured = [without_rewards(metrics, extract, rewards_of(job)) for job in jobs if job.name == name]
        for title in dict.fromkeys(metric.title for some in measured for key, metric in metrics.items() if key not in some):
            sentences.append(f"{title} of {name} is left out: a training raised this score as its reward.")
            log.warning(sentences[-1])
    draw(chunks[:: cfg.world_size], extract, cfg.batch_size, quiet=False)
    wait(chunks, cfg.patience)
    rows, columns = [], []
    references = {} if real is None else {"real": real}
    if teacher is not None:
        references["teacher"] = load(teacher, chunks, distinct)[0]
    timed = {name: metric for name, metric in metrics.items() if metric.against == "time"}
    for job in jobs:
        if job is not teacher:
            features, images = load(job, chunks, distinct)
            columns.append(resized(images[: cfg.grid_rows], cfg.resolution))
            judges = {name: metric for name, metric in metrics.items() if name not in timed}
            judges = without_rewards(judges, extract, rewards_of(job))
            values = scores(features, references, judges, device)
            values |= {name: metric.measure(job, prompts[0]) for name, metric in timed.items()}
            rows.append({"name": job.name, "steps": job.steps, "w": job.w, **{name: values.get(name) for name in metrics}})
    note = report.note(cfg, extract, metrics, real=real, distinct=distinct, sha256=sha256, warnings=sentences)
    metadata = {job.name: job.model.metadata for job in jobs}
    trainings = [row for name, content in metadata.items() if (row := report.training(name, content))]
    report.write(folder, rows, note, columns, prompts, cfg, metrics, trainings, build_all(cfg.get("logger")), sha256)


@program
@torch.inference_mode()
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
