"""An export equals the model that train.py saves: a run under `trainer=fsdp` on two processes, and adapters."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "name=sharded", "callbacks.samples.steps=[1]"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sharded_run_is_exported(run, tiny, tmp_path):
    done = run("train.py", *tiny, *FSDP, "trainer.strategy.sharded_checkpoints=true")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/sharded/0"
    last = run_dir / "checkpoints/last.ckpt"
    assert len(list(last.glob("shard-*.safetensors"))) == 2
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert sorted(path.name for path in run_dir.glob("samples/*")) == ["history.png", "step-000000.png", "step-000006.png"]

    assert (done := run("lcm.export", f"run={run_dir}")).returncode == 0, done.stderr
    assert contents(run_dir / "export") == contents(run_dir / "model")
    assert json.loads((run_dir / "export/lcm.json").read_text())["steps"] == 6
    LatentConsistencyModelPipeline.from_pretrained(run_dir / "export")

    target = run("lcm.export", f"run={run_dir}", "weights=target", "dtype=float32", "format=unet", "output=target")
    assert target.returncode == 0, target.stderr
    found = load_file(tmp_path / "target.safetensors")
    best = UNet2DConditionModel.from_pretrained(run_dir / "export", subfolder="unet", torch_dtype=torch.float32)
    best.load_state_dict(found)
    assert all(value.dtype == torch.float32 for value in found.values())

    shard = next(last.glob("shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = run("lcm.export", f"run={run_dir}", "output=before", "format=unet")
    assert "of step 4" in before.stdout, before.stderr


def test_adapters_are_exported(run, tiny, tmp_path):
    model = ["experiment=lcd_lora_mini", "model.adapters.rank=4", "model.ema_decay=0"]
    trained = run("train.py", *tiny, *model, "trainer.max_steps=2", "callbacks.samples.steps=[1]")
    assert trained.returncode == 0, trained.stderr
    run_dir = tmp_path / "runs/lcd_lora_mini/0"
    assert (done := run("lcm.export", f"run={run_dir}")).returncode == 0, done.stderr
    assert contents(run_dir / "export") == contents(run_dir / "model")
    assert (run_dir / "model/pytorch_lora_weights.safetensors").is_file()

    single = run("lcm.export", f"run={run_dir}", "format=unet", "output=unet")
    assert single.returncode == 0, single.stderr
    merged = UNet2DConditionModel.from_pretrained(run_dir / "model", subfolder="unet", torch_dtype=torch.float16).state_dict()
    found = load_file(tmp_path / "unet.safetensors")
    assert merged.keys() == found.keys()
    assert all(torch.equal(value, merged[name]) for name, value in found.items())

    target = run("lcm.export", f"run={run_dir}", "weights=target")
    assert "has no such weights" in target.stderr
