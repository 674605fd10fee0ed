"""--help is a complete page. --help, --cfg and the errors of wrong keys need no torch."""

import json
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
    """The examples of a help page compose. Its keys exist and have a sentence. Its options exist."""
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


COMMANDS = [
    ["train", "--help"],
    ["train", "--cfg", "job"],
    ["train", "model/solver=ddmi"],
    *([program, "nothing.like=it"] for program in PROGRAMS[1:]),
    ["export", "dtype=float32"],
]
RUN_ALL = """
import contextlib, io, json, runpy, sys
answers = []
for program, *args in json.loads(sys.argv[1]):
    sys.argv, out, err = [program, *args], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module = program if program in ("train", "sample") else f"lcm.{program}"
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code
    text = f"{code}\\n" if isinstance(code, str) else ""
    answers.append((code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue() + text))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Return the exit code, output and errors of each command.

    One interpreter runs all commands. An import of torch ends a command.
    """
    folder = tmp_path_factory.mktemp("without-torch")
    (folder / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    run = [sys.executable, "-c", RUN_ALL, json.dumps(COMMANDS)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return {" ".join(command): tuple(answer) for command, answer in zip(COMMANDS, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--help"], 0, "Examples:"),
        (["--cfg", "job"], 0, "optimized_metric: null"),
        (["model/solver=ddmi"], 1, "error: there is no config 'model/solver/ddmi'"),
    ],
    ids=str,
)
def test_train_answers_without_torch(args: list[str], code: int, says: str, answers: dict[str, tuple[int, str, str]]) -> None:
    returned, out, err = answers[" ".join(["train", *args])]
    assert (returned, says in out + err) == (code, True), out + err


def test_programs_answer_without_torch(answers: dict[str, tuple[int, str, str]]) -> None:
    results = {program: answers[f"{program} nothing.like=it"] for program in PROGRAMS[1:]}
    assert results == dict.fromkeys(PROGRAMS[1:], (1, "", "error: there is no config key 'nothing.like'\n"))
    missing = "error: run has no default: give it on the command line, run=...\n"
    assert answers["export dtype=float32"] == (1, "", missing)
