"""Wrong input gives one clear message and exit code 1, before training starts. Unit tests have the other messages."""

import pytest
import torch

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
        ("model.ema_decay=1.5", "model.ema_decay=1.5 is not in [0, 1)"),  # refused by a constructor
        ("trainer.accelerator=gpuu", "invalid accelerator name: `accelerator='gpuu'`"),  # refused by Lightning
    ],
)
def test_train_refuses(run, tiny, override, says, tmp_path):
    assert says in complaint(run("train.py", *tiny, override))
    assert not list(tmp_path.glob("runs/*")), "a run folder without a run"


def test_diverging_loss_keeps_last_checkpoint(run, tiny, tmp_path):
    message = complaint(run("train.py", *tiny, "model.optimizer.lr=1e25", "trainer.max_steps=50"))
    assert "non-finite" in message
    last = tmp_path / "runs/lcd_mini/0/checkpoints/last.ckpt"
    if last.is_file():
        weights = torch.load(last, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())
