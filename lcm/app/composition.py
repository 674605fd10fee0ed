"""Compose a program's configuration from its command line.

No import here imports torch, so the answer to a typo comes at once.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm.app.arguments import Hint
from lcm.app.groups import Groups, compose, override_like
from lcm.app.overrides import as_hydra_reads, for_shell, kind_of, parsed, quoted, typed
from lcm.app.refusals import check_choice, check_keys, check_keys_are_read, explain_choices
from lcm.core.errors import UserError


class Command(NamedTuple):
    """A valid command line.

    args: the arguments for Hydra, with texts quoted. runs: the configuration of each run; a sweep has several. sweep_dir: the
    folder of a sweep. printed: the program only prints its help or its configuration.
    """

    args: list[str]
    runs: list[DictConfig]
    sweep_dir: Path | None
    printed: bool


def prepare(config_name: str, args: list[str], hints: Mapping[str, Hint]) -> Command:
    """Return the composed command line. Raises UserError for an invalid one. hints: annotations of top-level keys."""
    options, unknown = get_args_parser().parse_known_intermixed_args(args)
    name, typed_overrides = options.config_name or config_name, options.overrides
    groups = Groups(name, typed_overrides)
    if unknown:
        meant = override_like(unknown[0].lstrip("-"), groups.default_keys)
        raise UserError(f"there is no option {unknown[0]}: overrides have no dashes, did you mean '{meant}'?")
    if options.experimental_rerun or options.config_path:
        raise UserError("--experimental-rerun unpickles a file, --config-path replaces conf/: give overrides, or --config-dir")
    if options.shell_completion or options.hydra_help:
        return Command(args, [], None, True)
    if options.config_dir and any(typed(override).key == "hydra.searchpath" for override in typed_overrides):
        raise UserError("--config-dir and hydra.searchpath both name folders: give all with hydra.searchpath=[...]")
    for override in typed_overrides:
        if typed(override).value is None and not override.startswith("~"):
            raise UserError(f"'{override}' sets nothing, did you mean '{override_like(override, groups.default_keys)}'?")

    folders = [f"hydra.searchpath=['file://{os.path.abspath(options.config_dir)}']"] if options.config_dir else []
    groups = Groups(name, [*folders, *typed_overrides])
    multirun = options.multirun or any(override.upper() == "HYDRA.MODE=MULTIRUN" for override in typed_overrides)
    printed = bool(options.help or options.cfg or options.info)

    @cache
    def composed(*overrides: str) -> DictConfig:
        try:
            return compose(name, [*folders, *overrides], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            explain_choices([override for override in overrides if groups.are_chosen_by(override)], groups, str(error))
            raise UserError(" ".join(str(error).split())) from None

    def chosen(overrides: Sequence[str]) -> DictConfig:
        """Compose the chosen groups, without the overrides of values."""
        return composed(*(override for override in overrides if groups.are_chosen_by(override)))

    choices = [override for override in typed_overrides if groups.are_chosen_by(override)]
    for override in choices:
        check_choice(override, groups)
    before = chosen(next(single_runs(choices)))
    values = [override for override in typed_overrides if override not in choices]
    check_keys(before, values, groups, hints)
    read = {override: readable(before, override, hints, multirun) for override in values}
    overrides = [read.get(override, override) for override in typed_overrides]
    runs = list(single_runs(overrides))
    if len(runs) > 1 and not multirun:
        raise UserError(several_values(overrides, groups))
    cfg, sweep_dir = composed(*runs[0]), None
    if multirun or cfg.hydra.mode is RunMode.MULTIRUN:
        swept = [f"{key}={values}" for key, values in (cfg.hydra.sweeper.get("params") or {}).items()]
        if len(runs) == 1 and not swept and not printed:
            raise UserError("-m has nothing to sweep: give a key several values, as in model.w_max=4,8, or leave -m out")
        runs, sweep_dir = list(single_runs([*swept, *overrides])), Path(cfg.hydra.sweep.dir)
    for run in runs:
        check_keys(chosen(run), [override for override in run if not groups.are_chosen_by(override)], groups, hints)
        check_keys_are_read(composed(*run), run, groups, hints)
    # Hydra's parser refuses overrides between options.
    return Command(
        [*(arg for arg in args if arg not in typed_overrides), *overrides], [composed(*run) for run in runs], sweep_dir, printed
    )


def single_runs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of single runs. Each swept value comes once, with the first values of the other swept keys."""
    readings = OverridesParser.create().parse_overrides(list(overrides))
    values = [
        [f"{reading.get_key_element()}={value}" for value in reading.sweep_string_iterator()]
        if reading.is_sweep_override()
        else [override]
        for override, reading in zip(overrides, readings, strict=True)
    ]
    first = [alternatives[0] for alternatives in values]
    yield first
    for i, alternatives in enumerate(values):
        for alternative in alternatives[1:]:
            yield [*first[:i], alternative, *first[i + 1 :]]


def readable(before: DictConfig, override: str, hints: Mapping[str, Hint], multirun: bool) -> str:
    """Return the override, quoted so that Hydra can read it. Raises UserError if it cannot."""
    key, text = typed(override)[1:]
    if key.startswith("hydra."):
        return override
    example = quoted(text or "")
    read = as_hydra_reads(override, lambda key: kind_of(before, key, hints), multirun)
    if parsed(read) is None:
        raise UserError(
            f"{override} cannot be read: a value is a number, true, false, null, a word, [a,b] or {{a: b}}; other text "
            f"needs two pairs of quotes, as in {for_shell(f'{key}={example}')}"
        )
    return read


def several_values(overrides: Sequence[str], groups: Groups) -> str:
    """Return the error message for an override with several values outside of a sweep."""
    [first, *_] = [override for override in overrides if (reading := parsed(override)) and reading.is_sweep_override()]
    prefix, key, text = typed(first)
    if groups.are_chosen_by(first) or "(" in str(text):
        return f"{first} chooses several: add -m to sweep over them, or choose one"
    return f"{first} gives several values: a list needs brackets, {for_shell(f'{prefix}{key}=[{text}]')}; a sweep needs -m"


def plain(node: Any) -> Any:
    """Return plain containers without interpolations. A value that cannot be resolved yet, such as the run folder, is None."""
    if not OmegaConf.is_config(node):
        return node
    values = {}
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        try:
            values[key] = plain(node[key])
        except OmegaConfBaseException:
            values[key] = None
    return values if OmegaConf.is_dict(node) else list(values.values())
