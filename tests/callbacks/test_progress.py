"""The progress line has the step, the total and the time left, also in a log file and after a resume."""

import re

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from lcm.callbacks.progress import Progress


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(1)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, bar, max_steps, ckpt_path=None):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=max_steps, max_epochs=-1, default_root_dir=folder, callbacks=[bar], **options)
    trainer.fit(Model(), DataLoader(Endless(), batch_size=1), ckpt_path=ckpt_path)
    return trainer


def test_time_left_is_shown_for_an_endless_stream(tmp_path, capsys):
    fit(tmp_path, Progress(), 4).save_checkpoint(tmp_path / "last.ckpt")
    text = capsys.readouterr().err
    assert "training:   0%" in text
    assert re.search(r"4/4 \[[\d:]+<[\d:]+", text)
    fit(tmp_path, Progress(), 8, tmp_path / "last.ckpt")
    assert "4/8" in capsys.readouterr().err


def test_finished_training_is_named(tmp_path, capsys):
    fit(tmp_path, Progress(), 2).save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    fit(tmp_path, Progress(), 2, tmp_path / "last.ckpt")
    assert "the checkpoint is at step 2 of trainer.max_steps=2" in capsys.readouterr().out
