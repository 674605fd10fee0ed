"""Arguments of constructors and programs: what an annotation asks for, compared with a configuration before anything is built.

A constructor says `batch_size: Count`; a program says `@program("sample", batch_size=Count)`. A third party's constructor
checks its own arguments; only an argument that it does not take is found here.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm.core.errors import UserError
from lcm.core.numbers import Limit

Hint = Any
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Wrong(NamedTuple):
    """interpolated: the value was typed for another key."""

    interpolated: bool
    message: str


def fits(value: Any, hint: Hint) -> bool:
    """Whether a plain value may be an argument of that annotation; a node with a `_target_` becomes whatever it builds."""
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if origin is Annotated:
        return fits(value, inner[0]) and all(limit.holds(value) for limit in inner[1:] if isinstance(limit, Limit))
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    return hint is Any or not isinstance(value, bool | int | float | str) or isinstance(hint, str)


def expected(hint: Hint) -> str:
    """A phrase for a message, such as "a whole number from 1"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return expected(inner[0]) + "".join(str(limit) for limit in inner[1:] if isinstance(limit, Limit))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(expected(option) for option in inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple, Sequence):
        return f"a list in brackets, each {expected(inner[0])}"
    if hint in (None, NoneType):
        return "null"
    return PLAIN.get(hint, "a mapping" if origin in (dict, Mapping) else "a part, chosen by a slash")


def spelt(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def asked_for(hint: Hint) -> str:
    if get_origin(hint) is Literal:
        return f"choose among {', '.join(map(str, get_args(hint)))}"
    return f"expected {expected(hint)}"


class Parameters(NamedTuple):
    """hints: by name; takes_any: whether other names are passed on to code that is not looked at."""

    hints: dict[str, Hint]
    takes_any: bool


@cache
def parameters(target: Callable[..., Any]) -> Parameters:
    """Names and annotations of a function's parameters or of a constructor's, `**kwargs` followed to the base classes."""
    if not isinstance(target, type):
        return signature_of(target, 0) or Parameters({}, True)
    hints: dict[str, Hint] = {}
    for cls in target.__mro__:
        if "__init__" not in vars(cls):
            continue
        found = signature_of(vars(cls)["__init__"], 1)
        if cls is object or found is None:
            break
        hints = {**found.hints, **hints}
        if not found.takes_any or not is_own(cls):
            return Parameters(hints, found.takes_any)
    return Parameters(hints, True)


def signature_of(function: Callable[..., Any], skipped: int) -> Parameters | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C
        return None
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # names that only a type checker imports
        hints = {p.name: p.annotation for p in signature.parameters.values() if not isinstance(p.annotation, str)}
        hints = {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}
    given = list(signature.parameters.values())[skipped:]
    named = [p for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Parameters({p.name: hints.get(p.name, Any) for p in named}, any(p.kind is p.VAR_KEYWORD for p in given))


def is_own(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "lcm"


def located(target: Any, key: str) -> Callable[..., Any]:
    """The class or function of a `_target_`. Raises UserError if it is not there."""
    if not isinstance(target, str):
        raise UserError(f"{key}={target}: expected the dotted name of a class or function")
    try:
        return _locate(target)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        package = (missing or target).partition(".")[0]
        if package.isidentifier() and find_spec(package) is None:
            raise UserError(f"{key}={target} needs the package {package}, which is not installed: pip install it") from error
        near = difflib.get_close_matches(target.rpartition(".")[2], names_beside(target), n=1)
        meant = f", did you mean {target.rpartition('.')[0]}.{near[0]}?" if near else f" ({' '.join(str(cause).split())})"
        raise UserError(f"{key}={target} cannot be found{meant}") from error


def names_beside(target: str) -> list[str]:
    try:
        return dir(_locate(target.rpartition(".")[0]))
    except Exception:
        return []


def check_arguments(cfg: DictConfig, hints: Mapping[str, Hint]) -> None:
    """Raise UserError for an argument of any node, or of the program (`hints`), that no run could use."""
    wrong = sorted(complaints(cfg, "", Parameters(dict(hints), True)), key=lambda found: found.interpolated)
    if wrong:
        raise UserError(wrong[0].message)


def complaints(node: DictConfig, path: str, known: Parameters, name: str = "the program") -> Iterator[Wrong]:
    """A key's complaints come before those of the nodes below it."""
    below: list[tuple[str, Any, Hint]] = []
    for name_or_number in node:
        key, child = str(name_or_number), node._get_node(name_or_number)
        where, interpolated = f"{path}{key}", child is not None and child._is_interpolation()  # type: ignore[union-attr]
        try:
            value = node[name_or_number]
        except OmegaConfBaseException:  # a value that is set at the start, such as the run's folder
            continue
        if key.startswith("_") or (interpolated and value is None):
            continue
        hint = known.hints.get(key, Any)
        if key not in known.hints and not known.takes_any:
            yield Wrong(False, f"{where}: {name} takes no {key}: leave it out ('~{where}' removes it)")
            continue
        if OmegaConf.is_config(value):
            below.append((where, value, hint))
        try:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            continue
        if not fits(plain, hint):
            yield Wrong(interpolated, f"{where}={spelt(plain)}: {asked_for(hint)}")
    for where, value, hint in below:
        yield from complaints_of_value(where, value, hint)


def complaints_of_value(path: str, value: Any, hint: Hint) -> Iterator[Wrong]:
    if get_origin(hint) in (dict, Mapping) and OmegaConf.is_dict(value):
        for key in value:
            if OmegaConf.is_config(item := value.get(key)):
                yield from complaints_of_value(f"{path}.{key!s}", item, get_args(hint)[1])
    elif OmegaConf.is_list(value):
        for index, item in enumerate(value):
            if OmegaConf.is_config(item):
                yield from complaints_of_value(f"{path}.{index}", item, Any)
    elif "_target_" in value:
        target = located(value["_target_"], f"{path}._target_")
        known, name = parameters(target), value["_target_"]
        yield from complaints(value, f"{path}.", own_or_names_only(target, known), name)
        yield from optimizer_complaints(path, value, target)
    else:
        known = parameters(hint) if isinstance(hint, type) and is_own(hint) else Parameters({}, True)
        yield from complaints(value, f"{path}.", known, path)


def own_or_names_only(target: Callable[..., Any], known: Parameters) -> Parameters:
    """Third parties check values themselves; text for a number would be a TypeError of theirs."""
    if is_own(target):
        return known
    return Parameters({name: as_number(hint) for name, hint in known.hints.items()}, known.takes_any)


def as_number(hint: Hint) -> Hint:
    options = set(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
    if not {int, float} & options or options - {int, float, bool, NoneType, torch.Tensor}:
        return Any
    return Union[tuple(options - {torch.Tensor} | ({float} if float in options else set()))]  # noqa: UP007


def optimizer_complaints(path: str, node: DictConfig, target: Callable[..., Any]) -> Iterator[Wrong]:
    """Try the optimizer's constructor on one parameter, before the networks are loaded. Yield its error."""
    if not (isinstance(target, type) and issubclass(target, torch.optim.Optimizer) and node.get("_partial_")):
        return
    options = {str(key): value for key, value in OmegaConf.to_container(node, resolve=True).items()}  # type: ignore[union-attr]
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    if not all(isinstance(value, bool | int | float | str | list | None) for value in options.values()):
        return  # parts that are to be built
    try:
        target([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], **options)
    except Exception as error:
        yield Wrong(False, f"{path}: {target.__name__} refuses its arguments: {' '.join(str(error).split())}")
