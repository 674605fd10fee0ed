"""The README's commands train a teacher, distil it, fine-tune the student, draw samples and write a table."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

from tests.e2e import warm
from tests.e2e.conftest import command, environment, tiny_data
from tests.e2e.test_security import ENVIRONMENT, planted

pytestmark = pytest.mark.slow


def rows(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "metrics.csv").open()))


def test_distil_sample_evaluate_fine_tune(run_cold, run, tiny, shards, tiny_pipeline, tmp_path):
    done = run_cold("train.py", *tiny, "callbacks.samples.every_n_steps=3")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/lcd_mini/0"
    assert "model:   runs/lcd_mini/0/model" in done.stdout
    pictures = {path.name for path in (run_dir / "samples").iterdir()}
    assert pictures == {"history.png", *(f"step-{n:06d}.png" for n in (0, 3, 6))}
    assert {"train/loss", "train/grad_norm", "val/loss"} <= set(rows(run_dir)[-1])
    assert json.loads((run_dir / "model/lcm.json").read_text())["w_max"] == 6.0
    LatentConsistencyModelPipeline.from_pretrained(run_dir / "model")

    done = run("sample.py", "prompts=[red apple,rocket]", "images_per_prompt=2", "steps=2", "w=1.5", "output=out")
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / "out/00003.png")
    assert (image.text["caption"], image.text["seed"], image.text["steps"]) == ("rocket", "3", "2")
    assert Image.open(tmp_path / "out/grid.png").height > 2 * 128

    done = run(
        "lcm.evaluate",
        f"entries.DDIM.pipeline={tiny_pipeline}",
        "entries.DDIM.steps=[1,4]",
        "entries.LCM.steps=[1,2]",
        f"backbone.pipeline={tiny_pipeline}",
        f"shards={shards}/val-*.tar",
        "resolution=32",
        "samples=6",
        "grid_rows=3",
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "outputs/evaluate/table.md").read_text()
    assert "| DDIM |" in table
    assert "| LCM |" in table
    assert "| LCM | 6 | 24 |" in table  # steps and images of its training
    assert len(json.loads((tmp_path / "outputs/evaluate/table.json").read_text())["rows"]) == 4

    done = run(
        "train.py", "experiment=lcf_mini", "model.pipeline=runs/lcd_mini/0/model", *tiny_data(shards),
        "trainer.max_steps=4", "callbacks.samples.steps=[1]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/lcf_mini/0/model/model_index.json").is_file()


def test_teacher_trains_and_is_distilled(run, tiny, shards, tiny_pipeline, tmp_path):
    small = ["model.net.block_out_channels=[16,16,16]", "model.net.norm_num_groups=4", "model.net.cross_attention_dim=16"]
    small += [
        "model.net.sample_size=8",
        "model.net.attention_head_dim=2",
        "model.net.in_channels=4",
        "model.net.out_channels=4",
    ]
    done = run(
        "train.py", "experiment=teacher_mini", f"model.pipeline={tiny_pipeline}", *small, *tiny_data(shards),
        "trainer.max_steps=3", "callbacks.samples.steps=[2]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("train.py", *tiny, "model.pipeline=runs/teacher_mini/0/model", "model.ema_decay=0", "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr


def test_sweep_writes_table_and_plot_without_secrets(run, tiny, tmp_path):
    """The sweep's first job fails. The second job still trains. tests/app/test_sweep_table.py tests a table of two keys."""
    url = "https://user:planted-password@host/planted-hf?token=planted-query"
    override, rest = tiny[0], tiny[1:]
    done = run("train.py", "-m", *rest, "trainer.max_steps=3", override.replace("=", f"='{url}',"), **ENVIRONMENT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "pipeline folder" in message
    [folder] = (tmp_path / "runs/sweeps").iterdir()
    head, _, *lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in (folder / "table.md").open()]
    assert head == ["model.pipeline", "val/loss", "run"]
    assert [loss == "failed" for _, loss, _ in lines] == [True, False]
    pipeline, loss, run_dir = lines[1]
    assert f"model.pipeline={pipeline}" == override
    logged = [row["val/loss"] for row in rows(tmp_path / run_dir) if row["val/loss"]]
    assert float(loss) == pytest.approx(float(logged[-1]), rel=1e-3)
    assert (tmp_path / run_dir / "model/unet").is_dir()
    assert Image.open(folder / "plot.png").width > 300
    assert {path.name for path in folder.iterdir()} >= {"multirun.yaml", "run-0000.json", "run-0001.json"}
    assert planted(done, tmp_path) == {}


def test_ddp_sweep_keeps_folders_apart(run, tiny, tmp_path):
    options = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.max_steps=3", "callbacks.samples.steps=[1]"]
    done = run("train.py", "-m", *tiny, *options, "trainer.devices=1,2", LOCAL_RANK="0", LCM_RUN_ID="0")
    assert done.returncode == 0, done.stderr
    [sweep] = (tmp_path / "runs/sweeps").iterdir()
    notes = [json.loads(file.read_text()) for file in sorted(sweep.glob("run-*.json"))]
    assert [note["run"] for note in notes] == ["runs/lcd_mini/0", "runs/lcd_mini/1"]
    for number, devices in enumerate((1, 2)):
        run_dir = tmp_path / f"runs/lcd_mini/{number}"
        assert OmegaConf.load(run_dir / "config.yaml").trainer.devices == devices
        assert [row["step"] for row in rows(run_dir) if row["train/loss"]] == ["0", "1", "2"]
        assert (run_dir / "model/model_index.json").is_file()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_signal_to_a_sweep_saves_its_job(signum, code, tiny, tmp_path):
    endless = ["trainer.max_steps=100000", "callbacks.samples.steps=[1]", "model/solver=heun,ddim"]
    log, metrics = tmp_path / "log", tmp_path / "runs/lcd_mini/0/metrics.csv"
    sweep = warm.start(command("train.py", "-m", *tiny, *endless), tmp_path, environment(), log)
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert sweep.poll() is None, log.read_text()
        time.sleep(0.1)
    os.kill(sweep.pid, signum)
    assert sweep.wait(300) == code, log.read_text()
    deadline = time.monotonic() + 300
    while "stopped at step" not in log.read_text():  # the job may outlive the sweep
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    assert (tmp_path / "runs/lcd_mini/0/checkpoints/last.ckpt").is_file()
    assert "lcm.core.solvers.heun" in (tmp_path / "runs/lcd_mini/0/config.yaml").read_text()
    assert [path.name for path in (tmp_path / "runs/lcd_mini").iterdir()] == ["0"]


def test_baseline_trains_and_samples(run, tiny_pipeline, shards, tmp_path):
    experiment, steps, w = "guided_distill_mini", 8, 1.5
    done = run(
        "train.py", f"experiment={experiment}", f"model.pipeline={tiny_pipeline}", *tiny_data(shards),
        "trainer.max_steps=8", "callbacks=default",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("sample.py", "prompts=[red apple,rocket]", f"steps={steps}", f"w={w}", "output=out")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out/00001.png").size == (32, 32)
    diffusers_opens = StableDiffusionPipeline.from_pretrained(tmp_path / "runs" / experiment / "0/model")
    images = diffusers_opens("rocket", num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
