"""Which checkpoint a run goes on from."""

import os
import sys
from difflib import SequenceMatcher
from pathlib import Path

from omegaconf import DictConfig

from lcm.core.errors import UserError
from lcm.runtime.integrity import LAST, PREVIOUS, damage, keep, kept
from lcm.runtime.launch import say, warn

FOLDER = "checkpoints"  # of a run's directory


def checkpoint_path(run_dir: Path, ckpt_path: str) -> str | None:
    """A whole checkpoint: the one given, or for `last` the newest of the run. Raises UserError for a damaged one."""
    if "://" in str(ckpt_path):
        raise UserError("ckpt_path must be a local file: copy the checkpoint here first")
    if ckpt_path == "last":
        return newest_whole(run_dir / FOLDER)
    path = Path(ckpt_path)
    if not path.exists():
        raise UserError(f"ckpt_path={path} is not a file; ckpt_path=last goes on with the newest run of this name")
    if (path / FOLDER).is_dir():
        raise UserError(f"ckpt_path={path} is a run's folder: give {path / FOLDER / LAST}")
    if reason := keep(path):
        others = [other for other in saved(path.parent) if other.resolve() != path.resolve() and not damage(other)]
        instead = f"give ckpt_path={others[0]}, which is whole" if others else "no other checkpoint beside it is whole"
        raise UserError(f"ckpt_path={path} is damaged ({reason}): {instead}")
    if path in kept and not (isinstance(kept[path], dict) and {"loops", "optimizer_states"} <= kept[path].keys()):
        raise UserError(
            f"ckpt_path={path} holds no training to go on with, only weights: give a pipeline folder as model.pipeline"
        )
    return str(path)


def saved(folder: Path) -> list[Path]:
    """A run's checkpoints, first the one to go on from: last.ckpt, the one before it, then others, newest first.

    By name first: copying a run does not keep the times of its files.
    """
    files = [path for path in folder.glob("*.ckpt") if path.exists()]
    return sorted(files, key=lambda path: (path.name == LAST, path.name == PREVIOUS, path.stat().st_mtime), reverse=True)


def newest_whole(folder: Path) -> str | None:
    """Raises UserError where there are checkpoints, but no whole one: a fresh start would overwrite them."""
    files = saved(folder)
    for path in files:
        reason = keep(path)
        if reason is None:
            return str(path)
        print(f"warning: {path} is damaged ({reason}): it is left out, the one before it is used", file=sys.stderr, flush=True)
    if files:
        raise UserError(f"no checkpoint in {folder} is whole: put a copy there, or move the folder away to start anew")
    return None


def resume_path(cfg: DictConfig) -> str | None:
    """The checkpoint to go on from: a path, or for `last` the newest whole one of this run (a fresh start if there is none).

    A job that SLURM started again goes on with its own, if it has one, whatever it began from. Every rank reads the same files
    and comes to the same answer: none writes before all have started.
    """
    if "SLURM_RESTART_COUNT" in os.environ and saved(Path(cfg.paths.run_dir, FOLDER)):
        cfg.ckpt_path = "last"
    if cfg.ckpt_path is None:
        return None
    found = checkpoint_path(Path(cfg.paths.run_dir), cfg.ckpt_path)
    if found is None:
        say("start:   from the first step: this run has no checkpoint yet")
        if runs := resumable(Path(cfg.paths.runs), cfg.name):
            warn(
                f"warning: ckpt_path=last found no checkpoint of {cfg.name}: training starts anew; runs with checkpoints are "
                f"{', '.join(runs)}: stop this one and give name=, or paths.run_id=, to go on with one of them"
            )
    return found


def resumable(runs: Path, name: str) -> list[str]:
    """Return the runs that have a checkpoint, as `<name>/<id>`, up to five, those of the nearest names first."""
    folders = {path.parent.parent for path in runs.glob(f"*/*/{FOLDER}/*.ckpt")}
    newest = sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    newest.sort(key=lambda folder: SequenceMatcher(None, folder.parent.name, name).ratio(), reverse=True)
    return [f"{folder.parent.name}/{folder.name}" for folder in newest[:5]]
