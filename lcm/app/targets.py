"""The allowed `_target_` values of untrusted files. A target is code that runs, so only parts of a training are allowed.

The command line and the user's own conf/ are trusted.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from hydra.utils import get_object

from lcm.core.errors import UserError

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # installed; in a checkout
# The variable is read at the import, because a configuration could set it later.
USER_PACKAGES = tuple(filter(None, re.split(r"[\s,]+", os.environ.get("LCM_ALLOW_TARGETS", ""))))
FUNCTIONS = ("lcm.core", *USER_PACKAGES)
CLASSES = (
    *FUNCTIONS,
    *("lcm.callbacks", "lcm.evaluate", "lcm.modules", "lcm.runtime"),
    *("torch.optim", "torch.nn", "torch.distributed.fsdp", "diffusers.models"),
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "plugins", "profilers", "strategies")),
    *("lightning.fabric.plugins", "lightning.fabric.strategies"),
)


def check_targets(node: Any, key: str = "") -> None:
    """Raise UserError for a target in plain containers that is not allowed."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            path = f"{key}.{name}" if key else str(name)
            if name == "_target_":
                check_target(value, path)
            else:
                check_targets(value, path)
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for i, value in enumerate(node):
            check_targets(value, f"{key}.{i}")


def check_target(target: Any, key: str) -> None:
    if target in shipped() or (isinstance(target, str) and is_allowed(target)):
        return
    raise UserError(
        f"{key}={target} is not allowed: a run's config.yaml may only name what conf/ names, and the optimizers, layers, "
        "callbacks, loggers and models of lcm, torch, lightning and diffusers; for your own package set "
        "LCM_ALLOW_TARGETS=<package>"
    )


@cache
def shipped() -> frozenset[str]:
    """Return all targets in the yaml files of conf/."""
    texts = [path.read_text() for path in CONF.rglob("*.yaml")]
    return frozenset(name for text in texts for name in re.findall(r"^[\s-]*_target_:\s*([\w.]+)", text, re.MULTILINE))


def is_allowed(target: str) -> bool:
    """Return whether a target is an allowed class or function, by the module that defines it.

    `lcm.runtime.run_dir.os.system` is os.system. A method such as `from_pretrained` may run code that it downloads.
    """
    packages = {name.partition(".")[0] for name in CLASSES} | {*USER_PACKAGES}
    if not any(within(target, package) for package in packages):
        return False  # the target is not imported
    try:
        value = get_object(target)
    except Exception:  # the target does not exist, or is on Hydra's list of dangerous targets
        return False
    home = getattr(value, "__module__", None) or ""
    if isinstance(value, type):
        return any(within(home, package) for package in CLASSES)
    is_function = isinstance(value, FunctionType) and "." not in value.__qualname__
    return is_function and any(within(home, package) for package in FUNCTIONS)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
