"""Composing a configuration from overrides, and one sentence where that fails or holds what cannot be meant."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm import precision  # noqa: F401  its resolvers
from lcm.data import openmoji  # noqa: F401  its resolver
from lcm.errors import UserError
from lcm.limits import check_limits
from lcm.targets import CONF, check_targets

OmegaConf.register_new_resolver("home", os.path.expanduser)  # for what Hydra itself reads before a program starts


def compose(config_name: str, overrides: list[str], **options: Any) -> DictConfig:
    """options: `return_hydra_config=True` keeps what Hydra itself is configured with."""
    if GlobalHydra.instance().is_initialized():  # within a program, whose search path is this one
        return hydra.compose(config_name, overrides, **options)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, overrides, **options)


def check_overrides(config_name: str, args: list[str]) -> Path | None:
    """Raises UserError, naming the nearest valid key, where Hydra would print a page or build what is not allowed.

    Returns the folder of a sweep; None where none is to start.
    """
    options, unknown = get_args_parser().parse_known_args(args)
    if unknown:
        meant = as_override(config_name, unknown[0].lstrip("-"))
        raise UserError(f"there is no option {unknown[0]}: overrides have no dashes, did you mean '{meant}'?")
    if options.experimental_rerun or options.config_path:
        raise UserError("--experimental-rerun unpickles a file, --config-path replaces conf/: give overrides, or --config-dir")
    name, overrides = options.config_name or config_name, options.overrides
    if options.config_dir:
        if any(override.lstrip("+").startswith("hydra.searchpath=") for override in overrides):
            raise UserError("--config-dir and hydra.searchpath say the same: give all folders with hydra.searchpath=[...]")
        overrides = [f"hydra.searchpath=['file://{os.path.abspath(options.config_dir)}']", *overrides]
    sweep_dir = None
    try:
        for single in single_runs(overrides):
            cfg = compose(name, single, return_hydra_config=True)
            check_composed(cfg)
            swept = [f"{key}={values}" for key, values in (cfg.hydra.sweeper.get("params") or {}).items()]
            if not (options.multirun or cfg.hydra.mode is RunMode.MULTIRUN):
                continue
            sweep_dir = Path(cfg.hydra.sweep.dir)
            if swept:
                for run in single_runs([*swept, *single]):
                    check_composed(compose(name, run, return_hydra_config=True))
    except (HydraException, OmegaConfBaseException) as error:
        if not (options.help or options.hydra_help or options.cfg or options.info or options.shell_completion):
            raise UserError(explain(name, str(error))) from None  # those are Hydra's to answer
    return None if options.help or options.hydra_help or options.cfg or options.info or options.shell_completion else sweep_dir


def check_composed(cfg: DictConfig) -> None:
    """Raises UserError for a number that cannot be meant and for a `_target_` that is not allowed, also where Hydra builds it
    before the program starts."""
    if cfg.hydra.output_subdir is not None:
        raise UserError("hydra.output_subdir would hold secrets of the overrides: leave it null, config.yaml says what was run")
    found = plain(cfg)
    for part in ("job_logging", "hydra_logging"):
        check_targets(found["hydra"].pop(part), f"hydra.{part}", logs=True)
    check_targets(found)
    check_limits({name: part for name, part in found.items() if name != "hydra"})


def plain(node: Any) -> Any:
    """Containers without interpolations; what cannot be resolved yet, such as the run's folder, is None."""
    if OmegaConf.is_config(node):
        keys = list(node) if OmegaConf.is_dict(node) else range(len(node))
        found = {}
        for key in keys:
            try:
                found[key] = plain(node[key])
            except OmegaConfBaseException:
                found[key] = None
        return found if OmegaConf.is_dict(node) else list(found.values())
    return node


def single_runs(overrides: list[str]) -> Iterator[list[str]]:
    """Without sweeps the overrides themselves; else one list for each alternative of each sweep, the others at their first."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [text]
        for text, override in zip(overrides, parsed, strict=True)
    ]
    first = [alternatives[0] for alternatives in choices]
    yield first
    for i, alternatives in enumerate(choices):
        for alternative in alternatives[1:]:
            yield [*first[:i], alternative, *first[i + 1 :]]


def explain(config_name: str, message: str) -> str:
    """One sentence out of a composition error of Hydra's."""
    if match := re.search(
        r"Could not find '([^']+)'(?:.*?Available options in '([^']+)':\s*(.*?)\s*Config search path)?", message, re.S
    ):
        wanted, group, options = match.groups()
        choices = [option for option in (options or "").split() if not option.startswith("_")]  # those are parts of others
        return f"there is no config '{wanted}'" + (f"; {group} has: {', '.join(choices)}" if choices else "")
    if match := re.search(r"Could not override '([^']+)'", message):
        key, known = match[1], known_keys(config_name)
        if key in known:
            return f"{key} is a group of configs: choose one, {key}=<name>, or set a key in it, such as +{key}.name=..."
        near = nearest(key, known)
        return f"there is no config key '{key}'" + (f", did you mean '{near}'?" if near else "")
    if match := re.search(r"override '([^']+)'\s+missing EQUAL", message):
        return f"'{match[1]}' sets nothing, did you mean '{as_override(config_name, match[1])}'?"
    if re.search(r"mismatched input|no viable alternative|extraneous input|token recognition", message):
        first = message.splitlines()[0]
        return f"an override cannot be parsed ({first}); quote special characters twice, as in \"key='a{{0..9}}.tar'\""
    return " ".join(message.split())


def as_override(config_name: str, text: str) -> str:
    """What was probably meant: by `lcd_mini` experiment=lcd_mini, by `max_steps=3` trainer.max_steps=3."""
    files = sorted(CONF.glob("*/**/*.yaml"), key=lambda file: (file.parent.name != "experiment", file))
    if group := next((file.parent.relative_to(CONF).as_posix() for file in files if file.stem == text), None):
        return f"{group}={text}"
    key, _, value = text.partition("=")
    return f"{nearest(key, known_keys(config_name)) or key}={value or '...'}"


def nearest(key: str, known: list[str]) -> str | None:
    """Of the known keys a single one's of the same last name, else one of a like spelling."""
    last, above = key.rpartition(".")[2], {name.rpartition(".")[0] for name in known}
    if same := [name for name in known if name.rpartition(".")[2] == last and name not in above]:
        return max(same, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    return next(iter(difflib.get_close_matches(key, known, n=1)), None)


def known_keys(config_name: str) -> list[str]:
    groups = [path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()]
    return groups + dotted_keys(compose(config_name, []))


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for key in map(str, node):
        keys += [f"{prefix}{key}", *dotted_keys(node._get_node(key), f"{prefix}{key}.")]
    return keys
