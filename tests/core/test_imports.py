"""Imports run one way: core <- runtime <- models <- data, modules, app <- callbacks, programs <- evaluate <- bench."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import lcm

ROOT = Path(__file__).parents[2]
LAYERS = [{"core"}, {"runtime"}, {"models"}, {"data", "modules", "app"}, {"callbacks", "programs"}, {"evaluate"}, {"bench"}]
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}


def imports(file: Path) -> set[str]:
    """Return the dotted names that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package(name: str) -> str:
    """Return the package of a module below lcm. Modules beside the packages are programs."""
    part = name.split(".")[1]
    return part if (ROOT / "lcm" / part).is_dir() else "programs"


def test_imports_follow_layers() -> None:
    """A package imports packages of lower layers only, and core needs torch only. LAYERS must name every package."""
    files = [file for file in (ROOT / "lcm").rglob("*.py") if file != ROOT / "lcm/__init__.py"]
    assert len(files) > 50
    for file in files:
        own = package(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for name in imports(file):
            top = name.partition(".")[0]
            if top == "lcm":
                other = package(name)
                assert other == own or LAYER[other] < LAYER[own], f"{file} imports {name}"
            else:
                assert own != "core" or top in {"torch", *sys.stdlib_module_names}, f"{file} imports {name}"
                assert top not in {"train", "sample", "tests"}, f"{file} imports {name}"


def test_programs_shadow_no_standard_module() -> None:
    """`python lcm/encode.py` puts the folder lcm first in the search path."""
    assert not sys.stdlib_module_names & {path.stem for path in (ROOT / "lcm").glob("*")} - {"__init__"}


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"error: Windows lacks .* run it in WSL 2"):
        importlib.reload(lcm)
