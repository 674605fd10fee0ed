"""The examples of docs/extending.md, run as a reader would run them."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, tiny_data

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```(python|yaml|bash)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [content.strip() for kind, content in BLOCKS if kind == "bash"]
FILES = {content.split("\n", 1)[0].removeprefix("# "): content for kind, content in BLOCKS if kind != "bash"}


def test_each_part_is_one_file_and_one_yaml() -> None:
    code, choices = ([path for path in FILES if path.endswith(end)] for end in (".py", ".yaml"))
    assert len(code) == len(choices) == len(COMMANDS) == 5
    assert all(path.startswith("my/") for path in FILES)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=[command.split()[-1] for command in COMMANDS])
def test_examples_run(command: str, run: Callable, tmp_path: Path, tiny_pipeline: Path, shards: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    words = shlex.split(command)
    assert words[:2] == ["PYTHONPATH=my", "python"]
    program, *args = words[2:] if words[2] != "-m" else words[3:]
    if program == "train.py":
        data = [override for override in tiny_data(shards) if "data=colours" not in args or not override.startswith("data.")]
        small = [f"model.pipeline={tiny_pipeline}", *data, "data.batch_size=2", "trainer.max_steps=2", "callbacks=default"]
        small += ["trainer.precision=32-true", "trainer.val_check_interval=null"]
    else:
        small = [f"entries.LCM.pipeline={tiny_pipeline}", "~entries.DDIM", "entries.LCM.steps=[1]", "samples=4", "grid_rows=1"]
        small += [f"shards={shards}/val-*.tar", "resolution=32", "backbone=mini", "dtype=float32"]
        args = [argument for argument in args if not argument.startswith("entries.LCM.pipeline")]
    result = run(program, *args, *small, PYTHONPATH=f"{ROOT}:{tmp_path / 'my'}")
    assert result.returncode == 0, result.stderr
    part = words[-1].partition("=")[2]
    if program == "train.py":
        assert (tmp_path / "runs").is_dir()
    else:
        assert "spread" in (tmp_path / "outputs" / "evaluate" / "table.md").read_text(), part
