"""Compare models by FID, KID, CMMD and CLIP score: `python -m lcm.evaluate entries.LCM.pipeline=<folder>`.

Features of drawn images are cached in chunks, one file each, named by a digest of everything they depend on. Several processes
share the chunks and coordinate through these files only. A restart and another choice of metrics draw only missing chunks.
"""

from types import GenericAlias
from typing import Annotated, Any

from lcm.app.cli import Program, build, build_all
from lcm.core.numbers import Count, Dtype, Limit, NonNegative, Seed

TEXTS = str | list[str]
program = Program(
    "evaluate",
    grid_rows=Count,
    batch_size=Count,
    chunk=Count,
    resolution=Count | None,
    entries=GenericAlias(dict, (str, "lcm.evaluate.jobs.Entry")),
    teacher="lcm.evaluate.jobs.Entry",
    w=float | list[float],
    metrics=dict[str, Any],
    shards=TEXTS,
    reference=TEXTS | None,
    prompts=TEXTS,
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

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lcm.app.images import resized
from lcm.app.inputs import output_folder, pick_device, read_prompts
from lcm.core.errors import UserError
from lcm.data.captions import read_captions
from lcm.data.source import Source
from lcm.evaluate import report
from lcm.evaluate.features import Extractor, joined
from lcm.evaluate.jobs import GRID_IMAGES, Chunk, Job, choose_resolution, load_models, make_jobs
from lcm.evaluate.metrics import FeatureMetric, Features, scores

log = logging.getLogger(__name__)


def make_prompts(cfg: DictConfig) -> tuple[list[str], int]:
    """Return `samples` prompts, repeated if there are fewer, and the number of prompts before repetition."""
    prompts = read_prompts(cfg.prompts, lambda: read_captions(Source.of_option(cfg, "shards", build(cfg.cache)), cfg.samples))
    if not prompts:
        raise UserError(f"there are no captions in prompts={cfg.prompts} (shards={cfg.shards}): give others")
    return [prompts[i % len(prompts)] for i in range(cfg.samples)], min(len(prompts), cfg.samples)


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


def load(job: Job, chunks: Sequence[Chunk]) -> tuple[Features, Tensor]:
    """Return the features of a job's images, and its images for the grid."""
    parts = [load_file(chunk.file) for chunk in chunks if chunk.job is job]
    images = torch.cat([part.pop("images") for part in parts if "images" in part])
    return joined(parts), images


def check_teacher(cfg: DictConfig, metrics: Mapping[str, FeatureMetric]) -> None:
    """Raise UserError for a metric without its teacher, and for a teacher without a metric."""
    compared = [name for name, metric in metrics.items() if metric.against == "teacher"]
    if compared and cfg.teacher is None:
        raise UserError(f"metrics={compared} compare with a teacher's images: set 'teacher={{pipeline: mini, steps: 50}}'")
    if cfg.teacher is not None and not compared:
        raise UserError("teacher is used by no metric: choose one that compares with it, as in metrics=[fid,fid_teacher]")


def check(cfg: DictConfig) -> None:
    if not cfg.get("metrics"):
        raise UserError("metrics=[] measures nothing: choose metrics of conf/metrics, as in metrics=[fid,clip_score]")
    if cfg.samples < 2 or cfg.grid_rows > GRID_IMAGES:
        raise UserError(f"samples={cfg.samples} and grid_rows={cfg.grid_rows}: at least 2 samples, at most {GRID_IMAGES} rows")


def warnings(extract: Extractor, samples: int, real: int, jobs: Sequence[Job]) -> list[str]:
    """Log and return the warnings that belong in the table's note. real: the number of real images."""
    dimensions = (extract.fid or extract.clip).num_features
    sizes = {job.name: job.size for job in jobs if job.size != extract.resolution}
    sentences = [f"{name} is drawn at {size} px and resized to {extract.resolution} px." for name, size in sizes.items()]
    if (fewest := min(samples, real)) <= dimensions:
        sentences.append(f"{fewest} images do not fill the {dimensions} dimensions of the features: FID is too high")
    if real < samples:
        sentences.append(f"The reference set has {real} images, fewer than the {samples} drawn.")
    for sentence in sentences:
        log.warning(sentence)
    return sentences


def untrained(job: Job, metrics: Mapping[str, FeatureMetric], extract: Extractor) -> dict[str, FeatureMetric]:
    """Return the metrics without those that the job's model was trained to raise: they say nothing about it."""
    trained = [reward["weights"] for reward in job.model.metadata.get("rewards", [])]
    hidden = extract.weights[0] in trained
    return {name: metric for name, metric in metrics.items() if not (hidden and metric.against == "captions")}


def evaluate(cfg: DictConfig) -> None:
    """Draw the missing chunks, compute the metrics and write the report. Processes of `rank` > 0 only draw their share."""
    check(cfg)
    folder, device = output_folder(cfg.output), pick_device(cfg.device, cfg.local_rank)
    output_folder(cfg.features, "features")
    prompts, different = make_prompts(cfg)
    metrics, backbone, fid_backbone = build(cfg.metrics), build(cfg.backbone), build(cfg.get("fid_backbone"))
    check_teacher(cfg, metrics)
    models = load_models(cfg, device)
    cfg.resolution = choose_resolution(cfg, models)
    extract = Extractor(backbone, fid_backbone, resolution=cfg.resolution).to(device)
    jobs = make_jobs(cfg, models, extract)
    chunks = [chunk for job in jobs for chunk in job.chunks(prompts, cfg.chunk)]
    teacher = next((job for job in jobs if job.option == "teacher"), None)
    if cfg.rank:
        return draw(chunks[cfg.rank :: cfg.world_size], extract, cfg.batch_size, quiet=True)
    option = "reference" if cfg.reference else "shards"
    real = extract.reference(Source.of_option(cfg, option, build(cfg.cache)), cfg.reference_cache)
    sentences = warnings(extract, cfg.samples, len(real["clip"]), jobs)
    for name in dict.fromkeys(job.name for job in jobs):
        shown = [untrained(job, metrics, extract) for job in jobs if job.name == name]
        for title in dict.fromkeys(metric.title for each in shown for key, metric in metrics.items() if key not in each):
            sentences.append(f"{title} of {name} is left out: a training raised this score as its reward.")
            log.warning(sentences[-1])
    draw(chunks[:: cfg.world_size], extract, cfg.batch_size, quiet=False)
    wait(chunks, cfg.patience)
    rows, columns = [], []
    references = {"real": real} if teacher is None else {"real": real, "teacher": load(teacher, chunks)[0]}
    for job in jobs:
        if job is not teacher:
            features, images = load(job, chunks)
            columns.append(resized(images[: cfg.grid_rows], cfg.resolution))
            values = scores(features, references, untrained(job, metrics, extract), device)
            rows.append({"name": job.name, "steps": job.steps, "w": job.w, **{name: values.get(name) for name in metrics}})
    reference = str(cfg[option])
    note = report.note(cfg, extract, metrics, real=real, different=different, reference=reference, warnings=sentences)
    names = {job.name: job.model.metadata for job in jobs}
    trainings = [row for name, metadata in names.items() if (row := report.training(name, metadata))]
    report.write(folder, rows, note, columns, prompts, cfg, metrics, trainings, build_all(cfg.get("logger")))


@program
@torch.inference_mode()
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
