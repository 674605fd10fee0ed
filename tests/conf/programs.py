"""Functions that compose and check the command line of a program. They do not run the program."""

import importlib
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from lcm.app.arguments import check_arguments
from lcm.app.composition import Command, compose, prepare

MODULES = {"train": "train", "sample": "sample", "bench": "lcm.bench.__main__", "evaluate": "lcm.evaluate.__main__"}
PROGRAMS = ["train", "sample", "evaluate", "encode", "preview", "index", "bench", "export", "serve", "dashboard"]
REQUIRED = {"encode": ["out=x"], "export": ["run=x"]}


def hints_of(program: str) -> dict[str, Any]:
    return importlib.import_module(MODULES.get(program, f"lcm.{program}")).program.hints


def command(program: str, *args: str) -> Command:
    """Compose the configurations, and check keys and then arguments as the program does. Raises UserError."""
    hints = hints_of(program)
    composed = prepare(program, list(args), hints)
    for cfg in composed.runs:
        check_arguments(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), hints)
    return composed


def check(program: str, *args: str) -> list[str]:
    """Check a command, and return the arguments for Hydra. Raises UserError."""
    return command(program, *args).args


def checked(program: str, *args: str) -> Any:
    """Return the configuration after a check of its arguments. The overrides are not checked. Raises UserError."""
    cfg = compose(program, list(args))
    check_arguments(cfg, hints_of(program))
    return cfg


def configured(program: str, args: Sequence[str]) -> Any:
    """Check a command, and return the configuration that Hydra composes for the program. Raises UserError."""
    return compose(program, check(program, *args))
