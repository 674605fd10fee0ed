"""--help is a complete page. --help, --cfg and the errors of wrong keys need no torch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lcm.app import help_page
from lcm.app.composition import prepare
from tests.conf.programs import PROGRAMS, check

ROOT = Path(__file__).parents[2]


def page(program: str) -> str:
    [cfg] = prepare(program, ["--help"], {}).runs
    return help_page.page(program, cfg)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_page(program: str) -> None:
    """Its examples compose, its keys exist and have a sentence, its options exist."""
    text = page(program)
    examples, keys, groups = text.split("\n\n")[1:4]
    commands = [shlex.split(line) for line in examples.splitlines()[1:]]
    assert 2 <= len(commands) <= 4
    for command in commands:
        start = ["python", f"{program}.py"] if program in ("train", "sample") else ["python", "-m", f"lcm.{program}"]
        assert command[: len(start)] == start
        check(program, *command[len(start) :])
    entries = re.findall(r"^  (\S+?)=(?:.*?\s{2,}|\S*\n\s+)(\S.*)", keys, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^  \S", keys, re.MULTILINE))
    [cfg] = prepare(program, ["--help"], {}).runs
    for key, sentence in entries:
        parent, _, name = key.rpartition(".")
        assert name in list(OmegaConf.select(cfg, parent) if parent else cfg), key
        assert len(sentence) > 5, key
    for plus, group, first in re.findall(r"^  (\+?)([\w/@.]+)\s+([\w()]+)", groups, re.MULTILINE):
        assert (ROOT / "conf" / group.partition("@")[0]).is_dir()
        assert plus or first == (cfg.hydra.runtime.choices[group] or "(none)")
    assert max(map(len, text.splitlines())) <= 132


def test_keys_of_parts_have_comments() -> None:
    for program in PROGRAMS:
        for line in help_page.head_of(program):
            names = line.removeprefix(help_page.KEYS_OF_PARTS).split() if line.startswith(help_page.KEYS_OF_PARTS) else []
            assert [name for name in names if not help_page.comment_of(name, program)] == []


def start(program: str, args: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a program where an import of torch ends it."""
    (folder / "torch.py").write_text("raise SystemExit('torch was imported')")
    module = program if program in ("train", "sample") else f"lcm.{program}"
    script = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--help"], 0, "Examples:"),
        (["--cfg", "job"], 0, "optimized_metric: null"),
        (["model/solver=ddmi"], 1, "error: there is no config 'model/solver/ddmi'"),
    ],
    ids=str,
)
def test_train_answers_without_torch(args: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = start("train", args, tmp_path)
    assert (done.returncode, says in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS[1:])
def test_program_answers_without_torch(program: str, tmp_path: Path) -> None:
    done = start(program, ["nothing.like=it"], tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["error: there is no config key 'nothing.like'"]


def test_missing_value_is_answered_without_torch(tmp_path: Path) -> None:
    done = start("export", ["dtype=float32"], tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: run has no default: give it on the command line, run=...\n")
