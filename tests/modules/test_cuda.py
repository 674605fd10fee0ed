"""Tests for a GPU: one process, small networks. Skipped without a GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lcm.core.errors import UserError
from lcm.models.pipeline import load_codec
from lcm.models.quantization import nf4
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.fsdp import FullySharded
from tests.modules.conftest import new_module
from tests.modules.ranks import HALF, STEPS, Batches, Losses, batch, whole

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:::lightning"),
]
STRATEGIES = {"auto": lambda: "auto", "ddp": DDPStrategy, "fsdp": FullySharded}


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off TF32, because each convolution kernel rounds to TF32 differently."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def train(tiny_pipeline: Path, tmp_path: Path) -> Any:
    """`train(...)` returns the losses and weights after `steps` on the same batches, and the module.

    save: the path of the checkpoint at the end. resume: the path of a checkpoint after `HALF` steps.
    """

    def run(
        kind: str = "distillation",
        *,
        strategy: str = "auto",
        accelerator: str = "gpu",
        precision: str = "32-true",
        steps: int = STEPS,
        resume: Path | None = None,
        save: Path | None = None,
        poisoned: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        batches = [batch(i, None) for i in range(HALF if resume else 0, STEPS)]
        if poisoned is not None:
            batches[poisoned].z0.fill_(float("nan"))
        # With AdamW's usual eps of 1e-8 the order of a sum decides the step of a weight whose gradient is nearly zero.
        optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, eps=1e-6, fused=True)
        module, watch = new_module(tiny_pipeline, kind, **{"optimizer": optimizer, **options}), Losses()
        trainer = L.Trainer(
            accelerator=accelerator, devices=1, strategy=STRATEGIES[strategy](), max_steps=steps, max_epochs=-1,
            callbacks=[watch], precision=precision, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
            plugins=[AtomicCheckpointIO()], check_val_every_n_epoch=None, val_check_interval=2,
        )  # fmt: skip
        loaders = [DataLoader(Batches(part), batch_size=None) for part in (batches, batches[:1])]
        trainer.fit(module, *loaders, ckpt_path=resume)
        if save:
            trainer.save_checkpoint(save)
        return {
            "losses": watch.losses,
            "weights": {k: v.cpu() for k, v in whole(module.state_dict()).items()},
            "module": module,
        }

    return run


def assert_close(run: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], value, rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["diffusion", "distillation", "finetuning", "guided", "cd", "ct", "lora"])
def test_method_trains_in_mixed_precision(kind: str, train: Any) -> None:
    share = {"match_share": 1 / STEPS} if kind == "guided" else {}  # a step for each of its four stages
    result = train(kind, precision="bf16-mixed", **share)
    assert len(result["losses"]) == STEPS
    assert all(torch.tensor(result["losses"]).isfinite())


def test_sampling_moves_the_codec(tiny_pipeline: Path) -> None:
    module, codec = new_module(tiny_pipeline, "distillation").to("cuda"), load_codec(str(tiny_pipeline))
    [images] = module.text_to_image(codec).images(["rocket"], [0], steps=2, w=3.0)
    assert images.device.type == "cuda"


@pytest.mark.parametrize("kind", ["distillation", "lora"])
def test_compiled_training_equals_eager(kind: str, train: Any) -> None:
    eager, compiled = train(kind), train(kind, compile=True)
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert_close(compiled, eager, 1e-4)
    module = compiled["module"]
    assert set(module.compiled) == set(module.networks())
    assert module.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("written_on", ["cpu", "gpu"])
def test_checkpoint_resumes_on_either_device(written_on: str, train: Any, tmp_path: Path) -> None:
    """Moments are contiguous on the CPU and channels-last on the GPU.

    Draws differ between the devices, so losses differ too.
    """
    half = tmp_path / "half.ckpt"
    train(accelerator=written_on, steps=HALF, save=half)
    resumed = train(resume=half)
    assert len(resumed["losses"]) == STEPS - HALF
    if written_on == "gpu":
        assert_close(resumed, train(), 1e-6)
    else:
        assert all(torch.tensor(resumed["losses"]).isfinite())
        train(accelerator="cpu", resume=half)


@pytest.mark.parametrize(("strategy", "options"), [("ddp", {}), ("fsdp", {}), ("fsdp", {"compile": True})])
def test_nccl_equals_one_process(strategy: str, options: dict[str, Any], train: Any) -> None:
    assert_close(train(strategy=strategy, **options), train(), 1e-4)


@pytest.mark.parametrize("quantization", [nf4])
@pytest.mark.parametrize("kind", ["distillation", "lora", "tdm"])
def test_quantised_layers_train_with_8_bit_moments(kind: str, quantization: Any, train: Any, tmp_path: Path) -> None:
    options = {
        "quantization": quantization,
        "optimizer": partial(AdamW8bit, lr=1e-3, min_8bit_size=64),
        "precision": "bf16-mixed",
    }
    straight = train(kind, **options)
    train(kind, steps=HALF, save=tmp_path / "half.ckpt", **options)
    assert_close(train(kind, resume=tmp_path / "half.ckpt", **options), straight, 1e-4)


def test_stored_latents_keep_the_encoders_off_the_gpu(tiny_pipeline: Path) -> None:
    codec = load_codec(str(tiny_pipeline)).to("cuda")
    codec.place(torch.device("cuda", 0), {"moments": None, "states": None})
    assert (codec.vae.device.type, codec.text.device.type) == ("cpu", "cpu")
    assert codec.text([""], torch.device("cuda", 0))["states"].device.type == "cuda"


def test_device_skips_a_non_finite_update(train: Any) -> None:
    result = train(poisoned=1, skip_non_finite=1, precision="bf16-mixed")
    assert all(value.isfinite().all() for value in result["weights"].values())
    with pytest.raises(UserError, match="non-finite"):
        train(poisoned=1, precision="bf16-mixed")
