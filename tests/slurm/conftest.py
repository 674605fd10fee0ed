"""A real SLURM cluster of three nodes on this machine, and its jobs. Tests are skipped without SLURM's packages or root."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, environment
from tests.e2e.conftest import tiny as tiny

LOCAL = ROOT / "tests/slurm/local.sh"
PATIENCE = 1800  # seconds; on an idle machine a wait takes only a few


def wait_for(condition: Callable[[], object], message: Callable[[], str], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.05)


class Job:
    """A submitted batch job."""

    def __init__(self, cluster: "Cluster", number: str, log: Path) -> None:
        self.cluster, self.number, self.file = cluster, number, log

    @property
    def log(self) -> str:
        return self.file.read_text() if self.file.is_file() else ""

    def facts(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.run("scontrol", "show", "job", self.number)))

    def ended(self) -> bool:
        return self.facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def end(self, patience: float = PATIENCE) -> dict[str, str]:
        wait_for(self.ended, lambda: f"job {self.number} does not end:\n{self.log}", patience)
        return self.facts()

    def pids(self, rank: int) -> list[int]:
        """Return the ids of a rank's processes in the order of their starts, the main process first. (Ids can wrap around.)"""
        expected = {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}"}
        processes = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
                line = (folder / "cmdline").read_bytes()
                if expected <= variables and b"train.py" in line and not line.startswith(b"env"):  # env is yet to block signals
                    started = int((folder / "stat").read_text().rpartition(")")[2].split()[19])  # proc(5): field 22
                    processes.append((started, int(folder.name)))
            except OSError:
                continue  # the process ended, or is a kernel thread
        return [pid for _, pid in sorted(processes)]

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to every process of every step, as SLURM does before the time limit."""
        self.cluster.run("scancel", f"--signal={signum.name.removeprefix('SIG')}", self.number)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.env = folder, environment(SLURM_CONF=f"{folder}/slurm.conf", PYTHON=sys.executable)

    def run(self, *command: str, **env: str) -> str:
        """Run a program that uses the cluster, in the checkout. Return its output."""
        done = subprocess.run(command, cwd=ROOT, env={**self.env, **env}, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *overrides: str, nodes: int = 2, tasks: int = 1, log: Path, **env: str) -> Job:
        """Submit docker/train.sbatch with options for this small cluster. tasks: the number per node."""
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", "--gres=none", "--time=60"]
        number = self.run(
            "sbatch",
            "--parsable",
            *options,
            f"--output={log}",
            "docker/train.sbatch",
            "trainer.accelerator=cpu",
            *overrides,
            **env,
        )
        return Job(self, number.strip(), log)

    def lose(self, node: str) -> None:
        """Kill a node's daemon and all processes on the node."""
        daemon = int((self.folder / f"run/slurmd.{node}.pid").read_text())
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line, files = (folder / "cmdline").read_bytes(), list((folder / "fd").iterdir())
                task = f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes().split(b"\0")
                stepd = line.startswith(b"slurmstepd: [") and any(f"slurmd.{node}" in os.readlink(file) for file in files)
                if task or stepd or int(folder.name) == daemon:
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue

    def bring_back(self, node: str) -> None:
        self.run("slurmd", "-N", node, "-f", self.env["SLURM_CONF"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a cluster of three nodes with 8 pretended CPUs each. Jobs of two nodes start on n1 and n2, and n3 is a spare."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if shutil.which(name) is None]
    if missing or os.geteuid():
        lack = f"has no {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)" if missing else "needs root"
        pytest.skip(f"no local SLURM: this machine {lack}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    port = 25000 + os.getpid() % 700 * 10  # differs between pytest workers; below the ports that the kernel gives out
    start = {**os.environ, "SLURM_LOCAL_PORT": str(port), "SLURM_LOCAL_KILL_WAIT": "600"}  # a busy machine saves slowly
    try:
        subprocess.run([LOCAL, "start", folder, "3"], env=start, check=True, timeout=120)
        yield Cluster(folder)
    finally:
        subprocess.run([LOCAL, "stop", folder], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)
