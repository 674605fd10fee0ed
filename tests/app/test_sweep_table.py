"""A sweep without a table says the reason. tests/e2e/test_story.py has a table."""

from pathlib import Path

from lcm.app.sweep_table import lack


def test_sweep_without_metrics_says_what_to_add(tmp_path: Path) -> None:
    runs = [str(tmp_path)]
    assert lack([]) == "no job has trained, the errors are above"
    assert lack(runs) == "it reads metrics.csv, add logger=csv"
    (tmp_path / "metrics.csv").touch()
    assert lack(runs).startswith("no run has measured a metric named val/, add callbacks=evaluation for FID")
