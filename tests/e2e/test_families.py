"""The programs train, sample, evaluate and export PixArt-alpha and Stable Diffusion 3. diffusers opens the exports."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_flow_match_lcm, scheduling_lcm
from diffusers.utils import torch_utils
from PIL import Image

from lcm.core.random import ImageNoise
from tests.data.conftest import png, write_shard

pytestmark = pytest.mark.slow
PROMPT = "red apple on a white background"


@pytest.mark.parametrize(
    ("name", "side", "pipeline"), [("pixart", 256, "PixArtAlphaPipeline"), ("sd3", 32, "StableDiffusion3Pipeline")]
)
def test_family_runs_through_every_program(name, side, pipeline, run, request, tiny_pipeline, tmp_path, monkeypatch):
    teacher: Path = request.getfixturevalue(f"{name}_pipeline")
    samples = [{"__key__": str(i), "png": png((side, side), colour=(40 * i, 90, 200)), "txt": PROMPT} for i in range(4)]
    shard = write_shard(tmp_path / "0.tar", samples)
    data = ["data=shards", f"data.shards={shard}", "data.batch_size=2", "data.num_workers=0", "trainer.precision=32-true"]
    steps = ["trainer.max_steps=2", "callbacks.samples.steps=[1]", "callbacks.samples.w=0", "name=few"]
    trained = run("train.py", f"model.pipeline={teacher}", *data, *steps)
    assert trained.returncode == 0, trained.stderr
    run_dir = tmp_path / "runs/few/0"

    exported = run("lcm.export", f"run={run_dir}", "dtype=float32")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((run_dir / "export/model_index.json").read_text())["_class_name"] == pipeline

    sampled = run(
        "sample.py",
        f"pipeline={run_dir}/export",
        f"prompts={PROMPT}",
        "w=0",
        "images_per_prompt=1",
        "device=cpu",
        "output=ours",
    )
    assert sampled.returncode == 0, sampled.stderr
    ours = np.asarray(Image.open(tmp_path / "ours/00000.png")).astype(int)

    measured = run(
        "lcm.evaluate", f"entries.DDIM.pipeline={teacher}", "entries.DDIM.steps=[1]", f"entries.LCM.pipeline={run_dir}/model",
        "entries.LCM.steps=[1,4]", "w=0", f"shards={shard}", "samples=4", "grid_rows=2", f"backbone.pipeline={tiny_pipeline}",
        "device=cpu", "output=table",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    assert [row["steps"] for row in json.loads((tmp_path / "table/table.json").read_text())["rows"]] == [1, 1, 4]

    rng = ImageNoise([0], ()).generators[0]

    def noise(shape, **options):
        return torch.randn(tuple(shape[1:]), generator=rng)[None]

    for module in (scheduling_flow_match_lcm, scheduling_lcm, torch_utils):
        monkeypatch.setattr(module, "randn_tensor", noise)
    pipe = diffusers.DiffusionPipeline.from_pretrained(run_dir / "export")
    latents = noise((1, pipe.transformer.config.in_channels, *2 * [pipe.transformer.config.sample_size]))
    theirs = pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0, latents=latents).images[0]
    assert abs(np.asarray(theirs).astype(int) - ours).max() <= 2
