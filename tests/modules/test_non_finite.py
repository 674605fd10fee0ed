"""A non-finite loss changes no weight, average or optimizer state on any rank; training stops or skips the update."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lcm.core.errors import UserError
from lcm.modules.latent import LatentModule
from lcm.modules.lr_schedules import cosine
from lcm.modules.optimization import CHECK_EVERY, Optimization
from lcm.runtime.atomic_io import whole_file
from tests.modules.conftest import Make

pytestmark = pytest.mark.filterwarnings("ignore")


def state(trainer: L.Trainer, module: LatentModule) -> dict[str, Tensor]:
    """Return all that an update may change: weights, averages, the optimizer's moments and its count of steps."""
    [optimizer] = trainer.optimizers
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value for i, values in moments.items() for name, value in values.items()}
    return {name: value.clone() for name, value in {**module.state_dict(), **tensors}.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Poison(L.Callback):
    """Fill the batches of given indices with a value on one rank, and record the state after each optimizer step."""

    def __init__(self, *batches: int, value: str = "nan", rank: int = 0, folder: Path | None = None) -> None:
        self.batches, self.value, self.rank, self.folder = batches, float(value), rank, folder
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches and trainer.global_rank == self.rank:
            batch.z0.fill_(self.value)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step not in self.after:
            self.after[trainer.global_step] = state(trainer, module)
        if self.folder and trainer.global_step == trainer.max_steps:
            self.write(trainer, None)

    def attach(self, monkeypatch: pytest.MonkeyPatch) -> "Poison":
        """Record also the state in which a rank stops with an error.

        Lightning reports the error to callbacks in the first process only.
        """
        check = Optimization.check_skipped

        def watched(optimization: Optimization, trainer: L.Trainer) -> None:
            try:
                check(optimization, trainer)
            except UserError as error:
                self.on_error(trainer, trainer.lightning_module, error)
                raise

        monkeypatch.setattr(Optimization, "check_skipped", watched)
        return self

    def on_error(self, trainer: L.Trainer, module: Any, error: UserError) -> None:
        self.after["error"] = state(trainer, module)  # type: ignore[index]
        if self.folder:
            self.write(trainer, str(error))
            deadline = time.monotonic() + 120  # the first rank that ends stops the other ranks
            while len(list(self.folder.glob("rank*.pt"))) < trainer.world_size and time.monotonic() < deadline:
                time.sleep(0.01)

    def write(self, trainer: L.Trainer, error: str | None) -> None:
        with whole_file(self.folder / f"rank{trainer.global_rank}.pt") as file:  # other ranks count complete files
            torch.save({"after": self.after, "error": error}, file)


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("host", {"precision": "bf16-mixed"}),
        ("host, not fused", {"accumulate_grad_batches": 2}),
        ("device", {}),
        ("device", {"accumulate_grad_batches": 2}),
    ],
)
def test_skipped_update_changes_only_the_step(
    where: str, options: dict[str, Any], training: Make, data: Make, fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Optimization, "skips_on_device", lambda *_: where == "device")
    kind = {"fused": where != "host, not fused", "eval_ema": 0.9, "lr_schedule": cosine, "skip_non_finite": 1}
    poison, module = Poison(4), training("distillation", **kind)
    trainer = fit(module, data(), 6, callbacks=[poison], **options)
    bad = 4 // options.get("accumulate_grad_batches", 1)
    changed = [step for step in range(2, 7) if not same(poison.after[step], poison.after[step - 1])]
    assert changed == [step for step in range(2, 7) if step != bad + 1]
    assert all(value.isfinite().all() for value in poison.after[6].values())
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert trainer.global_step == 6
    healthy = fit(training("distillation", **kind), data(), 6, **options)
    assert trainer.optimizers[0].param_groups[0]["lr"] == healthy.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("where", ["host", "device"])
def test_too_many_skips_in_a_row_stop(
    where: str, training: Make, data: Make, fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Optimization, "skips_on_device", lambda *_: where == "device")
    module, poison = training("distillation", skip_non_finite=2), Poison(1, 2, 4, 5)
    assert fit(module, data(), 7, callbacks=[poison]).callback_metrics["train/skipped_steps"] == 4

    poison = Poison(2, 3, 4).attach(monkeypatch)
    seen = 4 if where == "host" else CHECK_EVERY - 1  # the device skips the updates until the host's next check
    with pytest.raises(UserError, match=f"non-finite 3 times in a row at step {seen}; no weight"):
        fit(training("distillation", skip_non_finite=2), data(), 14, callbacks=[poison])
    assert same(poison.after["error"], poison.after[2])


def test_device_skips_updates_until_the_host_checks(
    training: Make, data: Make, fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Optimization, "skips_on_device", lambda *_: True)
    poison = Poison(3).attach(monkeypatch)
    with pytest.raises(UserError, match=f"non-finite at step {CHECK_EVERY - 1}"):
        fit(training("distillation"), data(), 14, callbacks=[poison])
    assert same(poison.after["error"], poison.after[3])

    poison = Poison(3)
    with pytest.raises(UserError, match="non-finite at step 5"):
        fit(training("distillation"), data(), 6, callbacks=[poison])  # the host checks at the end of a run


def test_all_ranks_skip_a_bad_update_of_one(
    training: Make, data: Make, fit: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """tests/modules/test_strategies.py tests that all ranks stop if no update may be skipped."""
    poison, bad, steps = Poison(4, value="inf", rank=1, folder=tmp_path).attach(monkeypatch), 2, 5
    options = {"devices": 2, "strategy": DDPStrategy(start_method="fork", process_group_backend="gloo")}
    module = training("distillation", skip_non_finite=1, eval_ema=0.9)
    fit(module, data(), steps, callbacks=[poison], accumulate_grad_batches=2, **options)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        after = rank["after"]
        assert same(after[bad + 1], after[bad])
        assert not same(after[bad], after[bad - 1])
        assert not same(after[steps], after[bad])
        assert all(value.isfinite().all() for value in after[steps].values())
        assert all(same(after[step], ranks[0]["after"][step]) for step in after)
