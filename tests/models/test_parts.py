"""A part of a pipeline folder: all of its weights, in whichever safetensors file they are, or one sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lcm.errors import UserError
from lcm.models.pipeline import load_codec, load_network

NETWORKS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "unet": ("diffusion_pytorch_model", load_network),
    "vae": ("diffusion_pytorch_model", lambda folder: load_codec(folder).vae),
    "text_encoder": ("model", lambda folder: load_codec(folder).text.encoders[0]),
    "text_encoder_2": ("model", lambda folder: load_codec(folder).text.encoders[1]),
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
