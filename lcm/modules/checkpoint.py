"""Checks of a checkpoint before its tensors are loaded into a module."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lcm.core.errors import UserError
from lcm.runtime.launch import say

FIRST_EDITION = {  # method names in checkpoints of the first edition, whose tensors have the same names as today's
    "LatentDiffusion": "Denoising",
    "LatentConsistencyFineTuning": "LatentConsistencyFinetuning",
    "LoRADistillation": "LatentConsistencyDistillation of adapters",
    "ConsistencyModelDistillation": "ConsistencyDistillation",
    "ConsistencyModelTraining": "ConsistencyTraining",
}


def check_method(checkpoint: Mapping[str, Any], method: str) -> None:
    """Raise UserError for the checkpoint of another method, even if its tensors fit."""
    saved = checkpoint.get("method", method)
    if FIRST_EDITION.get(saved, saved) != method:
        raise UserError(
            f"the checkpoint is of {saved}, this training is a {method}: give another ckpt_path, or a new name= to start anew"
        )


def check_fixed_settings(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UserError if a setting that cannot change during a training differs from the checkpoint's."""
    for option, value in settings.items():
        saved = checkpoint.get("settled", {}).get(option, value)
        if value != saved:
            raise UserError(f"{option} was {saved} when this training began and cannot change to {value}: leave it as it was")


def match_averages(state: dict[str, Any], expected: Mapping[str, Any], averages: Mapping[str, str]) -> None:
    """Fit the averages of a checkpoint to this run, in place: start a missing one from `net`, drop an unused one.

    state: the checkpoint's state dict. expected: the module's state dict. averages: the option of each average, by the name of
    its network.
    """
    for network, option in averages.items():
        module_names, saved_names = ([name for name in names if name.startswith(f"{network}.")] for names in (expected, state))
        if module_names and not saved_names:
            say(f"resume:  the average of {option} starts from the trained network, because the checkpoint lacks it")
            online = {name: f"net{name.removeprefix(network)}" for name in module_names}
            state |= {name: state[source] for name, source in online.items() if source in state}
        elif saved_names and not module_names:
            say(f"resume:  the checkpoint's average of {option} is dropped: this run keeps none")
            for name in saved_names:
                del state[name]


def check_tensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *_: Any) -> None:
    """Raise UserError if names or shapes of the tensors differ from the module's (a pre-hook of `load_state_dict`)."""
    averages = getattr(module, "averages", None)
    expected = module.state_dict()
    if averages:
        match_averages(state, expected, averages)
    if strict and (names := mismatches(expected, state)):
        raise UserError(
            f"the checkpoint does not fit this training's network, {len(names)} of its tensors differ: {names[0]}: give "
            "the model of the first start (model.pipeline, model.adapters.rank, ...), or a new name= to start anew"
        )


def mismatches(expected: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Describe each tensor of a checkpoint whose name or shape differs from the module's."""
    shapes = [(name, list(state[name].shape), list(expected[name].shape)) for name in expected if name in state]
    return [
        *(f"{name} was {old} and is {new}" for name, old, new in shapes if old != new),
        *(f"{name} is not in the checkpoint" for name in expected if name not in state),
        *(f"{name} is in the checkpoint alone" for name in state if name not in expected),
    ]
