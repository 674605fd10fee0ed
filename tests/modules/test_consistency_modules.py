"""Distillation and fine-tuning: the teacher never changes, the student starts from it, the target follows the student."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.objectives.finetuning import LatentConsistencyFinetuning
from lcm.core.process import VP
from lcm.core.timesteps import full, grid
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec, load_network, load_process, read_lcm_json
from lcm.models.text_to_image import TextToImage
from lcm.modules.consistency import ConsistencyModule
from lcm.modules.lr_schedules import constant
from tests.modules.conftest import new_module

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


class Online(L.Callback):
    """Record the weights of the student after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(parameters_to_vector(module.net.parameters()).detach().clone())


def test_teacher_never_changes_and_target_gets_no_gradient(training: Make, data: Make, fit: Make) -> None:
    module = training("distillation", lr=0.1)
    before = parameters_to_vector(module.frozen["teacher"].parameters()).clone()
    fit(module, data(), 3, precision="bf16-mixed")
    teacher = module.frozen["teacher"]
    assert torch.equal(parameters_to_vector(teacher.parameters()), before.to(teacher.dtype))
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for net in (teacher, module.target_net) for p in net.parameters())
    assert all(p.grad is not None for p in module.net.parameters())


def test_teacher_is_not_in_the_module_tree(training: Make) -> None:
    module = training("distillation")
    teacher = {id(p) for p in module.frozen["teacher"].parameters()}
    assert not teacher & {id(p) for p in module.parameters()}
    assert {name.split(".")[0] for name in module.state_dict()} == {"net", "target_net"}
    assert training("finetuning").frozen == {}


def test_target_matches_closed_form_average(training: Make, data: Make, fit: Make) -> None:
    """After n optimizer steps, the target is `theta-_n = mu^n theta_0 + (1 - mu) sum_i mu^(n - i) theta_i`.

    The number of accumulated batches does not change this average.
    """
    mu, module, online = 0.8, training("distillation", ema_decay=0.8), Online()
    start = parameters_to_vector(module.net.parameters()).detach().clone()
    fit(module, data(), 4, callbacks=[online], accumulate_grad_batches=3)
    moved = sum((1 - mu) * mu ** (4 - i) * theta for i, theta in enumerate(online.steps, start=1))
    torch.testing.assert_close(
        parameters_to_vector(module.target_net.parameters()), mu**4 * start + moved, rtol=1e-5, atol=1e-6
    )
    assert len(online.steps) == 4


def test_zero_decay_makes_the_student_its_target(training: Make, data: Make, fit: Make) -> None:
    module = training("distillation", ema_decay=0)
    networks = module.denoisers(module.net)
    assert module.target_net is None
    assert networks.target is networks.online
    assert {name.split(".")[0] for name in module.state_dict()} == {"net"}
    fit(module, data(), 2)


def test_zero_initialised_student_equals_teacher(training: Make, batch: LatentBatch) -> None:
    module = training("distillation")
    nets = module.denoisers(module.net)
    t, ws = torch.tensor([19, 339, 659, 999]), torch.tensor([0.0, 2.0, 8.0, 14.0])
    with torch.no_grad():
        assert torch.equal(nets.online.output(batch.z0, t, batch.cond, ws), nets.teacher.output(batch.z0, t, batch.cond, None))


def test_random_projection_differs_from_teacher(training: Make, batch: LatentBatch) -> None:
    module = training("distillation", zero_init=False)
    nets = module.denoisers(module.net)
    t, ws = torch.tensor([19, 339, 659, 999]), torch.full((4,), 8.0)
    with torch.no_grad():
        assert not torch.allclose(
            nets.online.output(batch.z0, t, batch.cond, ws), nets.teacher.output(batch.z0, t, batch.cond, None)
        )


@pytest.mark.parametrize("ema_decay", [-0.1, 1.0])
def test_ema_decay_out_of_range_is_refused(ema_decay: float, training: Make) -> None:
    with pytest.raises(UserError, match="ema_decay"):
        training("distillation", ema_decay=ema_decay)


def test_empty_w_range_is_refused(training: Make) -> None:
    with pytest.raises(UserError, match=r"model\.w_min"):
        training("finetuning", w_min=3.0, w_max=2.0)


@pytest.mark.parametrize(("kind", "eval_ema"), [("distillation", 0.5), ("finetuning", None)])
def test_saved_folder_holds_the_student(
    kind: str, eval_ema: float | None, training: Make, data: Make, fit: Make, tmp_path: Path
) -> None:
    module = training(kind, eval_ema=eval_ema, w_min=1.0, w_max=5.0)
    fit(module, data(), 2)
    module.save_model(folder := str(tmp_path / "model"))
    best = module.net if eval_ema is None else module.ema_net
    loaded = load_network(folder)
    assert torch.equal(parameters_to_vector(loaded.parameters()), parameters_to_vector(best.parameters()).half().float())
    assert TextToImage.load(folder).consistency
    assert load_process(folder).config == module.process.config
    assert read_lcm_json(folder).items() >= {"steps": 2, "w_min": 1.0, "w_max": 5.0}.items()
    assert TextToImage.load(folder).latents(["rocket"], [0], steps=2, w=3.0).isfinite().all()


@pytest.mark.parametrize(("kind", "points"), [("lora", 40), ("distillation", None)])
def test_sampling_uses_trained_timesteps(
    kind: str, points: int | None, training: Make, codec: LatentCodec, tmp_path: Path
) -> None:
    """This package and diffusers sample at trained timesteps.

    A model that is trained on the whole schedule samples on the grid of 50 points.
    """
    module = training(kind, timesteps=partial(grid, points=points) if points else full)
    module.save_model(folder := str(tmp_path / "model"))
    scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(4)
    for model in (module.text_to_image(codec), TextToImage.load(folder)):
        place = model.sampler(None)[1]
        assert set(place(4)) <= set(module.objective.timesteps.tolist())
        assert place(4) == scheduler.timesteps.tolist()
        assert place(points or 50)[-1] == 1000 // (points or 50) - 1


def test_trained_timesteps_fit_the_process(training: Make, tiny_pipeline: Path) -> None:
    module, short, base = training("finetuning"), VP(num_train_timesteps=500), str(tiny_pipeline)
    options = {"optimizer": torch.optim.AdamW, "lr_schedule": constant, "loss": module.objective.distance}
    for timesteps, first in ((grid, 9), (full, 20)):
        tuned = ConsistencyModule(
            load_network(base),
            short,
            pipeline=base,
            objective=LatentConsistencyFinetuning,
            timesteps=timesteps,
            w_min=2.0,
            w_max=14.0,
            **options,
        )
        assert (tuned.objective.timesteps[0], tuned.objective.timesteps[-1]) == (first, 499)


def test_guidance_lr_multiplier_scales_the_first_step(training: Make, data: Make, fit: Make) -> None:
    """AdamW's first step moves every weight that has a gradient by the learning rate."""
    plain, fast = training("distillation"), training("distillation", guidance_lr_multiplier=10.0)
    for module in (plain, fast):
        fit(module, data(), 1)
    moved, further = (module.net.time_embedding.cond_proj.weight.detach() for module in (plain, fast))
    assert torch.allclose(further, 10 * moved, rtol=1e-4)
    assert moved.abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(fast.net.conv_in.weight, plain.net.conv_in.weight)


def test_fine_tuning_starts_from_the_student(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    distilled = training("distillation")
    fit(distilled, data(), 2)
    distilled.save_model(folder := str(tmp_path / "student"))
    tuned = new_module(Path(folder), "finetuning")
    assert torch.equal(parameters_to_vector(tuned.net.parameters()), parameters_to_vector(load_network(folder).parameters()))
    assert float(tuned.net.time_embedding.cond_proj.weight.detach().abs().sum()) > 0
    fit(tuned, data(), 1)


def test_only_training_uses_compiled_networks(
    training: Make, data: Make, fit: Make, codec: LatentCodec, batch: LatentBatch, monkeypatch: pytest.MonkeyPatch
):
    called: list[UNet2DConditionModel] = []

    def compiled(net: UNet2DConditionModel, dynamic: bool) -> Callable[..., Any]:
        assert dynamic is False
        return lambda *args, **kwargs: called.append(net) or net(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    module = training("distillation", compile=True)
    fit(module, data(), 2)
    assert called == [module.frozen["teacher"], module.target_net, module.net] * 2
    module.eval()
    draws = module.draws(module.objective.draw, batch.z0, 0, "val")
    module.objective.loss(module.denoisers(module.net), batch, draws)
    module.text_to_image(codec).latents(["rocket"], [0], steps=1, w=3.0)
    assert len(called) == 6


def test_each_batch_shape_gets_a_graph(training: Make, data: Make, fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile stops at 8 graphs of one function, unless its limit is raised.

    This test starts with a limit of 2.
    """
    graphs: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    shapes = [[32, 32], [32, 16]]
    module = training("finetuning", compile=True)
    fit(module, data(buckets=shapes), 1)
    module.train()
    monkeypatch.setattr("lcm.modules.latent.log_train", lambda *_: None)  # the steps run outside the trainer's loop
    for height, width in shapes:
        z0 = torch.randn(4, 4, height // 4, width // 4)
        cond, uncond = {"states": torch.randn(4, 16, 16)}, {"states": torch.randn(1, 16, 16)}
        module.training_step(LatentBatch(z0, cond, uncond, [], []), 0)
    assert len(graphs) == 2 * len(shapes)  # the graphs of the student and of the target


@pytest.mark.parametrize(("gpu", "language"), [(False, r"a C\+\+ compiler"), (True, "a C compiler")])
def test_compile_without_a_compiler_is_refused(
    gpu: bool, language: str, training: Make, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    monkeypatch.delenv("CC", raising=False)
    starts: dict[str, Callable[[], Any]] = {
        "model.compile": lambda: training("distillation", compile=True),
        "data.codec.compile": lambda: load_codec(str(tiny_pipeline), compile=True),
        "compile": lambda: TextToImage.load(str(tiny_pipeline), compile=True),
    }
    for option, start in starts.items():
        with pytest.raises(
            UserError, match=f"^{option}=true needs {language}, and there is none: install g.. or set {option}=false"
        ):
            start()
