"""Compare a configuration with the annotations of constructors and programs, before anything is built.

A constructor is annotated as `batch_size: Count`, a program as `Program("sample", batch_size=Count)`. The constructors of other
libraries check their values. Only their argument names and numbers are compared here.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm.core.errors import UserError
from lcm.core.numbers import Limit

Hint = Any  # an annotation, or the dotted name of a class that is imported when it is needed
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Parameters(NamedTuple):
    """The parameters of a function. hints: annotations by name. takes_any: any other name is accepted, too (`**kwargs`)."""

    hints: dict[str, Hint]
    takes_any: bool


ANYTHING = Parameters({}, True)


class Complaint(NamedTuple):
    """An invalid argument. interpolated: the value comes from another key. A complaint about the other key is clearer."""

    interpolated: bool
    message: str


def fits(value: Any, hint: Hint) -> bool:
    """Return whether a plain value fits an annotation. A node with a `_target_` always does."""
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if origin is Annotated:
        return fits(value, inner[0]) and all(limit.holds(value) for limit in inner[1:] if isinstance(limit, Limit))
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in inner)
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
    """Return a phrase for a message, such as "a whole number from 1"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return expected(inner[0]) + "".join(str(limit) for limit in inner[1:] if isinstance(limit, Limit))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(expected(member) for member in inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple, Sequence):
        return f"a list in brackets, each {expected(inner[0])}"
    if hint in (None, NoneType):
        return "null"
    return PLAIN.get(hint, "a mapping" if origin in (dict, Mapping) else "a part, chosen by a slash")


def as_yaml(value: Any) -> str:
    """Return a plain value as a user types it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


@cache
def parameters(target: Callable[..., Any]) -> Parameters:
    """Return the parameters of a function or constructor. With `**kwargs`, parameters of the base classes are included."""
    if not isinstance(target, type):
        return signature_of(target, 0) or ANYTHING
    hints: dict[str, Hint] = {}
    for cls in target.__mro__:
        if "__init__" not in vars(cls):
            continue
        signature = signature_of(vars(cls)["__init__"], 1)
        if cls is object or signature is None:
            break
        hints = {**signature.hints, **hints}
        if not signature.takes_any or not is_own(cls):
            return Parameters(hints, signature.takes_any)
    return Parameters(hints, True)


def signature_of(function: Callable[..., Any], skipped: int) -> Parameters | None:
    """Return the parameters of a function without the first `skipped`, or None for a function written in C."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # names that only a type checker imports
        hints = {p.name: p.annotation for p in signature.parameters.values() if not isinstance(p.annotation, str)}
        hints = {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}
    own_parameters = list(signature.parameters.values())[skipped:]
    named = [p for p in own_parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Parameters({p.name: hints.get(p.name, Any) for p in named}, any(p.kind is p.VAR_KEYWORD for p in own_parameters))


def is_own(target: Any) -> bool:
    """Return whether a class or function is defined in lcm."""
    return str(getattr(target, "__module__", "")).partition(".")[0] == "lcm"


def parameters_of(node: DictConfig, hint: Hint, path: str) -> tuple[Parameters, str, Callable[..., Any] | None]:
    """Return the parameters for a node's keys, the name of their function for a message, and the node's target."""
    if OmegaConf.is_dict(node) and "_target_" in node:
        target = located(node["_target_"], f"{path}._target_")
        accepted = parameters(target)
        if not is_own(target):  # the constructor checks its values, but text in place of a number would be a TypeError
            accepted = accepted._replace(hints={name: as_number(annotation) for name, annotation in accepted.hints.items()})
        return accepted, node["_target_"], target
    hint = _locate(hint) if isinstance(hint, str) else hint
    return parameters(hint) if isinstance(hint, type) and is_own(hint) else ANYTHING, path, None


def as_number(hint: Hint) -> Hint:
    """Return an annotation of numbers (or tensors) unchanged, and Any for all others."""
    members = set(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
    members = {member for member in members if getattr(member, "__name__", "") != "Tensor"}
    if not {int, float} & members or members - {int, float, bool, NoneType}:
        return Any
    return Union[tuple(members)]  # noqa: UP007


def located(target: Any, key: str) -> Callable[..., Any]:
    """Import the class or function of a `_target_`. Raises UserError if it does not exist."""
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
    """Return the names in the module of a target."""
    try:
        return dir(_locate(target.rpartition(".")[0]))
    except Exception:
        return []


def check_arguments(cfg: DictConfig, hints: Mapping[str, Hint]) -> None:
    """Raise UserError for an invalid argument of any node, or of the program (`hints`)."""
    complaints = list(check_node(cfg, "", Parameters(dict(hints), True), "the program"))
    if complaints:
        raise UserError(min(complaints, key=lambda complaint: complaint.interpolated).message)


def check_node(node: DictConfig, path: str, accepted: Parameters, receiver: str) -> Iterator[Complaint]:
    """Yield the complaints about a node: first about its keys, then about its child nodes."""
    below: list[tuple[str, Any, Hint]] = []
    for name in node:
        key, child = str(name), node._get_node(name)
        where, interpolated = f"{path}{key}", child is not None and child._is_interpolation()  # type: ignore[union-attr]
        try:
            value = node[name]
        except OmegaConfBaseException:  # a program sets this value later, such as the run folder
            continue
        if key.startswith("_") or (interpolated and value is None):
            continue
        hint = accepted.hints.get(key, Any)
        if key not in accepted.hints and not accepted.takes_any:
            yield Complaint(False, f"{where}: {receiver} takes no {key}: leave it out ('~{where}' removes it)")
            continue
        if OmegaConf.is_config(value):
            below.append((where, value, hint))
        with suppress(OmegaConfBaseException):
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            if not fits(plain, hint):
                yield Complaint(interpolated, f"{where}={as_yaml(plain)}: expected {expected(hint)}")
    for where, value, hint in below:
        yield from check_value(where, value, hint)


def check_value(path: str, value: Any, hint: Hint) -> Iterator[Complaint]:
    """Yield the complaints about a list or a mapping. path: its dotted key. hint: its annotation."""
    if OmegaConf.is_list(value):
        children = ((str(index), item, Any) for index, item in enumerate(value))
    elif get_origin(hint) in (dict, Mapping) and "_target_" not in value:
        children = ((str(key), value.get(key), get_args(hint)[1]) for key in value)
    else:
        accepted, receiver, target = parameters_of(value, hint, path)
        yield from check_node(value, f"{path}.", accepted, receiver)
        yield from check_optimizer(path, value, target)
        return
    for name, item, inner in children:
        if OmegaConf.is_config(item):
            yield from check_value(f"{path}.{name}", item, inner)


def check_optimizer(path: str, node: DictConfig, target: Any) -> Iterator[Complaint]:
    """Yield a complaint if an optimizer refuses its arguments. The constructor is tried on one small parameter.

    A training builds its optimizer only after the networks are loaded.
    """
    if not (isinstance(target, type) and node.get("_partial_") and "Optimizer" in {cls.__name__ for cls in target.__mro__}):
        return
    import torch

    options = {str(key): value for key, value in OmegaConf.to_container(node, resolve=True).items()}  # type: ignore[union-attr]
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    if not all(isinstance(value, bool | int | float | str | list | None) for value in options.values()):
        return  # some arguments are parts that are not built yet
    try:
        target([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], **options)
    except Exception as error:
        yield Complaint(False, f"{path}: {target.__name__} refuses its arguments: {' '.join(str(error).split())}")
