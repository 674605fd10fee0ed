"""The perceptual and adversarial terms of the autoencoder: gradients, frozen parts, two optimizers, exact resume."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.strategies import DDPStrategy
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader
from torchmetrics.functional.image.lpips import _LPIPS

from lcm.core.errors import UserError
from lcm.models.pipeline import load_vae
from lcm.modules.adversary import Adversary, PatchDiscriminator
from lcm.modules.autoencoder import Autoencoder
from lcm.modules.lr_schedules import constant
from lcm.modules.perceptual import ClipPerceptual, Lpips

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
ADAMW = partial(torch.optim.AdamW, lr=2e-3, fused=True)


def halved_each_step(optimizer: torch.optim.Optimizer, *args: Any) -> ExponentialLR:
    return ExponentialLR(optimizer, 0.5)


def new_autoencoder(pipeline: Path, start: int | None = None, **options: Any) -> Autoencoder:
    """Return a module, always with the same initial weights. start: the adversary's first step, or None for no adversary."""
    torch.manual_seed(0)
    optimizer, adversary = options.pop("optimizer", ADAMW), None
    if start is not None:
        adversary = Adversary(PatchDiscriminator(8), optimizer=optimizer, lr_schedule=halved_each_step, start=start)
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    return Autoencoder(vae, adversary=adversary, **{"optimizer": optimizer, "lr_schedule": constant, **options})


@pytest.fixture
def autoencoder(tiny_pipeline: Path) -> Make:
    return partial(new_autoencoder, tiny_pipeline)


@pytest.fixture
def pixels(data: Make, shards: Path) -> Make:
    return lambda: data(codec=None, val_shards=f"{shards}/val-*.tar")


def tensors(module: Autoencoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: Autoencoder) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def moments(module: Autoencoder) -> list[torch.Tensor]:
    """Return the state of both optimizers."""
    assert module.adversary is not None
    optimizers: Any = (module.optimizers().optimizer, module.adversary.optimizer)
    return [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]


def test_resume_is_exact(autoencoder: Make, pixels: Make, fit: Make, tmp_path: Path) -> None:
    options = {"start": 1, "perceptual": ClipPerceptual("mini")}
    whole = autoencoder(**options)
    assert fit(whole, pixels(), 4).global_step == 4
    assert {int(state["step"]) for state in whole.adversary.optimizer.state.values()} == {3}
    assert whole.adversary.optimizer.param_groups[0]["lr"] == 2e-3 * 0.5**4
    fit(autoencoder(**options), pixels(), 2).save_checkpoint(tmp_path / "2.ckpt")
    resumed = autoencoder(**options)
    assert fit(resumed, pixels(), 4, ckpt_path=tmp_path / "2.ckpt").global_step == 4
    assert changed(tensors(whole), resumed) == set()
    assert resumed.adversary.optimizer.param_groups[0]["lr"] == 2e-3 * 0.5**4
    pairs = list(zip(moments(whole), moments(resumed), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


class Gradients(L.Callback):
    """Record each step's gradients after the discriminator's update and after the generator's backward pass."""

    def __init__(self) -> None:
        self.judged: list[dict[str, list[Any]]] = []
        self.generated: list[dict[str, list[Any]]] = []

    def taken(self, module: Any) -> dict[str, list[Any]]:
        networks = {"vae": module.vae, "adversary": module.adversary}
        return {k: [None if p.grad is None else p.grad.clone() for p in net.parameters()] for k, net in networks.items()}

    def on_before_zero_grad(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.judged.append(self.taken(module))

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        self.generated.append(self.taken(module))


def test_gradients_reach_only_their_own_network(autoencoder: Make, pixels: Make, fit: Make) -> None:
    module, seen = autoencoder(start=0), Gradients()
    before = tensors(module)
    fit(module, pixels(), 2, callbacks=[seen])
    assert all(gradient is None for gradient in seen.judged[0]["vae"])
    for judged, generated in zip(seen.judged, seen.generated, strict=True):
        assert all(gradient is not None for gradient in [*judged["adversary"], *generated["vae"]])
        assert all(torch.equal(a, b) for a, b in zip(judged["adversary"], generated["adversary"], strict=True))
    assert len(seen.judged) == 2
    assert changed(before, module) >= {name for name in before if name.startswith("adversary.")}
    assert all(p.grad is None for p in module.adversary.parameters())


def test_adversary_changes_the_generator_from_its_start_on(autoencoder: Make, pixels: Make, fit: Make) -> None:
    plain, late, early = autoencoder(), autoencoder(start=2), autoencoder(start=1)
    for module in (plain, late, early):
        fit(module, pixels(), 2)
    weights = [torch.nn.utils.parameters_to_vector(module.vae.parameters()) for module in (plain, late, early)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_adaptive_weight_balances_gradients(autoencoder: Make) -> None:
    last = torch.tensor([1.0, 1.0], requires_grad=True)
    loss, other = (last * torch.tensor([0.0, 0.2])).sum(), (last * torch.tensor([3.0, 4.0])).sum()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert float(autoencoder(start=0).adversary.balanced_weight(loss, other, last, trainer)) == pytest.approx(
        0.5 * 5 / 0.2, rel=1e-3
    )


def test_accumulated_steps_are_one_update(autoencoder: Make, pixels: Make, fit: Make) -> None:
    module = autoencoder(start=0)
    assert fit(module, pixels(), 2, accumulate_grad_batches=2).global_step == 2
    assert {int(state["step"]) for state in module.adversary.optimizer.state.values()} == {2}


def test_non_finite_batch_skips_both_updates(autoencoder: Make, pixels: Make, fit: Make) -> None:
    module = autoencoder(start=0, skip_non_finite=1)
    before = tensors(module)
    bad = {"x": torch.full((2, 3, 32, 32), float("nan")), "captions": ["a", "b"]}
    fit(module, DataLoader([bad], batch_size=None), 1)
    assert changed(before, module) == set()


def test_perceptual_gradient_reaches_the_decoder_and_clip_stays(
    autoencoder: Make, pixels: Make, fit: Make, tmp_path: Path
) -> None:
    perceptual = ClipPerceptual("mini")
    module = autoencoder(start=0, perceptual=perceptual)
    before = {name: value.clone() for name, value in perceptual.state_dict().items()}
    x, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    perceptual(x, module.vae.decode(z).sample, 3).backward()
    assert all(float(p.grad.norm()) > 0 for p in module.vae.decoder.conv_out.parameters())
    assert all(p.grad is None for p in perceptual.parameters())
    assert float(perceptual(x, x, 3)) == 0

    fit(module, pixels(), 2, val_check_interval=2, check_val_every_n_epoch=None).save_checkpoint(tmp_path / "2.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in perceptual.state_dict().items())
    checkpoint = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"vae", "adversary", "latent_std"}
    assert [bool(state["state"]) for state in checkpoint["optimizer_states"]] == [True, True]
    module.save_model(str(tmp_path / "model"))
    saved = {path.name for path in (tmp_path / "model").rglob("*")}
    assert saved == {"vae", "config.json", "diffusion_pytorch_model.safetensors"}


def test_without_options_nothing_is_added(autoencoder: Make, pixels: Make, fit: Make, tmp_path: Path) -> None:
    fit(autoencoder(), pixels(), 1).save_checkpoint(tmp_path / "1.ckpt")
    checkpoint = torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"vae", "latent_std"}
    assert len(checkpoint["optimizer_states"]) == 1


def test_frozen_encoder_keeps_its_bits_and_scaling_factor(autoencoder: Make, pixels: Make, fit: Make, tmp_path: Path) -> None:
    module = autoencoder(start=0, freeze_encoder=True)
    before, factor = tensors(module), module.vae.config["scaling_factor"]
    fit(module, pixels(), 2, val_check_interval=2, check_val_every_n_epoch=None)
    trained = changed(before, module) - {"latent_std"}
    assert {".".join(name.split(".")[:2]) for name in trained} == {"vae.decoder", "vae.post_quant_conv", "adversary.network"}
    module.save_model(str(tmp_path))
    again = load_vae(tmp_path)  # the folder of a training contains vae/ only
    assert again.config["scaling_factor"] == factor
    assert torch.equal(again.encoder.conv_in.weight, before["vae.encoder.conv_in.weight"].half().float())


def test_lpips_is_torchmetrics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = _LPIPS(net="vgg", pnet_rand=True)
    names = {name.partition(".")[2]: value for name, value in reference.net.state_dict().items()}
    torch.save({f"features.{name}": value for name, value in names.items()}, tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        ours, theirs = Lpips(str(tmp_path / "vgg.pth"))(x, y, 0), reference(x, y).mean()
    assert float(theirs) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_missing_and_wrong_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no VGG16 weights at .*: get vgg16"):
        Lpips(str(tmp_path / "vgg.pth"))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="does not hold torchvision's VGG16"):
        Lpips(str(tmp_path / "vgg.pth"))


def train(pipeline: Path, file: Path, ranks: int = 1) -> None:
    """Train for three steps and save the weights. `ranks` processes share a step's four pictures: see test_strategies.py."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    rows = slice(4 // ranks * rank, 4 // ranks * (rank + 1))
    pictures = torch.rand(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    optimizer = partial(torch.optim.AdamW, lr=2e-3, eps=1e-6, fused=True)  # eps: see tests/modules/ranks.py
    module = new_autoencoder(pipeline, start=1, perceptual=ClipPerceptual("mini"), optimizer=optimizer)
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="auto" if ranks == 1 else DDPStrategy(process_group_backend="gloo"),
        max_steps=3, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=file.parent,
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"x": x[rows]} for x in pictures], batch_size=None))
    torch.save(module.state_dict(), file.with_suffix(f".{rank}"))
