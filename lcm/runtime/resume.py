"""The checkpoint that a run resumes from."""

import os
import sys
from difflib import SequenceMatcher
from pathlib import Path

from omegaconf import DictConfig

from lcm.core.errors import UserError
from lcm.runtime.integrity import LAST, PREVIOUS, contents, damage, verified
from lcm.runtime.launch import agree, is_child, say, warn

FOLDER = "checkpoints"  # in a run folder


def checkpoint_path(run_dir: Path, ckpt_path: str) -> str | None:
    """Return the path of an undamaged checkpoint. ckpt_path: a path, or "last" for the newest checkpoint of the run.

    Return None for "last" in a run without checkpoints. Raises UserError for a damaged checkpoint, and for a file that holds
    only weights.
    """
    if "://" in str(ckpt_path):
        raise UserError("ckpt_path must be a local file: copy the checkpoint here first")
    if ckpt_path == "last":
        return newest_undamaged(run_dir / FOLDER)
    path = Path(ckpt_path)
    if not path.exists():
        raise UserError(f"ckpt_path={path} is not a file; ckpt_path=last resumes the newest run of this name")
    if (path / FOLDER).is_dir():
        raise UserError(f"ckpt_path={path} is a run folder: give {path / FOLDER / LAST}")
    if reason := damage(path):
        others = [other for other in checkpoints_in(path.parent) if other.resolve() != path.resolve() and not damage(other)]
        instead = f"give ckpt_path={others[0]}, which is undamaged" if others else "no other checkpoint beside it is undamaged"
        raise UserError(f"ckpt_path={path} is damaged ({reason}): {instead}")
    if path.is_file() and not (isinstance(content := contents(path), dict) and {"loops", "optimizer_states"} <= content.keys()):
        raise UserError(f"ckpt_path={path} holds only weights, no training to resume: give a pipeline folder as model.pipeline")
    verified.add(path)
    return str(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return a folder's checkpoints in the order of preference: last.ckpt, previous.ckpt, then the others, newest first.

    Names count before times, because a copy of a run may have other file times.
    """
    files = [path for path in folder.glob("*.ckpt") if path.exists()]
    return sorted(files, key=lambda path: (path.name == LAST, path.name == PREVIOUS, path.stat().st_mtime), reverse=True)


def newest_undamaged(folder: Path) -> str | None:
    """Return the first undamaged checkpoint of `checkpoints_in`, or None in an empty folder.

    Raises UserError if all checkpoints are damaged: a fresh start would overwrite them.
    """
    files = checkpoints_in(folder)
    for path in files:
        reason = damage(path)
        if reason is None:
            verified.add(path)
            return str(path)
        verified.discard(path)
        print(f"warning: {path} is damaged ({reason}): it is skipped, the one before it is used", file=sys.stderr, flush=True)
    if files:
        raise UserError(f"all checkpoints in {folder} are damaged: put a copy there, or move the folder away to start anew")
    return None


def resume_path(cfg: DictConfig) -> str | None:
    """Return the checkpoint to resume from; None: a fresh start. Rank 0 chooses and verifies it for all ranks.

    A job that SLURM requeued resumes from the newest checkpoint of its run, if there is any, whatever `ckpt_path` says.
    """
    if is_child() and "LCM_CHECKPOINT" in os.environ:  # a rank that Lightning's launcher started
        path = os.environ["LCM_CHECKPOINT"]
    else:
        path = os.environ["LCM_CHECKPOINT"] = agree("checkpoint", lambda: choose_checkpoint(cfg) or "")
    if not path:
        return None
    verified.add(Path(path))
    return path


def choose_checkpoint(cfg: DictConfig) -> str | None:
    if "SLURM_RESTART_COUNT" in os.environ and checkpoints_in(Path(cfg.paths.run_dir, FOLDER)):
        cfg.ckpt_path = "last"
    if cfg.ckpt_path is None:
        return None
    path = checkpoint_path(Path(cfg.paths.run_dir), cfg.ckpt_path)
    if path is None:
        say("start:   from the first step: this run has no checkpoint yet")
        if runs := runs_with_checkpoint(Path(cfg.paths.runs), cfg.name):
            warn(
                f"warning: ckpt_path=last found no checkpoint of {cfg.name}: training starts anew; runs with checkpoints are "
                f"{', '.join(runs)}: stop this one and give name=, or paths.run_id=, to resume one of them"
            )
    return path


def runs_with_checkpoint(runs: Path, name: str) -> list[str]:
    """Return up to five runs with a checkpoint, as `<name>/<id>`, nearest names first."""
    folders = {path.parent.parent for path in runs.glob(f"*/*/{FOLDER}/*.ckpt")}
    newest = sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    newest.sort(key=lambda folder: SequenceMatcher(None, folder.parent.name, name).ratio(), reverse=True)
    return [f"{folder.parent.name}/{folder.name}" for folder in newest[:5]]
