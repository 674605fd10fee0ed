"""Resolve `last` and `last:<name>` to pipeline folders."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lcm.core.errors import UserError
from lcm.models.pipeline import read_lcm_json

MODELS = ("pipeline", "model")  # keys whose value names a model: a folder, a hub id, mini, last or last:<name>


def resolve_models(node: Any, runs: str) -> None:
    """Replace "last" and "last:<name>" in a configuration by the model's folder. A resumed run then uses the same model."""
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            resolve_models(node[key], runs)
        elif key in MODELS and isinstance(node[key], str):
            node[key] = find_pipeline_once(node[key], runs, os.getcwd())


@cache
def find_pipeline_once(pipeline: str, runs: str, working_directory: str) -> str:
    """Return `find_pipeline` of the first call. Each job of a sweep saves a newer model, but all jobs use the same one."""
    return find_pipeline(pipeline, runs)


def is_student(pipeline: Path) -> bool:
    """Return whether a saved model is a student: it has a consistency sampler, or its lcm.json lists students."""
    metadata = read_lcm_json(pipeline)
    return metadata["sampler"] != "ddim" or "students" in metadata


def find_pipeline(pipeline: str, runs: str) -> str:
    """Return the folder of the newest model under `runs` for "last", and any other pipeline unchanged. Raises UserError.

    "last" prefers a student to a newer teacher. "last:<name>" is the newest model of the runs of this name.
    """
    last, _, name = pipeline.partition(":")
    files = sorted(Path(runs).glob("*/*/model/model_index.json"), key=lambda file: file.stat().st_mtime)
    names = [file.parts[-4] for file in files]
    if last != "last":
        if pipeline in names and not Path(pipeline).is_dir():
            raise UserError(f"there is no folder {pipeline!r}: the newest model of the run {pipeline} is last:{pipeline}")
        return pipeline
    models = [file.parent for file, run in zip(files, names, strict=True) if not name or run == name]
    if not models:
        others = [f"last:{run}" for run in dict.fromkeys(reversed(names))][:10]
        cure = f"give {' or '.join(others)}" if others else "train one by `python train.py`"
        run = f"no run called {name}" if name else "no run"
        raise UserError(f"{run} under {runs}/ has saved a model: {cure}, or give a folder, a hub id (owner/name) or mini")
    students = [] if name else [model for model in models if is_student(model)]
    return str((students or models)[-1])
