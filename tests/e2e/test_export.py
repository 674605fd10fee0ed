"""An export equals the model that train.py saves. One run has two ranks under `trainer=fsdp`, and another trains adapters.

diffusers reads the files that are exported for other programs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from tests.e2e.conftest import command, environment

pytestmark = pytest.mark.slow
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "name=sharded", "callbacks.samples.steps=[1]"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sharded_run_is_exported(run, tiny, tmp_path):
    """This test starts the ranks by torchrun itself. Other tests use `warm.ranks`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = command("train.py", *tiny, *FSDP, "trainer.strategy.sharded_checkpoints=true")[1:]
    done = subprocess.run([*torchrun, *train], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
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
    weights = load_file(tmp_path / "target.safetensors")
    best = UNet2DConditionModel.from_pretrained(run_dir / "export", subfolder="unet", torch_dtype=torch.float32)
    best.load_state_dict(weights)
    assert all(value.dtype == torch.float32 for value in weights.values())

    fixed = run("lcm.export", f"run={run_dir}", "format=original", "w=3", "dtype=float32", "output=fixed")
    assert "float32, w = 3)" in fixed.stdout, fixed.stderr
    pipe = StableDiffusionPipeline.from_single_file(str(tmp_path / "fixed.safetensors"), config=tiny[0].partition("=")[2])
    assert pipe.unet.config["time_cond_proj_dim"] is None

    graphs = run("lcm.export", f"run={run_dir}", "format=openvino", "dtype=float32", "output=graphs")
    assert "model:   graphs   (best weights of step 6, float32)" in graphs.stdout, graphs.stderr
    assert 'names="timestep_cond"' in (tmp_path / "graphs/unet/openvino_model.xml").read_text()
    assert {path.name for path in (tmp_path / "graphs").iterdir()} >= {"scheduler", "text_encoder", "tokenizer", "vae_decoder"}
    drawn = run("sample.py", f"pipeline={run_dir}/export", "engine=openvino", "prompts=cat", HF_HOME=str(tmp_path / "hub"))
    assert drawn.returncode == 0, drawn.stderr

    shard = next(last.glob("shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = run("lcm.export", f"run={run_dir}", "output=before", "format=unet")
    assert "of step 4" in before.stdout, before.stderr


def test_adapters_are_exported(run, tiny, tmp_path):
    model = [
        "experiment=lcd_lora_mini",
        "model.adapters.rank=4",
        "model.adapters.alpha=2",
        "model.ema_decay=0",
        "model.optimizer.lr=0.02",
    ]
    trained = run("train.py", *tiny, *model, "trainer.max_steps=2", "callbacks.samples.steps=[1]")
    assert trained.returncode == 0, trained.stderr
    run_dir = tmp_path / "runs/lcd_lora_mini/0"
    assert (done := run("lcm.export", f"run={run_dir}")).returncode == 0, done.stderr
    assert contents(run_dir / "export") == contents(run_dir / "model")
    assert (run_dir / "model/pytorch_lora_weights.safetensors").is_file()
    page = (run_dir / "report.html").read_text()
    for part in (
        "Run lcd_lora_mini/0",
        "ConsistencyModule after 2 steps",
        "train/loss",
        "step 2",
        "rank: 4",
        "python train.py",
    ):
        assert part in page

    (tmp_path / "measured").mkdir()
    (tmp_path / "measured/table.md").write_text("| | FID, 1 step |\n|---|---|\n| LCM | 3.21 |\n")
    carded = run("lcm.export", f"run={run_dir}", "card=true", "evaluation=measured", "output=carded")
    assert carded.returncode == 0, carded.stderr
    card = ModelCard.load(tmp_path / "carded/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.tags == ["latent-consistency", "lora"]
    for part in (
        "# lcd_lora_mini",
        "for 2 steps",
        "num_inference_steps=4, guidance_scale=1.0",
        "| LCM | 3.21 |",
        "| model.adapters.rank | 4 |",
        "![Samples at the end of the training](samples.png)",
        "Name the licences of",
    ):
        assert part in card.text, card.text
    assert str(tmp_path) not in card.content
    assert (tmp_path / "carded/samples.png").read_bytes() == (run_dir / "samples/step-000002.png").read_bytes()

    single = run("lcm.export", f"run={run_dir}", "format=unet", "output=unet")
    assert single.returncode == 0, single.stderr
    merged = UNet2DConditionModel.from_pretrained(run_dir / "model", subfolder="unet", torch_dtype=torch.float16).state_dict()
    weights = load_file(tmp_path / "unet.safetensors")
    assert merged.keys() == weights.keys()
    assert all(torch.equal(value, merged[name]) for name, value in weights.items())

    kohya = run("lcm.export", f"run={run_dir}", "format=kohya", "dtype=float32", "output=kohya")
    assert kohya.returncode == 0, kohya.stderr
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        header = file.metadata()
        assert file.get_tensor("lora_unet_down_blocks_1_attentions_0_proj_in.alpha").item() == 2
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_base_model_version"]) == ("4", "2", "sd_v1")
    teacher = StableDiffusionPipeline.from_pretrained(tiny[0].partition("=")[2])
    teacher.load_lora_weights(tmp_path / "kohya.safetensors")
    teacher.fuse_lora()
    teacher.unload_lora_weights()
    fused = teacher.unet.state_dict()
    assert fused.keys() == merged.keys()
    assert max((value - merged[name].float()).abs().max() for name, value in fused.items()) < 1e-3  # merged is float16

    assert (done := run("lcm.export", f"run={run_dir}", "format=original", "output=whole")).returncode == 0, done.stderr
    whole = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "whole.safetensors"), config=str(run_dir / "model"), local_files_only=True, torch_dtype=torch.float16
    )
    assert all(torch.equal(value, merged[name]) for name, value in whole.unet.state_dict().items())

    target = run("lcm.export", f"run={run_dir}", "weights=target")
    assert "has no such weights" in target.stderr
