"""Rates of a training: FLOPs and times are right, and the training does not change."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lcm.callbacks import throughput
from lcm.callbacks.throughput import Throughput, not_timed
from lcm.models.flops import forward_flop
from lcm.models.pipeline import load_family, load_network
from lcm.modules import training_length
from lcm.modules.training_length import TrainingLength
from tests.modules.conftest import codec, data, fit, training  # noqa: F401  (fixtures)

KINDS = ["diffusion", "distillation", "cd", "guided", "lora"]


def test_forward_flop_matches_the_counter(tiny_pipeline):
    family, unet = load_family(str(tiny_pipeline)), load_network(str(tiny_pipeline))
    z, t, cond = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.randn(3, 7, unet.config["cross_attention_dim"])
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(z, t, cond)
    assert forward_flop(family, unet, z.shape, {"states": cond}) == counter.get_total_flops() > 1e5


@pytest.mark.parametrize("kind", KINDS)
def test_step_flop_matches_the_counter(kind, training, data, fit, monkeypatch):  # noqa: F811
    """torch counts attention as matmuls. The input of the first layer has no gradient, hence the tolerance."""
    module, callback, counted = training(kind), Throughput(peak_tflops=1.0), []
    step = module.training_step

    def watched(batch, batch_idx):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = step(batch, batch_idx)
            trained = [p for p in module.net.parameters() if p.requires_grad]
            torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        counted.append(counter.get_total_flops() / len(batch))
        return loss

    monkeypatch.setattr(module, "training_step", watched)
    fit(module, data(), 6, max_epochs=1, limit_train_batches=1, callbacks=[callback])
    assert callback.flop_per_image == pytest.approx(counted[0], rel=0.03)
    assert module.calls is None


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def perf_counter(self):
        return self.now


def test_rates_cover_the_time_since_the_last_log(monkeypatch):
    clock, logged = Clock(), {}
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(training_length, "time", clock)
    monkeypatch.setattr(throughput, "call_flop", lambda family, unet, z, cond, trained: (1 + 2 * trained) * unet * z)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=4, sanity_checking=False)
    module = SimpleNamespace(family=None, log=lambda name, value, **_: logged.update({name: value}), log_dict=logged.update)
    callback, length, batch = Throughput(peak_tflops=1e-3), TrainingLength(), list(range(8))
    trainer.callbacks, trainer.training = [callback, length], True
    callback.on_train_start(trainer, module)
    length.on_train_start(trainer, module)

    def step(wait, work):
        clock.now += wait
        callback.on_train_batch_start(trainer, module, batch, 0)
        if module.calls is not None:
            module.calls += [(100, 8, 0, True), (100, 16, 0, False)]  # 3 and 2 forwards an image
        clock.now += work
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, batch, 0)
        length.on_train_batch_end(trainer, module, None, batch, 0)

    step(50, 50)  # the first step is not timed
    step(1, 3)
    assert logged["perf/images_per_sec"] == pytest.approx(4 * 8 / 4)
    assert logged["perf/data_wait"] == pytest.approx(1 / 4)
    assert logged["perf/tflops"] == pytest.approx(8 * 500 / 4 / 1e12)
    assert logged["perf/mfu"] == pytest.approx(8 * 500 / 4 / 1e12 / 1e-3)
    logged.clear()
    step(0, 2)
    assert not logged
    callback.on_validation_start(trainer, module)
    clock.now += 1000
    callback.on_validation_end(trainer, module)
    length.on_validation_end(trainer, module)
    with not_timed(trainer):
        clock.now += 500
    step(2, 4)
    assert logged["perf/images_per_sec"] == pytest.approx(4 * 16 / 8)
    assert logged["perf/data_wait"] == pytest.approx(2 / 8)
    assert (length.images, length.seconds) == (4 * 8 * 4, 100 + 4 + 2 + 6)  # without validation and steps that are not timed


def test_training_is_unchanged(training, data, fit):  # noqa: F811
    without, with_it, logged = training("distillation"), training("distillation"), []
    log_dict = with_it.log_dict
    with_it.log_dict = lambda values, **kwargs: (logged.append(values), log_dict(values, **kwargs))
    torch.manual_seed(1)
    fit(without, data(), 4)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    fit(with_it, data(), 4, callbacks=[Throughput(matmul_size=16)], log_every_n_steps=2)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_it.parameters(), strict=True))
    rates = [values for values in logged if "perf/mfu" in values]
    assert len(rates) == 2
    assert all(0 < value < float("inf") for rate in rates for value in rate.values())
