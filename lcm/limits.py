"""What a configuration may hold, by the last name of a key: looked at before a program loads anything."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lcm.errors import UserError


class Limit(NamedTuple):
    """From `low` to `high`; `above`: low itself is too low."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False

    def holds(self, value: Any) -> bool:
        kind = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        name = "a whole number" if self.whole else "a number"
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low}"
        return name + low + ("" if self.high == math.inf else f" to {self.high}")


COUNT, POSITIVE, SHARE = Limit(1, whole=True), Limit(0, above=True), Limit(0, 1)
LIMITS: dict[str, Limit] = {
    "seed": Limit(0, 2**32 - 1, whole=True),
    **dict.fromkeys(("batch_size", "val_batch_size", "chunk", "lanes", "resolution", "crops"), COUNT),
    **dict.fromkeys(("images_per_prompt", "grid_rows", "steps", "repeats", "points", "num_nodes"), COUNT),
    **dict.fromkeys(("log_every_n_steps", "every_n_steps", "accumulate_grad_batches", "replicas"), COUNT),
    **dict.fromkeys(("num_workers", "shuffle", "warmup", "skip_non_finite", "every_n_train_steps"), Limit(0, whole=True)),
    **dict.fromkeys(("clip_norm", "timeout", "patience", "w_lr_scale", "max_gb", "val_check_interval", "c"), POSITIVE),
    **dict.fromkeys(("caption_dropout", "max_skip_ratio", "match_share", "eval_ema"), SHARE),
    **dict.fromkeys(("lr", "weight_decay", "text_cache", "offset_noise"), Limit(0)),
    **dict.fromkeys(("w", "w_min", "w_max"), Limit()),
    "samples": Limit(2, whole=True),
    "skip_steps": Limit(1, 1000, whole=True),
    "max_steps": Limit(-1, whole=True),
}
CHOICES: dict[str, Sequence[str]] = {
    # Of Lightning's others, "16-mixed" scales losses, which the clipping and the guard against NaN would have to know of, and
    # "bf16-true" also rounds the schedule, and averages of a mu near 1, which then stand still.
    "precision": ("32-true", "bf16-mixed", "32", "bf16"),
    "dtype": ("float32", "bfloat16", "float16"),
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
}
PATTERNS = {
    "devices": (r"auto|-1|[1-9]\d*|\d+,|\d+(,\d+)+|\[\d+(, \d+)*\]", "how many (-1: all), auto, or a list of GPUs as [0,1]"),
}
SWITCHES = (
    *("compile", "gradient_checkpointing", "zero_init", "flip", "random_crop", "allow_pipe", "async_checkpoints"),
    *("antialias", "fused", "verify", "sharded_checkpoints"),
)


def check_limits(node: Any, key: str = "") -> None:
    """Raise UserError for what plain containers hold that no program could use, such as a batch of no images."""
    name = key.rpartition(".")[2]
    if name in CHOICES and node is not None and str(node) not in CHOICES[name]:
        raise UserError(f"{key}={node}: choose among {', '.join(CHOICES[name])}")
    if name in PATTERNS and node is not None and not re.fullmatch(PATTERNS[name][0], str(node)):
        raise UserError(f"{key}={node}: expected {PATTERNS[name][1]}")
    if name in SWITCHES and not isinstance(node, bool | None):
        raise UserError(f"{key}={node}: expected true or false")
    if isinstance(node, Mapping):
        # What a program has at its top first: other keys take their value from there.
        for name, value in sorted(node.items(), key=lambda item: isinstance(item[1], Mapping)):
            check_limits(value, f"{key}.{name}" if key else str(name))
    elif (limit := LIMITS.get(name)) and node is not None:
        values = node if isinstance(node, list) else [node]
        if not values or not all(map(limit.holds, values)):
            raise UserError(f"{key}={node}: expected {limit}" + (", or several" if isinstance(node, list) else ""))
