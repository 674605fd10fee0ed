"""Imports run one way: errors, ... <- core <- models <- data <- modules <- metrics, callbacks, ... <- programs."""

import ast
import importlib
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import lcm

ROOT = Path(__file__).parents[2]
FILES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "lcm").rglob("*.py"))]
LAYERS = [
    {"errors", "files", "images", "precision", "redaction", "signals", "targets"},
    {"core"},
    {"models"},
    {"data", "arguments", "overrides"},
    *({"modules"}, {"metrics", "callbacks", "checkpoints", "loggers", "strategies"}),
]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PROGRAMS = len(LAYERS)  # lcm/*.py
RANK["bench"] = PROGRAMS  # a program of several files


def imports(file):
    """The dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(Path(file).parent.parts)
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rank(part):
    """A package's layer; a new one must be given its place in LAYERS."""
    return PROGRAMS if (ROOT / "lcm" / f"{part}.py").exists() and part not in RANK else RANK[part]


def test_the_files_were_found():
    assert "lcm/core/process.py" in FILES


def test_core_needs_torch_and_the_standard_library_only():
    for file in (file for file in FILES if file.startswith("lcm/core/")):
        for name in imports(file):
            top = name.partition(".")[0]
            assert top in {"torch", *sys.stdlib_module_names} or name.startswith(("lcm.core", "lcm.core.errors.")), (file, name)


def test_no_package_imports_one_to_its_right():
    for file in (file for file in FILES if file != "lcm/__init__.py"):
        own_rank = rank(Path(file).with_suffix("").parts[1])
        for name in imports(file):
            top, _, rest = name.partition(".")
            if top == "lcm":
                assert rank(rest.partition(".")[0]) <= own_rank, f"{file} imports {name}"


def test_no_module_beside_the_programs_shadows_the_standard_library():
    """`python lcm/encode.py`, as an editor starts it, looks there first."""
    assert not sys.stdlib_module_names & {path.stem for path in (ROOT / "lcm").glob("*")} - {"__init__"}


def test_the_package_does_not_import_its_scripts():
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"tests"}
    for file in FILES:
        assert not scripts & {name.partition(".")[0] for name in imports(file)}, file


def test_windows_is_told_where_the_program_runs(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"error: Windows lacks .* run it in WSL 2"):
        importlib.reload(lcm)
