"""The container's files; `make container` builds it."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def locked(file: Path) -> dict[str, tuple[str, list[str]]]:
    """`{package: (version, hashes)}`"""
    text = re.sub(r"\\\n\s*", " ", file.read_text())
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]
    found = {}
    for line in lines:
        pinned = re.fullmatch(r"([a-z0-9-]+)==(\S+?)((?: --hash=sha256:[0-9a-f]{64})+)", line)
        assert pinned, line
        found[pinned[1]] = (pinned[2], pinned[3].split())
    return found


@pytest.mark.parametrize("file", sorted(DOCKER.glob("requirements.*.txt")), ids=lambda file: file.name)
def test_the_lock_file_pins_what_the_project_needs(file: Path) -> None:
    """With hashes, at versions it works with, and from no index in particular."""
    pins, project = locked(file), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for extra in ("wandb", "tensorboard", "fid") for need in project["optional-dependencies"][extra]]
    for need in map(Requirement, [*project["dependencies"], *extras, "setuptools", "wheel"]):
        assert need.name in pins, need
        assert need.specifier.contains(pins[need.name][0]), need
    assert "://" not in file.read_text()


def test_the_image_runs_as_nobody_special_and_installs_nothing_unknown() -> None:
    lines = re.sub(r"\\\n\s*", " ", (DOCKER / "Dockerfile").read_text()).splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER lcm"]
    assert sum(line.startswith("FROM ${BASE_IMAGE}") for line in lines) == 2
    installs = [part for line in lines for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("--no-deps" in part and ("--require-hashes" in part or "--no-index" in part) for part in installs)
    assert not [line for line in lines if re.match(r"(ENV|ARG).*(KEY|TOKEN|SECRET|PASSW)", line)]


def test_compose_passes_secrets_by_name() -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["lcm"]
    assert "WANDB_API_KEY" in service["environment"]
    assert not [entry for entry in service["environment"] if "=" in entry]
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        (["train", "experiment=a b", "x='y'"], ["/app/train.py", "experiment=a b", "x='y'"]),
        (["sample"], ["/app/sample.py"]),
        (["evaluate", "w=2"], ["-m", "lcm.evaluate", "w=2"]),
        (["preview"], ["-m", "lcm.preview"]),
        (["python", "-V"], ["-V"]),
    ],
)
def test_the_first_word_is_a_program(words: list[str], ran: list[str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LCM_APP": "/app"}
    done = subprocess.run([DOCKER / "lcm", *words], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ran


def test_every_program_named_is_there() -> None:
    script = (DOCKER / "lcm").read_text()
    for name in re.search(r"(evaluate [^)]*)\)", script)[1].split(" | "):  # type: ignore[index]
        assert (ROOT / f"lcm/{name}.py").is_file() or (ROOT / f"lcm/{name}/__main__.py").is_file(), name
