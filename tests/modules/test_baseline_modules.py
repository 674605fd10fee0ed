"""Guided distillation goes through its stages; consistency models train and sample in their own form."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lcm.core.networks import conditioned
from lcm.modules.consistency_models import grid_points
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from lcm.checkpoints.atomic import AtomicCheckpointIO
from lcm.command_line import build
from lcm.composition import compose
from lcm.core import sampling
from lcm.core.consistency import cm_consistency_fn
from lcm.core.timesteps import karras
from lcm.errors import UserError
from lcm.export import trained
from lcm.models.generate import LatentModel
from lcm.models.pipeline import load_unet
from lcm.models.student import as_network

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
MODELS = pytest.mark.parametrize("kind", ["cd", "ct"])


def vector(network: torch.nn.Module) -> Tensor:
    return parameters_to_vector(network.parameters()).detach().clone()


class Watch(L.Callback):
    """At every batch: the stage, the student before and after it, and the one it learns from."""

    def __init__(self) -> None:
        self.stages: list[int] = []
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.previous: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.stages.append(module.stage)
        self.after.append(vector(module.best_net))
        self.previous.append(vector(module.previous))


def test_the_stages_share_the_steps(training: Make, data: Make, fit: Make) -> None:
    watch = Watch()
    fit(training("guided", match_share=0.4), data(), 10, callbacks=[watch])
    assert watch.stages == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("eval_ema", [None, 0.5])
def test_each_stage_learns_from_the_finished_student_before_it(
    eval_ema: float | None, training: Make, data: Make, fit: Make
) -> None:
    watch, module = Watch(), training("guided", match_share=0.4, eval_ema=eval_ema)
    start = vector(module.net)
    fit(module, data(), 10, callbacks=[watch])
    assert all(torch.equal(previous, start) for previous in watch.previous[:4])
    for stage in (1, 2, 3):
        finished = watch.after[2 * stage + 1]
        for batch in (2 * stage + 2, 2 * stage + 3):
            assert torch.equal(watch.previous[batch], finished)
    assert not torch.equal(vector(module.best_net), watch.after[7])


def test_the_saved_folder_holds_every_student(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    watch, module = Watch(), training("guided", match_share=0.4, w_min=1.0, w_max=5.0)
    fit(module, data(), 10, callbacks=[watch])
    module.save_model(folder := str(tmp_path / "model"))
    for name, batch in (("unet_4", 5), ("unet_2", 7), ("unet", 9)):
        assert torch.equal(vector(load_unet(folder, name=name)), watch.after[batch].half().float())
    model = LatentModel.load(folder)
    assert list(model.students) == [4, 2, 1]
    images = [model.latents(["rocket"], [0], steps=steps, w=3.0) for steps in (1, 2, 4)]
    assert all(image.isfinite().all() for image in images)
    one_net = [run_ddim(model, model.unet, steps) for steps in (1, 2, 4)]
    assert [torch.equal(a, b) for a, b in zip(images, one_net, strict=True)] == [True, False, False]
    assert torch.equal(images[2], run_ddim(model, model.students[4], 4))
    with pytest.raises(UserError, match="steps=3: this model was distilled for 4, 2, 1 steps"):
        model.latents(["rocket"], [0], steps=3, w=3.0)
    assert StableDiffusionPipeline.from_pretrained(folder).unet.config.time_cond_proj_dim == 256


def run_ddim(model: LatentModel, unet: Any, steps: int) -> Tensor:
    plain = LatentModel(unet, model.schedule, model.codec, consistency=False)
    return plain.latents(["rocket"], [0], steps=steps, w=3.0)


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_guided_distillation_resumes_exactly_before_at_and_after_a_stage_s_end(
    cut: int, training: Make, data: Make, fit: Make, tmp_path: Path
) -> None:
    whole, first, second = (training("guided", match_share=0.4, eval_ema=0.5) for _ in range(3))
    fit(whole, data(), 10)
    # max_steps sets the stages, so the first part is a run of 10 that is stopped.
    trainer = fit(first, data(), 10, callbacks=[StopAt(cut)])
    trainer.save_checkpoint(path := tmp_path / "cut.ckpt")
    assert trainer.global_step == cut
    fit(second, data(), 10, ckpt_path=str(path))
    for name in ("net", "ema_net", "previous"):
        assert torch.equal(vector(getattr(second, name)), vector(getattr(whole, name))), name


@pytest.fixture
def stopped(tiny_pipeline: Path, data: Make, fit: Make, tmp_path: Path) -> Make:
    """`stopped(experiment, step)`: a run of 10 steps in tmp_path that was stopped there; gives its module."""

    def run(experiment: str, step: int) -> Any:
        base = "pipeline" if experiment == "ct_mini" else "teacher"
        cfg = compose("train", [f"experiment={experiment}", f"model.{base}={tiny_pipeline}", "trainer.max_steps=10"])
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        trainer = fit(module := build(cfg.model), data(), 10, callbacks=[StopAt(step)], plugins=[AtomicCheckpointIO()])
        trainer.save_checkpoint(tmp_path / "checkpoints/last.ckpt")
        return module

    return run


class StopAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_the_guided_teacher_never_changes(training: Make, data: Make, fit: Make) -> None:
    module = training("guided", lr=0.1)
    before = vector(module.frozen["teacher"])
    fit(module, data(), 6)
    assert torch.equal(vector(module.frozen["teacher"]), before)


def test_a_checkpoint_goes_on_in_another_run_with_its_students(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    first, old, new = training("guided", match_share=0.4), tmp_path / "0", tmp_path / "1"
    trainer = fit(first, data(), 10, callbacks=[StopAt(9)], default_root_dir=old)
    trainer.save_checkpoint(path := old / "checkpoints/last.ckpt")
    second = training("guided", match_share=0.4)
    fit(second, data(), 10, ckpt_path=str(path), default_root_dir=new)
    second.save_model(str(new / "model"))
    assert list(LatentModel.load(str(new / "model")).students) == [4, 2, 1]
    shutil.rmtree(old / "students")
    with pytest.raises(UserError, match=r"unet_4 is not there: copy it"):
        fit(training("guided", match_share=0.4), data(), 10, ckpt_path=str(path), default_root_dir=tmp_path / "2")


@pytest.mark.parametrize(("step", "students"), [(3, []), (6, [8]), (8, [8, 4])])
def test_an_export_midway_has_the_students_there_are(step: int, students: list[int], stopped: Make, tmp_path: Path) -> None:
    module = stopped("guided_distill_mini", step)
    exported = trained(tmp_path, "last")
    assert exported.facts() == module.facts()
    exported.save_model(folder := str(tmp_path / "model"))
    model = LatentModel.load(folder)
    assert list(model.students) == students
    assert torch.equal(vector(model.unet), vector(module.best_net).half().float())


@pytest.mark.parametrize("max_steps", [-1, 4, 7])
def test_a_training_that_leaves_a_stage_without_a_step_is_a_user_error(
    max_steps: int, training: Make, data: Make, fit: Make
) -> None:
    with pytest.raises(UserError, match=rf"trainer\.max_steps={max_steps} leaves one of 5 stages"):
        fit(training("guided", steps=[8, 4, 2, 1]), data(), max_steps, max_epochs=1, limit_train_batches=1)


@pytest.mark.parametrize("steps", [[], [8, 4, 1], [4, 4]])
def test_steps_that_are_not_halved_are_a_user_error(steps: list[int], training: Make) -> None:
    with pytest.raises(UserError, match=r"model\.steps"):
        training("guided", steps=steps)


@pytest.mark.parametrize("match_share", [0.0, 1.0])
def test_a_share_that_leaves_a_stage_without_steps_is_a_user_error(match_share: float, training: Make) -> None:
    with pytest.raises(UserError, match=r"model\.match_share"):
        training("guided", match_share=match_share)


# consistency models


@MODELS
def test_a_consistency_model_starts_as_the_unet_and_takes_no_w(kind: str, training: Make, tiny_pipeline: Path) -> None:
    module = training(kind)
    assert torch.equal(vector(module.net), vector(load_unet(str(tiny_pipeline))))
    assert module.net.config["time_cond_proj_dim"] is None
    assert (kind == "cd") == ("teacher" in module.frozen)


@MODELS
def test_a_consistency_model_is_sampled_as_it_was_trained(
    kind: str, training: Make, data: Make, fit: Make, tmp_path: Path
) -> None:
    """In its own form, at its own timesteps, whatever w is asked for, one forward a step."""
    module = training(kind, sigma_data=0.7)
    fit(module, data(), 2)
    module.save_model(folder := str(tmp_path / "model"))
    model = LatentModel.load(folder)
    drawn = model.latents(["rocket"], [0], steps=1, w=3.0)
    z = drawn_noise(model)
    denoise = conditioned(as_network(model.unet), model.codec.text(["rocket"])[0], model.schedule)
    f = cm_consistency_fn(denoise, z, torch.tensor([999]), schedule=model.schedule, sigma_data=0.7)
    torch.testing.assert_close(drawn, f)
    assert torch.equal(model.latents(["rocket"], [0], steps=1, w=0.0), drawn)
    run, place = model.sampler(None)
    assert place(2) == [999, model.facts["timesteps"][-1 - len(model.facts["timesteps"]) // 2]]
    assert getattr(run, "func", run) is sampling.consistency


def drawn_noise(model: LatentModel) -> Tensor:
    """The z_T of seed 0: what a sampler without steps gives back."""
    return model.latents(["rocket"], [0], steps=1, w=0.0, sampler=lambda denoise, z, timesteps, **_: z)


def test_the_pair_s_grid_is_karras(training: Make) -> None:
    module = training("cd", points=12)
    assert module.timesteps.tolist() == karras(module.schedule, points=12)[1:].tolist()
    assert module.facts()["timesteps"] == module.timesteps.tolist()


@pytest.mark.parametrize(("progress", "points"), [(0.0, 2), (0.25, 76), (0.5, 107), (1.0, 151)])
def test_golden_grid_of_consistency_training(progress: float, points: int) -> None:
    """2303.01469, appendix C with s_0 = 2, s_1 = 150."""
    assert grid_points(progress, 2, 150) == points


def test_the_grid_and_mu_of_consistency_training_grow(training: Make, data: Make, fit: Make) -> None:
    module, seen = training("ct", points=40), []

    class See(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            seen.append((len(module.timesteps) + 1, module.ema_decay))

    fit(module, data(), 4, callbacks=[See()])
    sizes, decays = zip(*seen, strict=True)
    assert sizes[0] == 2
    assert list(sizes) == sorted(set(sizes))
    points = [grid_points(step / 4, 2, 40) for step in range(4)]
    assert list(decays) == pytest.approx([math.exp(2 * math.log(0.9) / n) for n in points])


def test_the_grid_of_consistency_training_ends_with_every_timestep(training: Make) -> None:
    module = training("ct", points=1000)
    module.trainer = L.Trainer(max_steps=1000, accelerator="cpu", logger=False, enable_checkpointing=False)
    module.grow(999)
    assert module.now == 1000


def test_a_checkpoint_of_consistency_training_is_of_the_grid_at_its_step(
    training: Make, data: Make, fit: Make, tmp_path: Path
) -> None:
    first, second, path = training("ct", points=40), training("ct", points=40), tmp_path / "cut.ckpt"
    fit(first, data(), 4, callbacks=[StopAt(2)]).save_checkpoint(path)
    assert len(first.timesteps) < len(second.timesteps)
    fit(second, data(), 4, ckpt_path=str(path), callbacks=[(start := AtStart())])
    assert start.facts["timesteps"] == first.facts()["timesteps"]
    assert start.ema_decay == first.ema_decay


def test_an_export_of_consistency_training_is_of_the_grid_at_its_step(stopped: Make, tmp_path: Path) -> None:
    module = stopped("ct_mini", 2)
    assert trained(tmp_path, "last").facts() == module.facts()


class AtStart(L.Callback):
    """What a module is before its first batch."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.facts, self.ema_decay = module.facts(), module.ema_decay


@pytest.mark.parametrize("max_steps", [-1, 0])
def test_consistency_training_without_a_length_is_a_user_error(max_steps: int, training: Make, data: Make, fit: Make) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        fit(training("ct"), data(), max_steps, max_epochs=1, limit_train_batches=1)
