"""One test that runs all its cases."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]


def each(names: str | tuple[str, ...], values: Iterable[Any], ids: Callable[[Any], Any] | Iterable[str] | None = None) -> Any:
    """Decorate a test to run once per case; it fails after the last one, with the name and error of each that failed.

    The arguments are those of `pytest.mark.parametrize`. Each case gets its own `tmp_path`, and its patches are undone.
    """
    keys = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
    cases = [value if len(keys) > 1 else (value,) for value in values]
    if ids is None or callable(ids):
        labels = [", ".join(str((ids or shown)(value)) for value in case) for case in cases]
    else:
        labels = list(ids)
    assert cases, "no cases"

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            failed: list[tuple[str, BaseException]] = []
            for number, case in enumerate(cases):
                try:
                    in_case(test, number, {**fixtures, **dict(zip(keys, case, strict=True))})
                except (Exception, pytest.fail.Exception, BaseExceptionGroup) as error:
                    error.add_note(f"case {number}: {labels[number]}")
                    failed.append((labels[number], error))
            if failed:
                message = f"{len(failed)} of {len(cases)} cases failed: {'; '.join(label for label, _ in failed)}"
                raise BaseExceptionGroup(message, [error for _, error in failed])

        del run.__wrapped__  # type: ignore[attr-defined]  # pytest would ask it for fixtures
        left = [parameter for name, parameter in signature.parameters.items() if name not in keys]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate


def shown(value: Any) -> str:
    return repr(value)[:80]


def in_case(test: Test, number: int, arguments: dict[str, Any]) -> None:
    if "tmp_path" in arguments:
        arguments["tmp_path"] /= str(number)
        arguments["tmp_path"].mkdir()
    if "monkeypatch" not in arguments:
        return test(**arguments)
    with pytest.MonkeyPatch.context() as arguments["monkeypatch"]:
        return test(**arguments)
