"""The name of a model is a folder, a hub id, mini, last or last:<name>. Other folders are an error."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lcm.app.pipelines import find_pipeline, find_pipeline_once, resolve_models
from lcm.core.errors import UserError
from lcm.models import pipeline as pipelines
from lcm.models.pipeline import find, load_network
from lcm.models.text_to_image import TextToImage


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make two runs named mine and a newer run named other. Only mine/1 and other/0 have a saved model."""
    monkeypatch.chdir(tmp_path)
    find_pipeline_once.cache_clear()
    (tmp_path / "runs/mine/0").mkdir(parents=True)
    for i, run in enumerate(("mine/1", "other/0")):
        folder = tmp_path / "runs" / run / "model"
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "lcm.json").write_text("{}")
        os.utime(folder / "model_index.json", (i, i))
    return Path("runs")


def test_every_model_key_takes_last(runs: Path) -> None:
    cfg = OmegaConf.create({
        "pipeline": "last",
        "ckpt_path": "last",
        "model": {"pipeline": "last:mine", "net": {"pipeline": "${model.pipeline}"}},
        "data": {"codec": {"pipeline": "${model.pipeline}"}, "shipped": {"pipeline": "mini"}},
        "entries": {"A": {"pipeline": "last:other"}},
        "backbone": {"model": "last:mine"},
        "more": [{"pipeline": "last"}, "last"],
    })  # fmt: skip
    resolve_models(cfg, str(runs))
    mine, other = "runs/mine/1/model", "runs/other/0/model"
    assert OmegaConf.to_container(cfg, resolve=True) == {
        "pipeline": other,
        "ckpt_path": "last",
        "model": {"pipeline": mine, "net": {"pipeline": mine}},
        "data": {"codec": {"pipeline": mine}, "shipped": {"pipeline": "mini"}},
        "entries": {"A": {"pipeline": other}},
        "backbone": {"model": mine},
        "more": [{"pipeline": other}, "last"],
    }


def test_jobs_of_sweep_share_start_model(runs: Path) -> None:
    first, second = ({"model": {"pipeline": "last"}} for _ in range(2))
    resolve_models(first := OmegaConf.create(first), str(runs))
    (runs / "newer/0/model").mkdir(parents=True)
    (runs / "newer/0/model/model_index.json").write_text("{}")
    resolve_models(second := OmegaConf.create(second), str(runs))
    assert first == second


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("last:gone", "no run called gone under runs/ has saved a model: give last:other or last:mine, or give a folder"),
        ("mine", "there is no folder 'mine': the newest model of the run mine is last:mine"),
    ],
)
def test_unknown_name_is_an_error(name: str, says: str, runs: Path) -> None:
    with pytest.raises(UserError, match=says):
        find_pipeline(name, str(runs))


def test_last_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run under .* has saved a model: train one by .*, or give a folder, a hub id"):
        find_pipeline("last", str(tmp_path))


def adapters(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "pytorch_lora_weights.safetensors")
    return folder


def hub_cache(folder: Path, tiny: Path) -> Path:
    shutil.copytree(tiny, folder / "models--owner--name/snapshots/abc")
    return folder / "models--owner--name"


def single_network(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


FOLDERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "the hub's cache": (hub_cache, r"is a folder of the hub's cache: give .*/snapshots/abc, or the hub id owner/name"),
    "a run": (lambda folder, tiny: shutil.copytree(tiny, folder / "0/model").parent, "is a run's folder: give .*/0/model"),
    "a part": (lambda folder, tiny: shutil.copytree(tiny, folder / "t") / "unet", "is not a pipeline's folder: give .*/t$"),
    "adapters": (lambda folder, tiny: adapters(folder / "lora"), r"holds adapters \(LoRA\) only: give the pipeline they were"),
    "a file": (lambda folder, tiny: adapters(folder) / "pytorch_lora_weights.safetensors", "is a file, not a pipeline folder"),
    "a network": (
        lambda folder, tiny: single_network(folder / "net", '{"_class_name": "ControlNetModel"}'),
        "is a ControlNetModel, not a text-to-image pipeline: it lacks unet",
    ),
    "nothing of it": (lambda folder, tiny: folder, "is not a pipeline folder: it lacks unet"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_folder_is_an_error(kind: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    make, says = FOLDERS[kind]
    (tmp_path / "f").mkdir()
    folder = make(tmp_path / "f", tiny_pipeline)
    with pytest.raises(UserError, match=says):
        find(str(folder))


def test_unused_adapters_are_warned_of(tiny_pipeline: Path, tmp_path: Path, caplog: Any) -> None:
    folder = adapters(shutil.copytree(tiny_pipeline, tmp_path / "both"))
    TextToImage.load(str(folder))
    assert [record.message for record in caplog.records if "is not used, only the network in this folder" in record.message]
    caplog.clear()
    (folder / "lcm.json").write_text('{"rank": 4}')  # our runs merge their adapters
    TextToImage.load(str(folder))
    assert "is not used" not in caplog.text


def test_hub_id_is_requested_once(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []
    monkeypatch.setattr(pipelines, "download", lambda hub_id: looked_up.append(hub_id) or tiny_pipeline)
    TextToImage.load("owner/name")
    assert looked_up == ["owner/name"]


def test_folder_may_start_with_tilde(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_pipeline.parent))
    load_network(f"~/{tiny_pipeline.name}")
