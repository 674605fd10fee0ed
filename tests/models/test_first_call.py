"""diffusers opens every kind of shipped or saved folder. A first call with only a prompt draws the image of TextToImage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm.core import sampling
from lcm.core.random import ImageNoise
from lcm.models.lora import with_adapters
from lcm.models.pipeline import ASSETS, load_codec, load_family, load_network, read_lcm_json
from lcm.models.saving import save_clip
from lcm.models.text_to_image import TextToImage
from tests.models.conftest import save_student, save_teacher

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT, SEED = "red apple on a white background", 3
MINI = ASSETS / "mini"


def as_hub_folder(base: Path, folder: Path) -> Path:
    """Copy a folder in the form of hub repositories: float16 text encoders, fp16 variants, and no tokenizer length."""
    shutil.copytree(base, folder)
    for part in folder.glob("text_encoder*"):
        file = part / "config.json"
        config = {key: value for key, value in json.loads(file.read_text()).items() if key != "dtype"}
        file.write_text(json.dumps({**config, "torch_dtype": "float16"}))
    for part in (folder / "vae", *folder.glob("text_encoder*")):
        [weights] = part.glob("*.safetensors")
        halved = {name.removeprefix("text_model."): value.half() for name, value in load_file(weights).items()}
        save_file(halved, weights.with_suffix(".fp16.safetensors"), {"format": "pt"})
        weights.unlink()
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": None}))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_pipeline: Path, xl_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders by kind. Their networks are in float16, as train.py saves them."""
    root = tmp_path_factory.mktemp("folders")

    def saved(name: str, base: Path, *, takes_w: bool, consistency: bool) -> Path:
        torch.manual_seed(0)
        unet = load_network(base)
        unet = load_family(base).with_w(unet, zero_init=False) if takes_w else unet
        if consistency:
            save_student(root / name, base, net=unet, dtype=torch.float16)
        else:
            save_teacher(root / name, unet, base, dtype=torch.float16)
        return root / name

    hub, hub_xl = as_hub_folder(tiny_pipeline, root / "hub"), as_hub_folder(xl_pipeline, root / "hub-xl")
    return {
        "mini": MINI,
        "teacher": saved("teacher", hub, takes_w=False, consistency=False),
        "student": saved("student", hub, takes_w=True, consistency=True),
        "guided": saved("guided", hub, takes_w=True, consistency=False),
        "student of mini": saved("of-mini", MINI, takes_w=True, consistency=True),
        "xl teacher": saved("xl-teacher", hub_xl, takes_w=False, consistency=False),
        "xl student": saved("xl-student", hub_xl, takes_w=True, consistency=True),
    }


KINDS: dict[str, tuple[type[DiffusionPipeline], int, float]] = {  # the class with its default steps and w
    "mini": (StableDiffusionPipeline, 50, 6.5),
    "teacher": (StableDiffusionPipeline, 50, 6.5),
    "student": (LatentConsistencyModelPipeline, 4, 7.5),
    "guided": (StableDiffusionPipeline, 50, 6.5),
    "student of mini": (LatentConsistencyModelPipeline, 4, 7.5),
    "xl teacher": (StableDiffusionXLPipeline, 50, 4.0),
    "xl student": (StableDiffusionXLPipeline, 50, 4.0),
}


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes torch draw our noise of `SEED`. torch draws it in float32 and then casts it."""
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, dtype=None, **options: draw(*size, **options).to(dtype))
    return lambda: torch.set_rng_state(ImageNoise([SEED], ()).generators[0].get_state())


def difference(image: Image.Image, folder: Path, **options: Any) -> float:
    """Return the mean absolute difference, in grey levels, between diffusers' image and ours."""
    [ours] = TextToImage.load(str(folder)).images([PROMPT], [SEED], **options)
    return float(np.abs(ours[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(image).astype(int)).mean())


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        *((kind, None, 0.01) for kind in KINDS if kind != "student of mini"),
        ("student of mini", torch.float16, 0.5),
    ],
)
def test_first_call_agrees_with_ours(
    kind: str, dtype: torch.dtype | None, tolerance: float, folders: dict[str, Path], same_noise: Callable[[], None]
) -> None:
    """The tolerance is in grey levels."""
    (pipeline_class, steps, w), folder = KINDS[kind], folders[kind]
    pipe = pipeline_class.from_pretrained(folder, **({} if dtype is None else {"torch_dtype": dtype}))
    same_noise()
    image = pipe(PROMPT).images[0]
    sampler = None if read_lcm_json(folder)["sampler"] == "consistency" else sampling.ddim
    assert difference(image, folder, steps=steps, w=w, sampler=sampler) <= tolerance


def test_documented_lines_for_adapters_agree_with_ours(
    tiny_pipeline: Path, tmp_path: Path, same_noise: Callable[[], None]
) -> None:
    unet = with_adapters(load_family(tiny_pipeline), load_network(tiny_pipeline), rank=4, alpha=2)
    for name, value in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    folder = tmp_path / "model"
    save_student(folder, tiny_pipeline, net=unet, rank=4)
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    base.load_lora_weights(folder)
    base.scheduler = LCMScheduler.from_config(base.scheduler.config)
    for pipe in (base, StableDiffusionPipeline.from_pretrained(folder)):
        same_noise()
        image = pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0).images[0]
        assert difference(image, folder, steps=4, w=0.0) <= 0.01


def keys(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def test_text_encoders_have_prefix(folders: dict[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    """transformers 4 and ComfyUI need the prefix in the names of weights."""
    codec = load_codec(tiny_pipeline)
    clip = CLIPModel.from_pretrained(tiny_pipeline / "clip")
    save_clip(tmp_path / "clip_mini", clip, codec.text.tokenizers[0])
    for folder in (*folders.values(), tmp_path / "clip_mini"):
        for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if (folder / part).is_dir():
                assert {key.partition(".")[0] for key in keys(folder / part)} <= {"text_model", "text_projection"}
                network, info = kind.from_pretrained(folder / part, output_loading_info=True)
                assert not any(info.values()), info
                assert network.dtype == torch.float32
                assert json.loads((folder / part / "config.json").read_text())["dtype"] == "float32"
    for folder in (MINI / "clip", tmp_path / "clip_mini/clip"):
        network, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert network.dtype == torch.float32
        assert any(key.startswith("text_model.") for key in keys(folder))


def test_saving_keeps_weights(folders: dict[str, Path], tiny_pipeline: Path) -> None:
    for part in ("text_encoder", "vae"):
        [before], [after] = ((folder / part).glob("*.safetensors") for folder in (tiny_pipeline, folders["student"]))
        assert ".fp16." not in after.name
        expected = {name.removeprefix("text_model."): value.half() for name, value in load_file(before).items()}
        actual = {name.removeprefix("text_model."): value for name, value in load_file(after).items()}
        assert actual.keys() == expected.keys()
        assert all(value.dtype == torch.float16 and torch.equal(value, expected[name]) for name, value in actual.items())


def test_tokenizers_load_in_transformers_4(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        for part in folder.glob("tokenizer*"):
            positions = json.loads((folder / part.name.replace("tokenizer", "text_encoder") / "config.json").read_text())
            tokenizer = CLIPTokenizer.from_pretrained(part)
            assert tokenizer.model_max_length == positions["max_position_embeddings"]
            slow = CLIPTokenizer(vocab=str(part / "vocab.json"), merges=str(part / "merges.txt"))
            assert slow("red apple naïve 红").input_ids == tokenizer("red apple naïve 红").input_ids
