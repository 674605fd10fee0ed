"""LoRA distillation: base weights that never change, adapters that learn, small files that diffusers loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.objectives.denoising import Denoising
from lcm.core.random import ImageNoise
from lcm.models.lora import is_adapter_parameter, kohya_weights, merge_adapters, save_adapters, with_adapters
from lcm.models.pipeline import load_family, load_network, load_process, read_lcm_json
from lcm.models.student import as_network
from lcm.models.text_to_image import TextToImage
from lcm.modules.latent import LatentModule
from tests.models.conftest import save_student
from tests.modules.conftest import common, new_module

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
T = torch.tensor([19, 339, 659, 999])


def adapters(module: LatentModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def output(tiny_pipeline: Path, batch: LatentBatch) -> Callable[[UNet2DConditionModel], Tensor]:
    """`output(unet)` returns the network's output for the batch."""
    family = load_family(str(tiny_pipeline))

    def run(unet: UNet2DConditionModel) -> Tensor:
        with torch.no_grad():
            return as_network(family, unet.eval())(batch.z0, T, batch.cond)

    return run


@pytest.mark.parametrize(("kind", "options"), [("lora", {"ema_decay": 0.9}), ("tdm", {"adapters": {"rank": 4}})])
def test_networks_share_the_base_weights(kind: str, options: dict[str, Any], training: Make, tiny_pipeline: Path) -> None:
    module = training(kind, eval_ema=0.9, **options)
    teacher_weights = list(load_network(str(tiny_pipeline)).parameters())
    weights = {id(p): p for network in module.networks() for p in network.parameters()}
    more = sum(value.numel() for value in module.state_dict().values())
    assert sum(p.numel() for p in weights.values()) == sum(p.numel() for p in teacher_weights) + more
    assert len(module.networks()) == 4


def test_base_weights_stay_and_take_bf16(training: Make, data: Make, fit: Make) -> None:
    module = training("lora", lr=0.1, eval_ema=0.9)
    before, start = [p.clone() for p in module.frozen["teacher"].parameters()], adapters(module)
    fit(module, data(), 3, precision="bf16-mixed")
    stored = torch.bfloat16
    for p, value in zip(module.frozen["teacher"].parameters(), before, strict=True):
        assert torch.equal(p, value.to(stored))
    base_ids = {id(p) for p in module.frozen["teacher"].parameters()}
    for net in (module.net, module.ema_net):
        for name, p in net.named_parameters():
            assert p.dtype == (torch.float32 if is_adapter_parameter(name) else stored)
            assert is_adapter_parameter(name) or id(p) in base_ids, name
    assert [name for name, value in adapters(module).items() if torch.equal(value, start[name])] == []


def test_fresh_adapters_equal_the_teacher(training: Make, batch: LatentBatch) -> None:
    module = training("lora")
    nets = module.denoisers(module.net)
    with torch.no_grad():
        student_output = nets.online.output(batch.z0, T, batch.cond, torch.tensor([0.0, 2.0, 8.0, 14.0]))
        assert torch.equal(student_output, nets.teacher.output(batch.z0, T, batch.cond, None))
    assert nets.target is nets.online


def test_adapters_of_a_student_keep_its_weights_and_w(
    training: Make, data: Make, fit: Make, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """The saved folder of fine-tuned adapters opens in diffusers as a few-step model that takes w."""
    student = save_student(tmp_path / "student", tiny_pipeline)
    module = new_module(Path(student), "finetuning", adapters={"rank": 4}, ema_decay=0.5, lr=0.05)
    before = {name: p.clone() for name, p in module.net.named_parameters() if not p.requires_grad}
    assert all(is_adapter_parameter(name) for name, p in module.net.named_parameters() if p.requires_grad)
    fit(module, data(), 3)
    assert [name for name, p in before.items() if not torch.equal(p, module.net.get_parameter(name))] == []
    module.save_model(folder := str(tmp_path / "model"), dtype=torch.float32)
    model, base = TextToImage.load(folder), TextToImage.load(student)
    assert model.takes_w
    ours = model.latents(["rocket"], [3], steps=2, w=3.0)
    assert not torch.allclose(ours, base.latents(["rocket"], [3], steps=2, w=3.0), atol=1e-2)
    pipe = LatentConsistencyModelPipeline.from_pretrained(folder)
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = pipe("rocket", generator=ImageNoise([3], ()).generators, **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    adapted = LatentConsistencyModelPipeline.from_pretrained(student)
    adapted.load_lora_weights(folder)
    again = adapted("rocket", generator=ImageNoise([3], ()).generators, **options).images
    torch.testing.assert_close(ours, again, rtol=1e-3, atol=1e-2)


def test_adapters_of_a_teacher_are_saved_merged_and_alone(
    training: Make, data: Make, fit: Make, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """`sample.py lora=<folder>` on the base draws the same latents as the saved pipeline."""
    module = training("diffusion", adapters={"rank": 4}, lr=0.05)
    fit(module, data(), 3)
    module.save_model(folder := str(tmp_path / "model"), dtype=torch.float32)
    options: dict[str, Any] = {"steps": 2, "w": 3.0}
    images = TextToImage.load(folder).latents(["rocket"], [3], **options)
    base, adapted = (TextToImage.load(str(tiny_pipeline), lora=lora) for lora in ({}, {folder: 1.0}))
    torch.testing.assert_close(images, adapted.latents(["rocket"], [3], **options), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(images, base.latents(["rocket"], [3], **options), atol=1e-2)


def test_adapters_need_the_weights_of_the_pipeline(tiny_pipeline: Path) -> None:
    net = UNet2DConditionModel.from_config(load_network(str(tiny_pipeline)).config)
    net.register_to_config(_name_or_path="")
    options = common(objective=Denoising, adapters={"rank": 4})
    with pytest.raises(UserError, match="set model/net=pipeline"):
        LatentModule(net, load_process(str(tiny_pipeline)), pipeline=str(tiny_pipeline), **options)


@pytest.mark.parametrize(("kind", "recompute"), [("lora", False), ("tdm", True), ("diffusion", False)])
def test_only_adapters_get_gradients(kind: str, recompute: bool, training: Make, data: Make, fit: Make) -> None:
    """All trained parameters get gradients, so DDP need not look for unused parameters."""
    module = training(kind, gradient_checkpointing=recompute, eval_ema=0.9, adapters={"rank": 4})
    fit(module, data(), 2)
    assert [name for name, p in module.named_parameters() if (p.grad is not None) != p.requires_grad] == []
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {name for name in module.state_dict() if name.startswith("net.")}
    assert {net.is_gradient_checkpointing for net in module.networks() if net.training} == {recompute}


def test_resume_from_adapters_is_exact(training: Make, data: Make, fit: Make, tmp_path: Path) -> None:
    straight, first, second = (training("lora", eval_ema=0.9, ema_decay=0.5) for _ in range(3))
    fit(straight, data(), 4, precision="bf16-mixed")
    fit(first, data(), 2, precision="bf16-mixed").save_checkpoint(tmp_path / "2.ckpt")
    fit(second, data(), 4, ckpt_path=tmp_path / "2.ckpt", precision="bf16-mixed")
    assert [name for name, value in adapters(straight).items() if not torch.equal(value, adapters(second)[name])] == []
    content = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert all(is_adapter_parameter(name) for name in content["state_dict"])
    assert {name.split(".")[0] for name in content["state_dict"]} == {"net", "ema_net", "target_net"}


def test_checkpoint_without_an_adapter_is_refused(training: Make) -> None:
    module = training("lora")
    state = module.state_dict()
    name, _ = state.popitem()
    with pytest.raises(UserError, match=f"{name} is not in the checkpoint"):
        module.load_state_dict(state)


def test_average_of_adapters_is_saved(training: Make, data: Make, fit: Make, output: Make, tmp_path: Path) -> None:
    module = training("lora", eval_ema=0.5)
    fit(module, data(), 3)
    module.save_model(folder := str(tmp_path / "model"), dtype=torch.float32)
    result = output(load_network(folder))
    torch.testing.assert_close(result, output(module.ema_net), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_folder_and_adapters(
    training: Make, data: Make, fit: Make, output: Make, tiny_pipeline: Path, tmp_path: Path
) -> None:
    module = training("lora", adapters={"rank": 4, "alpha": 2}, lr=1e-2)
    fit(module, data(), 3)
    module.save_model(folder := str(tmp_path / "model"), dtype=torch.float32)
    whole = StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(whole.scheduler, LCMScheduler)
    assert not [path for path in Path(folder).rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    teacher = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    before = output(teacher.unet)
    teacher.load_lora_weights(folder)
    teacher.scheduler = LCMScheduler.from_config(teacher.scheduler.config)
    for unet in (teacher.unet, module.net):
        torch.testing.assert_close(output(unet), output(whole.unet), atol=1e-4, rtol=0)
    assert (output(whole.unet) - before).abs().max() > 1e-2
    image = teacher("rocket", num_inference_steps=2, guidance_scale=1.0, output_type="np").images[0]
    assert image.shape == (32, 32, 3)


def test_merged_folder_needs_one_pass_per_step(training: Make, data: Make, fit: Make, tmp_path: Path, monkeypatch: Any) -> None:
    module = training("lora", w_min=1.0, w_max=5.0)
    fit(module, data(), 2)
    module.save_model(folder := str(tmp_path / "model"))
    facts = {"method": "LatentConsistencyDistillation of adapters", "steps": 2, "rank": 4, "alpha": 4, "teacher_w": [1.0, 5.0]}
    assert read_lcm_json(folder).items() >= facts.items()
    model, batches = TextToImage.load(folder), []
    assert model.consistency
    model.net.register_forward_pre_hook(lambda unet, args: batches.append(len(args[0])))
    images = [model.latents(["rocket", "dog"], [0, 1], steps=3, w=w) for w in (0.0, 9.0)]
    assert torch.equal(*images)
    assert batches == [2] * 6


def test_sampling_during_training(training: Make, data: Make, fit: Make) -> None:
    module, source = training("lora", eval_ema=0.9), data()
    fit(module, source, 2, precision="bf16-mixed")
    assert module.text_to_image(source.codec).latents(["rocket"], [0], steps=2, w=3.0).isfinite().all()


@pytest.mark.parametrize("options", [{"rank": 0}, {"target_modules": ["to_nothing"]}])
def test_empty_adapters_are_refused(options: dict[str, Any], training: Make) -> None:
    with pytest.raises(UserError, match=rf"model\.adapters\.{next(iter(options))}"):
        training("lora", adapters={"rank": 4, **options})


@pytest.mark.parametrize("kind", ["lora", "tdm"])
def test_sharding_is_refused(kind: str, training: Make) -> None:
    module = training(kind, adapters={"rank": 4})
    module._device_mesh = object()
    with pytest.raises(UserError, match="trainer=ddp"):
        module.configure_model()


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_adapters_are_added_with_their_weight(form: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    """`lora=<file>:0.5` adds half of the merged update, for files of both formats."""
    family, base = load_family(tiny_pipeline), load_network(tiny_pipeline).state_dict()
    adapted = with_adapters(family, load_network(tiny_pipeline), rank=2, alpha=3)
    torch.manual_seed(0)
    for name, value in adapted.named_parameters():
        if is_adapter_parameter(name):
            value.data.normal_()
    if form == "kohya":
        save_file(kohya_weights(adapted), tmp_path / "lora.safetensors")
    else:
        save_adapters(tmp_path, adapted, family, torch.float32)
    file = tmp_path / "lora.safetensors" if form == "kohya" else tmp_path
    weights = TextToImage.load(str(tiny_pipeline), lora={str(file): 0.5}).net.state_dict()
    whole = merge_adapters(adapted, load_network(tiny_pipeline)).state_dict()
    assert weights.keys() == base.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, base[name] + 0.5 * (whole[name] - base[name]), rtol=1e-4, atol=1e-4)
    assert sum(not torch.equal(value, base[name]) for name, value in weights.items()) > 50


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("photo.png", "is not a .safetensors file"),
        ("missing.safetensors", "does not exist"),
        ("other.safetensors", "does not fit this StableDiffusionPipeline"),
    ],
)
def test_wrong_adapters_are_refused(name: str, says: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    if name == "photo.png":
        (tmp_path / name).write_bytes(b"PNG")
    elif name == "other.safetensors":
        save_file({"unet.other.lora_A.weight": torch.zeros(2, 2)}, tmp_path / name)
    with pytest.raises(UserError, match=f"^lora: .*{name} {says}"):
        TextToImage.load(str(tiny_pipeline), lora={str(tmp_path / name): 1.0})
