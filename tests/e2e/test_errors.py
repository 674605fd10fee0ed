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
        ("model.emma_decay=0.9", "did you mean 'model.ema_decay'?"),  # refused while the configuration is composed
        ("data.batch_size=0", "data.batch_size=0: expected a whole number from 1"),  # by its annotation
        ("model.ema_decay=1.5", "model.ema_decay=1.5 is not in [0, 1)"),  # by the constructor
        ("trainer.accelerator=gpuu", "invalid accelerator name: `accelerator='gpuu'`"),  # by Lightning
        ("model.pipeline=nowhere", "there is no pipeline folder 'nowhere'"),  # by a file
        ("trainer.devices=0", "trainer.devices=0: expected auto, a number from 1"),
        ("trainer.accelerator=gpu", "with trainer=default trainer.accelerator=cpu"),
        ("data.resolution=30", "data.resolution=30 is not a multiple of the VAE's factor 4"),
        ("data.shards=missing/*.tar", "no shards match 'missing/*.tar'"),
        ("data.shards=.", "data.shards: . is a folder: give its shards, as in './*.tar'"),
        ("model.timesteps.points=5000", "a grid of 5000 points does not fit"),
        ("paths.runs=/proc/nowhere", "set paths.runs to a writable folder"),
        ("ckpt_path=nothing.ckpt", "ckpt_path=nothing.ckpt is not a file"),
        ("name=", "name= is empty"),
        ("name=../x", "name=../x is a path outside paths.runs: give a name"),
    ],
)
def test_train_refuses(run, tiny, override, says, tmp_path):
    assert says in complaint(run("train.py", *tiny, override))
    assert not list(tmp_path.glob("runs/*/*")), "a run folder without a run"


def test_train_refuses_pipeline_folder(run, tiny, tiny_pipeline, tmp_path):
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


def test_diverging_loss_keeps_last_checkpoint(run, tiny, tmp_path):
    import torch

    says = complaint(run("train.py", *tiny, "model.optimizer.lr=1e25", "trainer.max_steps=50"))
    assert "non-finite" in says
    last = tmp_path / "runs/lcd_mini/0/checkpoints/last.ckpt"
    if last.is_file():
        weights = torch.load(last, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sampler=lcm", "steps=60", "prompts=a"], "use 1 to 50"),
        (["prompts=p.txt"], "has no prompts"),
        (["prompts=a", "device=foo"], "unknown device=foo"),
        (["prompts=a", "captions={blip: 1}"], "set prompts=val, or leave captions out"),
    ],
)
def test_sample_refuses(run, tiny_pipeline, args, says, tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    assert says in complaint(run("sample.py", f"pipeline={tiny_pipeline}", *args))


@pytest.mark.parametrize(
    ("program", "args", "says"),
    [
        ("evaluate", ["samples=1"], "samples=1: expected a whole number from 2"),
        ("encode", [], "out has no default"),
        ("export", ["run=nowhere"], "nowhere is not the folder of a run"),
        ("index", ["data.shards=nowhere.tar"], "no shards match 'nowhere.tar'"),
        ("preview", ["data.shards=nowhere.tar"], "no shards match 'nowhere.tar'"),
        ("bench", ["parts=speed"], "parts=speed is not a list"),
    ],
)
def test_program_refuses(run, program, args, says):
    assert says in complaint(run(f"lcm.{program}", *args))
