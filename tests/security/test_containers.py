"""The container's files pin packages, choose an unprivileged user and hold no secrets. No test builds the image."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def without_line_breaks(file: Path) -> list[str]:
    return re.sub(r"\\\n\s*", " ", file.read_text()).splitlines()


def test_lock_file_pins_every_requirement():
    """The lock file has versions that pyproject.toml accepts, hashes, and no package index."""
    pins = {}
    for line in without_line_breaks(DOCKER / "requirements.cuda.txt"):
        pinned = re.fullmatch(r"([a-z0-9-]+)==(\S+?)(?: --hash=sha256:[0-9a-f]{64})+", line)
        assert pinned, line
        pins[pinned[1]] = pinned[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for extra in ("tensorboard", "fid") for need in project["optional-dependencies"][extra]]
    for need in map(Requirement, [*project["dependencies"], *extras, "setuptools", "wheel"]):
        assert need.name in pins, need
        assert need.specifier.contains(pins[need.name]), need


def test_image_runs_unprivileged_and_installs_only_pinned_packages():
    lines = without_line_breaks(DOCKER / "Dockerfile")
    assert [line for line in lines if line.startswith("USER")] == ["USER lcm"]
    assert sum(line.startswith("FROM ${BASE_IMAGE}") for line in lines) == 2
    installs = [part for line in lines for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("--no-deps" in part and ("--require-hashes" in part or "--no-index" in part) for part in installs)
    assert not [line for line in lines if re.match(r"(ENV|ARG).*(KEY|TOKEN|SECRET|PASSW)", line)]
    for line in lines:
        for source in re.findall(r"^COPY (docker/\S+)", line):
            assert (ROOT / source.replace("${VARIANT}", "cuda")).is_file(), line


def test_compose_passes_secrets_by_name():
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["lcm"]
    assert "WANDB_API_KEY" in service["environment"]
    assert not [entry for entry in service["environment"] if "=" in entry]
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["train", "experiment=a b", "x='y'"], ["/app/train.py", "experiment=a b", "x='y'"]),
        (["evaluate", "w=2"], ["-m", "lcm.evaluate", "w=2"]),
        (["python", "-V"], ["-V"]),
    ],
)
def test_first_word_chooses_the_program(words: list[str], arguments: list[str], tmp_path: Path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LCM_APP": "/app"}
    done = subprocess.run([DOCKER / "lcm", *words], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == arguments


def test_every_program_of_the_entry_point_exists():
    script = (DOCKER / "lcm").read_text()
    for name in re.search(r"(evaluate [^)]*)\)", script)[1].split(" | "):  # type: ignore[index]
        assert (ROOT / f"lcm/{name}.py").is_file() or (ROOT / f"lcm/{name}/__main__.py").is_file(), name
