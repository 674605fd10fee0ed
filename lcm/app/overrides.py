"""Quoting of overrides: Hydra's grammar would misread some texts.

Hydra reads `name=2024` as a number, `prompts=a cat, a dog` as two values and `prompts=café` not at all. A key holds text
if it has the annotation of a text, or if its value in the configuration is text. The override of such a key is quoted.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from lcm.app.arguments import ANYTHING, Hint, Parameters, parameters_of
from lcm.core.errors import UserError

SYNTAX = re.compile(r"(\+{0,2}|~)([^=~+][^=]*)(?:=(.*))?", re.DOTALL)
FUNCTION = re.compile(r"(?:choice|range|interval|glob|shuffle|sort|tag|str|json_str|int|float|bool)\(.*\)", re.DOTALL)
CLOSING = {"[": "]", "{": "}", "(": ")"}


class Typed(NamedTuple):
    """An override `prefix key=value`. value: None if there is no equals sign."""

    prefix: str
    key: str
    value: str | None


def typed(override: str) -> Typed:
    """Return the parts of an override."""
    match = SYNTAX.fullmatch(override)
    return Typed(*match.groups()) if match else Typed("", override, None)


def parsed(override: str) -> Override | None:
    """Parse an override by Hydra's grammar. Return None for a syntax error."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


class Kind(NamedTuple):
    """The kind of a key. text: the key holds text. texts: it may hold a list of texts. nullable: it may be null."""

    text: bool = False
    texts: bool = False
    nullable: bool = False


def alternatives(hint: Hint) -> Sequence[Hint]:
    """Return the members of a union."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [member for part in get_args(hint) for member in alternatives(part)]
    return [hint]


def is_text(hint: Hint) -> bool:
    return hint in (str, Path) or (get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)))


def kind_of(cfg: DictConfig, key: str, hints: Mapping[str, Hint]) -> Kind:
    """Return the kind of a key by its annotation, else by its value in conf/. A number needs no annotation."""
    value, _ = lookup(cfg, key)
    if key not in hints and isinstance(value, bool | int | float):
        return Kind()
    hint = hint_of(cfg, key, hints)
    if hint is not Any:
        members = alternatives(hint)
        lists = [member for member in members if get_origin(member) in (list, tuple, Sequence) or member is list]
        texts = any(is_text(item) for member in lists for part in get_args(member) for item in alternatives(part))
        reads_numbers = bool({bool, int, float} & set(members))
        return Kind((any(map(is_text, members)) or texts) and not reads_numbers, texts, NoneType in members)
    if isinstance(value, str):
        return Kind(True, True)
    texts = OmegaConf.is_list(value) and len(value) > 0 and all(isinstance(item, str) for item in value)
    return Kind(texts, texts)


def lookup(cfg: Any, key: str) -> tuple[Any, bool]:
    """Return a key's value, and whether the key exists. The value is None if it is missing or cannot be resolved yet."""
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent) if parent else cfg
        exists = OmegaConf.is_dict(node) and (name in node or OmegaConf.is_missing(node, name))
    except OmegaConfBaseException:
        return None, False
    try:
        return (node[name] if exists else None), exists  # type: ignore[index]
    except OmegaConfBaseException:
        return None, exists


def hint_of(cfg: DictConfig, key: str, hints: Mapping[str, Hint]) -> Hint:
    """Return the annotation of a key's parameter, Any without an annotation. Imports the constructors of the parent nodes."""
    node: Any = cfg
    accepted, hint = Parameters(dict(hints), True), Any
    for name in key.split("."):
        hint = accepted.hints.get(name, Any)
        node = lookup(node, name)[0] if OmegaConf.is_dict(node) else None
        if get_origin(hint) in (dict, Mapping):
            accepted = Parameters(dict.fromkeys(key.split("."), get_args(hint)[1]), True)
            continue
        try:
            accepted = parameters_of(node, hint, name)[0] if OmegaConf.is_dict(node) or hint is not Any else ANYTHING
        except UserError:
            accepted = ANYTHING
    return hint


def as_hydra_reads(override: str, kind_of: Callable[[str], Kind], multirun: bool) -> str:
    """Return the override with its texts quoted. In a sweep, a comma outside of brackets and quotes separates values."""
    prefix, key, text = typed(override)
    reading = parsed(override)
    if text is None or (reading is not None and isinstance(reading._value, str)):
        return override  # Hydra reads a plain word as text
    kind = kind_of(key)
    if not kind.text:
        return f"{prefix}{key}={quoted_mapping(key, text, kind_of)}"
    text = text.strip()
    if FUNCTION.fullmatch(text) and parsed(f"key={text}"):
        return override
    values = split(text) if multirun else [text]
    return f"{prefix}{key}=" + ",".join(quoted_value(value, kind) for value in values)


def quoted_mapping(key: str, text: str, kind_of: Callable[[str], Kind]) -> str:
    """Quote the texts in `{name: value, ...}`. Return any other value unchanged."""
    pairs = [part.partition(":") for part in split(text.strip()[1:-1])]
    if not re.fullmatch(r"\s*\{.*\}\s*", text, re.DOTALL) or not all(colon for _, colon, _ in pairs):
        return text

    def inner(name: str, value: str) -> str:
        kind = kind_of(f"{key}.{name}")
        return quoted_value(value, kind) if kind.text else quoted_mapping(f"{key}.{name}", value, kind_of)

    return "{" + ", ".join(f"{name.strip()}: {inner(name.strip(), value.strip())}" for name, _, value in pairs) + "}"


def quoted_value(text: str, kind: Kind) -> str:
    """Return a value of a key, in quotes if Hydra would not read it as text."""
    reading = parsed(f"key={text}")
    value = None if reading is None else reading._value
    if text == "" or isinstance(value, QuotedString) or (isinstance(value, dict) and "_target_" in value):
        return text
    if text.startswith("[") and text.endswith("]"):
        return "[" + ",".join(quoted_value(item, Kind(True)) for item in split(text[1:-1])) + "]" if kind.texts else text
    if reading is not None and (isinstance(value, str) or (value is None and kind.nullable)):
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """Return a text in Hydra's quotes."""
    if "${" in text:
        try:
            parse(text)
        except OmegaConfBaseException:
            text = text.replace("${", r"\${")  # the text is no interpolation
    return QuotedString(text, Quote.single).with_quotes()


def split(text: str) -> list[str]:
    """Split at commas outside of quotes and brackets. Quotes enclose whole parts only."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        letter = text[i]
        if letter in "'\"" and not text[start:i].strip() and (end := closing_quote(text, i)) is not None:
            i = end
        elif letter in CLOSING:
            depth += 1
        elif letter in CLOSING.values():
            depth = max(depth - 1, 0)
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    if depth:  # a bracket is not closed, so brackets mean nothing here
        return [part.strip() for part in text.split(",")]
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


def closing_quote(text: str, start: int) -> int | None:
    """Return the position of the quote that closes the quote at `start`, or None."""
    match = re.compile(rf"{text[start]}(?:\\.|[^\\{text[start]}])*{text[start]}(?=\s*(?:,|$))", re.DOTALL).match(text, start)
    return match.end() - 1 if match else None


def shown(override: str) -> tuple[str, str]:
    """Return key and value of an override, the value without Hydra's quotes."""
    (_, key, text), reading = typed(override), parsed(override)
    if reading is None:
        return override, ""
    return key, reading._value.text if isinstance(reading._value, QuotedString) else text or ""


def for_shell(override: str) -> str:
    """Quote an override for bash and zsh."""
    if re.fullmatch(r"[\w./:=@%+,-]+", override, re.ASCII):
        return override
    return shlex.quote(override) if re.search(r"[\"$`\\!]", override) else f'"{override}"'
