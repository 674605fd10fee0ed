"""Single files in the original layout agree with diffusers' converter. A single file can be a teacher."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcm.app.cli import build
from lcm.app.targets import CONF
from lcm.core.errors import UserError
from lcm.core.process import VP, Flow
from lcm.export import check_format
from lcm.models import single_file
from lcm.models.families import Original
from lcm.models.lora import with_adapters
from lcm.models.pipeline import find, load_family, load_network
from lcm.models.single_file import clip_weights, unet_weights, vae_weights
from lcm.models.student import as_network
from lcm.models.text_to_image import TextToImage
from tests.conftest import tiny_vae

OPENCLIP = Original("sd_v2", "stable-diffusion-v2", ("cond_stage_model.model.",))


def whole_file(file: Path, pipe: Any, text: tuple[str, ...], net: Any = None) -> Path:
    weights = {**unet_weights(net or pipe.unet), **vae_weights(pipe.vae)}
    for encoder, prefix in zip((pipe.text_encoder, getattr(pipe, "text_encoder_2", None)), text, strict=False):
        state = encoder.state_dict()
        named = {name if name.startswith("text_") else f"text_model.{name}": value for name, value in state.items()}
        weights |= clip_weights(named, prefix)
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    return file


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("kind", ["CLIP", "OpenCLIP", "XL"])
def test_diffusers_reads_what_is_written(kind: str, tiny_pipeline: Path, xl_pipeline: Path, tmp_path: Path) -> None:
    base, pipeline = (xl_pipeline, StableDiffusionXLPipeline) if kind == "XL" else (tiny_pipeline, StableDiffusionPipeline)
    pipe = pipeline.from_pretrained(base)
    text = OPENCLIP.text if kind == "OpenCLIP" else load_family(base).original(pipe.unet).text
    file = whole_file(tmp_path / "model.safetensors", pipe, text)
    again = pipeline.from_single_file(str(file), config=str(base), local_files_only=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if kind == "XL" else 3]:
        equal(getattr(pipe, part).state_dict(), getattr(again, part).state_dict())


@pytest.mark.parametrize(
    ("net", "weights", "examples"),
    [
        (
            "sd15",
            686,
            ["output_blocks.11.0.skip_connection.weight", "output_blocks.2.1.conv.bias", "output_blocks.5.2.conv.bias"],
        ),
        ("sd21", 686, ["input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"]),
        ("sdxl", 1680, ["label_emb.0.2.bias", "output_blocks.2.2.conv.bias"]),
    ],
)
def test_names_of_full_size_unets(net: str, weights: int, examples: list[str]) -> None:
    with torch.device("meta"):
        unet: UNet2DConditionModel = build(OmegaConf.load(CONF / "model/net" / f"{net}.yaml"))
    named = unet_weights(unet)
    assert len(named) == weights
    assert {f"model.diffusion_model.{example}" for example in examples} <= named.keys()
    converted = convert_ldm_unet_checkpoint(named, unet.config)
    assert {name: value.shape for name, value in converted.items()} == {name: p.shape for name, p in unet.state_dict().items()}


def test_attention_of_the_vae_is_convolutions() -> None:
    vae = tiny_vae(mid_block_add_attention=True)
    named = vae_weights(vae)
    assert named["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    equal(convert_ldm_vae_checkpoint(named, vae.config), vae.state_dict())


def test_w_is_fixed_exactly(tiny_pipeline: Path) -> None:
    w = 7.5
    family = load_family(tiny_pipeline)
    torch.manual_seed(0)
    student = family.with_w(load_network(tiny_pipeline), zero_init=False).double()
    plain = family.at_w(student, w).double()
    z, cond = torch.randn(2, 4, 8, 8).double(), {"states": torch.randn(2, 16, 16).double()}
    t, ws = torch.tensor([19, 999]), torch.full((2,), w)
    with torch.no_grad():
        expected = as_network(family, student)(z, t, cond, ws)
        assert plain.config["time_cond_proj_dim"] is None
        torch.testing.assert_close(as_network(family, plain)(z, t, cond), expected, rtol=0, atol=1e-6)
        assert (expected - as_network(family, student)(z, t, cond, ws + 1)).abs().max() > 1e-3


@pytest.fixture
def checkpoint(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(single_file, "HF_HOME", str(tmp_path / "hub"))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    return whole_file(tmp_path / "model.safetensors", pipe, load_family(tiny_pipeline).original(pipe.unet).text)


def test_a_single_file_is_a_teacher(checkpoint: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    configs = shutil.copytree(tiny_pipeline, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    model, teacher = TextToImage.load(f"{checkpoint}:{configs}"), TextToImage.load(str(tiny_pipeline))
    options = {"steps": 2, "w": 3.0}
    assert torch.equal(model.latents(["rocket"], [3], **options), teacher.latents(["rocket"], [3], **options))
    folder = find(f"{checkpoint}:{configs}")
    shutil.rmtree(configs)  # the second call uses the stored conversion
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert find(f"{checkpoint}:{configs}") == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == before
    os.utime(checkpoint, (0, 0))  # another modification time stands for another file
    with pytest.raises(UserError, match=r"the configuration .*configs' is neither a folder here nor reachable on the hub"):
        find(f"{checkpoint}:{configs}")


def test_a_single_file_without_its_configuration_says_how_to_name_it(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"looks like .*/stable-diffusion-v1-5, .*model.safetensors:<folder>"):
        find(str(checkpoint))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="is the configuration of a FluxPipeline, which is not supported"):
        find(f"{checkpoint}:{tmp_path / 'odd'}")
    with pytest.raises(UserError, match=r"there is no file .*none.safetensors"):
        find(str(tmp_path / "none.safetensors"))
    save_file({"unet.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"is a file, not a pipeline folder, and holds adapters \(LoRA\)"):
        find(str(tmp_path / "lora.safetensors"))


def test_other_families_have_no_such_layout(pixart_pipeline: Path) -> None:
    assert load_family(pixart_pipeline).original(None) is None


def test_pickled_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.bin.safetensors"):
        torch.save({"model.diffusion_model.out.0.bias": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match=r"model.ckpt is a file, not a pipeline folder or a .safetensors file"):
        find(str(tmp_path / "model.ckpt"))
    with pytest.raises(UserError, match=r"cannot load .*model.bin.safetensors: it is cut or damaged"):
        find(str(tmp_path / "model.bin.safetensors"))


def test_a_checkpoint_without_a_part_is_refused(checkpoint: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The weights of the configuration's pipeline do not replace the missing part."""
    weights = {name: value for name, value in load_file(checkpoint).items() if not name.startswith("cond_stage_model.")}
    save_file(weights, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"cannot load .*half.safetensors"):
        find(f"{tmp_path / 'half.safetensors'}:{tiny_pipeline}")


def network(kind: str, tiny: Path, pixart: Path, sd3: Path) -> tuple[Any, Any]:
    """Return a stand-in for a module, with the attributes that an export reads, and its network."""
    folder = {"pixart": pixart, "sd3": sd3}.get(kind, tiny)
    family, net = load_family(folder), load_network(folder)
    if kind == "student":
        net = family.with_w(net)
    elif kind == "adapters":
        net = with_adapters(family, net, rank=2)
    process = Flow() if kind == "flow" else VP(rescale_betas_zero_snr=True)
    return SimpleNamespace(family=family, process=process, extra_networks=lambda: kind == "several"), net


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (
            "student",
            {"format": "kohya"},
            "format=kohya is for adapters .*, and this run trained the whole network: use format=",
        ),
        ("student", {"format": "original"}, "has no input for w, and this network takes w: fix it by w=7"),
        ("student", {"format": "original", "w": float("inf")}, "w=inf is not a finite number"),
        ("student", {"format": "unet", "w": 3.0}, "w=3 has no effect on format=unet"),
        ("teacher", {"format": "original", "w": 3.0}, "w=3 has no effect: this network does not take w"),
        ("flow", {"format": "original"}, "other programs assume the noise schedule of Stable Diffusion"),
        ("pixart", {"format": "original"}, "other programs have no names for PixArtAlphaPipeline"),
        ("teacher", {"format": "unet", "card": True}, "card=true has no effect on format=unet"),
        ("teacher", {"evaluation": "x"}, "evaluation=x has no effect without a card"),
        ("teacher", {"evaluation": "x", "card": True}, "evaluation=x has no table.md"),
        ("pixart", {"format": "onnx"}, "format=onnx is for Stable Diffusion 1, 2 and XL, and this is a PixArtAlphaPipeline"),
        ("sd3", {"format": "openvino"}, "format=openvino is for Stable Diffusion 1, 2 and XL, and this is a StableDiffusion3P"),
        ("several", {"format": "openvino"}, "format=openvino holds one network, and this run trained several"),
        ("student", {"format": "openvino", "w": 3.0}, "w=3 has no effect on format=openvino"),
        ("student", {"format": "original", "w": 3.0}, None),
        ("adapters", {"format": "kohya"}, None),
    ],
)
def test_an_export_without_effect_is_refused(
    kind: str, options: dict[str, Any], says: str | None, tiny_pipeline: Path, pixart_pipeline: Path, sd3_pipeline: Path
) -> None:
    cfg = OmegaConf.create({"format": "pipeline", "w": None, "card": False, "evaluation": None, **options})
    module, net = network(kind, tiny_pipeline, pixart_pipeline, sd3_pipeline)
    with nullcontext() if says is None else pytest.raises(UserError, match=says):
        check_format(cfg, module, net)
