"""Pipeline folders of diffusers, written."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch

from lcm.models.families import Family
from lcm.models.lora import is_adapted, merged, save_adapters
from lcm.models.parts import load_part, read_json


def save_network(folder: str | Path, network: Any, dtype: torch.dtype = torch.float16) -> None:
    torch.nn.Module.to(copy.deepcopy(network), dtype).save_pretrained(folder)


def save_pipeline(
    folder: str | Path,
    network: Any,
    *,
    family: Family,
    base: Path,
    scheduler: tuple[str, dict[str, Any]],
    facts: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    more: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write a pipeline folder that diffusers opens unmodified: a copy of `base` with another network and scheduler.

    scheduler: the class of diffusers and its config. facts: the content of `lcm.json`. more: further networks' folders by
    their names in the pipeline. Adapters are merged into the network of `base`, and also saved by themselves, in the file
    that diffusers' `load_lora_weights` looks for. The folder is written beside its place and renamed, so it is whole or
    absent.
    """
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    towers = [name for tower in family.towers for name in (tower.encoder, tower.tokenizer)]
    for part in ("vae", *towers, "clip"):
        if (base / part).is_dir():
            shutil.copytree(base / part, partial / part)
    for name, other in more.items():
        shutil.copytree(other, partial / name)
    if is_adapted(network):
        save_adapters(partial, network, family, dtype)
        network = merged(network, load_part(family.network_class, base / family.network, torch_dtype=torch.float32))
    save_network(partial / family.network, network, dtype)
    name, config = scheduler
    getattr(diffusers, name)(**config).save_pretrained(partial / "scheduler")
    index = {**read_json(base / "model_index.json"), "scheduler": ["diffusers", name]}
    if facts["sampler"] != "ddim":
        index["_class_name"] = family.student_pipeline(family.takes_w(network), name)
    (partial / "model_index.json").write_text(json.dumps(index, indent=2))
    (partial / "lcm.json").write_text(json.dumps(facts, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
