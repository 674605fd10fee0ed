"""Jobs on a real SLURM cluster train like one process, and a stopped job loses no step.

By default one job is stopped. `LCM_ROUNDS=20 pytest -n 0 tests/slurm` stops 20 jobs, each at a random moment. It also runs the
tests of a lost node and of a sweep.
"""

import csv
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import ROOT, command, environment
from tests.slurm.conftest import PATIENCE, Cluster, Job, wait_for

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("LCM_ROUNDS", "1"))
campaign = pytest.mark.skipif(ROUNDS < 2, reason="takes minutes: LCM_ROUNDS=2")
STEPS = 60
COMMON = [
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=7",
    "callbacks.checkpoint.every_n_train_steps=10",
    "callbacks.stop.every_n_steps=1",
    "callbacks.samples.steps=[1]",
    "data.num_workers=1",
    "data.index=null",
]


def rows(run_dir: Path) -> list[dict[str, str]]:
    file = run_dir / "metrics.csv"
    return list(csv.DictReader(file.open())) if file.is_file() else []


def column(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows(run_dir) if row.get(name)]


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint(run_dir)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stop_at_random(job: Job, run_dir: Path, rng: random.Random) -> str:
    """Send SIGUSR1 at a random moment in the first two thirds of the training, and return a description.

    One rank gets the signal, or all processes get it once or twice.
    """
    wait_for(lambda: all(job.pids(rank) for rank in range(2)), lambda: job.log)
    if rng.random() < 0.25:
        wait = rng.uniform(0, 5)
        when = f"after {wait:.1f} s"  # imports, models, rendezvous
    else:
        step, wait = rng.randrange(STEPS * 2 // 3), rng.uniform(0, 0.3)
        wait_for(lambda: len(column(run_dir, "train/loss")) > step or job.ended(), lambda: job.log)
        when = f"in step {step} or soon after"
    time.sleep(wait)
    if rng.random() < 0.3:
        rank = rng.randrange(2)
        os.kill(job.pids(rank)[0], signal.SIGUSR1)
        return f"{when}, rank {rank} alone"
    times = rng.choice([1, 1, 2])
    for _ in range(times):
        job.signal(signal.SIGUSR1)
    return f"{when}, all processes, {times} x"


def test_ranks_train_as_one_process(cluster: Cluster, tiny, tmp_path):
    """Four ranks on two nodes match one process with the same global batch: losses to 2e-5, gradient norms to 1e-4.

    With AdamW's usual eps of 1e-8, the order of a sum decides the step of a weight whose gradient is nearly zero. With an eps
    of 1e-4, it still changes one gradient norm of 60.
    """
    runs = [*tiny, *COMMON, f"paths.runs={tmp_path}", "+model.optimizer.eps=1e-3"]
    job = cluster.submit(*runs, "data.batch_size=2", "name=ranks", tasks=2, log=tmp_path / "log")
    single_process = subprocess.run(
        command("train.py", *runs, "trainer.accelerator=cpu", "data.batch_size=8", "name=one"),
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert single_process.returncode == 0, single_process.stderr
    assert job.end()["JobState"] == "COMPLETED", job.log
    run_dir = tmp_path / f"ranks/{job.number}"
    for name, tolerance in (("train/loss", 2e-5), ("train/grad_norm", 1e-4)):
        values, expected = dict(column(run_dir, name)), dict(column(tmp_path / "one/0", name))
        assert values == pytest.approx(expected, rel=tolerance)
        print(f"{name}: equal to {max(abs(values[step] / expected[step] - 1) for step in expected):.2g}")
    assert [step for step, _ in column(run_dir, "train/loss")] == list(range(STEPS))  # only one rank writes rows
    assert job.log.count("run:  ") == job.log.count("model:  ") == 1
    assert list((tmp_path / "ranks").iterdir()) == [run_dir]


def test_a_job_stopped_at_any_moment_ends_as_if_it_had_not_been(cluster: Cluster, tiny, tmp_path):
    """The losses and weights equal those of an uninterrupted job bit for bit, with two ranks.

    With more ranks, DDP sums in another order in the first step after a resume, because it arranges its buckets anew.
    """
    runs = [*tiny, *COMMON, f"paths.runs={tmp_path}", "logger=[csv,tensorboard,wandb]", "logger.wandb.offline=true"]
    straight = cluster.submit(*runs, "name=straight", log=tmp_path / "straight.log")
    whole = tmp_path / f"straight/{straight.number}"
    assert straight.end()["JobState"] == "COMPLETED", straight.log
    for number in range(ROUNDS):
        job = cluster.submit(*runs, f"name=cut-{number}", log=tmp_path / f"cut-{number}.log")
        run_dir = tmp_path / f"cut-{number}/{job.number}"
        when = stop_at_random(job, run_dir, random.Random())
        end = job.end()
        assert end["JobState"] == "COMPLETED", job.log
        saved = [int(step) for step in re.findall(r"SIGUSR1: stopped at step (\d+): the job is requeued", job.log)]
        assert len(saved) == int(end["Restarts"]) >= 1, (when, job.log)
        for name in ("train/loss", "val/loss"):
            assert column(run_dir, name) == column(whole, name), f"{when}: not resumed at {saved}"
        assert same(weights(run_dir), weights(whole))
        starts = list((run_dir / "wandb").glob("offline-run-*"))  # all starts log to one wandb run
        assert {folder.name.rpartition("-")[2] for folder in starts} == {json.loads((run_dir / "run.json").read_text())["id"]}
        assert list((tmp_path / f"cut-{number}").iterdir()) == [run_dir]
        assert "Traceback" not in job.log
        print(
            f"round {number + 1}: SIGUSR1 {when}: saved step {saved[0]}, {end['Restarts']} restart(s), weights equal",
            flush=True,
        )


def test_trainings_of_one_job_side_by_side_and_in_turn_do_not_meet(cluster: Cluster, tiny, tmp_path):
    """The job runs two steps of two ranks at once, then the first command again without srun, like a loop in a batch script."""
    runs = [*tiny, *COMMON, "trainer.max_steps=4", "data.num_workers=0", f"paths.runs={tmp_path}", "name=own"]
    train = command("train.py", *runs)
    srun = ["srun", "--exact", "--nodes=1", "--ntasks=2", "--ntasks-per-node=2"]
    step = [*srun, *train, "trainer=slurm", "trainer.accelerator=cpu"]
    lines = [f"{shlex.join([*step, f'model.w_max={w}'])} &" for w in (4, 8)]
    script = "\n".join(["#!/bin/bash", *lines, "wait", shlex.join([*train, "trainer.accelerator=cpu", "model.w_max=4"])])
    (tmp_path / "job.sh").write_text(script)
    options = ["--nodes=1", "--ntasks=4", "--ntasks-per-node=4", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    number = cluster.run("sbatch", "--parsable", *options, f"{tmp_path}/job.sh").strip()
    job = Job(cluster, number, tmp_path / "log")
    assert job.end()["JobState"] == "COMPLETED", job.log
    assert {path.name for path in (tmp_path / "own").iterdir()} == {number, f"{number}-1", f"{number}-2"}, job.log
    w_max = [json.loads((path / "model/lcm.json").read_text())["w_max"] for path in sorted((tmp_path / "own").iterdir())]
    assert sorted(w_max[:2]) == [4, 8], job.log
    assert w_max[2] == 4
    for path in (tmp_path / "own").iterdir():
        assert [step for step, _ in column(path, "train/loss")] == list(range(4))


def test_scancel_saves_and_ends_with_slurm_s_code(cluster: Cluster, tiny, tmp_path):
    endless = ["trainer.max_steps=100000", f"paths.runs={tmp_path}", "name=cancelled"]
    job = cluster.submit(
        *tiny, *COMMON, *endless, "logger=[csv,tensorboard,wandb]", "logger.wandb.offline=true", log=tmp_path / "log"
    )
    run_dir = tmp_path / f"cancelled/{job.number}"
    wait_for(lambda: len(column(run_dir, "train/loss")) > 3 or job.ended(), lambda: job.log)
    cluster.run("scancel", job.number)
    end = job.end()
    assert (end["JobState"], end["ExitCode"]) == ("CANCELLED", "143:0"), job.log
    [saved] = re.findall(r"SIGTERM: stopped at step (\d+)", job.log)
    assert f"with paths.run_id={job.number} ckpt_path=last to resume" in job.log
    assert checkpoint(run_dir)["global_step"] == int(saved)
    assert len(column(run_dir, "train/loss")) == int(saved)
    assert end["Restarts"] == "0"


def test_a_rank_that_raises_ends_the_job_within_30_s_with_its_traceback(cluster: Cluster, tiny, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import signal\ndef broken(*args):\n    raise ValueError('something broke')\nsignal.signal(signal.SIGUSR2, broken)\n"
    )
    endless = ["trainer.max_steps=100000", f"paths.runs={tmp_path}", "name=broken"]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    job = cluster.submit(*tiny, *COMMON, *endless, log=tmp_path / "log", PYTHONPATH=path)
    wait_for(lambda: len(column(tmp_path / f"broken/{job.number}", "train/loss")) > 3 or job.ended(), lambda: job.log)
    os.kill(job.pids(1)[0], signal.SIGUSR2)
    end = job.end(patience=30)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), job.log
    assert end["ExitCode"] != "0:0"
    assert "ValueError: something broke" in job.log
    assert "Traceback" in job.log


def test_evaluation_over_ranks_equals_one_process(cluster: Cluster, tiny_pipeline, shards, tmp_path):
    args = [
        *(f"entries.DDIM.pipeline={tiny_pipeline}", "entries.DDIM.steps=[1,2]", "~entries.LCM", "device=cpu", "dtype=float32"),
        *("samples=8", "chunk=2", "batch_size=2", "resolution=32", "grid_rows=2", f"backbone.pipeline={tiny_pipeline}"),
        *(f"shards={shards}/val-*.tar", f"reference_cache={tmp_path}/reference"),
    ]
    program = [sys.executable, "-m", "lcm.evaluate", *args]
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *program, f"output={tmp_path}/ranks")
    done = subprocess.run([*program, f"output={tmp_path}/one"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = [json.loads((tmp_path / name / "table.json").read_text())["rows"] for name in ("ranks", "one")]
    assert tables[0] == tables[1]
    assert all(row["fid"] > 0 for row in tables[0])


@campaign
def test_a_lost_node_costs_no_more_than_the_steps_since_the_last_checkpoint(cluster: Cluster, tiny, tmp_path):
    runs = [*tiny, *COMMON, "trainer.max_steps=300", f"paths.runs={tmp_path}", "name=lost"]
    job = cluster.submit(*runs, log=tmp_path / "log")
    run_dir = tmp_path / f"lost/{job.number}"
    wait_for(lambda: len(column(run_dir, "train/loss")) > 25 or job.ended(), lambda: job.log)
    cluster.lose("n2")
    end = job.end()
    # n2 does not return earlier: SLURM tries for minutes to signal the lost step, and can hit a new step of the same number.
    cluster.bring_back("n2")
    assert (end["JobState"], end["Restarts"], end["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), job.log
    steps = [step for step, _ in column(run_dir, "train/loss")]
    again = next(i for i, (step, following) in enumerate(pairwise(steps)) if following <= step)
    assert 0 <= steps[again] - steps[again + 1] < 10  # a checkpoint every 10 steps
    losses = column(run_dir, "train/loss")
    assert dict(losses) == dict(reversed(losses))  # the repeated steps have the same losses


@campaign
def test_a_sweep_gives_each_run_a_job(cluster: Cluster, tiny, tmp_path):
    pytest.importorskip("submitit", reason="hydra/launcher=submitit_slurm needs `pip install -e .[slurm]`")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    args = [*tiny, "trainer.accelerator=cpu", "model.ema_decay=0,0.95", f"paths.runs={tmp_path}", "name=sweep"]
    cluster.run(sys.executable, "train.py", "-m", *launcher, *args)
    [table] = (tmp_path / "sweeps").glob("*/table.md")
    assert not list((tmp_path / "sweeps").rglob("*.pkl"))  # they hold the overrides, with secrets
    assert len(table.read_text().splitlines()) == 4
    assert len(list((tmp_path / "sweep").iterdir())) == 2
