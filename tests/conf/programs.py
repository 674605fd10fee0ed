"""The command line of a program, composed and checked without running the program."""

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
    """Compose, check the keys and then the arguments, as the program does. Raises UserError."""
    hints = hints_of(program)
    composed = prepare(program, list(args), hints)
    for cfg in composed.runs:
        check_arguments(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), hints)
    return composed


def check(program: str, *args: str) -> list[str]:
    """The arguments for Hydra."""
    return command(program, *args).args


def checked(program: str, *args: str) -> Any:
    """The configuration, composed once, with its arguments checked. The overrides are right."""
    cfg = compose(program, list(args))
    check_arguments(cfg, hints_of(program))
    return cfg


def configured(program: str, args: Sequence[str]) -> Any:
    """The configuration that the program gets, as Hydra reads the arguments."""
    return compose(program, check(program, *args))
