"""A sweep without a table says the reason. tests/e2e/test_story.py has a table."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lcm.app.sweep_table import SweepTable, lack


def test_sweep_folder_that_cannot_be_written() -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "/proc/nowhere/sweeps"}}})
    with pytest.raises(SystemExit, match=r"^error: cannot write to /proc/nowhere/sweeps \(.*\): set paths\.runs to a"):
        SweepTable().on_multirun_start(config)


def test_sweep_without_metrics_says_what_to_add(tmp_path: Path) -> None:
    runs = [str(tmp_path)]
    assert lack([]) == "no job has trained, the errors are above"
    assert lack(runs) == "it reads metrics.csv, add logger=csv"
    (tmp_path / "metrics.csv").touch()
    assert lack(runs).startswith("no run has measured a metric named val/, add callbacks=evaluation for FID")
