"""Refusals of wrong overrides, each in one sentence: unknown groups, options and keys, and keys without effect."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lcm.app.arguments import Hint
from lcm.app.groups import Groups, did_you_mean, keys_of, nearest, override_like
from lcm.app.overrides import for_shell, lookup, parsed, typed
from lcm.core.errors import UserError

UNUSED = ("hydra.job.chdir", "hydra.run.dir", "hydra.sweep.subdir")  # folders of Hydra's own files, which are turned off
PARTS = ("callbacks", "logger")  # each child with a `_target_` is built


def check_choice(override: str, groups: Groups) -> None:
    """Raise UserError for a group or an option that does not exist, and for several options that do not combine."""
    prefix, key, text = typed(override)
    group, _, package = key.partition("@")
    if group == "hydra.searchpath" or group.startswith("hydra/") or prefix == "~":
        return
    options = groups.options(group)
    if not options and not package:
        dotted = group.replace("/", ".")
        if dotted in groups.default_keys:
            raise UserError(f"there is no group '{group}', set the key with a dot: {prefix}{dotted}={text}")
        near = nearest(group, [name for name in groups.default_keys if name != key])
        raise UserError(f"there is no group '{group}'{did_you_mean(near)}")
    if not text:
        raise UserError(f"{key}= is empty: choose one of {', '.join(options)}")
    reading = parsed(override)
    if reading is None:
        raise UserError(f"{override} cannot be read: a choice is <group>=<name>, one of {', '.join(options)}")
    if isinstance(reading._value, list) and groups.has_targets(group):
        raise UserError(f"{key} takes one of {', '.join(options)}, not a list; -m sweeps over several")


def explain_choices(choices: Sequence[str], groups: Groups, message: str) -> None:
    """Raise UserError for the choice that made Hydra's composition fail."""
    for override in choices:
        prefix, key, text = typed(override)
        group, options = key.partition("@")[0], groups.options(key)
        names = re.findall(r"[\w./-]+", text or "")
        for name in names if prefix != "~" and not group.startswith("hydra") else ():
            if name != "null" and not groups.has(group, name):
                near = difflib.get_close_matches(name, options, n=1)
                meant = f"{group}={near[0]}" if near else override_like(name, [])
                also = "" if meant.endswith("=...") else f", did you mean {meant}?"
                raise UserError(f"there is no config '{group}/{name}'{also}; {group} has: {', '.join(options)}")
        if prefix == "" and f"Could not override '{key}'" in message:
            raise UserError(f"{key} is not among the choices of this configuration: append it, +{key}=<name>")


def check_keys(before: DictConfig, values: Sequence[str], groups: Groups, hints: Mapping[str, Hint]) -> None:
    """Raise UserError for an unknown key, a `+key` that exists, and a part that is chosen with a slash."""
    added: list[str] = []
    for override in values:
        prefix, key, text = typed(override)
        if any(key.startswith(f"{above}.") for above in added):
            continue
        if key.startswith("hydra."):
            check_hydra_key(before, key)
            continue
        value, exists = lookup(before, key)
        if prefix == "~" and not exists:
            near = nearest(key, keys_of(before))
            raise UserError(f"'{override}' removes a key that is not there{did_you_mean(near, '~')}")
        if prefix == "~":
            continue
        check_part(before, key, text, value, groups)
        if prefix == "" and not exists:
            raise UserError(unknown_key(before, key, text, groups, hints))
        if prefix == "+" and value is not None and not str(text).startswith(("{", "[")):
            raise UserError(f"{key} is there already: set it without the +")
        added += [key] if prefix else []


def check_hydra_key(before: DictConfig, key: str) -> None:
    """Raise UserError for an unknown key of Hydra, and for one without effect."""
    if key in UNUSED and os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning sets these keys for the ranks that it starts
        raise UserError(
            f"{key} has no effect: set paths.runs, name and paths.run_id for a run's folder, or output= of other programs"
        )
    above, (value, exists) = key, lookup(before, key)
    while not exists:
        above = above.rpartition(".")[0]
        value, exists = lookup(before, above)
    closed = OmegaConf.is_dict(value) and (OmegaConf.get_type(value) is not dict or "_target_" in value)
    if above != key and closed:
        raise UserError(f"Hydra has no key '{key}'{did_you_mean(nearest(key, keys_of(before.hydra, 'hydra.')))}")


def check_part(before: DictConfig, key: str, text: str | None, value: Any, groups: Groups) -> None:
    """Raise UserError for a part that is set with a dot instead of a slash."""
    chosen = {name.partition("@")[2] or name.replace("/", "."): name for name in before.hydra.runtime.choices}
    group = chosen.get(key, key.replace(".", "/"))
    options = groups.options(group)
    if text in options:
        raise UserError(f"{key} is a part, choose it with a slash: {'' if key in chosen else '+'}{group}={text}")
    if not OmegaConf.is_dict(value) or text == "null" or str(text).lstrip().startswith("{"):
        return
    if options:
        raise UserError(
            f"{key}={text}: {key} is a part: choose one of {', '.join(options)} with a slash, "
            f"{'' if key in chosen else '+'}{group}=<name>, or set a key in it with a dot, {key}.<key>=..."
        )
    name = key.rpartition(".")[2]
    if groups.options(name):
        raise UserError(f"{key}={text}: {key} holds parts: choose them from their group, {name}@{key}={text}")
    raise UserError(f"{key}={text}: {key} holds several keys: set one of them, {key}.<key>=...")


def unknown_key(before: DictConfig, key: str, text: str | None, groups: Groups, hints: Mapping[str, Hint]) -> str:
    """Return the error message for a key that the configuration lacks."""
    if part := unbuilt_part(before, key):
        return not_chosen(key, part, groups)
    parent = key.rpartition(".")[0]
    node: Any = lookup(before, parent)[0] if parent else None
    if not OmegaConf.is_dict(node) or ("_target_" not in node and parent not in hints):
        return f"there is no config key '{key}'{did_you_mean(nearest(key, [*groups.names, *keys_of(before)]))}"
    above = ["/".join(key.split(".")[:depth]) for depth in range(key.count("."), 0, -1)]
    group = next((name for name in above if name in before.hydra.runtime.choices), None)
    if group and key in groups.default_keys:
        choice = before.hydra.runtime.choices[group]
        return f"{key} is no key of {group}={choice}: leave it out, or choose another {group}"
    below = [name.removeprefix(f"{parent}.") for name in keys_of(before) if name.startswith(f"{parent}.")]
    if near := nearest(key.removeprefix(f"{parent}."), below):
        return f"there is no config key '{key}', did you mean '{parent}.{near}'?"
    options = groups.options(key.replace(".", "/"))
    swap = f"; a slash adds a part, +{key.replace('.', '/')}=<name>, one of {', '.join(options)}" if options else ""
    receiver, example = node.get("_target_", parent), for_shell(f"+{key}={text}")
    return f"{key} has no value yet: if {receiver} takes it, add it with a plus, {example}{swap}"


def unbuilt_part(cfg: DictConfig, key: str) -> str | None:
    """Return the callback or logger of a key if it is not chosen (it has no `_target_`), else None."""
    top, *below = key.split(".")
    if top not in PARTS or len(below) < 2:
        return None
    node = lookup(cfg, f"{top}.{below[0]}")[0]
    return None if OmegaConf.is_dict(node) and "_target_" in node else f"{top}.{below[0]}"


def not_chosen(key: str, part: str, groups: Groups) -> str:
    """Return the error message for a key of a part that is not chosen."""
    option = groups.option_that_builds(*part.split("."))
    cure = f"choose it, {part.partition('.')[0]}={option}, or leave" if option else "leave"
    return f"{key} sets nothing, because {part} is not chosen: {cure} the key out"


def check_keys_are_read(cfg: DictConfig, overrides: Sequence[str], groups: Groups, hints: Mapping[str, Hint]) -> None:
    """Raise UserError for an unused key: a key of a part that is not chosen, or an added key that nothing reads."""
    if cfg.hydra.output_subdir is not None:
        raise UserError("hydra.output_subdir would store secrets in overrides: leave it null, config.yaml has the settings")
    for override in overrides:
        prefix, key, _ = typed(override)
        if prefix == "~" or key.startswith("hydra") or groups.are_chosen_by(override):
            continue
        if part := unbuilt_part(cfg, key):
            raise UserError(not_chosen(key, part, groups))
        nodes = {name: cfg._get_node(name) for name in cfg if name != "hydra"}
        if prefix and not is_read(cfg, key, hints) and f"${{{key}}}" not in str(nodes):
            near = nearest(key, [name for name in keys_of(cfg) if name != key])
            raise UserError(f"nothing reads {key}: leave it out" + (f", or did you mean '{near}'?" if near else ""))


def is_read(cfg: DictConfig, key: str, hints: Mapping[str, Hint]) -> bool:
    """Return whether the program or a part reads the key. `check_arguments` compares the part's constructor later."""
    names = key.split(".")
    if names[0] in hints or names[0] not in cfg:
        return names[0] in hints
    depths = {*range(1, len(names)), *([2] if names[0] in PARTS else [])}
    nodes = [lookup(cfg, ".".join(names[:depth]))[0] for depth in depths]
    return any(OmegaConf.is_dict(node) and "_target_" in node for node in nodes)
