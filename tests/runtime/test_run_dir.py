"""Every training has its own run folder. A wrong number of processes is refused before the folder is made."""

import os
import subprocess

import pytest
from omegaconf import OmegaConf

from lcm.app.composition import compose
from lcm.core.errors import UserError
from lcm.runtime import run_dir as runs
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.launch import check_processes
from lcm.runtime.resume import resume_path
from lcm.runtime.run_dir import save_metric, start_run, training
from lcm.runtime.sweep import check_sweep

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LCM_RUN_ID", "LCM_RUN_PROCESS")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Remove the variables of all launchers before a test. Unlock the run after the test."""
    for name in [*LAUNCHERS, *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_")))]:
        monkeypatch.delenv(name, raising=False)
    yield
    runs.unlock_run()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return `start`, which runs a training that saves a checkpoint, and returns the name of the run folder.

    `start("model.w_max=4", SLURM_JOB_ID="4711")` sets an override and a variable. `start.resumes` is the resumed checkpoint.
    """

    def start(command: str = "", ckpt_path: str | None = None, run_id: object = None, **env: str) -> str:
        slurm_variables = {"SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"}
        with monkeypatch.context() as patch:
            for name in slurm_variables - env.keys():
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(runs, "overrides", lambda: command.split())
            paths = {"runs": str(tmp_path / "runs"), "run_id": run_id, "run_dir": None}
            cfg = OmegaConf.create({"name": "a", "ckpt_path": ckpt_path, "paths": paths})
            run_dir = start_run(cfg)
            with training(run_dir):
                start.resumes = resume_path(cfg)
                (run_dir / "checkpoints").mkdir(exist_ok=True)
                AtomicCheckpointIO().save_checkpoint(
                    {"global_step": 1, "loops": {}, "optimizer_states": []}, run_dir / "checkpoints/last.ckpt"
                )
            return run_dir.name

    return start


def test_runs_of_one_slurm_job_get_own_folders(start):
    job = {"SLURM_JOB_ID": "4711"}
    assert [start(f"model.w_max={w}", **job) for w in (4, 8, 8)] == ["4711", "4711-1", "4711-2"]
    assert start("model.w_max=4", SLURM_JOB_ID="4712") == "4712"  # another job of the array
    assert start("model.w_max=8", "last", **job) == "4711-2"
    assert start() == "4713"


def test_requeued_job_resumes_its_own_runs(start):
    job, again = {"SLURM_JOB_ID": "4711"}, {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"}
    for w in (4, 8):
        start(f"model.w_max={w}", **job)
    assert start("model.w_max=8", **again) == "4711-1"
    assert start.resumes.endswith("4711-1/checkpoints/last.ckpt")
    assert start("model.w_max=6", **again, SLURM_STEP_ID="1") == "4711-2"
    assert start.resumes is None
    assert start("model.w_max=4 trainer.devices=2", **again) == "4711"  # the settings of the training are the same
    assert start.resumes.endswith("4711/checkpoints/last.ckpt")
    assert start("model.w_max=4", **again) == "4711-3"  # run 4711 has already resumed


def test_named_run_is_not_overwritten(start, tmp_path):
    assert start(run_id=7) == "7"
    with pytest.raises(
        UserError, match=r"runs/a/7 holds a run: resume it with ckpt_path=last, or choose another paths\.run_id"
    ):
        start(run_id=7)
    assert start(run_id=7, ckpt_path="last") == "7"
    assert start(run_id=7, ckpt_path=str(tmp_path / "runs/a/7/checkpoints/last.ckpt")) == "7"
    with pytest.raises(UserError, match="holds a run"):
        start(run_id=7, SLURM_JOB_ID="7")
    assert start(run_id="mine", SLURM_JOB_ID="1") == start(run_id="mine", SLURM_JOB_ID="1", SLURM_RESTART_COUNT="1") == "mine"


def test_slurm_run_is_locked_except_after_a_lost_node(start, tmp_path):
    job = {"SLURM_JOB_ID": "4711"}
    start(**job)
    lock = tmp_path / "runs/a/4711/.lock"
    code = (
        f"import fcntl, sys; f = open({str(lock)!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(
            UserError, match=r"another process is training in .*/4711: wait .*; if its machine is lost, remove .*lock"
        ):
            start(ckpt_path="last", **job)
        assert start(**job, SLURM_RESTART_COUNT="1") == "4711"
        other.stdin.close()


def test_training_restores_the_environment(start, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    before = dict(os.environ)
    for number in range(2):
        monkeypatch.setenv("LOCAL_RANK", "0")  # another program may have set it
        cfg = OmegaConf.create({"name": "a", "ckpt_path": None, "paths": {"runs": str(tmp_path), "run_id": None}})
        run_dir = start_run(cfg)
        assert run_dir.name == str(number)
        assert "LOCAL_RANK" not in os.environ
        with training(run_dir):
            os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_PORT": "2"}
        assert dict(os.environ) == before
        assert not runs.locks
        assert save_metric(run_dir, None) is None


def test_child_processes_share_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LCM_RUN_ID", "5")
    paths = {"runs": str(tmp_path), "run_id": None}
    for parent, name in ((os.getppid(), "5"), (1, "6")):  # a training that ended left the second number
        monkeypatch.setenv("LCM_RUN_PROCESS", str(parent))
        assert start_run(OmegaConf.create({"name": "a", "ckpt_path": None, "paths": paths})).name == name
        runs.unlock_run()


@pytest.mark.parametrize("obstacle", ["dangling link", "name is a file"])
def test_unwritable_folder_is_named(obstacle, tmp_path):
    folder = tmp_path / "runs"
    if obstacle == "dangling link":
        folder.symlink_to(tmp_path / "gone")
        (tmp_path / "gone").symlink_to(tmp_path / "gone")
    else:
        (folder.mkdir() or folder / "a").write_text("")
    paths = {"runs": str(folder), "run_id": None}
    for run_id in (None, 5):
        with pytest.raises(
            UserError, match=r"cannot write the run folder under .*runs/a \(.*\): set paths\.runs to a writable"
        ):
            start_run(OmegaConf.create({"name": "a", "ckpt_path": None, "paths": {**paths, "run_id": run_id}}))
    if obstacle != "name is a file":
        with pytest.raises(UserError, match=r"cannot write .*sweeps/now \(.*\): set paths\.runs to a writable folder"):
            check_sweep(folder / "sweeps/now", one_process=True)


@pytest.mark.parametrize(("name", "says"), [("", "name= is empty"), ("../x", r"name=\.\./x is a path outside paths\.runs")])
def test_name_that_is_no_folder_is_refused(name, says, tmp_path):
    with pytest.raises(UserError, match=says):
        start_run(OmegaConf.create({"name": name, "ckpt_path": None, "paths": {"runs": str(tmp_path), "run_id": None}}))
    assert not list(tmp_path.iterdir())


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
PER_NODE = {"SLURM_NTASKS_PER_NODE": "2"}
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("env", "overrides", "says"),
    [
        (TORCHRUN, [], "torchrun started 2 processes, but trainer.devices=1 and trainer.num_nodes=1 make 1: use trainer=ddp "
         "trainer.devices=2, or start one process"),
        (TORCHRUN, [*DDP, "trainer.devices=4"], "trainer.num_nodes=1 make 4: use trainer=ddp trainer.devices=2"),
        (SRUN, [], "srun started 2 processes, but trainer.devices=1 and trainer.num_nodes=1 make 1: use "
         "srun --ntasks-per-node=2 and trainer=slurm, or start one process"),
        ({**SRUN, **PER_NODE}, [], "make 1: use trainer=slurm, or start one process"),
        (SRUN, [*DDP, "trainer.devices=2"], "srun --ntasks=2 does not say how many run on each node: use --ntasks-per-node"),
        ({**SRUN, **PER_NODE, "SLURM_JOB_NAME": "bash"}, [*DDP, "trainer.devices=2"], "which only trainer=slurm joins"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, [*DDP, "trainer.devices=2"], "SLURM has 1 task(s) and srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, [], "mpirun started 2 processes, which do not join in one "
         "training: start them with torchrun or srun"),
        ({}, ["trainer.devices=0"], "trainer.devices=0: expected auto, a number from 1"),
        ({}, [*DDP, "trainer.devices=1", "trainer.num_nodes=2"], "trainer.num_nodes=2 needs a launcher on every node"),
    ],
)  # fmt: skip
def test_wrong_process_counts_are_refused(env, overrides, says, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        check_processes(compose("train", overrides).trainer)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("env", "overrides"),
    [
        ({}, [*DDP, "trainer.devices=2"]),
        (TORCHRUN, [*DDP, "trainer.devices=2"]),
        (TORCHRUN, [*DDP, "trainer.devices=[0,1]"]),
        ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2"}, [*DDP, "trainer.devices=1", "trainer.num_nodes=2"]),
        ({**SRUN, **PER_NODE, "SLURM_NNODES": "1"}, ["trainer=slurm"]),
        ({**SRUN, **PER_NODE, "SLURM_JOB_NAME": "bash", "SLURM_NNODES": "1"}, ["trainer=slurm"]),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, []),  # a batch script's or salloc's shell
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "1"}, [*DDP, "trainer.devices=2"]),
    ],
)
def test_matching_process_counts_pass(env, overrides, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    check_processes(compose("train", overrides).trainer)


def test_sweep_needs_one_process(tmp_path, monkeypatch):
    check_sweep(tmp_path / "now", one_process=True)
    assert not (tmp_path / "now").exists()
    check_sweep(tmp_path, one_process=True)  # hydra.sweep.dir=<an existing folder>
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    check_sweep(tmp_path / "now", one_process=False)  # for a program that starts no processes
    with pytest.raises(
        UserError, match="torchrun started 2 processes, but a sweep starts the processes of its jobs itself: start one"
    ):
        check_sweep(tmp_path / "now", one_process=True)
