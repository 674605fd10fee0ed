"""A resumed training follows its configuration: a changed setting takes effect, or is refused in one sentence."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import OneCycleLR

from lcm.core.errors import UserError
from lcm.modules.latent import LatentModule
from lcm.modules.lr_schedules import cosine
from tests.conftest import tiny_unet

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


class Groups(L.Callback):
    """Record the optimizer's settings in each step."""

    def __init__(self) -> None:
        self.steps: list[list[dict[str, Any]]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step >= len(self.steps):
            groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            self.steps.append(groups)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the checkpoints of trainings without options, one per kind."""
    return tmp_path_factory.mktemp("unchanged")


@pytest.fixture
def resume(training: Make, data: Make, fit: Make, tmp_path: Path, unchanged: Path) -> Make:
    """`resume(kind, before, after)` resumes a checkpoint of three steps for two steps, and returns the module and trainer."""

    def run(kind: str, before: dict[str, Any], after: dict[str, Any], **trainer: Any) -> tuple[LatentModule, L.Trainer]:
        checkpoint = tmp_path / "3.ckpt"
        written = checkpoint if before else unchanged / f"{kind}.ckpt"
        if before or not written.exists():
            fit(training(kind, **before), data(), 3).save_checkpoint(written)
        if not before:
            shutil.copy(written, checkpoint)
        module = training(kind, **after)
        return module, fit(module, data(), 5, ckpt_path=tmp_path / "3.ckpt", **trainer)

    return run


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: group.get(name) for name in ("lr", "betas", "eps", "weight_decay", "momentum")} for group in groups]


OTHERS = {
    "weight_decay, betas and eps": {"optimizer": partial(AdamW, lr=1e-3, weight_decay=0.5, betas=(0.5, 0.6), eps=1e-3)},
    "schedule": {"lr_schedule": partial(cosine, warmup=2)},
    "a schedule that moves betas": {"lr_schedule": lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=steps + 1)},
    "guidance_lr_multiplier": {"guidance_lr_multiplier": 10.0},
    "optimizer without moments": {"optimizer": partial(SGD, lr=1e-3)},
    "optimizer of other moments": {"optimizer": partial(RMSprop, lr=1e-3, momentum=0.9)},
    "more moments": {"optimizer": partial(AdamW, lr=1e-3, amsgrad=True)},
}


@pytest.mark.parametrize("change", OTHERS)
def test_changed_setting_takes_effect_on_resume(change: str, resume: Make, training: Make, data: Make, fit: Make) -> None:
    resumed, straight = Groups(), Groups()
    resumed.steps = [[], [], []]
    resume("distillation", {}, OTHERS[change], callbacks=[resumed])
    fit(training("distillation", **OTHERS[change]), data(), 5, callbacks=[straight])
    assert list(map(settings, resumed.steps[3:])) == list(map(settings, straight.steps[3:]))


def test_computed_group_numbers_are_resumed(resume: Make) -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    options = {"optimizer": partial(Counting, lr=1e-3)}
    _, trainer = resume("distillation", options, options)
    assert {group["k"] for group in trainer.optimizers[0].param_groups} == {5}


def test_length_counts_over_resumes(resume: Make) -> None:
    module, _ = resume("diffusion", {}, {})
    assert module.lcm_json()["images"] == 5 * 4
    assert module.length.seconds > 0


def test_changed_patience_takes_effect(resume: Make, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    def stop(patience: int) -> EarlyStopping:
        return EarlyStopping("train/loss", patience=patience, check_on_train_epoch_end=True)

    fit(training("distillation"), data(), 3, callbacks=[stop(1)]).save_checkpoint(tmp_path / "3.ckpt")
    other = stop(9)
    fit(training("distillation"), data(), 5, ckpt_path=tmp_path / "3.ckpt", callbacks=[other])
    assert other.patience == 9


@pytest.mark.parametrize(
    ("kind", "option", "network", "on", "off"),
    [
        ("distillation", "ema_decay", "target_net", 0.5, 0.0),
        ("lora", "eval_ema", "ema_net", 0.5, None),
    ],
)
def test_average_switches_on_and_off_on_resume(
    kind: str, option: str, network: str, on: Any, off: Any, resume: Make, training: Make, data: Make, fit: Make,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    started = f"the average of model.{option} starts from the trained network, because the checkpoint lacks it"
    dropped = f"the checkpoint's average of model.{option} is dropped: this run keeps none"
    module, _ = resume(kind, {option: on}, {option: off})
    assert getattr(module, network) is None
    assert dropped in capsys.readouterr().out
    resume(kind, {option: off}, {option: on})
    assert started in capsys.readouterr().out
    begun = training(kind, **{option: on})
    content = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    begun.load_state_dict(content)
    state = begun.state_dict()
    trained = [name for name in content if name.startswith("net.")]
    assert trained
    assert all(torch.equal(state[name.replace("net", network, 1)], content[name]) for name in trained)


@pytest.mark.parametrize(
    ("kind", "before", "after", "sentence"),
    [
        (
            "lora",
            {"adapters": {"rank": 4}},
            {"adapters": {"rank": 2}},
            r"does not fit this training's network, \d+ of its tensors differ: net\.\S+ was \[",
        ),
        ("lora", {}, {"adapters": {"rank": 4, "target_modules": ["to_q"]}}, "tensors differ: net.* is in the checkpoint alone"),
        ("distillation", {"zero_init": True}, {"zero_init": False}, "model.zero_init was True when this training began"),
    ],
)
def test_fixed_setting_change_is_refused(
    kind: str, before: dict[str, Any], after: dict[str, Any], sentence: str, resume: Make
) -> None:
    with pytest.raises(UserError, match=sentence):
        resume(kind, before, after)


def test_another_network_is_refused(
    training: Make, data: Make, fit: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(training("distillation"), data(), 1).save_checkpoint(tmp_path / "1.ckpt")
    for changes in ({"block_out_channels": [32, 32]}, {"time_cond_proj_dim": 8}):
        monkeypatch.setattr("tests.modules.conftest.load_network", lambda _, changes=changes: tiny_unet(**changes))
        with pytest.raises(
            UserError, match=r"the checkpoint does not fit this training's network, \d+ of its tensors differ: net\."
        ):
            fit(training("distillation"), data(), 2, ckpt_path=tmp_path / "1.ckpt")


def test_stages_stay_once_a_student_is_finished(resume: Make, training: Make) -> None:
    with pytest.raises(UserError, match=r"model.steps was \[2, 1\] when this training began and cannot change to \[4, 2\]"):
        resume("guided", {"steps": [2, 1], "match_share": 0.1}, {"steps": [4, 2], "match_share": 0.1})
