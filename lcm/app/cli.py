"""From the command line to a program's objects, and what a user sees when that fails."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from lcm.app.arguments import Hint
from lcm.app.composition import plain, prepare
from lcm.app.pipelines import resolve_models
from lcm.app.targets import CONF, check_targets
from lcm.core.errors import UserError
from lcm.runtime.redaction import hide_in_logs, redacted
from lcm.runtime.sweep import check_sweep


@dataclass
class Paths:
    """The key `paths` of conf/_program.yaml."""

    runs: str
    data: str
    run_id: str | None
    run_dir: str | None
    wandb_id: str | None


failures: list[int] = []  # the numbers of a sweep's jobs that ended in an error


def program(
    config_name: str, sweep_job: Callable[[DictConfig], tuple[int, Any]] | None = None, **hints: Hint
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(cfg)` a Hydra program whose wrong input ends in one sentence and exit code 1.

    sweep_job: runs `main` for one of a sweep's jobs in another process; returns its exit code and result.
    hints: annotations of the keys at the configuration's top, which are compared with it before anything is loaded.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def checked(cfg: DictConfig) -> Any:
            quiet()
            expand_home(cfg)
            try:
                check_missing(cfg)
                resolve_models(cfg, cfg.paths.runs)
                if sweep_job is None or not sweeps_here():
                    return main(cfg)
                code, result = sweep_job(cfg)
                if code:
                    failures.append(HydraConfig.get().job.num)
                return result
            except UserError as error:
                return fail(error)
            except MisconfigurationException as error:  # Lightning's own sentences
                return fail(" ".join(str(error).split()))
            except torch.OutOfMemoryError:
                return fail(
                    "the GPU's memory is full: lower data.batch_size, if need be with trainer.accumulate_grad_batches, or see "
                    "docs/larger-models.md"
                )
            except UnpicklingError:
                return fail(
                    "a file to be loaded holds code, not tensors alone, and is refused: give one that this program wrote"
                )

        known = {"paths": Paths, **hints}

        def run() -> None:
            hide_in_logs()  # Hydra's launchers log a sweep's overrides
            warnings.filterwarnings("ignore", r"\s*'hydra/launcher/.* ConfigStore")  # conf/ fills in a plugin's own schema
            try:
                sys.argv[1:], sweep_dir = prepare(config_name, sys.argv[1:], known)
                if sweep_dir is not None:
                    check_sweep(sweep_dir, one_process=sweep_job is not None)
            except UserError as error:
                refuse(error)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(checked)()
            if failures:
                sys.exit(1)

        run.hints = known  # type: ignore[attr-defined]
        return run

    return decorate


def refuse(reason: object) -> NoReturn:
    sys.exit(f"error: {redacted(str(reason))}")


def fail(reason: object) -> None:
    """End, but for a sweep in this process: it goes on with its other jobs, and ends with exit code 1."""
    if not sweeps_here():
        refuse(reason)
    print(f"error: {redacted(str(reason))}", file=sys.stderr, flush=True)
    failures.append(HydraConfig.get().job.num)


def sweeps_here() -> bool:
    """Whether this process runs all jobs of a sweep; submitit's jobs are processes of their own."""
    hydra_cfg = HydraConfig.get()
    return hydra_cfg.mode is RunMode.MULTIRUN and hydra_cfg.launcher["_target_"].endswith(".BasicLauncher")


def expand_home(cfg: DictConfig) -> None:
    """Replace the `~` that begins a path anywhere in a configuration: a shell leaves it within quotes and behind `=`."""
    for from_environment in (False, True):  # first what other keys take their value from
        for node, key in settings(cfg):
            interpolated = OmegaConf.is_interpolation(node, key)
            if interpolated != from_environment or (interpolated and "oc.env" not in str(node._get_node(key))):
                continue
            with suppress(OmegaConfBaseException), flag_override(node, ["readonly", "struct"], False):
                if isinstance(text := node[key], str) and re.fullmatch(r"~[\w.-]*(/.*)?", text):
                    node[key] = os.path.expanduser(text)


def settings(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield `(container, key)` of each value of a configuration but prompts, which are texts unless they are in a file."""
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        child = node._get_node(key)
        if key == "prompts" and not str(child).endswith(".txt"):
            continue
        if OmegaConf.is_config(child) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from settings(child)
        else:
            yield node, key


def check_missing(cfg: DictConfig) -> None:
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except InterpolationToMissingValueError as error:  # another key takes its value from it
        missing = re.findall(r"Missing mandatory value: ([\w.]+)", str(error))
    if missing:
        raise UserError(f"{missing[0]} has no default: give it on the command line, {missing[0]}=...")


def quiet() -> None:
    """Keep the libraries' advertisements and per-file bars off the screen."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory",
        "Be aware that when using `ckpt_path`",  # a changed period of checkpoints: it takes effect
        "Found .* eval mode",
        "isinstance.treespec",
        "The '.*' does not have many workers",
        "The `srun` command is available",  # it goes on with the command line, secrets included
        "torch.distributed is disabled",
        "This DataLoader will create",
        "Total length of `list` across ranks is zero",
        "torch.distributed.nn.functional.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", f".*{message}")


def build(node: Any, *, foreign: bool = False) -> Any:
    """`instantiate` with plain containers; None of nothing. A constructor's complaint is a UserError.

    foreign: the node is of a file that came from elsewhere, and may name only what `lcm.app.targets` allows.
    """
    if not node:
        return None
    node = node if OmegaConf.is_config(node) else OmegaConf.create(node, flags={"allow_objects": True})
    if foreign:
        check_targets(plain(node))
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        where = error.args[0].partition("full_key: ")[2] or "the configuration"
        raise UserError(f"cannot build {where}: {type(cause).__name__}: {' '.join(str(cause).split())}") from cause


def build_all(nodes: Any) -> list[Any]:
    """What a group of named parts describes; numbers that an experiment sets for a part not chosen (callbacks=default) describe
    nothing."""
    return [build(node) for node in (nodes or {}).values() if node and "_target_" in node]
