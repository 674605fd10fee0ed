"""How the rate of a training grows with its processes."""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lcm.app.targets import CONF
from lcm.bench.measure import Table, in_turn
from lcm.core.errors import UserError


def rate(overrides: list[str], processes: int, threads: int, steps: int) -> dict[str, float]:
    """Of the second half of a training by `train.py`, as it logs it."""
    with tempfile.TemporaryDirectory() as folder:
        length = [f"trainer.devices={processes}", f"trainer.max_steps={steps}", f"trainer.log_every_n_steps={steps // 2}"]
        quiet = ["logger=csv", f"paths.runs={folder}", "name=scaling", "callbacks=default", "data.val_shards=null"]
        command = [sys.executable, str(CONF.parent / "train.py"), *overrides, *length, *quiet]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"training with {processes} processes failed: {done.stderr.strip().splitlines()[-1]}")
        with Path(folder, "scaling/0/metrics.csv").open() as file:
            logged = list(csv.DictReader(file))
    names = {"images_per_sec": "images/s", "data_wait": "data"}
    return {name: float([row for row in logged if row[f"perf/{key}"]][-1][f"perf/{key}"]) for key, name in names.items()}


def measure(
    *, experiment: list[str], shards: str, resolution: int, processes: list[int], threads: int, steps: int, repeats: int
) -> Table:
    """experiment: overrides of `train.py` whose trainer takes `trainer.devices`; threads: of each process."""
    overrides = [*experiment, f"data.shards={shards}", f"data.resolution={resolution}", "++data.build=null"]
    runs = {str(n): lambda n=n: rate(overrides, n, threads, steps) for n in processes}
    taken = in_turn(runs, repeats, lambda found: f"{found['images/s']:.1f} images/s")
    best = {int(n): max(found, key=lambda of: of["images/s"]) for n, found in taken.items()}
    single = best[processes[0]]["images/s"] / processes[0]
    rows: list[dict[str, Any]] = [
        {
            "processes": n,
            "images/s": found["images/s"],
            "of as many single ones": found["images/s"] / (n * single),
            "% waiting for data": round(100 * found["data"], 1),
        }
        for n, found in best.items()
    ]
    note = (
        f"`train.py {' '.join(experiment)}`, the second half of {steps} steps, best of {repeats}, taken in turn; every process "
        f"has its own batch and {threads} threads. Gradients are averaged by DDP."
    )
    return Table("Scaling", rows, note)
