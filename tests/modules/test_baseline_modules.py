"""Guided distillation trains in stages. Consistency models train and sample with their own function and timesteps."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.core import sampling
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import Denoiser
from lcm.core.errors import UserError
from lcm.core.objectives.consistency_models import grid_points
from lcm.core.timesteps import karras
from lcm.export import trained
from lcm.models.pipeline import load_network
from lcm.models.student import as_network
from lcm.models.text_to_image import TextToImage
from lcm.runtime.checkpoint_io import AtomicCheckpointIO

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
MODELS = pytest.mark.parametrize("kind", ["cd", "ct"])


def vector(network: torch.nn.Module) -> Tensor:
    return parameters_to_vector(network.parameters()).detach().clone()


class Watch(L.Callback):
    """Record after every batch the stage, the student and the previous student, from which the student learns."""

    def __init__(self) -> None:
        self.stages: list[int] = []
        self.after: list[Tensor] = []
        self.previous: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.stages.append(module.stage)
        self.after.append(vector(module.best_net))
        self.previous.append(vector(module.previous))


def test_stages_share_the_steps(training: Make, data: Make, fit: Make) -> None:
    watch = Watch()
    fit(training("guided", match_share=0.4), data(), 10, callbacks=[watch])
    assert watch.stages == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_stage_learns_from_the_previous_student(training: Make, data: Make, fit: Make) -> None:
    watch, module = Watch(), training("guided", match_share=0.4, eval_ema=0.5)
    start = vector(module.net)
    fit(module, data(), 10, callbacks=[watch])
    assert all(torch.equal(previous, start) for previous in watch.previous[:4])
    for stage in (1, 2, 3):
        finished = watch.after[2 * stage + 1]
        for batch in (2 * stage + 2, 2 * stage + 3):
            assert torch.equal(watch.previous[batch], finished)
    assert not torch.equal(vector(module.best_net), watch.after[7])


def test_saved_folder_holds_every_student(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    watch, module = Watch(), training("guided", match_share=0.4, w_min=1.0, w_max=5.0)
    fit(module, data(), 10, callbacks=[watch])
    module.save_model(folder := str(tmp_path / "model"))
    for name, batch in (("unet_4", 5), ("unet_2", 7), ("unet", 9)):
        assert torch.equal(vector(load_network(folder, name=name)), watch.after[batch].half().float())
    model = TextToImage.load(folder)
    assert list(model.students) == [4, 2, 1]
    images = [model.latents(["rocket"], [0], steps=steps, w=3.0) for steps in (1, 2, 4)]
    assert all(image.isfinite().all() for image in images)
    one_net = [run_ddim(model, model.net, steps) for steps in (1, 2, 4)]
    assert [torch.equal(a, b) for a, b in zip(images, one_net, strict=True)] == [True, False, False]
    assert torch.equal(images[2], run_ddim(model, model.students[4], 4))
    with pytest.raises(UserError, match="steps=3: this model was distilled for 4, 2, 1 steps"):
        model.latents(["rocket"], [0], steps=3, w=3.0)
    assert StableDiffusionPipeline.from_pretrained(folder).unet.config.time_cond_proj_dim == 256


def run_ddim(model: TextToImage, net: Any, steps: int) -> Tensor:
    plain = TextToImage(model.family, net, model.process, model.prediction_type, model.codec)
    return plain.latents(["rocket"], [0], steps=steps, w=3.0)


@pytest.mark.parametrize("cut", [4, 5])
def test_resume_around_a_stage_end_is_exact(cut: int, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    whole, first, second = (training("guided", match_share=0.4, eval_ema=0.5) for _ in range(3))
    fit(whole, data(), 10)
    # max_steps determines the stages, so the first part is a run of 10 steps that stops early.
    trainer = fit(first, data(), 10, callbacks=[StopAt(cut)])
    trainer.save_checkpoint(path := tmp_path / "cut.ckpt")
    assert trainer.global_step == cut
    fit(second, data(), 10, ckpt_path=str(path))
    for name in ("net", "ema_net", "previous"):
        assert torch.equal(vector(getattr(second, name)), vector(getattr(whole, name))), name


@pytest.fixture
def stopped(tiny_pipeline: Path, data: Make, fit: Make, tmp_path: Path) -> Make:
    """`stopped(experiment, step)` stops a run of 10 steps in tmp_path after a step, and returns its module."""

    def run(experiment: str, step: int) -> Any:
        cfg = compose("train", [f"experiment={experiment}", f"model.pipeline={tiny_pipeline}", "trainer.max_steps=10"])
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


def test_guided_teacher_never_changes(training: Make, data: Make, fit: Make) -> None:
    module = training("guided", lr=0.1)
    before = vector(module.frozen["teacher"])
    fit(module, data(), 6)
    assert torch.equal(vector(module.frozen["teacher"]), before)


def test_resume_in_another_run_copies_students(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    first, old, new = training("guided", match_share=0.4), tmp_path / "0", tmp_path / "1"
    trainer = fit(first, data(), 10, callbacks=[StopAt(9)], default_root_dir=old)
    trainer.save_checkpoint(path := old / "checkpoints/last.ckpt")
    second = training("guided", match_share=0.4)
    fit(second, data(), 10, ckpt_path=str(path), default_root_dir=new)
    second.save_model(str(new / "model"))
    assert list(TextToImage.load(str(new / "model")).students) == [4, 2, 1]
    shutil.rmtree(old / "students")
    with pytest.raises(UserError, match=r"unet_4 is missing: copy it"):
        fit(training("guided", match_share=0.4), data(), 10, ckpt_path=str(path), default_root_dir=tmp_path / "2")


@pytest.mark.parametrize(("step", "students"), [(3, []), (8, [8, 4])])
def test_export_midway_has_the_finished_students(step: int, students: list[int], stopped: Make, tmp_path: Path) -> None:
    module = stopped("guided_distill_mini", step)
    exported = trained(tmp_path, "last")
    assert exported.lcm_json() == module.lcm_json()
    exported.save_model(folder := str(tmp_path / "model"))
    model = TextToImage.load(folder)
    assert list(model.students) == students
    assert torch.equal(vector(model.net), vector(module.best_net).half().float())


@pytest.mark.parametrize("max_steps", [-1, 7])
def test_stage_without_a_step_is_refused(max_steps: int, training: Make, data: Make, fit: Make) -> None:
    with pytest.raises(UserError, match=rf"trainer\.max_steps={max_steps} leaves one of 5 stages"):
        fit(training("guided", steps=[8, 4, 2, 1]), data(), max_steps, max_epochs=1, limit_train_batches=1)


@pytest.mark.parametrize("steps", [[], [8, 4, 1]])
def test_steps_must_be_halved(steps: list[int], training: Make) -> None:
    with pytest.raises(UserError, match=r"model\.steps"):
        training("guided", steps=steps)


def test_match_share_out_of_range_is_refused(training: Make) -> None:
    with pytest.raises(UserError, match=r"model\.match_share"):
        training("guided", match_share=1.0)


# consistency models


@MODELS
def test_consistency_model_starts_as_the_unet(kind: str, training: Make, tiny_pipeline: Path) -> None:
    module = training(kind)
    assert torch.equal(vector(module.net), vector(load_network(str(tiny_pipeline))))
    assert module.net.config["time_cond_proj_dim"] is None
    assert (kind == "cd") == ("teacher" in module.frozen)


@MODELS
def test_consistency_model_samples_as_trained(kind: str, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    """A saved model samples with its own function and timesteps, for any w, in one forward pass per step."""
    module = training(kind, **{"objective.sigma_data": 0.7})
    fit(module, data(), 2)
    module.save_model(folder := str(tmp_path / "model"))
    model = TextToImage.load(folder)
    drawn = model.latents(["rocket"], [0], steps=1, w=3.0)
    z = drawn_noise(model)
    denoiser = Denoiser(as_network(model.family, model.net), model.process, model.prediction_type)
    denoise = denoiser.bound(model.codec.conditions(["rocket"], z)[0])
    f = cm_consistency_fn(denoise, z, torch.tensor([999]), process=model.process, sigma_data=0.7)
    torch.testing.assert_close(drawn, f)
    assert torch.equal(model.latents(["rocket"], [0], steps=1, w=0.0), drawn)
    run, place = model.sampler(None)
    assert place(2) == [999, model.metadata["timesteps"][-1 - len(model.metadata["timesteps"]) // 2]]
    assert getattr(run, "func", run) is sampling.consistency


def drawn_noise(model: TextToImage) -> Tensor:
    """Return the z_T of seed 0, which a sampler without steps returns unchanged."""
    return model.latents(["rocket"], [0], steps=1, w=0.0, sampler=lambda denoise, z, timesteps, **_: z)


def test_cd_grid_is_karras(training: Make) -> None:
    module = training("cd", **{"objective.points": 12})
    timesteps = module.objective.timesteps.tolist()
    assert timesteps == karras(module.process, points=12)[1:].tolist()
    assert module.lcm_json()["timesteps"] == timesteps


def test_ct_grid_matches_golden_values() -> None:
    """The expected values follow appendix C of arXiv 2303.01469 with s_0 = 2 and s_1 = 150."""
    assert [grid_points(progress, 2, 150) for progress in (0.0, 0.25, 0.5, 1.0)] == [2, 76, 107, 151]


def test_ct_grid_and_mu_grow(training: Make, data: Make, fit: Make) -> None:
    module, seen = training("ct", **{"objective.points": 40}), []

    class See(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            seen.append((len(module.objective.timesteps) + 1, module.objective.target_decay(module.ema_decay)))

    fit(module, data(), 4, callbacks=[See()])
    sizes, decays = zip(*seen, strict=True)
    assert sizes[0] == 2
    assert list(sizes) == sorted(set(sizes))
    points = [grid_points(step / 4, 2, 40) for step in range(4)]
    assert list(decays) == pytest.approx([math.exp(2 * math.log(0.9) / n) for n in points])


def test_ct_grid_ends_with_every_timestep(training: Make) -> None:
    objective = training("ct", **{"objective.points": 1000}).objective
    objective.advance(999, 1000)
    assert objective.points_now == 1000


def test_ct_resume_restores_the_grid(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    first, second = (training("ct", **{"objective.points": 40}) for _ in range(2))
    fit(first, data(), 4, callbacks=[StopAt(2)]).save_checkpoint(path := tmp_path / "cut.ckpt")
    assert len(first.objective.timesteps) < len(second.objective.timesteps)
    fit(second, data(), 4, ckpt_path=str(path), callbacks=[(start := AtStart())])
    assert start.facts["timesteps"] == first.lcm_json()["timesteps"]
    assert start.decay == first.objective.target_decay(first.ema_decay)


def test_ct_export_has_the_grid_of_its_step(stopped: Make, tmp_path: Path) -> None:
    module = stopped("ct_mini", 2)
    assert trained(tmp_path, "last").lcm_json() == module.lcm_json()


class AtStart(L.Callback):
    """Record the contents of lcm.json and the target decay before the first batch."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.facts, self.decay = module.lcm_json(), module.objective.target_decay(module.ema_decay)


def test_ct_needs_max_steps(training: Make, data: Make, fit: Make) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        fit(training("ct"), data(), -1, max_epochs=1, limit_train_batches=1)
