"""A checkpoint is complete or absent. ckpt_path=last skips a damaged checkpoint and uses the one before it."""

import itertools
import multiprocessing
import os
import random
import re
import resource
import signal
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed import TCPStore

import lcm.runtime.checkpoint_io as module
from lcm.core.errors import UserError
from lcm.runtime import signals
from lcm.runtime.atomic_io import locked
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.integrity import damage, verified
from lcm.runtime.launch import rendezvous_store
from lcm.runtime.resume import checkpoints_in, newest_undamaged, resume_path
from lcm.runtime.run_dir import start_run

ROUNDS = int(os.environ.get("LCM_ROUNDS", "10"))


def content(step, size=30):
    return {"global_step": step, "state_dict": {"a": torch.full((size,), float(step)), "b": torch.ones(3)}, "plain": [1, "x"]}


def equal(first, second):
    tensors = first["state_dict"].keys() == second["state_dict"].keys() and all(
        torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items()
    )
    return tensors and (first["global_step"], first["plain"]) == (second["global_step"], second["plain"])


def step_of(path):
    return AtomicCheckpointIO().load_checkpoint(path)["global_step"]


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def spoil(path):
    """Flip a bit of a tensor."""
    with zipfile.ZipFile(path) as archive:
        [tensor] = [archive.read(name) for name in archive.namelist() if name.endswith("/data/0")]
    flip(path, path.read_bytes().index(tensor) + 1)


@pytest.fixture(autouse=True)
def nothing_verified():
    """Forget the files that this process has verified, because the test damages them."""
    verified.clear()


@pytest.fixture
def last(tmp_path):
    """Return the path of last.ckpt at step 2. previous.ckpt at step 1 is beside it."""
    path = tmp_path / "checkpoints/last.ckpt"
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(content(step), path)
    verified.clear()
    return path


def test_torch_reads_our_checkpoints(last):
    assert damage(last) is None
    for mmap in (False, True):
        assert equal(torch.load(last, weights_only=True, mmap=mmap), content(2))


def test_bit_flips_and_cuts_are_noticed_or_harmless(last):
    """A bit flip in the padding or the dates of the zip is harmless."""
    size = last.stat().st_size
    for at in range(0, size, 3):
        flip(last, at)
        if damage(last) is None:
            assert equal(torch.load(last, weights_only=True), content(2)), at
        flip(last, at)
    for length in range(size - 1, 0, -7):
        os.truncate(last, length)
        assert damage(last)


def test_damage_of_empty_files_and_folders(tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(b"")
    assert damage(path)
    path.unlink()
    path.mkdir()
    assert damage(path)


def test_resume_verifies_on_rank_0_only(last, tmp_path, monkeypatch):
    """Rank 0 reads the file to verify it and again to load it. Other ranks get the path and only load the file."""
    AtomicCheckpointIO().save_checkpoint(content(3, size=1 << 20), last)
    verified.clear()
    passes = []
    for parent in (1, os.getppid()):
        monkeypatch.setenv("LCM_RUN_PROCESS", str(parent))
        before = bytes_read()
        loaded = AtomicCheckpointIO().load_checkpoint(resume_path(config(tmp_path, "last")))
        passes.append((bytes_read() - before) / last.stat().st_size)
        assert equal(loaded, content(3, size=1 << 20))
        verified.clear()
    assert passes == pytest.approx([2, 1], abs=0.1)


def bytes_read():
    """Return the number of bytes that this process has read, as the kernel counts them."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_pickled_object_is_refused(tmp_path):
    torch.save({"code": AtomicCheckpointIO()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")


def test_previous_replaces_a_damaged_last(last, capsys):
    spoil(last)
    assert newest_undamaged(last.parent) == str(last.with_name("previous.ckpt"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: {last} is damaged (its checksum does not match): it is skipped, the one before it is used"]
    with pytest.raises(UserError, match=r"last\.ckpt is damaged \(its checksum does not match\)"):
        AtomicCheckpointIO().load_checkpoint(last)
    io = AtomicCheckpointIO()
    io.save_checkpoint(content(3), last)
    assert [step_of(path) for path in checkpoints_in(last.parent)] == [3, 1]
    io.save_checkpoint(content(4), last)
    assert [step_of(path) for path in checkpoints_in(last.parent)] == [4, 3]


def test_kill_between_renames_leaves_previous(last):
    last.replace(last.with_name("previous.ckpt"))
    assert step_of(newest_undamaged(last.parent)) == 2


def test_checkpoints_are_ordered_by_name_and_time(last):
    for number, name in enumerate(["step_100", "step_200", "best"]):
        AtomicCheckpointIO().save_checkpoint(content(number), last.with_name(f"{name}.ckpt"))
        os.utime(last.with_name(f"{name}.ckpt"), (2e9 + number, 2e9 + number))
    names = ["last", "previous", "best", "step_200", "step_100"]
    assert [path.stem for path in checkpoints_in(last.parent)] == names


def config(tmp_path, ckpt_path):
    paths = {"runs": str(tmp_path / "runs"), "run_id": None, "run_dir": str(tmp_path)}
    return OmegaConf.create({"name": "a", "ckpt_path": str(ckpt_path) if ckpt_path else None, "paths": paths})


def test_damaged_ckpt_path_names_another(last, tmp_path):
    spoil(last)
    with pytest.raises(UserError, match=r"last\.ckpt is damaged .*: give ckpt_path=.*previous\.ckpt, which is undamaged"):
        resume_path(config(tmp_path, last))
    spoil(last.with_name("previous.ckpt"))
    with pytest.raises(UserError, match=r"ckpt_path=nothing\.ckpt is not a file; ckpt_path=last resumes"):
        resume_path(config(tmp_path, "nothing.ckpt"))
    with pytest.raises(UserError, match="no other checkpoint beside it is undamaged"):
        resume_path(config(tmp_path, last))
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        resume_path(config(tmp_path, "last"))


def test_last_without_checkpoints_starts_fresh(tmp_path, capsys):
    assert resume_path(config(tmp_path, "last")) is None
    assert not capsys.readouterr().err  # `make demo` starts this way


def test_weights_alone_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match=r"ckpt_path=.*weights\.ckpt holds only weights, no training to resume"):
        resume_path(config(tmp_path, tmp_path / "weights.ckpt"))


def test_last_names_runs_with_checkpoints(tmp_path, capsys):
    for run in ("lcd_mini/0", "lcd_mini/1", "teacher/0"):
        AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "runs" / run / "checkpoints/last.ckpt")
    mistyped = config(tmp_path, "last")
    mistyped.name = "lcd_mni"
    assert resume_path(mistyped) is None
    error = capsys.readouterr().err
    assert "warning: ckpt_path=last found no checkpoint of lcd_mni: training starts anew" in error
    names = re.search(r"runs with checkpoints are (.*): stop", error)[1].split(", ")
    assert sorted(names[:2]) == ["lcd_mini/0", "lcd_mini/1"]
    assert names[2:] == ["teacher/0"]


def test_start_removes_unfinished_files(last, tmp_path, monkeypatch):
    monkeypatch.delenv("LCM_RUN_ID", raising=False)
    run = tmp_path / "runs/a/3"
    last.parent.rename(run.mkdir(parents=True) or run / "checkpoints")
    (run / "checkpoints/last.partial").write_bytes(b"half")
    assert start_run(config(tmp_path, "last")) == run
    assert not list(run.rglob("*.partial"))
    assert len(list(run.rglob("*.ckpt"))) == 2


def hold(file, acquired):
    lock = locked(file)
    acquired.set()
    while lock is not None:  # until the process is killed
        signal.pause()


def test_run_of_another_process_is_locked(last, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = tmp_path / "runs/a/3"
    last.parent.rename(run.mkdir(parents=True) or run / "checkpoints")
    (run / "checkpoints/last.partial").write_bytes(b"half")
    acquired = multiprocessing.Event()
    other = multiprocessing.Process(target=hold, args=(run / ".lock", acquired))
    other.start()
    acquired.wait()
    with pytest.raises(UserError, match=r"another process is training in .*runs/a/3: wait for its end"):
        start_run(config(tmp_path, "last"))
    assert (run / "checkpoints/last.partial").exists()
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    for _ in range(2):  # a process may start a run again whose lock it holds
        assert start_run(config(tmp_path, "last")) == run


def test_torchrun_ranks_share_one_run(tmp_path, monkeypatch):
    """This process plays each rank in turn and serves the store. torchrun keeps its store when it restarts the ranks."""
    monkeypatch.delenv("LCM_RUN_ID", raising=False)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for number in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", number)
        for rank in ("0", "1"):
            env = {**shared, "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
            for name, value in env.items():
                monkeypatch.setenv(name, value)
            rendezvous_store.cache_clear()
            assert start_run(config(tmp_path, None)) == tmp_path / "runs/a" / number
    rendezvous_store.cache_clear()


def test_full_disk_keeps_old_checkpoints(last, capfd):
    """A limit on the file size stands in for a full disk. In both cases torch.save hides the OSError in a RuntimeError."""
    io, limits = AtomicCheckpointIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoints/last\.ckpt cannot be written whole \(File too large\): make room"):
            io.save_checkpoint(content(3, size=100_000), last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step_of(path) for path in checkpoints_in(last.parent)] == [2, 1]
    assert not list(last.parent.glob("*.partial"))


@pytest.fixture
def slow(monkeypatch):
    """Yield an asynchronous writer, the event that its writes wait for, and the steps of the writes that have begun."""
    io, go, begun = AtomicCheckpointIO(asynchronous=True), threading.Event(), []

    def save(checkpoint, file, torch_save=torch.save):
        begun.append(checkpoint["global_step"])
        assert go.wait(60)
        torch_save(checkpoint, file)

    monkeypatch.setattr(module.torch, "save", save)
    yield io, go, begun
    go.set()
    io.writer.shutdown()


def test_async_write_saves_a_copy_and_is_awaited(slow, tmp_path):
    (io, go, _), state = slow, content(1)
    io.save_checkpoint(state, tmp_path / "last.ckpt")
    state["state_dict"]["a"].zero_()
    assert not (tmp_path / "last.ckpt").exists()
    go.set()
    io.teardown()
    assert equal(torch.load(tmp_path / "last.ckpt", weights_only=True), content(1))


def test_one_async_write_at_a_time(slow, tmp_path):
    io, go, begun = slow
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    second = threading.Thread(target=io.save_checkpoint, args=(content(2), tmp_path / "last.ckpt"))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert begun in ([], [1])
    go.set()
    second.join(60)
    io.teardown()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [2, 1]


@pytest.mark.parametrize("where", ["the next save", "the end"])
def test_async_error_is_raised_once(where, tmp_path, monkeypatch):
    def full(checkpoint, file):
        raise OSError(28, "No space left on device")

    io = AtomicCheckpointIO(asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "save", full)
        io.save_checkpoint(content(1), tmp_path / "last.ckpt")
        with pytest.raises(UserError, match="No space left on device"):
            io.teardown() if where == "the end" else io.save_checkpoint(content(2), tmp_path / "last.ckpt")
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    io.teardown()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [3]


def keep_saving(path, begin, asynchronous, sender):
    """Save checkpoints until the process is killed. Send each step whose file is complete.

    When an asynchronous save returns, the file of the step before is complete.
    """
    io = AtomicCheckpointIO(asynchronous)
    for step in itertools.count(begin):
        io.save_checkpoint(content(step, size=1 << 20), path)
        if step - asynchronous >= begin:
            sender.send(step - asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_random_kills_leave_a_complete_checkpoint(asynchronous, tmp_path, monkeypatch):
    """LCM_ROUNDS=50 gives the figure in the docs. $TMPDIR is another filesystem, so that a move from there is a copy."""
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    path, step, inside = tmp_path / "last.ckpt", 0, 0
    fork = multiprocessing.get_context("fork")
    for _ in range(ROUNDS):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=keep_saving, args=(path, step + 1, asynchronous, sender))
        process.start()
        sender.close()
        assert receiver.poll(120)
        time.sleep(random.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while True:
            try:
                completed = receiver.recv()
            except EOFError:
                break
        inside += (tmp_path / "last.partial").exists()
        loaded = AtomicCheckpointIO().load_checkpoint(newest_undamaged(tmp_path))
        step = loaded["global_step"]
        assert step >= completed
        assert equal(loaded, content(step, size=1 << 20))
    print(f"{ROUNDS} kills, {inside} of them inside a write")
    assert inside or ROUNDS < 10


def wait_for_ctrl_c(sender):
    signals.listen(signal.SIGINT)
    sender.send("ready")
    while not signals.recorded_signal():
        time.sleep(0.01)
    sender.send("asked")
    time.sleep(120)  # a slow step or a slow write


def test_second_ctrl_c_ends_at_once():
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=wait_for_ctrl_c, args=(sender,))
    process.start()
    for word in ("ready", "asked"):
        assert receiver.poll(60)
        assert receiver.recv() == word
        os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == -signal.SIGINT
