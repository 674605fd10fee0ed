"""Overrides as a user types them, and as Hydra's grammar needs them: text stays the text that was typed.

Hydra reads `name=2024` as a number, `prompts=a cat, a dog` as two values and `prompts=café` not at all. A key that holds
text is known by its value in the configuration or by the annotation of its constructor: its override is
quoted before Hydra sees it.
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

from lcm.app.arguments import Hint, Parameters, is_own, located, parameters
from lcm.core.errors import UserError

SYNTAX = re.compile(r"(\+{0,2})([^=~+][^=]*)=(.*)", re.DOTALL)
FUNCTION = re.compile(r"(?:choice|range|interval|glob|shuffle|sort|tag|str|json_str|int|float|bool)\(.*\)", re.DOTALL)
CLOSING = {"[": "]", "{": "}", "(": ")"}


class Typed(NamedTuple):
    """An override `prefix key = value`."""

    prefix: str
    key: str
    value: str


def typed(override: str) -> Typed | None:
    """None for a deletion, or text without an equals sign."""
    match = SYNTAX.fullmatch(override)
    return Typed(*match.groups()) if match else None


def parsed(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


class Kind(NamedTuple):
    """Whether a key holds text, whether it may hold a list of texts, and whether `null` means nothing there."""

    text: bool = False
    texts: bool = False
    nullable: bool = False


def options_of(hint: Hint) -> Sequence[Hint]:
    if get_origin(hint) is Annotated:
        return options_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [option for part in get_args(hint) for option in options_of(part)]
    return [hint]


def is_text(hint: Hint) -> bool:
    return hint in (str, Path) or (get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)))


def kind_of(cfg: DictConfig, key: str, hints: Mapping[str, Hint]) -> Kind:
    """By the annotation if there is one, else by the value that the key has before the command line sets it."""
    hint = hint_of(cfg, key, hints)
    if hint is not Any:
        found = options_of(hint)
        lists = [option for option in found if get_origin(option) in (list, tuple, Sequence) or option is list]
        texts = any(is_text(option) for of in lists for item in get_args(of) for option in options_of(item))
        reads_numbers = bool({bool, int, float} & set(found))
        return Kind((any(map(is_text, found)) or texts) and not reads_numbers, texts, NoneType in found)
    value, _ = present(cfg, key)
    if isinstance(value, str):
        return Kind(True, True)
    if OmegaConf.is_list(value):
        texts = len(value) > 0 and all(isinstance(item, str) for item in value)
        return Kind(texts, texts)
    return Kind()


def present(cfg: Any, key: str) -> tuple[Any, bool]:
    """A key's value, None if it is missing or cannot be resolved yet; and whether there is such a key."""
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent) if parent else cfg
        exists = OmegaConf.is_dict(node) and name in node
        exists = exists or (OmegaConf.is_dict(node) and OmegaConf.is_missing(node, name))
    except OmegaConfBaseException:
        return None, False
    try:
        return (node[name] if exists else None), exists  # type: ignore[index]
    except OmegaConfBaseException:
        return None, exists


def hint_of(cfg: DictConfig, key: str, hints: Mapping[str, Hint]) -> Hint:
    """The annotation of the parameter that a key is given to, Any without one."""
    node: Any = cfg
    known, hint = Parameters(dict(hints), True), Any
    for name in key.split("."):
        hint = known.hints.get(name, Any)
        node = present(node, name)[0] if OmegaConf.is_dict(node) else None
        if get_origin(hint) in (dict, Mapping):
            known = Parameters(dict.fromkeys(key.split("."), get_args(hint)[1]), True)
        elif isinstance(hint, type) and is_own(hint):
            known = parameters(hint)
        elif OmegaConf.is_dict(node) and (target := present(node, "_target_")[0]):
            try:
                known = parameters(located(target, f"{name}._target_"))
            except UserError:
                known = Parameters({}, True)
        else:
            known = Parameters({}, True)
    return hint


def as_hydra_reads(override: str, kind_of: Callable[[str], Kind], multirun: bool) -> str:
    """The same override for Hydra's grammar: the text that was typed, quoted where Hydra would read something else.

    With multirun a comma outside of brackets and quotes separates the values of a sweep.
    """
    found = typed(override)
    if found is None:
        return override
    kind = kind_of(found.key)
    if not kind.text:
        return f"{found.prefix}{found.key}={mapping(found.key, found.value, kind_of)}"
    head, value = f"{found.prefix}{found.key}=", found.value.strip()
    if FUNCTION.fullmatch(value) and parsed(f"key={value}"):
        return override
    values = separated(value) if multirun else [value]
    return head + ",".join(written(part, kind) for part in values)


def mapping(key: str, value: str, kind_of: Callable[[str], Kind]) -> str:
    """`{name: value, ...}` with the texts in it quoted; any other value as it is."""
    pairs = [part.partition(":") for part in separated(value.strip()[1:-1])]
    if not re.fullmatch(r"\s*\{.*\}\s*", value, re.DOTALL) or not all(colon for _, colon, _ in pairs):
        return value

    def inner(name: str, text: str) -> str:
        kind = kind_of(f"{key}.{name}")
        return written(text, kind) if kind.text else mapping(f"{key}.{name}", text, kind_of)

    return "{" + ", ".join(f"{name.strip()}: {inner(name.strip(), text.strip())}" for name, _, text in pairs) + "}"


def written(value: str, kind: Kind) -> str:
    reading = parsed(f"key={value}")
    element = None if reading is None else reading._value
    if value == "" or isinstance(element, QuotedString) or (isinstance(element, dict) and "_target_" in element):
        return value
    if value.startswith("[") and value.endswith("]"):
        if not kind.texts:
            return value
        return "[" + ",".join(written(item, Kind(True)) for item in separated(value[1:-1])) + "]"
    if reading is not None and (isinstance(element, str) or (element is None and kind.nullable)):
        return value
    return quoted(value)


def quoted(value: str) -> str:
    if "${" in value:
        try:
            parse(value)
        except OmegaConfBaseException:
            value = value.replace("${", r"\${")  # the characters, no interpolation
    return QuotedString(value, Quote.single).with_quotes()


def separated(text: str) -> list[str]:
    """The parts between commas that no quotes or brackets enclose; a quote encloses a whole part."""
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
    if depth:  # a bracket that closes nowhere encloses nothing
        return [part.strip() for part in text.split(",")]
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


def closing_quote(text: str, start: int) -> int | None:
    match = re.compile(rf"{text[start]}(?:\\.|[^\\{text[start]}])*{text[start]}(?=\s*(?:,|$))", re.DOTALL).match(text, start)
    return match.end() - 1 if match else None


def shown(override: str) -> tuple[str, str]:
    """Key and value of an override, the value without the quotes that Hydra needs."""
    found, reading = typed(override), parsed(override)
    if found is None or reading is None:
        return override, ""
    element = reading._value
    return found.key, element.text if isinstance(element, QuotedString) else found.value


def for_shell(override: str) -> str:
    """As it is typed in bash and zsh."""
    if re.fullmatch(r"[\w./:=@%+,-]+", override, re.ASCII):
        return override
    return shlex.quote(override) if re.search(r"[\"$`\\!]", override) else f'"{override}"'
