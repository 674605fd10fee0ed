"""From the command line to a program's objects, and what a user sees when that fails."""

import logging
import re
import sys
import warnings
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from lcm.composition import check_overrides, plain
from lcm.errors import UserError
from lcm.redaction import hide_in_logs, redacted
from lcm.targets import CONF, check_targets

failures: list[int] = []  # the numbers of a sweep's jobs that ended in an error


def program(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(cfg)` a Hydra program whose wrong input ends in one sentence and exit code 1."""

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def checked(cfg: DictConfig) -> Any:
            quiet()
            try:
                check_missing(cfg)
                return main(cfg)
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

        def run() -> None:
            hide_in_logs()  # Hydra's launchers log a sweep's overrides
            warnings.filterwarnings("ignore", r"\s*'hydra/launcher/.* ConfigStore")  # conf/ fills in a plugin's own schema
            try:
                check_overrides(config_name, sys.argv[1:])
            except UserError as error:
                refuse(error)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(checked)()
            if failures:
                sys.exit(1)

        return run

    return decorate


def refuse(reason: object) -> NoReturn:
    sys.exit(f"error: {redacted(str(reason))}")


def fail(reason: object) -> None:
    """End, but for a sweep in this process: it goes on with its other jobs, and ends with exit code 1."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode is not RunMode.MULTIRUN or not hydra_cfg.launcher["_target_"].endswith(".BasicLauncher"):
        refuse(reason)
    print(f"error: {redacted(str(reason))}", file=sys.stderr, flush=True)
    failures.append(hydra_cfg.job.num)


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


def build(node: Any) -> Any:
    """`instantiate` of what is allowed, with plain containers; None of nothing. A constructor's complaint is a UserError."""
    if not node:
        return None
    node = node if OmegaConf.is_config(node) else OmegaConf.create(node, flags={"allow_objects": True})
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
