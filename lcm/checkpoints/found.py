"""Which checkpoint a run goes on from."""

import sys
from pathlib import Path

from lcm.checkpoints.integrity import LAST, PREVIOUS, damage, keep, kept
from lcm.errors import UserError

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
