"""Model families: how a pipeline of diffusers is read, called and written. One file a family, found by `family_of`."""

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

Tokenize = Callable[..., Tensor]


class Tower(NamedTuple):
    """A text encoder and its tokenizer: their folders in the pipeline and their classes of transformers.

    optional: the pipeline may lack it.
    """

    encoder: str
    encoder_class: Any
    tokenizer: str
    tokenizer_class: Any
    optional: bool = False


class Family:
    """What differs between pipelines. A subclass is one file in this package.

    pipelines: the `_class_name`s that `model_index.json` may have.
    network, network_class: the folder and the class of the denoising network.
    towers: the text encoders.
    text, width: the names of the text embeddings in a `Condition`, and the key of the network's config with their width.
    takes_sizes: whether a condition also has the image's sizes.
    resizable: whether a network may be trained and saved at another size than its own.
    blocks: the modules that are sharded, compiled and recomputed one at a time.
    lora_targets: the layers that take adapters.
    lora_mixin: the loader of diffusers for the adapters' file; None: diffusers has none, and adapters are refused.
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
        """index: the content of `model_index.json`. config: that of the network's `config.json`."""
        self.index, self.config = index, config

    def call(
        self, net: nn.Module, forward: Callable[..., Any], z: Tensor, time: Tensor, cond: Condition, w: Tensor | None
    ) -> Tensor:
        """Return the network's output `[B, C, h, w]`. forward: the network or its compiled form. Inputs follow its dtype."""
        raise NotImplementedError

    def encode(self, tokenizers: Sequence[Any], encoders: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        """Return the text embeddings of the captions by the names in `text`, a row a caption."""
        raise NotImplementedError

    def takes_w(self, net: nn.Module) -> bool:
        """Whether the network has an input for the guidance weight w."""
        return False

    def with_w(self, net: nn.Module, *, zero_init: bool = True) -> nn.Module:
        """Return a copy of the network that takes w where the family has an input for it, else a plain copy.

        A student without the input learns the guidance of all drawn w as one.
        """
        return network_like(net)

    def w_projection(self, net: nn.Module) -> nn.Parameter | None:
        """Return the weight that w enters through, which `model.guidance_lr_multiplier` speeds up."""
        return None

    def student_pipeline(self, takes_w: bool, scheduler: str) -> str:
        """Return the `_class_name` under which a student of this family is saved. scheduler: its class."""
        return self.index["_class_name"]

    def latent_scaling(self, vae: Any) -> tuple[float, float]:
        """Return (shift, scale): a latent is `(posterior sample - shift) * scale`."""
        return vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]


@cache
def families() -> tuple[type[Family], ...]:
    """Import every file of this package and return their families."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    kinds = (value for module in modules for value in vars(module).values() if isinstance(value, type))
    return tuple(dict.fromkeys(kind for kind in kinds if issubclass(kind, Family) and kind is not Family))


def family_of(folder: Path) -> Family:
    """Return the family of a pipeline folder by its `model_index.json`; raises UserError for an unknown class."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    for kind in families():
        if name in kind.pipelines:
            return kind(index, read_json(folder / kind.network / "config.json"))
    if name is None:
        raise UserError(f"{folder} is no pipeline folder: it lacks model_index.json")
    known = sorted(name for kind in families() for name in kind.pipelines)
    raise UserError(f"{folder} is a {name}, which is not supported: use one of {', '.join(known)}")


def network_like(net: Any, **changes: Any) -> Any:
    """Return a network of the same configuration but for `changes`, on the same device, with the weights that both have.

    New weights are drawn by their module's `reset_parameters`.
    """
    if not changes:
        return copy.deepcopy(net)
    with torch.device("meta"):  # drawing weights to overwrite them takes longer than copying them
        # Without the names of values left to their defaults, for which diffusers would take the default again.
        config = {key: value for key, value in net.config.items() if key != "_use_default_values"}
        like = type(net).from_config({**config, **changes})
    if net.device.type == "meta":
        return like
    like = nn.Module.to(like, net.dtype).to_empty(device=net.device)
    missing, unexpected = like.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected, unexpected
    for name in missing:
        like.get_submodule(name.rpartition(".")[0]).reset_parameters()
    return like


def tokens(tokenizer: Any, captions: list[str], device: torch.device, **options: Any) -> Any:
    """Return the tokenizer's tensors, padded and truncated to `max_length`, on the device without waiting for it."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt", **options}
    return {name: on_device(ids, device) for name, ids in tokenizer(captions, **options).items()}


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
