"""A run's directory and what is found in it: identity, checkpoints to go on from, configuration, models."""

import itertools
import json
import os
import uuid
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lcm.errors import UserError

LAST = "checkpoints/last.ckpt"


def start_run(cfg: DictConfig) -> Path:
    """The run's directory, the same for all ranks and restarts: `<runs>/<name>/<id>`.

    The id is the SLURM job's, or the next free number; `ckpt_path=last` goes on in the newest run that has a checkpoint.
    """
    parent = Path(cfg.paths.runs) / cfg.name
    run_id = cfg.paths.run_id
    if run_id is None and "LOCAL_RANK" in os.environ:
        run_id = os.environ.get("LCM_RUN_ID")  # this process was launched by the one that chose
    if run_id is None and cfg.ckpt_path == "last":
        run_id = next((n for n in reversed(run_numbers(parent)) if (parent / str(n) / LAST).is_file()), None)
    try:
        run_dir = parent / str(run_id) if run_id is not None else next_run(parent)
        run_dir.mkdir(parents=True, exist_ok=True)
        identity = run_dir / "run.json"
        if not identity.is_file():
            identity.write_text(json.dumps({"id": uuid.uuid4().hex[:8]}))
    except OSError as error:
        raise UserError(
            f"cannot write the run directory under {parent} ({error.strerror}): set paths.runs to a writable folder"
        ) from None
    os.environ["LCM_RUN_ID"] = run_dir.name
    with open_dict(cfg):
        cfg.paths.run_dir, cfg.paths.wandb_id = str(run_dir), json.loads(identity.read_text())["id"]
    print(f"run:     {run_dir}", flush=True)
    return run_dir


def run_numbers(parent: Path) -> list[int]:
    return sorted(int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit())


def next_run(parent: Path) -> Path:
    """Make the first free number's folder; two programs that start at once get two."""
    numbers = run_numbers(parent)
    for number in itertools.count(numbers[-1] + 1 if numbers else 0):
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            continue
    raise AssertionError("itertools.count ends")


def resume_path(cfg: DictConfig) -> str | None:
    """The checkpoint to go on from: a path, or the newest one of this run for `last` (a fresh start if there is none yet)."""
    if cfg.ckpt_path is None:
        return None
    if "://" in str(cfg.ckpt_path):
        raise UserError("ckpt_path must be a local file: copy the checkpoint here first")
    path = Path(cfg.paths.run_dir, LAST) if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if path.is_file():
        return str(path)
    if cfg.ckpt_path == "last":
        return None
    raise UserError(f"ckpt_path={cfg.ckpt_path} is not a file; ckpt_path=last goes on with the newest run of this name")


def write_config(cfg: DictConfig, trainer: Any) -> None:
    """Keep the run's configuration beside its results and in its loggers."""
    if trainer.is_global_zero:
        OmegaConf.save(cfg, Path(cfg.paths.run_dir, "config.yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))


def find_pipeline(pipeline: str, runs: str) -> str:
    """A pipeline folder, hub id or "mini" as given; for "last" the newest model that a run under `runs` saved, for
    "last:<name>" the newest of the runs of that name."""
    last, _, name = pipeline.partition(":")
    if last != "last":
        return pipeline
    saved = sorted(Path(runs).glob(f"{name or '*'}/*/model/model_index.json"), key=lambda file: file.stat().st_mtime)
    if not saved:
        train = f"python train.py experiment={name}" if name else "python train.py"
        raise UserError(
            f"no run under {Path(runs, name)}/ has saved a model yet: run `{train}`, or set pipeline=<folder or hub id>"
        )
    return str(saved[-1].parent)
