"""A program's command line, without the program."""

import importlib
from collections.abc import Sequence
from typing import Any

from lcm.app.composition import compose, prepare

MODULES = {"train": "train", "sample": "sample", "bench": "lcm.bench.__main__"}
PROGRAMS = ["train", "sample", "evaluate", "encode", "preview", "manifest", "bench", "export"]


def hints(program: str) -> dict[str, Any]:
    return importlib.import_module(MODULES.get(program, f"lcm.{program}")).main.hints


def check(program: str, *args: str) -> list[str]:
    """What Hydra is given in place of these arguments. Raises UserError as the program does."""
    return prepare(program, list(args), hints(program))[0]


def configured(program: str, args: Sequence[str]) -> Any:
    """The configuration that the program gets."""
    return compose(program, check(program, *args))
