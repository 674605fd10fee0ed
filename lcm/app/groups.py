"""The groups of conf/ and their options, and suggestions for misspelt keys."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lcm.app import resolvers  # noqa: F401
from lcm.app.overrides import typed
from lcm.app.targets import CONF


def compose(config_name: str, overrides: Sequence[str], **options: Any) -> DictConfig:
    """Compose a configuration. options: `return_hydra_config=True` adds Hydra's own keys."""
    if GlobalHydra.instance().is_initialized():  # within a program, which reads the same conf/
        return hydra.compose(config_name, list(overrides), **options)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, list(overrides), **options)


class Groups:
    """Configuration groups. folders: conf/ and the folders in `hydra.searchpath`."""

    def __init__(self, config_name: str, overrides: Iterable[str] = ()) -> None:
        self.config_name = config_name
        paths = [re.findall(r"file://([^'\",\]]+)", override) for override in overrides if "hydra.searchpath=" in override]
        self.folders = [CONF, *(Path(path) for folders in paths for path in folders)]

    def files(self, group: str) -> list[Path]:
        """Return the yaml files of a group, except files with a leading underscore, which are parts of other files."""
        group = group.partition("@")[0]
        files = (file for folder in self.folders for file in (folder / group).glob("*.yaml"))
        return sorted(file for file in files if not file.stem.startswith("_"))

    def options(self, group: str) -> list[str]:
        """Return the options of a group, sorted."""
        return sorted(file.stem for file in self.files(group))

    def has(self, group: str, option: str) -> bool:
        return any((folder / group / f"{option.removesuffix('.yaml')}.yaml").is_file() for folder in self.folders)

    @cached_property
    def default_keys(self) -> list[str]:
        """Return the groups, and the keys of the configuration without overrides."""
        return [*self.names, *keys_of(compose(self.config_name, []))]

    @cached_property
    def names(self) -> list[str]:
        return sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir())

    def are_chosen_by(self, override: str) -> bool:
        """Return whether an override chooses an option of a group, or names the folders of groups."""
        key = typed(override).key
        group = key.partition("@")[0]
        return "/" in key or "@" in key or group == "hydra.searchpath" or any((f / group).is_dir() for f in self.folders)

    def has_targets(self, group: str) -> bool:
        """Return whether an option of the group has a `_target_`. Two such options cannot be combined."""
        return any("_target_" in OmegaConf.load(file) for file in self.files(group))

    def option_that_builds(self, group: str, part: str) -> str | None:
        """Return the first option of a group whose `part` has a `_target_`."""
        nodes = ((file.stem, OmegaConf.select(OmegaConf.load(file), part)) for file in self.files(group))
        return next((name for name, node in nodes if OmegaConf.is_dict(node) and "_target_" in node), None)


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a configuration, without Hydra's own."""
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for key in (str(name) for name in node if prefix or name != "hydra"):
        keys += [f"{prefix}{key}", *keys_of(node._get_node(key), f"{prefix}{key}.")]
    return keys


def override_like(text: str, keys: list[str]) -> str:
    """Return the likely override: experiment=lcd_mini for `lcd_mini`, trainer.max_steps=3 for `max_steps=3`."""
    files = sorted(CONF.glob("*/**/*.yaml"), key=lambda file: (file.parent.name != "experiment", file))
    if group := next((file.parent.relative_to(CONF).as_posix() for file in files if file.stem == text), None):
        return f"{group}={text}"
    key, _, value = text.partition("=")
    return f"{nearest(key, keys) or key}={value or '...'}"


def nearest(key: str, keys: Sequence[str]) -> str | None:
    """Return a key with the same last name, else with an abbreviated, contained or similar name, else None."""
    last, above = last_name(key), {name.rpartition(".")[0] for name in keys}
    words = re.split(r"[_-]", last)
    leaves = [name for name in keys if name not in above]
    tests: list[Callable[[str], bool]] = [
        lambda name: name == last,
        lambda name: len(words) > 1 and name == "".join(word[:1] for word in words),  # learning_rate is lr
        lambda name: len(words) > 1 and set(name.split("_")) < set(words),  # num_inference_steps is steps
    ]
    for test in tests:
        if same := [name for name in leaves if test(last_name(name))]:
            return max(same, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    if close := difflib.get_close_matches(key, [name for name in keys if not key.startswith(f"{name}.")], n=1):
        return close[0]
    names = {last_name(name): name for name in reversed(leaves)}
    return next((names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.7)), None)


def last_name(key: str) -> str:
    return key.rpartition(".")[2]


def did_you_mean(key: str | None, mark: str = "") -> str:
    return f", did you mean '{mark}{key}'?" if key else ""
