"""A part of a pipeline folder: all of its weights, in whichever safetensors file they are, or one sentence."""

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


@pytest.fixture(params=NETWORKS)
def part(request: pytest.FixtureRequest, xl_pipeline: Path, tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """The weights' file of each part, to be changed, and what loads it."""
    name, load = NETWORKS[request.param]
    folder = shutil.copytree(xl_pipeline, tmp_path / "teacher")
    return folder / request.param / f"{name}.safetensors", lambda: load(str(folder))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["{}.fp16.safetensors", "{}.non_ema.safetensors"])
def test_a_variant_is_loaded_where_there_is_no_other_file(part: Any, name: str) -> None:
    file, load = part
    expected = load()
    file.rename(file.with_name(name.format(file.stem)))
    assert same(load(), expected)


def test_a_variant_is_passed_over_where_there_is_another_file(part: Any) -> None:
    file, load = part
    expected = load()
    zeros = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    save_file(zeros, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    assert same(load(), expected)


def test_weights_that_lack_some_are_a_user_error(part: Any) -> None:
    """A library draws them or leaves them on the meta device, and says so where nobody sees it."""
    file, load = part
    weights = load_file(file)
    lost = max(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{file.parent}: 1 of its weights are missing, such as .*{lost.split('.')[-2]}"):
        load()


@pytest.mark.parametrize(("pickled", "says"), [(True, "weights.bin may hold code; if you trust it"), (False, "copy the whole")])
def test_a_folder_without_safetensors_is_a_user_error(part: Any, pickled: bool, says: str) -> None:
    file, load = part
    file.unlink()
    if pickled:
        file.with_name("weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"cannot load {file.parent}: it has no .safetensors file: {says}"):
        load()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda whole: POINTER, r"is a pointer of git-lfs, not the file itself \(`git lfs pull` fetches it\)"),
        (lambda whole: b"", "is empty"),
        (lambda whole: b"<!DOCTYPE html><html>Access denied</html>", "is a web page, not the file itself"),
        (lambda whole: whole[: len(whole) // 2], "is cut or damaged"),
        (lambda whole: whole[:5], "is cut or damaged"),
    ],
    ids=["pointer", "empty", "page", "half", "header"],
)
def test_a_damaged_file_is_named(part: Any, content: Callable[[bytes], bytes], says: str) -> None:
    file, load = part
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(UserError, match=f"cannot load {file}: it {says}.*: copy it anew"):
        load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_a_user_error(part: Any, value: float) -> None:
    file, load = part
    weights = load_file(file)
    name = max(weights)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"cannot load {file.parent}: 1 of its weights are not finite, such as .*{name[-20:]}"):
        load()


def test_weights_too_large_for_half_precision_are_a_user_error(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Read and written; bfloat16 holds them."""
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
def test_weights_that_are_not_finite_are_not_saved(adapted: bool, tiny_pipeline: Path, tmp_path: Path) -> None:
    unet = load_network(tiny_pipeline)
    unet = with_adapters(load_family(tiny_pipeline), unet, rank=1, alpha=1) if adapted else unet
    next(p for name, p in unet.named_parameters() if ".lora_" in name or not adapted).data[0] = torch.nan
    with pytest.raises(UserError, match=r"1 of the weights to save are not finite, such as .*, and nothing is saved"):
        save_teacher(tmp_path / "model", unet, tiny_pipeline, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_finite_weights_of_any_dtype_are_saved() -> None:
    layer = nn.Linear(2, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert cast_copy(layer, dtype).weight.dtype == dtype


def test_a_clip_for_metrics_is_checked_alike(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline / "clip", tmp_path / "clip")
    shutil.copytree(tiny_pipeline / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"model\.safetensors: it is a pointer of git-lfs"):
        pretrained_clip(str(folder))
    with pytest.raises(UserError, match=r"is a pipeline: choose its CLIP by backbone=mini backbone\.pipeline="):
        pretrained_clip(str(tiny_pipeline))


def edited(folder: Path, part: str, **changes: Any) -> Path:
    """The folder with another configuration of a part; `...` removes a key."""
    file = folder / part
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


UNKNOWN = {"decay": 0.9999, "optimization_step": 1000, "update_after_step": 0, "use_ema_warmup": False, "from_tomorrow": None}
CONFIGS = {
    "unet/config.json": UNKNOWN,
    "vae/config.json": UNKNOWN,
    "text_encoder/config.json": UNKNOWN,
    "scheduler/scheduler_config.json": UNKNOWN,
}


@pytest.mark.parametrize("part", CONFIGS)
def test_keys_that_a_configuration_has_too_many_are_ignored(part: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = edited(shutil.copytree(tiny_pipeline, tmp_path / "ema"), part, **CONFIGS[part])
    family = load_family(folder)
    assert same(family.with_w(load_network(tiny_pipeline)), family.with_w(load_network(folder)))
    load_codec(folder)
    save_student(tmp_path / "student", folder)
    TextToImage.load(str(tmp_path / "student"))


@pytest.mark.parametrize("length", [..., None, 10**30, 512])
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_captions_are_cut_to_the_text_encoders_length(length: Any, files: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Whatever the tokenizer says of its own."""
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


def large(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab.update({f"more{i}": len(vocab) + i for i in range(100)})
    file.write_text(json.dumps(content))


TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (
        without_vocabulary,
        r"lacks its vocabulary .*: copy tokenizer\.json, or vocab\.json and merges\.txt",
    ),
    "no merges": (
        lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "merges.txt").unlink())[0],
        r"lacks its vocabulary \(missing: merges\.txt\)",
    ),
    "BERT's": (bert, "holds a BertTokenizer: only CLIP's tokenizers are supported"),
    "of a pointer": (lambda folder: (folder / "tokenizer.json").write_bytes(POINTER) and None, "is a pointer of git-lfs"),
    "half": (
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:999]) and None,
        r"tokenizer\.json is not JSON",
    ),
    "of cut merges": (cut_merges, "longer tokens: its merges are cut"),
    "small": (small, r"has \d+ tokens, but its text encoder has \d+"),
    "large": (large, r"has \d+ tokens, but its text encoder has \d+"),
}


@pytest.mark.parametrize("ending", ["", "_2"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_is_not_the_text_encoders_is_a_user_error(
    kind: str, ending: str, xl_pipeline: Path, tmp_path: Path
) -> None:
    folder, (change, says) = shutil.copytree(xl_pipeline, tmp_path / "f"), TOKENIZERS[kind]
    change(folder / f"tokenizer{ending}")
    with pytest.raises(UserError, match=says):
        load_codec(folder)


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("text_encoder", {"model_type": "bert", "architectures": ["BertModel"]}, "text_encoder holds a BertModel: only CLIP's"),
        ("text_encoder_2", {"model_type": "t5", "architectures": ["T5EncoderModel"]}, "_2 holds a T5EncoderModel: only CLIP's"),
        ("text_encoder", {"model_type": "chinese_clip_text_model", "architectures": ...}, "holds a chinese_clip_text_model"),
    ],
)
def test_a_text_encoder_that_is_not_clips_is_a_user_error(
    part: str, changes: dict[str, Any], says: str, xl_pipeline: Path, tmp_path: Path
) -> None:
    folder = edited(shutil.copytree(xl_pipeline, tmp_path / "f"), f"{part}/config.json", **changes)
    with pytest.raises(UserError, match=says):
        load_codec(folder)
