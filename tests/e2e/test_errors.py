"""Wrong input: one clear sentence, exit code 1, before training starts."""

import io
import json
import shutil
import tarfile

import pytest

pytestmark = pytest.mark.slow


def complaint(done) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.emma_decay=0.9", "did you mean 'model.ema_decay'?"),
        ("model/solver=ddmi", "model/solver has: ddim"),
        ("model/solvr=ddim", "did you mean 'model/solver'?"),
        ("model.ema_decay=1.5", "model.ema_decay=1.5 is not in [0, 1)"),
        ("model.pipeline=nowhere", "there is no pipeline folder 'nowhere'"),
        ("data.batch_size=0", "data.batch_size=0: expected a whole number from 1"),
        ("trainer.precision=8", "trainer.precision=8: the modules here train in one of 32-true"),
        ("trainer.devices=0", "trainer.devices=0: expected auto, a number from 1"),
        ("trainer.devices=abc", "trainer.devices=abc: expected auto, a number from 1"),
        ("trainer.accelerator=gpu", "No supported gpu backend found!"),
        ("--max_steps=3", "there is no option --max_steps=3: overrides have no dashes, did you mean 'trainer.max_steps=3'?"),
        ("lcd_mini", "'lcd_mini' sets nothing, did you mean 'experiment=lcd_mini'?"),
        ("data.resolution=30", "data.resolution=30 is not a multiple of the VAE's factor 4"),
        ("data.shards=missing/*.tar", "no shards match 'missing/*.tar'"),
        ("model.timesteps.points=5000", "a grid of 5000 points does not fit"),
        ("paths.runs=/proc/nowhere", "set paths.runs to a writable folder"),
        ("ckpt_path=nothing.ckpt", "ckpt_path=nothing.ckpt is not a file"),
        ("ckpt_path=https://example.org/a.ckpt", "ckpt_path must be a local file"),
        ("data.shards=[]", "data.shards=[] names no shards"),
        ("data.shards=.", "data.shards: . is a folder: give its shards, as in './*.tar'"),
        ("trainer.accelerator=gpuu", "invalid accelerator name: `accelerator='gpuu'`"),
        ("model.compile=yess", "model.compile=yess: expected true or false"),
        ("model.objective.skip_steps=2000", "expected a whole number from 1 to 1000"),
        ("name=", "name= is empty"),
    ],
)
def test_train_refuses(run, tiny, override, says, tmp_path):
    assert says in complaint(run("train.py", *tiny, override))
    assert not list(tmp_path.glob("runs/*/*")), "a run that never was"


def test_a_folder_that_is_not_a_pipeline_or_predicts_something_unknown(run, tiny, tiny_pipeline, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a pipeline folder: it lacks unet" in complaint(run("train.py", *tiny, f"model.pipeline={tmp_path}/empty"))
    broken = shutil.copytree(tiny_pipeline, tmp_path / "broken")
    file = broken / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "flow"}))
    assert "unknown prediction_type 'flow'" in complaint(run("train.py", *tiny, f"model.pipeline={broken}"))


def test_shards_without_captions(run, tiny, tmp_path):
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"png"))
    assert "has no captions" in complaint(run("train.py", *tiny, f"data.shards={tmp_path}/bare.tar"))


def test_a_diverging_loss_stops_and_keeps_the_last_good_checkpoint(run, tiny, tmp_path):
    import torch

    says = complaint(run("train.py", *tiny, "model.optimizer.lr=1e25", "trainer.max_steps=50"))
    assert "non-finite" in says
    last = tmp_path / "runs/lcd_mini/0/checkpoints/last.ckpt"
    if last.is_file():
        weights = torch.load(last, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_sample_refuses_more_steps_than_the_grid_and_empty_prompts(run, tiny, tiny_pipeline, tmp_path):
    assert "use 1 to 50" in complaint(run("sample.py", f"pipeline={tiny_pipeline}", "sampler=lcm", "steps=60", "prompts=a"))
    (tmp_path / "p.txt").write_text("\n")
    assert "has no prompts" in complaint(run("sample.py", f"pipeline={tiny_pipeline}", "prompts=p.txt"))
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    assert "in UTF-8" in complaint(run("sample.py", f"pipeline={tiny_pipeline}", "prompts=p.txt"))
    assert "prompts= has none" in complaint(run("sample.py", f"pipeline={tiny_pipeline}", "prompts="))
    assert "at one steps=" in complaint(run("sample.py", f"pipeline={tiny_pipeline}", "prompts=a", "steps=[1,2]"))
    assert "device=foo is none" in complaint(run("sample.py", f"pipeline={tiny_pipeline}", "prompts=a", "device=foo"))
