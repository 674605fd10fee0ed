"""The adversary on latents: timesteps, features, gradient paths, two optimizers, exact resume."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm.core.errors import UserError
from lcm.core.objectives.consistency import Pair
from lcm.core.process import VP, Flow, Process
from lcm.models.features import block_features
from lcm.models.pipeline import load_family, load_network
from lcm.models.student import as_network
from lcm.modules.adversary import Adversary, LatentAdversary, PatchDiscriminator, RenoisingDraws
from lcm.modules.lr_schedules import constant
from tests.modules.ranks import SHAPES, batch

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
OPTIMIZER = partial(torch.optim.AdamW, lr=2e-3, fused=True)
ADVERSARY: Any = partial(LatentAdversary, optimizer=OPTIMIZER, lr_schedule=constant, channels=8)


def test_golden_hinge_loss() -> None:
    """Two heads have the same weight in the loss, whatever their numbers of logits."""
    heads = torch.nn.Module()
    heads.forward = lambda x: [torch.tensor([[x, x]]), torch.tensor([[-3.0 * x]])]  # type: ignore[assignment]
    adversary = Adversary(heads, optimizer=OPTIMIZER, lr_schedule=constant)
    assert adversary.generator_loss(0.5).item() == pytest.approx((-0.5 + 1.5) / 2)
    # real 2: logits 2 and -6, relu(1 - l) = 0 and 7; fake 0.5: logits 0.5 and -1.5, relu(1 + l) = 1.5 and 0
    assert adversary.discriminator_loss(2.0, 0.5).item() == pytest.approx((3.5 + 0.75) / 2)


@pytest.mark.parametrize("process", [VP(), Flow(shift=3.0)], ids=["vp", "flow"])
def test_noise_is_added_within_the_phase(process: Process) -> None:
    """A point at the end of the phase that is noised to t has the distribution of data noised to t."""
    count, z0 = 20_000, torch.full((20_000, 1, 1, 1), 0.7)
    end, start = torch.full((count,), 259), torch.full((count,), 499)
    at_end = process.jump(z0, torch.randn(z0.shape), end)
    pair = Pair(at_end, 2 * at_end, at_end, end, start)
    draws = RenoisingDraws(torch.randn(z0.shape), torch.randn(z0.shape), torch.linspace(0, 1 - 1e-6, count))
    real, fake, t = ADVERSARY([4]).renoised(pair, z0, draws, process)
    assert (t.min(), t.max()) == (259, 499)
    assert torch.equal(fake[t == 259], at_end[t == 259])
    assert torch.equal(real[t == 259], 2 * at_end[t == 259])
    alpha, sigma = process.at(t, 4)
    normal = (fake - alpha * 0.7) / sigma
    assert (normal.mean().abs(), (normal.std() - 1).abs()) < (0.03, 0.03)
    data, _, _ = ADVERSARY([4], real="data").renoised(pair, z0, draws, process)
    torch.testing.assert_close(data, process.jump(z0, draws.real, t))


@pytest.mark.parametrize("of", SHAPES)
def test_features_of_every_family_lead_to_the_input(of: str, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(f"{of}_pipeline")
    family, net, some = load_family(pipeline), load_network(pipeline).eval(), batch(0, None, of)
    z = some.z0.requires_grad_()
    features = block_features(family, net, lambda: as_network(family, net)(z, torch.full((len(z),), 500), some.cond))
    widths = [width for _, width in family.feature_blocks(net)]
    assert [(len(feature), feature.shape[1]) for feature in features] == [(len(z), width) for width in widths]
    assert len({feature.sum().item() for feature in features}) == len(features)
    [gradient] = torch.autograd.grad(ADVERSARY(widths).generator_loss(features), z)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert not any(block._forward_hooks for block in net.modules())


def trained(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: Any) -> set[str]:
    return {name.partition(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("kind", ["distillation", "pcm", "lora", "cd"])
def test_both_networks_learn_and_the_teacher_stays(kind: str, training: Make, data: Make, fit: Make) -> None:
    module = training(kind, adversary=ADVERSARY)
    before, teacher = trained(module), {name: value.clone() for name, value in module.frozen["teacher"].state_dict().items()}
    metrics = fit(module, data(), 2).callback_metrics
    assert changed(before, module) >= {"net", "adversary"}
    assert all(torch.equal(value, teacher[name]) for name, value in module.frozen["teacher"].state_dict().items())
    assert all(p.grad is None for p in [*module.adversary.parameters(), *module.frozen["teacher"].parameters()])
    assert metrics["train/discriminator"] == pytest.approx(1.0, abs=0.3)  # the discriminator cannot tell the classes apart yet


def test_term_starts_later_and_changes_the_student(training: Make, data: Make, fit: Make) -> None:
    modules = [training("pcm", adversary=adversary) for adversary in (None, partial(ADVERSARY, start=2), ADVERSARY)]
    for module in modules:
        fit(module, data(), 2)
    plain, late, early = (torch.nn.utils.parameters_to_vector(module.net.parameters()) for module in modules)
    assert torch.equal(plain, late)
    assert not torch.equal(plain, early)


@pytest.mark.parametrize("kind", ["pcm", "lora"])
def test_resume_is_exact(kind: str, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    whole, resumed = (training(kind, adversary=ADVERSARY) for _ in range(2))
    fit(whole, data(), 4)
    fit(training(kind, adversary=ADVERSARY), data(), 2).save_checkpoint(tmp_path / "2.ckpt")
    fit(resumed, data(), 4, ckpt_path=tmp_path / "2.ckpt")
    assert any(name.startswith("adversary.") for name in whole.state_dict())
    assert changed(trained(whole), resumed) == set()
    moments = [[v for state in m.adversary.optimizer.state.values() for v in state.values()] for m in (whole, resumed)]
    assert moments[0]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_saved_model_has_no_adversary(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    module = training("pcm", adversary=ADVERSARY)
    fit(module, data(), 1)
    module.save_model(str(tmp_path / "model"))
    assert set(load_network(str(tmp_path / "model")).state_dict()) == set(module.net.state_dict())


def test_impossible_adversary_is_one_sentence(training: Make) -> None:
    for kind in ("finetuning", "ct"):
        with pytest.raises(UserError, match=r"this method has no teacher: use model=lcd or model=cd"):
            training(kind, adversary=ADVERSARY)
    patch = Adversary(PatchDiscriminator(), optimizer=OPTIMIZER, lr_schedule=constant)
    with pytest.raises(UserError, match=r"judges images: use model/adversary=latent"):
        training("pcm", adversary=patch)
