"""A part of a pipeline folder needs complete, finite weights in safetensors. Other weights are an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lcm.core.errors import UserError
from lcm.evaluate.clip import mini_clip, pretrained_clip
from lcm.models.loading import cast_copy
from lcm.models.lora import with_adapters
from lcm.models.pipeline import load_codec, load_family, load_network
from lcm.models.text_to_image import TextToImage
from tests.models.conftest import save_student, save_teacher

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 492265168\n"
NETWORKS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "unet": ("diffusion_pytorch_model", load_network),
    "vae": ("diffusion_pytorch_model", lambda folder: load_codec(folder).vae),
    "text_encoder": ("model", lambda folder: load_codec(folder).text.encoders[0]),
    "text_encoder_2": ("model", lambda folder: load_codec(folder).text.encoders[1]),
    "clip": ("model", lambda folder: mini_clip(folder).clip),
}


@pytest.fixture
def part(request: pytest.FixtureRequest, xl_pipeline: Path, tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """Return the weight file of a part in a copied folder, and the function that loads the part."""
    name, load = NETWORKS[request.param]
    folder = shutil.copytree(xl_pipeline, tmp_path / "teacher")
    return folder / request.param / f"{name}.safetensors", lambda: load(str(folder))


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def parts(names: str, *values: Any) -> Any:
    """Parametrise over values whose first entry names a part."""
    return pytest.mark.parametrize(names, values, indirect=["part"])


@parts("part,variant", ("unet", "fp16"), ("clip", "non_ema"))
def test_variant_is_loaded_without_other_files(part: Any, variant: str) -> None:
    file, load = part
    expected = load()
    file.rename(file.with_suffix(f".{variant}.safetensors"))
    assert same(load(), expected)


@parts("part", "unet", "text_encoder")
def test_variant_is_ignored_beside_other_file(part: Any) -> None:
    file, load = part
    expected = load()
    zeros = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    save_file(zeros, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    assert same(load(), expected)


@parts("part", "unet", "text_encoder", "clip")
def test_missing_weights_are_an_error(part: Any) -> None:
    """diffusers and transformers only warn. They draw random weights or leave the weights on the meta device."""
    file, load = part
    weights = load_file(file)
    lost = max(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{file.parent}: 1 of its weights are missing, such as .*{lost.split('.')[-2]}"):
        load()


@parts(
    "part,pickled,says",
    ("unet", True, "weights.bin may hold code; if you trust it"),
    ("text_encoder", False, "copy the whole"),
)
def test_missing_safetensors_are_an_error(part: Any, pickled: bool, says: str) -> None:
    file, load = part
    file.unlink()
    if pickled:
        file.with_name("weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"cannot load {file.parent}: it has no .safetensors file: {says}"):
        load()


@parts(
    "part,content,says",
    pytest.param(
        *("unet", lambda content: POINTER, r"is a pointer of git-lfs, not the file itself \(`git lfs pull` fetches it\)"),
        id="pointer",
    ),
    pytest.param("vae", lambda content: b"", "is empty", id="empty"),
    pytest.param("clip", lambda content: b"<!DOCTYPE html><html></html>", "is a web page, not the file itself", id="page"),
    pytest.param("text_encoder", lambda content: content[: len(content) // 2], "is cut or damaged", id="half"),
)
def test_damaged_file_is_an_error(part: Any, content: Callable[[bytes], bytes], says: str) -> None:
    file, load = part
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(UserError, match=f"cannot load {file}: it {says}.*: copy it anew"):
        load()


@parts(
    "part,value",
    ("unet", float("nan")),
    ("text_encoder_2", float("-inf")),
)
def test_loading_non_finite_weights_is_an_error(part: Any, value: float) -> None:
    file, load = part
    weights = load_file(file)
    name = max(weights)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"cannot load {file.parent}: 1 of its weights are not finite, such as .*{name[-20:]}"):
        load()


def test_float16_overflow_is_an_error(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Loading and saving both raise the error. bfloat16 has a larger range."""
    unet = load_network(tiny_pipeline)
    unet.conv_out.weight.data[0] = 7e4
    folder = shutil.copytree(tiny_pipeline, tmp_path / "large")
    unet.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=r"are not finite in float16, whose largest number is 65504, such as conv_out\.weight"):
        TextToImage.load(str(folder), dtype=torch.float16)
    TextToImage.load(str(folder), dtype=torch.bfloat16)

    with pytest.raises(UserError, match=r"1 of the weights to save are too large for float16, such as conv_out\.weight \(7e"):
        save_teacher(tmp_path / "half", unet, tiny_pipeline, dtype=torch.float16)
    assert not list(tmp_path.glob("half*"))
    save_teacher(tmp_path / "bfloat16", unet, tiny_pipeline, dtype=torch.bfloat16)


@pytest.mark.parametrize("adapted", [False, True])
def test_saving_non_finite_weights_is_an_error(adapted: bool, tiny_pipeline: Path, tmp_path: Path) -> None:
    unet = load_network(tiny_pipeline)
    unet = with_adapters(load_family(tiny_pipeline), unet, rank=1, alpha=1) if adapted else unet
    next(p for name, p in unet.named_parameters() if ".lora_" in name or not adapted).data[0] = torch.nan
    with pytest.raises(UserError, match=r"1 of the weights to save are not finite, such as .*, and nothing is saved"):
        save_teacher(tmp_path / "model", unet, tiny_pipeline, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_cast_copy_to_any_dtype() -> None:
    layer = nn.Linear(2, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert cast_copy(layer, dtype).weight.dtype == dtype


def test_clip_of_metrics_is_checked(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline / "clip", tmp_path / "clip")
    shutil.copytree(tiny_pipeline / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"model\.safetensors: it is a pointer of git-lfs"):
        pretrained_clip(str(folder))
    with pytest.raises(UserError, match=r"is a pipeline: choose its CLIP by backbone=mini backbone\.pipeline="):
        pretrained_clip(str(tiny_pipeline))


def edited(folder: Path, part: str, **changes: Any) -> Path:
    """Change the config of a part, and return the folder. `...` removes a key."""
    file = folder / part
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


UNKNOWN = {"decay": 0.9999, "optimization_step": 1000, "update_after_step": 0, "use_ema_warmup": False, "from_tomorrow": None}


def test_unknown_keys_of_configs_are_ignored(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "ema")
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        edited(folder, file, **UNKNOWN)
    family = load_family(folder)
    assert same(family.with_w(load_network(tiny_pipeline)), family.with_w(load_network(folder)))
    load_codec(folder)
    save_student(tmp_path / "student", folder)
    TextToImage.load(str(tmp_path / "student"))


@pytest.mark.parametrize(("length", "files"), [(10**30, "tokenizer.json"), (..., "vocab.json")])
def test_captions_are_cut_to_encoder_length(length: Any, files: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The tokenizer's config has a larger length or no length."""
    folder = edited(shutil.copytree(tiny_pipeline, tmp_path / "f"), "tokenizer/tokenizer_config.json", model_max_length=length)
    if files == "vocab.json":
        (folder / "tokenizer/tokenizer.json").unlink()
    for captions in (["dog"], ["dog", "dog " * 100]):
        ours, expected = load_codec(folder).text(captions), load_codec(tiny_pipeline).text(captions)
        assert torch.equal(ours["states"], expected["states"])
    captions = ["dog " * 100]
    torch.testing.assert_close(mini_clip(folder).text(captions), mini_clip(tiny_pipeline).text(captions))


def tokenizer_model(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]


def without_vocabulary(folder: Path) -> None:
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / file).unlink()


def bert(folder: Path) -> None:
    without_vocabulary(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 16}')


def cut_merges(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]))


def small(folder: Path) -> None:
    vocab = dict(list(tokenizer_model(folder)["vocab"].items())[:400])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2")


TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (
        without_vocabulary,
        r"lacks its vocabulary .*: copy tokenizer\.json, or vocab\.json and merges\.txt",
    ),
    "BERT": (bert, "holds a BertTokenizer: only CLIP's tokenizers are supported"),
    "pointer": (lambda folder: (folder / "tokenizer.json").write_bytes(POINTER) and None, "is a pointer of git-lfs"),
    "half": (
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:999]) and None,
        r"tokenizer\.json is not JSON",
    ),
    "cut merges": (cut_merges, "longer tokens: its merges are cut"),
    "small": (small, r"has \d+ tokens, but its text encoder has \d+"),
}


@pytest.mark.parametrize(("kind", "ending"), list(zip(TOKENIZERS, ["", "_2"] * 3, strict=True)))
def test_wrong_tokenizer_is_an_error(kind: str, ending: str, xl_pipeline: Path, tmp_path: Path) -> None:
    folder, (change, says) = shutil.copytree(xl_pipeline, tmp_path / "f"), TOKENIZERS[kind]
    change(folder / f"tokenizer{ending}")
    with pytest.raises(UserError, match=says):
        load_codec(folder)


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("text_encoder_2", {"model_type": "t5", "architectures": ["T5EncoderModel"]}, "_2 holds a T5EncoderModel: only CLIP's"),
    ],
)
def test_text_encoder_other_than_clip_is_an_error(
    part: str, changes: dict[str, Any], says: str, xl_pipeline: Path, tmp_path: Path
) -> None:
    folder = edited(shutil.copytree(xl_pipeline, tmp_path / "f"), f"{part}/config.json", **changes)
    with pytest.raises(UserError, match=says):
        load_codec(folder)
