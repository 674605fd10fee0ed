"""Composing a configuration from overrides, and one sentence where that fails or holds what cannot be meant."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm.app import resolvers  # noqa: F401
from lcm.app.arguments import Hint, check_arguments
from lcm.app.overrides import Typed, as_hydra_reads, for_shell, hint_of, kind_of, parsed, present, quoted, typed
from lcm.app.targets import CONF
from lcm.core.errors import UserError


def compose(config_name: str, overrides: list[str], **options: Any) -> DictConfig:
    """options: `return_hydra_config=True` keeps what Hydra itself is configured with."""
    if GlobalHydra.instance().is_initialized():  # within a program, whose search path is this one
        return hydra.compose(config_name, overrides, **options)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, overrides, **options)


def prepare(config_name: str, args: list[str], hints: Mapping[str, Hint]) -> tuple[list[str], Path | None]:
    """Return the command line with every text quoted for Hydra, and the folder of a sweep (None where none is to start).

    Raises UserError, in one sentence, for what no run could use. hints: what the program takes, by key.
    """
    options, unknown = get_args_parser().parse_known_intermixed_args(args)
    if unknown:
        meant = as_override(config_name, unknown[0].lstrip("-"))
        raise UserError(f"there is no option {unknown[0]}: overrides have no dashes, did you mean '{meant}'?")
    if options.experimental_rerun or options.config_path:
        raise UserError("--experimental-rerun unpickles a file, --config-path replaces conf/: give overrides, or --config-dir")
    name, given = options.config_name or config_name, options.overrides
    if options.config_dir and any(override.lstrip("+").startswith("hydra.searchpath=") for override in given):
        raise UserError("--config-dir and hydra.searchpath say the same: give all folders with hydra.searchpath=[...]")
    folders = [f"hydra.searchpath=['file://{os.path.abspath(options.config_dir)}']"] if options.config_dir else []
    multirun = options.multirun or any(override.upper() == "HYDRA.MODE=MULTIRUN" for override in given)
    help_only = options.help or options.hydra_help or options.cfg or options.info or options.shell_completion
    sweep_dir = None
    try:
        before = composed_before(name, [*folders, *given])
        roots = roots_of([*folders, *given])
        read = {
            override: override if is_choice(override, roots) else readable(before, override, hints, multirun)
            for override in given
        }
        overrides = [read[override] for override in given]
        check_parts(before, overrides, roots)
        runs = list(single_runs([*folders, *overrides]))
        if len(runs) > 1 and not multirun:
            raise UserError(several_values(overrides, roots))
        for single in runs:
            cfg = compose(name, single, return_hydra_config=True)
            check_composed(cfg, hints, overrides)
            swept = [f"{key}={values}" for key, values in (cfg.hydra.sweeper.get("params") or {}).items()]
            if multirun or cfg.hydra.mode is RunMode.MULTIRUN:
                sweep_dir = Path(cfg.hydra.sweep.dir)
                if len(runs) == 1 and not swept and not help_only:
                    raise UserError(
                        "-m has nothing to sweep: give a key several values, as in model.w_max=4,8, or leave -m out"
                    )
                for run in list(single_runs([*swept, *single])):
                    check_composed(compose(name, run, return_hydra_config=True), hints, [*swept, *overrides])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if help_only:
            return args, None  # those are Hydra's to answer
        raise UserError(explain(name, [*folders, *given], str(error), hints)) from None
    # Hydra's parser wants the overrides in one place.
    return [*(arg for arg in args if arg not in read), *overrides], None if help_only else sweep_dir


def composed_before(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration of the groups that are chosen, before any value is set."""
    roots = roots_of(overrides)
    choices = [override for override in overrides if is_choice(override, roots)]
    return compose(config_name, next(single_runs(choices)), return_hydra_config=True)


def roots_of(overrides: Sequence[str]) -> list[Path]:
    """conf/, and the folders of the user's own configs."""
    own = [
        match
        for override in overrides
        if "hydra.searchpath=" in override
        for match in re.findall(r"file://([^'\",\]]+)", override)
    ]
    return [CONF, *map(Path, own)]


def is_choice(override: str, roots: Sequence[Path]) -> bool:
    """Whether an override chooses among the configs of a group, or says where they are."""
    found = typed(override)
    if found is None:
        return "/" in override and override.startswith("~")
    group = found.key.partition("@")[0]
    return "/" in found.key or "@" in found.key or group == "hydra.searchpath" or any((root / group).is_dir() for root in roots)


def readable(before: DictConfig, override: str, hints: Mapping[str, Hint], multirun: bool) -> str:
    found = typed(override)
    if found is None or found.key.startswith("hydra."):
        return override
    read = as_hydra_reads(override, lambda key: kind_of(before, key, hints), multirun)
    if parsed(read) is None:
        raise UserError(
            f"{override} cannot be read: a value is a number, true, false, null, a word, [a,b] or {{a: b}}; other text "
            f"needs two pairs of quotes, as in {for_shell(f'{found.key}={quoted(found.value)}')}"
        )
    return read


def several_values(overrides: list[str], roots: Sequence[Path]) -> str:
    [first, *_] = [override for override in overrides if (reading := parsed(override)) and reading.is_sweep_override()]
    found = typed(first)
    assert found is not None
    if is_choice(first, roots) or "(" in found.value:
        return f"{first} chooses several: add -m to sweep over them, or choose one"
    as_list = for_shell(f"{found.prefix}{found.key}=[{found.value}]")
    return f"{first} gives several values: a list needs brackets, {as_list}, and a sweep over them needs -m"


def check_parts(before: DictConfig, overrides: list[str], roots: Sequence[Path]) -> None:
    """Raise UserError for a dot where a slash is needed, and for a slash where a dot is."""
    choices = {key.partition("@")[2] or key.replace("/", "."): key for key in before.hydra.runtime.choices}
    for override in overrides:
        found, reading = typed(override), parsed(override)
        if found is None or reading is None or found.key.startswith("hydra"):
            continue
        if is_choice(override, roots):
            check_choice(before, found, reading, roots)
            continue
        value, group = reading._value, choices.get(found.key, found.key.replace(".", "/"))
        names = options(group, roots)
        is_part = OmegaConf.is_dict(present(before, found.key)[0]) or found.value in names
        if isinstance(value, dict) or value is None or not is_part:
            continue
        appended = "" if group in before.hydra.runtime.choices else "+"
        if found.value in names:
            raise UserError(f"{found.key} is a part, and a slash swaps it: {appended}{group}={found.value}")
        if names:
            raise UserError(
                f"{found.key}={found.value}: {found.key} is a part, which a slash swaps, {appended}{group}=<name>, by one of "
                f"{', '.join(names)}; a dot sets a key in it, {found.key}.<key>=..."
            )
        raise UserError(f"{found.key}={found.value}: {found.key} holds several keys, set one of them, {found.key}.<key>=...")


def check_choice(before: DictConfig, found: Typed, reading: Override, roots: Sequence[Path]) -> None:
    group, _, package = found.key.partition("@")
    if group == "hydra.searchpath" or group.startswith("hydra/"):
        return
    if not package and not options(group, roots):
        dotted = group.replace("/", ".")
        known = known_keys_of(before)
        meant = f", set it with a dot: {found.prefix}{dotted}={found.value}" if dotted in known else ""
        near = "" if meant else nearest(group, [name for name in (*groups(), *known) if name != found.key])
        raise UserError(f"there is no group '{group}'{meant}" + (f", did you mean '{near}'?" if near else ""))
    if isinstance(reading._value, list) and has_target(group, roots):
        raise UserError(f"{found.key} takes one of {', '.join(options(group, roots))}, not a list; -m sweeps over several")


def files_of(group: str, roots: Sequence[Path] = (CONF,)) -> list[Path]:
    group = group.partition("@")[0]
    return sorted(path for root in roots for path in (root / group).glob("*.yaml") if not path.stem.startswith("_"))


def options(group: str, roots: Sequence[Path] = (CONF,)) -> list[str]:
    return sorted(path.stem for path in files_of(group, roots))


def has_target(group: str, roots: Sequence[Path]) -> bool:
    """Whether each of a group's configs is a part of its own, so that two make none."""
    return any("_target_" in OmegaConf.load(file) for file in files_of(group, roots))


def check_composed(cfg: DictConfig, hints: Mapping[str, Hint], overrides: list[str]) -> None:
    """Raise UserError for an argument that no run could use, and for an override that nothing reads."""
    if cfg.hydra.output_subdir is not None:
        raise UserError("hydra.output_subdir would hold secrets of the overrides: leave it null, config.yaml says what was run")
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    for override in overrides:
        found = typed(override)
        if found is None or found.key.startswith("hydra") or found.key in cfg.hydra.runtime.choices:
            continue
        check_is_read(own, found, hints)
    check_arguments(own, hints)


def check_is_read(cfg: DictConfig, found: Typed, hints: Mapping[str, Hint]) -> None:
    """Raise UserError for a key that nothing takes: of a part that is not chosen, or added with `+` where nothing looks."""
    parts = found.key.split(".")
    if len(parts) > 2 and (CONF / parts[0]).is_dir() and parts[0] not in hints:
        node = present(cfg, ".".join(parts[:2]))[0]
        if parts[0] in PARTS and OmegaConf.is_dict(node) and "_target_" not in node:
            raise UserError(not_chosen(parts, found.key))
    if found.prefix and not is_taken(cfg, parts, hints) and f"${{{found.key}}}" not in str(OmegaConf.to_container(cfg)):
        near = nearest(found.key, known_keys_of(cfg, without=found.key))
        raise UserError(f"nothing reads {found.key}: leave it out" + (f", or did you mean '{near}'?" if near else ""))


PARTS = ("callbacks", "logger")  # every child with a `_target_` is built


def not_chosen(parts: list[str], key: str) -> str:
    group, part = parts[:2]
    bringing = [file.stem for file in files_of(group) if "_target_" in (present(OmegaConf.load(file), part)[0] or ())]
    choose = f": choose it, {group}={bringing[0]}" if bringing else ""
    return f"{key} is of a part, {group}.{part}, that is not chosen{choose}, or leave the key out"


def is_taken(cfg: DictConfig, parts: list[str], hints: Mapping[str, Hint]) -> bool:
    """Whether a program or a part reads the key; what a part's constructor takes is looked at with its arguments."""
    if parts[0] in hints or parts[0] not in cfg:
        return parts[0] in hints
    for depth in range(len(parts) - 1, 0, -1):
        node = present(cfg, ".".join(parts[:depth]))[0]
        if OmegaConf.is_dict(node) and "_target_" in node:
            return True
    child = present(cfg, ".".join(parts[:2]))[0]
    return parts[0] in PARTS and OmegaConf.is_dict(child) and "_target_" in child


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


def explain(config_name: str, overrides: list[str], message: str, hints: Mapping[str, Hint]) -> str:
    """One sentence out of a composition error of Hydra's."""
    if match := re.search(
        r"Could not find '([^']+)'(?:.*?Available options in '([^']+)':\s*(.*?)\s*Config search path)?", message, re.S
    ):
        wanted, group, listed = match.groups()
        if wanted.endswith("/"):
            wanted, message = wanted.rstrip("/"), "is empty"
        choices = [option for option in (listed or "").split() if not option.startswith("_")]  # those are parts of others
        has = f"; {group} has: {', '.join(choices)}" if choices else ""
        if message == "is empty":
            return f"{wanted}= chooses nothing{has}"
        name = wanted.removeprefix(f"{group}/")
        meant = as_override(config_name, name)
        if close := difflib.get_close_matches(name, choices, n=1):
            meant = f"{group}={close[0]}"
        other = f", did you mean {meant}?" if choices and "..." not in meant else ""
        return f"there is no config '{wanted}'{other}{has}"
    if match := re.search(r"Could not override '([^']+)'", message):
        key, known = match[1], known_keys(config_name, overrides)
        parts = key.split(".")
        if parts[0] in PARTS and len(parts) > 2:
            return not_chosen(parts, key)
        if key in groups():
            return f"{key} is not among the choices of this configuration: append it, +{key}=<name>"
        before = None if "/" in key else composed_before(config_name, overrides)
        if before is not None and hint_of(before, key, hints) is not Any:
            return f"{key} has no value yet: add it with a plus, +{key}=..."
        if before is not None and key in known_keys(config_name):
            choice = before.hydra.runtime.choices.get(parts[0])
            return f"{key} is no key of {parts[0]}={choice}: leave it out, or choose another {parts[0]}"
        near = nearest(key, known)
        return f"there is no config key '{key}'" + (f", did you mean '{near}'?" if near else "")
    if match := re.search(r"Could not delete from config\. '([^']+)' does not exist", message):
        near = nearest(match[1].replace("/", "."), known_keys(config_name, overrides))
        return f"'~{match[1]}' removes a key that is not there" + (f", did you mean '~{near}'?" if near else "")
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", message):
        return f"{match[1]} is there already: set it without the +"
    if match := re.search(r"override '([^']+)'\s+missing EQUAL", message):
        return f"'{match[1]}' sets nothing, did you mean '{as_override(config_name, match[1])}'?"
    if re.search(r"mismatched input|no viable alternative|extraneous input|token recognition|LexerNoViableAlt", message):
        wrong = next((override for override in overrides if parsed(override) is None), message.splitlines()[0])
        return f"{wrong} cannot be read: an override is <key>=<value>, as in name=cats"
    return " ".join(message.split())


def as_override(config_name: str, text: str) -> str:
    """What was probably meant: by `lcd_mini` experiment=lcd_mini, by `max_steps=3` trainer.max_steps=3."""
    files = sorted(CONF.glob("*/**/*.yaml"), key=lambda file: (file.parent.name != "experiment", file))
    if group := next((file.parent.relative_to(CONF).as_posix() for file in files if file.stem == text), None):
        return f"{group}={text}"
    key, _, value = text.partition("=")
    return f"{nearest(key, known_keys(config_name)) or key}={value or '...'}"


def nearest(key: str, known: list[str]) -> str | None:
    """Return the one known key of the same last name. Else return the key with an abbreviated, contained or similar name."""
    last, above = key.rpartition(".")[2], {name.rpartition(".")[0] for name in known}
    leaves = [name for name in known if name not in above]

    def like(name: str) -> float:
        return difflib.SequenceMatcher(None, key, name).ratio()

    words = re.split(r"[_-]", last)
    tests: list[Callable[[str], bool]] = [
        lambda name: name == last,
        lambda name: len(words) > 1 and name == "".join(word[:1] for word in words),  # learning_rate is lr
        lambda name: len(words) > 1 and set(name.split("_")) < set(words),  # num_inference_steps is steps
    ]
    for test in tests:
        if same := [name for name in leaves if test(name.rpartition(".")[2])]:
            return max(same, key=like)
    known = [name for name in known if not key.startswith(f"{name}.")]
    if close := difflib.get_close_matches(key, known, n=1):
        return close[0]
    names = {name.rpartition(".")[2]: name for name in reversed(leaves)}
    return next((names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.7)), None)


def groups() -> list[str]:
    return [path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()]


def known_keys(config_name: str, overrides: Sequence[str] = ()) -> list[str]:
    try:
        cfg = composed_before(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError):
        cfg = compose(config_name, [])
    return groups() + known_keys_of(cfg)


def known_keys_of(cfg: DictConfig, without: str = "") -> list[str]:
    return [key for key in dotted_keys(cfg) if key.partition(".")[0] != "hydra" and key != without]


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for key in map(str, node):
        keys += [f"{prefix}{key}", *dotted_keys(node._get_node(key), f"{prefix}{key}.")]
    return keys
