"""A checkpoint folder is read as it was written. A damaged folder is never used. No content of a folder runs code."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lcm.core.errors import UserError
from lcm.runtime import sharded_checkpoint as sharded
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.integrity import damage, size_and_crc
from lcm.runtime.resume import newest_undamaged

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Yield the device mesh of a process group with world size 1."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def checkpoint(mesh: DeviceMesh, step: int) -> dict[str, Any]:
    weight, average = (distribute_tensor(torch.full((3, 2), step + part), mesh, [Shard(0)]) for part in (0.0, 0.5))
    state = {5: {"step": torch.tensor(float(step)), "exp_avg": average}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [5]}]}
    return {"state_dict": {"net.weight": weight}, "optimizer_states": [optimizer], "position": {"samples": [step]}}


def step_of(folder: Path) -> int:
    content = AtomicCheckpointIO().load_checkpoint(folder)
    step = content["position"]["samples"][0]
    assert torch.equal(content["state_dict"]["net.weight"], torch.full((3, 2), float(step)))
    [optimizer] = content["optimizer_states"]
    assert torch.equal(optimizer["state"][5]["exp_avg"], torch.full((3, 2), step + 0.5))
    assert (optimizer["state"][5]["step"], optimizer["param_groups"][0]["betas"]) == (step, (0.9, 0.99))
    return step


def test_folder_is_written_read_and_replaced(mesh: DeviceMesh, tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    for step in (1, 2):
        sharded.write(checkpoint(mesh, step), target)
        assert newest_undamaged(tmp_path) == str(target)
        assert step_of(target) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert step_of(tmp_path / "previous.ckpt") == 1


def test_folder_and_file_replace_each_other(mesh: DeviceMesh, tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    target.write_text("a checkpoint of another strategy")
    sharded.write(checkpoint(mesh, 1), target)
    assert step_of(target) == 1
    assert (tmp_path / "previous.ckpt").is_file()
    for step in (2, 3):
        AtomicCheckpointIO().save_checkpoint({"step": step}, target)
        assert AtomicCheckpointIO().load_checkpoint(target) == {"step": step}
        assert len(list(tmp_path.iterdir())) == 2
        assert step_of(tmp_path / "previous.ckpt") == 1 if step == 2 else (tmp_path / "previous.ckpt").is_file()


class Killed(Exception):
    """Stands for a kill of the process: no later code of the write runs."""


@pytest.mark.parametrize(("where", "step"), [("writing", 2), ("aside", 2), ("between", 2), ("renamed", 3)])
def test_kill_at_any_point_leaves_a_checkpoint(
    where: str, step: int, mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints exist before the write of the third. The last three points are the steps of `replacing`."""
    target = tmp_path / "last.ckpt"
    for before in (1, 2):
        sharded.write(checkpoint(mesh, before), target)
    rename, remove = Path.rename, sharded.remove
    killed = {"aside": target, "between": tmp_path / "last.ckpt.partial"}.get(where)

    def kill(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if where == "writing":
            patch.setattr(sharded, "size_and_crc", kill)
        elif where == "renamed":
            patch.setattr(
                sharded, "remove", lambda path: kill() if path.is_dir() and path.name == "last.old.ckpt" else remove(path)
            )
        else:
            patch.setattr(Path, "rename", lambda path, to: kill() if path == killed else rename(path, to))
        with pytest.raises(Killed):
            sharded.write(checkpoint(mesh, 3), target)
    newest = newest_undamaged(tmp_path)
    assert newest is not None
    assert step_of(Path(newest)) == step
    sharded.write(checkpoint(mesh, 4), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert step_of(target) == 4


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00001-model-00001-of-00001.safetensors", flip),
        ("rest.ckpt", cut),
        ("rest.ckpt", Path.unlink),
        ("files.json", cut),
    ],
)
def test_damaged_folder_is_refused(name: str, damage: Any, mesh: DeviceMesh, tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    sharded.write(checkpoint(mesh, 1), target)
    damage(target / name)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_undamaged(tmp_path)
    with pytest.raises(UserError, match=r"last.ckpt is damaged \(.*(missing or not as written|no readable files.json)"):
        AtomicCheckpointIO().load_checkpoint(target)
    sharded.write(checkpoint(mesh, 2), tmp_path / "previous.ckpt")
    assert newest_undamaged(tmp_path) == str(tmp_path / "previous.ckpt")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_folder_runs_no_code(mesh: DeviceMesh, tmp_path: Path) -> None:
    target, mark = tmp_path / "last.ckpt", tmp_path / "mark"
    sharded.write(checkpoint(mesh, 1), target)
    (target / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))  # torch's own format stores its pickle here
    assert step_of(target) == 1
    torch.save({"state_dict": Hostile(mark)}, target / "rest.ckpt")
    files = json.loads((target / "files.json").read_text())
    (target / "files.json").write_text(json.dumps({**files, "rest.ckpt": size_and_crc(target / "rest.ckpt")}))
    assert damage(target) is None
    with pytest.raises(pickle.UnpicklingError):
        sharded.read(target)
    assert not mark.exists()
