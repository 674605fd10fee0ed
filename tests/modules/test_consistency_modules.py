"""Distillation and fine-tuning: the teacher stays, the student starts as it, the target follows the student."""

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
from lcm.models.pipeline import load_codec, load_network, load_process, training_facts
from lcm.models.student import as_network
from lcm.models.text_to_image import TextToImage
from lcm.modules.consistency import ConsistencyModule
from lcm.modules.lr_schedules import constant
from tests.modules.conftest import new_module

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
BOTH = pytest.mark.parametrize("kind", ["distillation", "finetuning"])


class Online(L.Callback):
    """The student after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(parameters_to_vector(module.net.parameters()).detach().clone())


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=["float32", "bf16"])
def test_the_teacher_never_changes(options: dict[str, str], training: Make, data: Make, fit: Make) -> None:
    module = training("distillation", lr=0.1)
    before = parameters_to_vector(module.frozen["teacher"].parameters()).clone()
    fit(module, data(), 3, **options)
    teacher = module.frozen["teacher"]
    assert torch.equal(parameters_to_vector(teacher.parameters()), before.to(teacher.dtype))
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_teacher_is_not_in_the_module_tree(training: Make) -> None:
    module = training("distillation")
    teacher = {id(p) for p in module.frozen["teacher"].parameters()}
    assert not teacher & {id(p) for p in module.parameters()}
    assert {name.split(".")[0] for name in module.state_dict()} == {"net", "target_net"}


def test_fine_tuning_has_no_teacher(training: Make) -> None:
    module = training("finetuning")
    assert module.frozen == {}
    assert module.denoisers(module.net).teacher is None


@BOTH
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_target_is_the_closed_form_average(kind: str, accumulate: int, training: Make, data: Make, fit: Make) -> None:
    """`theta-_n = mu^n theta_0 + (1 - mu) sum_i mu^(n - i) theta_i`, n optimizer steps, whatever the accumulation."""
    mu, module, online = 0.8, training(kind, ema_decay=0.8), Online()
    start = parameters_to_vector(module.net.parameters()).detach().clone()
    fit(module, data(), 4, callbacks=[online], accumulate_grad_batches=accumulate)
    moved = sum((1 - mu) * mu ** (4 - i) * theta for i, theta in enumerate(online.steps, start=1))
    torch.testing.assert_close(
        parameters_to_vector(module.target_net.parameters()), mu**4 * start + moved, rtol=1e-5, atol=1e-6
    )
    assert len(online.steps) == 4


@BOTH
def test_without_decay_the_student_is_its_own_target(kind: str, training: Make, data: Make, fit: Make) -> None:
    module = training(kind, ema_decay=0)
    networks = module.denoisers(module.net)
    assert module.target_net is None
    assert networks.target is networks.online
    assert {name.split(".")[0] for name in module.state_dict()} == {"net"}
    fit(module, data(), 2)


@BOTH
def test_the_target_carries_no_gradient(kind: str, training: Make, data: Make, fit: Make) -> None:
    module = training(kind)
    fit(module, data(), 1)
    assert all(p.grad is None and not p.requires_grad for p in module.target_net.parameters())
    assert all(p.grad is not None for p in module.net.parameters())


@pytest.mark.parametrize("w", [0.0, 2.0, 14.0])
def test_a_zero_initialised_student_is_the_teacher_for_any_w(w: float, training: Make, batch: LatentBatch) -> None:
    module = training("distillation")
    nets = module.denoisers(module.net)
    t, ws = torch.tensor([19, 339, 659, 999]), torch.full((4,), w)
    with torch.no_grad():
        assert torch.equal(nets.online.output(batch.z0, t, batch.cond, ws), nets.teacher.output(batch.z0, t, batch.cond, None))


def test_a_student_without_zero_initialisation_is_not_the_teacher(training: Make, batch: LatentBatch) -> None:
    module = training("distillation", zero_init=False)
    nets = module.denoisers(module.net)
    t, ws = torch.tensor([19, 339, 659, 999]), torch.full((4,), 8.0)
    with torch.no_grad():
        assert not torch.allclose(
            nets.online.output(batch.z0, t, batch.cond, ws), nets.teacher.output(batch.z0, t, batch.cond, None)
        )


@BOTH
def test_the_target_starts_as_the_student(kind: str, training: Make) -> None:
    module = training(kind, zero_init=False)
    assert torch.equal(parameters_to_vector(module.net.parameters()), parameters_to_vector(module.target_net.parameters()))


def test_training_makes_w_matter(training: Make, data: Make, fit: Make, batch: LatentBatch) -> None:
    module = training("distillation")
    fit(module, data(), 2)
    t = torch.full((4,), 999)
    with torch.no_grad():
        low, high = (as_network(module.family, module.net)(batch.z0, t, batch.cond, torch.full((4,), w)) for w in (2.0, 14.0))
    assert not torch.allclose(low, high, rtol=1e-6)


@pytest.mark.parametrize("ema_decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_a_user_error(ema_decay: float, training: Make) -> None:
    with pytest.raises(UserError, match="ema_decay"):
        training("distillation", ema_decay=ema_decay)


@pytest.mark.parametrize(("w_min", "w_max"), [(3.0, 2.0), (-1.0, 2.0), (0.0, float("nan"))])
def test_no_range_of_w_is_a_user_error(w_min: float, w_max: float, training: Make) -> None:
    with pytest.raises(UserError, match=r"model\.w_min"):
        training("finetuning", w_min=w_min, w_max=w_max)


@BOTH
@pytest.mark.parametrize("eval_ema", [None, 0.5])
def test_the_saved_folder_is_the_trained_student(
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
    assert training_facts(folder).items() >= {"steps": 2, "w_min": 1.0, "w_max": 5.0}.items()
    assert TextToImage.load(folder).latents(["rocket"], [0], steps=2, w=3.0).isfinite().all()


@pytest.mark.parametrize("points", [20, 25, 40, 50, None])
@pytest.mark.parametrize("kind", ["distillation", "finetuning", "lora"])
def test_a_student_is_sampled_at_timesteps_that_it_was_trained_at(
    kind: str, points: int | None, training: Make, codec: LatentCodec, tmp_path: Path
) -> None:
    """Here and in diffusers; on the grid of 50 points where training had the whole schedule."""
    module = training(kind, timesteps=partial(grid, points=points) if points else full)
    module.save_model(folder := str(tmp_path / "model"))
    scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(4)
    for model in (module.text_to_image(codec), TextToImage.load(folder)):
        place = model.sampler(None)[1]
        assert set(place(4)) <= set(module.objective.timesteps.tolist())
        assert place(4) == scheduler.timesteps.tolist()
        assert place(points or 50)[-1] == 1000 // (points or 50) - 1


def test_trained_timesteps_are_of_the_models_schedule(training: Make, tiny_pipeline: Path) -> None:
    of, short, base = training("finetuning"), VP(num_train_timesteps=500), str(tiny_pipeline)
    options = {"optimizer": torch.optim.AdamW, "lr_schedule": constant, "loss": of.objective.distance}
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


def test_the_projection_of_w_learns_faster_by_its_scale(training: Make, data: Make, fit: Make) -> None:
    """AdamW's first step from zero is the learning rate itself, wherever there is a gradient."""
    plain, fast = training("distillation"), training("distillation", guidance_lr_multiplier=10.0)
    for module in (plain, fast):
        fit(module, data(), 1)
    moved, further = (module.net.time_embedding.cond_proj.weight.detach() for module in (plain, fast))
    assert torch.allclose(further, 10 * moved, rtol=1e-4)
    assert moved.abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(fast.net.conv_in.weight, plain.net.conv_in.weight)


def test_a_student_is_fine_tuned_as_it_is(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    distilled = training("distillation")
    fit(distilled, data(), 2)
    distilled.save_model(folder := str(tmp_path / "student"))
    tuned = new_module(Path(folder), "finetuning")
    assert torch.equal(parameters_to_vector(tuned.net.parameters()), parameters_to_vector(load_network(folder).parameters()))
    assert float(tuned.net.time_embedding.cond_proj.weight.detach().abs().sum()) > 0
    fit(tuned, data(), 1)


def test_training_runs_on_compiled_networks_and_nothing_else_does(
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


def test_each_network_has_a_graph_for_each_shape_of_batches(
    training: Make, data: Make, fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As traced by torch.compile, which stops at 8 graphs of one function, here at 2, unless it is told of more."""
    graphs: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    shapes = [[32, 32], [32, 16]]
    module = training("distillation", compile=True)
    fit(module, data(buckets=shapes), 1)
    module.train()
    monkeypatch.setattr(module, "log_train", lambda *_: None)  # outside the trainer's loop
    for height, width in shapes:
        z0 = torch.randn(4, 4, height // 4, width // 4)
        cond, uncond = {"states": torch.randn(4, 16, 16)}, {"states": torch.randn(1, 16, 16)}
        module.training_step(LatentBatch(z0, cond, uncond, [], []), 0)
    assert len(graphs) == 3 * len(shapes)


@pytest.mark.parametrize(("gpu", "language"), [(False, r"a C\+\+ compiler"), (True, "a C compiler")])
def test_compiling_without_a_compiler_is_refused_before_training(
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
