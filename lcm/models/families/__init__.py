"""Model families: how a pipeline of diffusers is loaded, called and saved. One file per family, found by `family_of`."""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lcm.core.denoiser import Condition
from lcm.core.errors import UserError
from lcm.models.loading import read_json


class Tower(NamedTuple):
    """A text encoder and its tokenizer: their folders in the pipeline and their classes in transformers.

    optional: whether a pipeline may lack them.
    """

    encoder: str
    encoder_class: Any
    tokenizer: str
    tokenizer_class: Any
    optional: bool = False


class Original(NamedTuple):
    """The names of a model in Stable Diffusion's original layout, which ComfyUI and others read.

    base: the base model in kohya's metadata. architecture: that of the `modelspec` metadata. text: the prefixes of the text
    encoders' weights in a checkpoint, see `single_file.clip_weights`.
    """

    base: str
    architecture: str
    text: Sequence[str]


class Family:
    """The kind of a pipeline: its networks and how they are called. Each subclass is one file in this package.

    pipelines: the values of `_class_name` in `model_index.json`.
    network, network_class: the folder and the class of the denoising network.
    towers: the text encoders.
    text: the names of the text embeddings in a `Condition`. width: the key of their width in the network's config.
    takes_sizes: whether the condition includes the image's sizes.
    resizable: whether a network may be trained and saved at a size other than its own.
    blocks: the modules that are sharded, compiled and recomputed one at a time.
    lora_targets: suffixes of the names of the layers that get adapters by default.
    lora_mixin: diffusers' loader of adapters. None: diffusers cannot load them, and adapters are an error.
    """

    pipelines: ClassVar[Sequence[str]]
    network: ClassVar[str]
    network_class: ClassVar[Any]
    towers: ClassVar[Sequence[Tower]]
    text: ClassVar[Sequence[str]] = ("states",)
    width: ClassVar[str]
    takes_sizes: ClassVar[bool] = False
    resizable: ClassVar[bool] = True
    blocks: ClassVar[tuple[type[nn.Module], ...]]
    lora_targets: ClassVar[Sequence[str]] = ()
    lora_mixin: ClassVar[Any] = None

    def __init__(self, index: dict[str, Any], config: dict[str, Any]) -> None:
        """Set the configs. index: the content of `model_index.json`. config: the content of the network's `config.json`."""
        self.index, self.config = index, config

    def call(
        self, net: nn.Module, forward: Callable[..., Any], z: Tensor, time: Tensor, cond: Condition, w: Tensor | None
    ) -> Tensor:
        """Return the network's output `[B, C, h, w]`. forward: the network or its compiled form.

        z, time and cond are cast to the network's dtype.
        """
        raise NotImplementedError

    def encode(self, tokenizers: Sequence[Any], encoders: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        """Return the text embeddings of the captions by the names in `text`, one row per caption."""
        raise NotImplementedError

    def embedding_width(self, configs: Sequence[dict[str, Any]]) -> int | None:
        """Return the width of the text embeddings; None: unknown. configs: the configs of the text encoders."""
        return None

    def takes_w(self, net: nn.Module) -> bool:
        """Return whether the network has an input for the guidance weight w."""
        return False

    def with_w(self, net: nn.Module, *, zero_init: bool = True) -> nn.Module:
        """Return a copy of the network that takes w if the family supports it, else a plain copy.

        A student without the input learns the mean over w. zero_init: whether new weights start at zero.
        """
        return network_like(net)

    def w_projection(self, net: nn.Module) -> nn.Parameter | None:
        """Return the weight of the projection of w, or None. `model.guidance_lr_multiplier` multiplies its learning rate."""
        return None

    def at_w(self, net: Any, w: float) -> Any:
        """Return a copy of the network without the input for w. It computes the output of `net` at this w."""
        raise NotImplementedError

    def original(self, net: Any) -> Original | None:
        """Return the names of the network and its text encoders in other programs; None: there are no such names."""
        return None

    def feature_blocks(self, net: Any) -> list[tuple[nn.Module, int]]:
        """Return the blocks whose outputs an adversary judges, each with its number of channels.

        The default is four blocks of a transformer.
        """
        width = net.config["num_attention_heads"] * net.config["attention_head_dim"]
        blocks, count = list(net.transformer_blocks), min(4, len(net.transformer_blocks))
        return [(blocks[len(blocks) * (i + 1) // count - 1], width) for i in range(count)]

    def feature(self, output: Any) -> Tensor:
        """Return the features `[B, C, N]` in the output of one of `feature_blocks`. By default the output is `[B, N, C]`."""
        return output.transpose(1, 2)

    def student_pipeline(self, takes_w: bool, scheduler: str) -> str:
        """Return the `_class_name` of a saved student. scheduler: the class name of its scheduler."""
        return self.index["_class_name"]

    def latent_scaling(self, vae: Any) -> tuple[float, float]:
        """Return (shift, scale): a latent is `(posterior sample - shift) * scale`."""
        return vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]


@cache
def families() -> tuple[type[Family], ...]:
    """Import every file of this package and return its families."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = (value for module in modules for value in vars(module).values() if isinstance(value, type))
    return tuple(dict.fromkeys(cls for cls in classes if issubclass(cls, Family) and cls is not Family))


def family_of(folder: Path) -> Family:
    """Return the family of a pipeline folder by its `model_index.json`. Raises UserError for an unknown class."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    for family in families():
        if name in family.pipelines:
            return family(index, read_json(folder / family.network / "config.json"))
    if name is None:
        raise UserError(f"{folder} is not a pipeline folder: its model_index.json is missing or names no class")
    supported = sorted(name for family in families() for name in family.pipelines)
    raise UserError(f"{folder} is a {name}, which is not supported: use one of {', '.join(supported)}")


def network_like(net: Any, **changes: Any) -> Any:
    """Return a copy of the network with `changes` of its config, on the same device.

    Weights of unchanged layers are copied. New weights are initialised by their layer's `reset_parameters`.
    """
    if not changes:
        return copy.deepcopy(net)
    with torch.device("meta"):  # initialising weights takes longer than copying them
        # diffusers would ignore the values of keys in "_use_default_values".
        config = {key: value for key, value in net.config.items() if key != "_use_default_values"}
        changed = type(net).from_config({**config, **changes})
    if net.device.type == "meta":
        return changed
    changed = nn.Module.to(changed, net.dtype).to_empty(device=net.device)
    missing, unexpected = changed.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected, unexpected
    for name in missing:
        changed.get_submodule(name.rpartition(".")[0]).reset_parameters()
    return changed


def tokens(tokenizer: Any, captions: list[str], device: torch.device, **options: Any) -> Any:
    """Return the tokenizer's tensors on the device, padded and truncated to `max_length`. Does not wait for the device."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt", **options}
    return {name: on_device(ids, device) for name, ids in tokenizer(captions, **options).items()}


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
