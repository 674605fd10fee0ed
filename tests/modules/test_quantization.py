"""Frozen layers in nf4 and 8-bit moments: stored dtypes, trained weights, exact resume."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from lcm.core.errors import UserError
from lcm.models.lora import is_adapter_parameter
from lcm.models.pipeline import load_network
from lcm.models.quantization import NF4, nf4

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*fork")
BITS = {nf4: (NF4, torch.uint8, 0.2)}  # the layer class, its storage dtype, and a bound of its relative error


@pytest.mark.parametrize("quantization", BITS)
def test_layer_computes_nearly_the_same_and_passes_gradients(quantization: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 128), torch.randn(8, 256, requires_grad=True)
    kind, dtype, bound = BITS[quantization]
    short = nn.Sequential(quantization(layer)).to("cpu").eval()
    assert isinstance(short[0], kind)
    assert short[0].weight.dtype == dtype
    for part in ("value", "gradient"):
        result, expected = (
            net(x) if part == "value" else torch.autograd.grad(net(x).square().sum(), x)[0] for net in (short, layer)
        )
        assert 0 < (result - expected).norm() < bound * expected.norm(), part
    with torch.autocast("cpu", torch.bfloat16):
        assert short(x).dtype == torch.bfloat16
    assert short(x).dtype == torch.float32


def stored(network: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of the weights of linear layers, without adapters."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and ".lora_" not in name}
    return {layer.weight.dtype for layer in layers.values() if isinstance(layer.weight, Tensor)}


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("kind", ["distillation", "guided", "tdm"])
def test_teacher_is_short_and_student_whole(kind: str, quantization: Any, training: Make, data: Make, fit: Make) -> None:
    share = {"match_share": 1 / 4} if kind == "guided" else {}
    module = training(kind, quantization=quantization, **share)
    before = {name: p.clone() for name, p in module.net.named_parameters()}
    fit(module, data(), 4, precision="bf16-mixed")
    assert stored(module.frozen["teacher"]) == {BITS[quantization][1]}
    assert stored(module.net) == {torch.float32}
    assert [name for name, p in module.net.named_parameters() if not p.isfinite().all()] == []
    assert any(not torch.equal(p, before[name]) for name, p in module.net.named_parameters())


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("kind", ["lora", "finetuning"])
def test_adapters_learn_on_a_shared_short_base(
    kind: str, quantization: Any, training: Make, data: Make, fit: Make, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """All networks share the layers of the base. Gradients pass through the base to every adapter, as in QLoRA."""
    module = training(kind, quantization=quantization, adapters={"rank": 4}, ema_decay=0.9, eval_ema=0.9, lr=0.01)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, data(), 3, precision="bf16-mixed")
    short = [{id(m) for m in net.modules() if isinstance(m, BITS[quantization][0])} for net in module.networks()]
    assert len(short[0]) > 5
    assert all(layers == short[0] for layers in short)
    assert [name for name, value in module.state_dict().items() if torch.equal(value, start[name])] == []
    assert all(is_adapter_parameter(name) for name in module.state_dict())
    module.save_model(folder := str(tmp_path / "model"), dtype=torch.float32)  # saving merges the adapters into the pipeline
    saved, base = load_network(folder), load_network(str(tiny_pipeline))
    assert torch.equal(saved.conv_in.weight, base.conv_in.weight)
    assert stored(saved) == {torch.float32}


EIGHT_BIT = partial(AdamW8bit, lr=1e-3, weight_decay=0.0, min_8bit_size=64)  # the tiny network's layers are small
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4 teacher": ("distillation", {"quantization": nf4}),
    "nf4 base": ("lora", {"quantization": nf4, "ema_decay": 0.5}),
    "nf4 base of two adapters": ("tdm", {"quantization": nf4, "adapters": {"rank": 4}}),
    "8-bit moments": ("distillation", {"optimizer": EIGHT_BIT}),
    "8-bit moments of two networks": ("tdm", {"optimizer": EIGHT_BIT}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_exact(case: str, training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    kind, options = RESUMED[case]
    straight, first, second = (training(kind, **options) for _ in range(3))
    way: dict[str, Any] = {"precision": "bf16-mixed"}
    fit(straight, data(), 5, **way)
    fit(first, data(), 2, **way).save_checkpoint(tmp_path / "2.ckpt")
    fit(second, data(), 5, ckpt_path=tmp_path / "2.ckpt", **way)
    ends = straight.state_dict(), second.state_dict()
    assert [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])] == []
    torch.load(tmp_path / "2.ckpt", weights_only=True)


def test_moments_have_8_bits_and_other_settings_take_effect(
    training: Make, data: Make, fit: Make, tmp_path: Path, capsys: Any
) -> None:
    fit(training("distillation", optimizer=EIGHT_BIT), data(), 2).save_checkpoint(tmp_path / "2.ckpt")
    other = partial(EIGHT_BIT, lr=0.5)
    trainer = fit(training("distillation", optimizer=other), data(), 3, ckpt_path=tmp_path / "2.ckpt")
    [optimizer] = trainer.optimizers
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    moments = [state["state1"] for state in optimizer.state.values()]
    assert {moment.dtype for moment in moments if moment.numel() >= 64} == {torch.uint8}
    assert {state["step"] for state in optimizer.state.values()} == {3}
    assert "without moments" not in capsys.readouterr().out
    fit(training("distillation"), data(), 3, ckpt_path=tmp_path / "2.ckpt")
    assert "AdamW starts without moments" in capsys.readouterr().out


def test_refused_without_frozen_weights(training: Make) -> None:
    with pytest.raises(UserError, match="has no teacher and no adapters"):
        training("finetuning", quantization=nf4)
