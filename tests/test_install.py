"""An installation by `pip install .` works from any folder. The wheel holds conf/ and the programs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unpacked wheel of this checkout."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "sample.py"):
        shutil.copy(ROOT / name, folder / "source")
    for name in ("lcm", "conf"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*build, folder / "source"], check=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_every_module_and_file_of_the_configuration(site):
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "lcm").rglob("__init__.py")}
    assert set(packages) == folders | {"lcm.conf", "lcm.programs"}
    assert files(site / "lcm/conf") == files(ROOT / "conf")
    added = {f"conf/{name}" for name in files(ROOT / "conf")} | {"programs/train.py", "programs/sample.py"}
    assert files(site / "lcm") == files(ROOT / "lcm") | added
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"lcm"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["lcm.preview", "data.shards={shards}/train-*.tar", "data.resolution=32", "samples=8"], "picture:  outputs/preview"),
        (["lcm.programs.train", "data.batch_size=0"], "error: data.batch_size=0: expected a whole number"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_installation_runs_from_another_folder(args, says, site, shards, tmp_path):
    command = [sys.executable, "-m", *(arg.format(shards=shards) for arg in args)]
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
