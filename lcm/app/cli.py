"""A program: its command line, its configuration and its error messages."""

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
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from lcm.app.arguments import Hint, check_arguments
from lcm.app.composition import Command, plain, prepare
from lcm.app.help_page import page
from lcm.app.targets import CONF, check_targets
from lcm.core.errors import UserError
from lcm.runtime.redaction import hide_in_logs, redacted


@dataclass
class Paths:
    """The key `paths` of conf/_program.yaml."""

    runs: str
    data: str
    run_id: str | None
    run_dir: str | None
    wandb_id: str | None


failures: list[int] = []  # the numbers of a sweep's jobs that ended in an error


class Program:
    """A configuration of conf/ and the function that receives it. Wrong input ends in one sentence and exit code 1.

        program = Program("preview", samples=Count)
        if __name__ == "__main__":
            program.read_command_line()  # before imports that take seconds

        import torch

        @program
        def main(cfg): ...

    process_per_job: each job of a sweep runs in a new process. hints: annotations of the configuration's top-level keys.
    """

    def __init__(self, config_name: str, /, *, process_per_job: bool = False, **hints: Hint) -> None:
        self.config_name, self.process_per_job = config_name, process_per_job
        self.hints: dict[str, Hint] = {"paths": Paths, **hints}
        self.command: Command | None = None

    def read_command_line(self) -> None:
        """Compose the configuration and check its keys. Answer --help and --cfg, and end the program."""
        hide_in_logs()  # Hydra's launchers log a sweep's overrides
        warnings.filterwarnings("ignore", r"\s*'hydra/launcher/.* ConfigStore")  # conf/ fills in a plugin's own schema
        try:
            self.command = prepare(self.config_name, sys.argv[1:], self.hints)
            for cfg in () if self.command.printed else self.command.runs:
                check_missing(program_keys(cfg))
        except UserError as error:
            refuse(error)
        sys.argv[1:] = self.command.args
        if self.command.printed:
            if {"--help", "-h"} & {*sys.argv}:
                print(page(self.config_name, self.command.runs[0]))
            else:
                self.hydra_main(lambda cfg: None)
            sys.exit()

    def hydra_main(self, function: Callable[[DictConfig], Any]) -> None:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=self.config_name)(function)()

    def __call__(self, main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def run() -> None:
            if self.command is None:
                self.read_command_line()
            assert self.command is not None
            from lcm.runtime.sweep import check_sweep

            try:
                for cfg in self.command.runs:
                    check_arguments(program_keys(cfg), self.hints)
                if self.command.sweep_dir is not None:
                    check_sweep(self.command.sweep_dir, one_process=self.process_per_job)
            except UserError as error:
                refuse(error)
            process_per_job = self.process_per_job  # without `self`: submitit pickles this function
            self.hydra_main(lambda cfg: run_job(main, cfg, process_per_job))
            if failures:
                sys.exit(1)

        return run


def run_job(main: Callable[[DictConfig], Any], cfg: DictConfig, process_per_job: bool) -> Any:
    """Run `main`, and print an expected error as one sentence. process_per_job: a sweep's job runs in a new process."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lcm.app.pipelines import resolve_models
    from lcm.runtime.sweep import sweep_job

    mute_libraries()
    expand_home(cfg)
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        os.environ.setdefault("WANDB_RUN_GROUP", f"sweep-{os.path.basename(HydraConfig.get().sweep.dir)}")
    try:
        resolve_models(cfg, cfg.paths.runs)
        if not (process_per_job and sweeps_here()):
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
        return fail("a file to be loaded holds code, not only tensors, and is refused: give one that this program wrote")


def refuse(reason: object) -> NoReturn:
    """Print an error and end the program with exit code 1."""
    sys.exit(f"error: {redacted(str(reason))}")


def fail(reason: object) -> None:
    """End the program with an error. A sweep in this process first runs its other jobs."""
    if not sweeps_here():
        refuse(reason)
    print(f"error: {redacted(str(reason))}", file=sys.stderr, flush=True)
    failures.append(HydraConfig.get().job.num)


def sweeps_here() -> bool:
    """Return whether this process runs all jobs of a sweep. submitit starts a process for each job."""
    hydra_cfg = HydraConfig.get()
    return hydra_cfg.mode is RunMode.MULTIRUN and hydra_cfg.launcher["_target_"].endswith(".BasicLauncher")


def expand_home(cfg: DictConfig) -> None:
    """Expand a leading `~` of every path in a configuration. A shell does not expand it in quotes or after `=`."""
    for from_environment in (False, True):  # plain values first: interpolations take their values from these
        for node, key in settings(cfg):
            interpolated = OmegaConf.is_interpolation(node, key)
            if interpolated != from_environment or (interpolated and "oc.env" not in str(node._get_node(key))):
                continue
            with suppress(OmegaConfBaseException), flag_override(node, ["readonly", "struct"], False):
                if isinstance(text := node[key], str) and re.fullmatch(r"~[\w.-]*(/.*)?", text):
                    node[key] = os.path.expanduser(text)


def settings(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield `(container, key)` of each value in a configuration, except prompts that are not a file."""
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        child = node._get_node(key)
        if key == "prompts" and not str(child).endswith(".txt"):
            continue
        if OmegaConf.is_config(child) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from settings(child)
        else:
            yield node, key


def program_keys(cfg: DictConfig) -> DictConfig:
    """Return the configuration without Hydra's own keys."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def check_missing(cfg: DictConfig) -> None:
    """Raise UserError for a key without a value (`???`)."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except InterpolationToMissingValueError as error:  # another key takes its value from a missing key
        missing = re.findall(r"Missing mandatory value: ([\w.]+)", str(error))
    if missing:
        raise UserError(f"{missing[0]} has no default: give it on the command line, {missing[0]}=...")


def mute_libraries() -> None:
    """Mute the advice of libraries and their progress bars for single files."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory",
        "Be aware that when using `ckpt_path`",  # Lightning warns of a changed period of checkpoints, which takes effect
        "Found .* eval mode",
        "isinstance.treespec",
        "The '.*' does not have many workers",
        "The `srun` command is available",  # the warning prints the command line with its secrets
        "torch.distributed is disabled",
        "This DataLoader will create",
        "Total length of `list` across ranks is zero",
        "torch.distributed.nn.functional.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", f".*{message}")


def build(node: Any, *, foreign: bool = False) -> Any:
    """Instantiate a node with plain containers. Return None for an empty node. Raises UserError for a constructor's error.

    foreign: the node comes from an untrusted file. Raises UserError for a target that `lcm.app.targets` does not allow.
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
    """Return the built nodes of a group. A node without a `_target_` holds settings of a part that is not chosen."""
    return [build(node) for node in (nodes or {}).values() if node and "_target_" in node]
