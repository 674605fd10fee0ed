"""A sweep writes a table, or prints the reason for a missing table. tests/e2e/test_story.py runs a real sweep."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from lcm.app.sweep_table import SweepTable, why_no_table


def test_sweep_without_metrics_says_what_to_add(tmp_path: Path) -> None:
    runs = [str(tmp_path)]
    assert why_no_table([]) == "no job has trained, the errors are above"
    assert why_no_table(runs) == "it reads metrics.csv, add logger=csv"
    (tmp_path / "metrics.csv").touch()
    assert why_no_table(runs).startswith("no run has measured a metric named val/, add callbacks=evaluation for FID")


def test_table_has_varied_keys_and_failed_jobs(tmp_path: Path) -> None:
    """The key with the most values comes last. It is the x axis of the plot."""
    swept = [{"seed": seed, "model.w_max": w, "name": "a"} for seed in ("1", "2") for w in ("4", "6", "8")]
    for number, values in enumerate(swept):
        metrics = {"val/loss": 0.5 + number} if number else {}
        note = {"swept": values, "run": f"runs/a/{number}" if number else None, "metrics": metrics}
        (tmp_path / f"run-{number:04d}.json").write_text(json.dumps(note))
    hydra = {"sweep": SimpleNamespace(dir=str(tmp_path)), "mode": SimpleNamespace(name="MULTIRUN")}
    config: Any = SimpleNamespace(hydra=SimpleNamespace(**hydra))
    SweepTable().on_multirun_end(config)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| seed | model.w_max | val/loss | run |"
    assert lines[2:4] == ["| 1 | 4 | failed | None |", "| 1 | 6 | 1.5 | runs/a/1 |"]
    assert len(lines) == 2 + 6
    assert Image.open(tmp_path / "plot.png").width > 300
