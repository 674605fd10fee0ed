"""Training of modules on latents: exact resume, non-finite losses, clipping, learning."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcm.callbacks.progress import Progress
from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.random import generator
from lcm.models import attention as kernels
from lcm.models.pipeline import load_codec
from lcm.modules import latent
from lcm.modules.checkpoint import check_method
from lcm.modules.latent import LatentModule
from lcm.modules.optimization import match_parameter_layout
from lcm.modules.trainer import Trainer
from lcm.runtime import signals
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.fsdp import FullySharded
from lcm.runtime.stop import StopOnSignal

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
KINDS = ["diffusion", "distillation"]


def weights(module: LatentModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize(("kind", "workers"), [("diffusion", 0), ("distillation", 1)])
def test_resume_equals_uninterrupted(kind: str, workers: int, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    straight, first, second = training(kind), training(kind), training(kind)
    initial = weights(straight)
    fit(straight, data(num_workers=workers), 6)
    fit(first, data(num_workers=workers), 3).save_checkpoint(tmp_path / "3.ckpt")
    resumed = data(num_workers=workers)
    fit(second, resumed, 6, ckpt_path=tmp_path / "3.ckpt")
    assert_equal(weights(second), weights(straight))
    assert not torch.equal(initial["net.conv_in.weight"], weights(straight)["net.conv_in.weight"])
    assert resumed.state_dict()["position"] == 24


def test_resume_from_a_checkpoint_under_accumulation(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    straight, resumed = training("distillation"), training("distillation")
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"accumulate_grad_batches": 2, "plugins": [AtomicCheckpointIO()]}
    fit(straight, data(), 5, callbacks=[checkpoint], enable_checkpointing=True, **options)
    fit(resumed, data(), 5, ckpt_path=tmp_path / "step=2.ckpt", **options)
    assert_equal(weights(resumed), weights(straight))


def test_resume_at_any_step_with_other_workers(
    training: Make, data: Make, fit: Make, tmp_path: Path, tiny_pipeline: Path
) -> None:
    """The runs resume early, in the middle of a shard, and after the end of an epoch, which is in batch 8.

    The cache of posteriors starts empty in every run.
    """

    def cached(workers: int) -> Any:
        return data(codec=load_codec(str(tiny_pipeline), cache=True), batch_size=32, num_workers=workers)

    straight, checkpoint = training("distillation"), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, cached(1), 10, callbacks=[checkpoint], enable_checkpointing=True)
    for step, workers in [(2, 0), (5, 2), (9, 1)]:
        resumed = training("distillation")
        fit(resumed, cached(workers), 10, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_equal(weights(resumed), weights(straight))


def test_validation_changes_no_weights_or_data(training: Make, data: Make, fit: Make, shards: Path) -> None:
    plain, validated = training("distillation"), training("distillation")
    fit(plain, data(), 6)
    held_out = data(val_shards=f"{shards}/val-*.tar")
    trainer = fit(validated, held_out, 6, val_check_interval=2, check_val_every_n_epoch=None)
    assert trainer.callback_metrics["val/loss"] > 0
    assert_equal(weights(validated), weights(plain))
    assert held_out.state_dict()["position"] == 24


class Validations(L.Callback):
    """Record the step and the loss of each validation, and ask the run to stop at the end of a given hook."""

    def __init__(self, at: str = "", when: int = 0) -> None:
        self.found: list[tuple[int, float]] = []
        self.at, self.when = at, when

    def ask(self, hook: str, number: int) -> None:
        if (hook, number) == (self.at, self.when):
            signals._recorded = signals.SIGTERM

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.ask("step", trainer.global_step)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self.ask("validation of step 4, batch", batch_idx if trainer.global_step == 4 else -1)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.found.append((step, float(trainer.callback_metrics["val/loss"])))
        self.ask("validation", trainer.global_step)


@pytest.mark.parametrize(
    ("at", "when", "accumulate", "every"),
    [("step", 3, 2, 3), ("validation of step 4, batch", 0, 2, 4), ("validation", 4, 1, 2)],
)
def test_resume_repeats_an_interrupted_validation(
    at: str,
    when: int,
    accumulate: int,
    every: int,
    training: Make,
    data: Make,
    fit: Make,
    shards: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(signals, "_recorded", 0)

    def run(module: LatentModule, watch: Validations, ckpt_path: Path | None = None) -> list[tuple[int, float]]:
        held_out = data(val_shards=f"{shards}/train-*.tar")
        options = {
            "val_check_interval": every,
            "limit_val_batches": 2,
            "check_val_every_n_epoch": None,
            "accumulate_grad_batches": accumulate,
            "callbacks": [watch, StopOnSignal(f"{tmp_path}/last.ckpt", every_n_steps=1)],
            "enable_checkpointing": True,
            "plugins": [AtomicCheckpointIO()],
        }
        fit(module, held_out, 7, ckpt_path=ckpt_path, **options)
        return watch.found

    straight, first, resumed = (training("distillation") for _ in range(3))
    whole, before = run(straight, Validations()), Validations(at, when)
    assert len(whole) == 7 * accumulate // every
    with pytest.raises(SystemExit, match="143"):
        run(first, before)
    signals._recorded = 0
    after = run(resumed, Validations(), tmp_path / "last.ckpt")
    assert before.found + after == whole
    assert_equal(weights(resumed), weights(straight))


def test_last_step_of_a_training_by_time_is_saved(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    stop, time = StopOnSignal(f"{tmp_path}/last.ckpt", every_n_steps=1), {"milliseconds": 50}
    trainer = fit(training("diffusion"), data(), -1, max_time=time, callbacks=[stop], enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == trainer.global_step > 0


@pytest.mark.parametrize("kind", ["diffusion", "distillation"])
def test_checkpoint_holds_tensors_and_containers(kind: str, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    module = training(kind)
    fit(module, data(), 2).save_checkpoint(tmp_path / "2.ckpt")
    content = torch.load(tmp_path / "2.ckpt", weights_only=True)
    average = "ema_net" if kind == "diffusion" else "target_net"
    names = [name for name, _ in module.net.named_parameters()]
    assert set(content["state_dict"]) == {f"{net}.{name}" for net in ("net", average) for name in names}
    assert content["ShardDataModule"]["position"] == 8


FIRST_EDITION = {
    "diffusion": "LatentDiffusion",
    "distillation": "LatentConsistencyDistillation",
    "finetuning": "LatentConsistencyFineTuning",
    "lora": "LoRADistillation",
    "cd": "ConsistencyModelDistillation",
    "ct": "ConsistencyModelTraining",
    "guided": "GuidedDistillation",
}


@pytest.mark.parametrize("kind", ["diffusion", "lora"])
def test_first_edition_checkpoint_resumes(kind: str, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    """The tensors of a first-edition checkpoint have the same names, see `test_checkpoint_holds_tensors_and_containers`."""
    method = FIRST_EDITION[kind]
    first, second, path = training(kind), training(kind), tmp_path / "1.ckpt"
    fit(first, data(), 6, callbacks=[StopAfter(1)]).save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert content["method"] != method
    torch.save({**content, "method": method}, path)
    fit(second, data(), 6, ckpt_path=path, callbacks=[start := StopAfter(2)])
    assert_equal(start.weights, weights(first))


class StopAfter(L.Callback):
    """Stop after a step, and record the weights at the start."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.weights = weights(module)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_checkpoint_of_another_method_is_refused(training: Make) -> None:
    """A checkpoint whose weights fit is refused too, such as a checkpoint of LCD for TCD."""
    methods = {**FIRST_EDITION, "tcd": "TrajectoryConsistencyDistillation", "clip": "Clip"}
    modules = {kind: training(kind) for kind in (*FIRST_EDITION, "tcd")}
    for (kind, module), (other, method) in product(modules.items(), methods.items()):
        if kind == other:
            check_method({"method": method}, module.method)
            continue
        with pytest.raises(
            UserError, match=f"the checkpoint is of {method}, this training is a .*: give another ckpt_path, or a new name="
        ):
            module.on_load_checkpoint({"method": method})


class Poison(L.Callback):
    """Fill the batch of one index with NaN, and record the weights before this batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: LatentBatch, batch_idx: int) -> None:
        if batch_idx == self.step:
            self.before = weights(module)
            batch.z0.fill_(float("nan"))


@pytest.mark.parametrize(
    ("kind", "options"), [("diffusion", {"precision": "bf16-mixed"}), ("distillation", {"accumulate_grad_batches": 3})]
)
def test_non_finite_loss_stops_without_an_update(
    kind: str, options: dict[str, Any], training: Make, data: Make, fit: Make
) -> None:
    module, poison = training(kind), Poison(4)
    step = 4 // options.get("accumulate_grad_batches", 1)
    with pytest.raises(UserError, match=f"non-finite at step {step}; .*ckpt_path=last"):
        fit(module, data(), 8, callbacks=[poison], **options)
    assert_equal(weights(module), poison.before)


def test_fused_optimizer_gets_clipped_gradients(training: Make, data: Make, fit: Make) -> None:
    class Watch(L.Callback):
        norms: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            """The gradients of the step are still there: Lightning clears them before the next backward pass."""
            self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.net.parameters()])))

    watch = Watch()
    trainer = fit(training("distillation", clip_norm=1e-3), data(), 3, callbacks=[watch], precision="bf16-mixed")
    assert trainer.callback_metrics["train/grad_norm"] > 1e-3
    assert watch.norms == pytest.approx(3 * [1e-3], rel=1e-3)


def test_null_clip_norm_keeps_gradients(training: Make, data: Make, fit: Make) -> None:
    free, bounded = (training("distillation", clip_norm=norm) for norm in (None, 1e9))
    trainer = fit(free, data(), 2)
    assert trainer.callback_metrics["train/grad_norm"] > 0
    fit(bounded, data(), 2)
    assert_equal(weights(free), weights(bounded))


def test_optimizer_gets_trained_parameters_only(training: Make, data: Make, fit: Make) -> None:
    module = training("distillation")
    trainer = fit(module, data(), 1)
    trained = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in module.net.parameters())


def fixed_loss(module: LatentModule, batch: LatentBatch) -> float:
    """Return the training loss over the draws of four steps. The module must be new, without a trainer."""
    with torch.no_grad():
        return sum(float(module.training_step(batch, index)) for index in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_overfitting_lowers_the_loss(kind: str, training: Make, fit: Make, batch: LatentBatch) -> None:
    """The network is disturbed first, because a student that starts as its random teacher has little to learn."""
    module, trained = training(kind), training(kind)
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator("cpu", 1)), alpha=0.05)
    before = fixed_loss(module, batch)
    fit(module, torch.utils.data.DataLoader([batch] * 25, batch_size=None), 25)
    trained.load_state_dict(module.state_dict())
    assert fixed_loss(trained, batch) < 0.8 * before


def test_gradient_checkpointing_keeps_gradients(training: Make, batch: LatentBatch) -> None:
    plain, saving = training("distillation"), training("distillation", gradient_checkpointing=True)
    assert saving.net.is_gradient_checkpointing
    for module in (plain, saving):
        module.training_step(batch, 0).backward()
    for (name, expected), parameter in zip(plain.net.named_parameters(), saving.net.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_recomputation_uses_the_same_kernels(training: Make, batch: LatentBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention kernel of the step is not torch's default here, as on a GPU.

    Another kernel would keep other tensors for the backward pass.
    """
    for module in (kernels, latent):
        monkeypatch.setattr(module, "fast_attention", lambda device: sdpa_kernel([SDPBackend.MATH]))
    training("distillation", gradient_checkpointing=True).training_step(batch, 0).backward()


def test_draws_depend_on_seed_and_batch_only(training: Make, batch: LatentBatch) -> None:
    module, other = training("distillation"), training("distillation", seed=1)
    torch.manual_seed(1)
    first = module.training_step(batch, 5)
    torch.manual_seed(2)
    assert torch.equal(module.training_step(batch, 5), first)
    assert not torch.equal(module.training_step(batch, 6), first)
    assert not torch.equal(other.training_step(batch, 5), first)


def test_eval_ema_moves_once_per_optimizer_step(training: Make, data: Make, fit: Make) -> None:
    module, expected = training("diffusion", eval_ema=0.2), []
    average = torch.nn.utils.parameters_to_vector(module.net.parameters()).detach()

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % 3 == 0:
                expected.append(torch.nn.utils.parameters_to_vector(module.net.parameters()).detach().clone())

    fit(module, data(), 4, callbacks=[Watch()], accumulate_grad_batches=3)
    for step, online in enumerate(expected):
        decay = min(0.2, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * online
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(module.ema_net.parameters()), average)
    assert len(expected) == 4


class Unsharded(L.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> None: ...


def test_module_without_sharding_refuses_fsdp(fit: Make, data: Make) -> None:
    with pytest.raises(UserError, match="Unsharded cannot be sharded: train it with trainer=ddp"):
        fit(Unsharded(), data(), 1, strategy=FullySharded(), plugins=[AtomicCheckpointIO()])


def test_loaded_moments_match_parameter_layout():
    """Convolutions are channels_last on a GPU, but not on a CPU.

    Fused AdamW reads parameters and moments in their memory order.
    """
    written, read = (torch.nn.Conv2d(4, 4, 3) for _ in range(2))
    read.to(memory_format=torch.channels_last)
    optimizers = [torch.optim.AdamW(module.parameters()) for module in (written, read)]
    written(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizers[0].step()
    optimizers[1].register_load_state_dict_post_hook(match_parameter_layout)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for before, after in zip(written.parameters(), read.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizers[0].state[before][name], optimizers[1].state[after][name])
            assert optimizers[1].state[after][name].stride() == after.stride()


class SeenModes(L.Callback):
    """Record by stage whether each network is in training mode when it is called."""

    def __init__(self) -> None:
        self.modes: dict[str, dict[str, set[bool]]] = {"train": {}, "validate": {}}

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        for name, network in {**dict(module.named_children()), **module.frozen}.items():
            network.register_forward_pre_hook(
                lambda unet, _, name=name: self.modes[trainer.state.stage.value].setdefault(name, set()).add(unet.training)
            )


@pytest.mark.parametrize("kind", ["diffusion", "distillation", "lora", "guided"])
def test_networks_run_in_the_right_mode(kind: str, training: Make, data: Make, fit: Make, shards: Path) -> None:
    options = {"steps": [2]} if kind == "guided" else {} if kind == "diffusion" else {"ema_decay": 0.5}
    module, seen = training(kind, eval_ema=0.5, **options), SeenModes()
    held_out, validation = data(val_shards=f"{shards}/val-*.tar"), {"val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = fit(module, held_out, 4, callbacks=[seen], **validation)
    train, validate = seen.modes["train"], seen.modes["validate"]
    assert train["net"] == train.get("target_net", {True}) == {True}
    assert train.get("teacher", {False}) == train.get("previous", {False}) == {False}
    assert "ema_net" not in train
    assert "net" not in validate
    assert validate["ema_net"] == {False}
    assert set().union(*validate.values()) == {False}
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_a_trainer_without_a_progress_bar_removes_the_callback():
    """Lightning refuses this setting together with a progress bar, and the configuration always has a progress bar."""
    callbacks, options = [Progress(), ModelCheckpoint()], {"max_steps": 1, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=callbacks, enable_progress_bar=False, **options)
    assert [callback for callback in callbacks if callback in trainer.callbacks] == callbacks[1:]
    assert callbacks[0] in Trainer(callbacks=callbacks, **options).callbacks
