"""Metrics survive a restart."""

import csv

from lcm.callbacks.csv_logger import CSVLogger


def test_restart_appends_rows_and_columns(tmp_path):
    CSVLogger(str(tmp_path)).log_metrics({"train/loss": 1.0}, 0)
    logger = CSVLogger(str(tmp_path))
    logger.log_metrics({"val/loss": 2.0}, 1)
    logger.log_metrics({"train/loss": 3.0}, 1)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows] == [
        ("0", "1.0", ""),
        ("1", "", "2.0"),
        ("1", "3.0", ""),
    ]
