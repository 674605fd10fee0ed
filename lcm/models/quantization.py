"""Frozen linear layers in nf4, by bitsandbytes. The layers quantise themselves when they are first moved to a device.

They compute in autocast's dtype, or in that of their input. Gradients pass through them to their input.
"""

import torch
from bitsandbytes import nn as bnb
from torch import Tensor, nn


def nf4(layer: nn.Linear) -> nn.Linear:
    """Return the layer in 4-bit normal floats with twice quantised scales, as QLoRA (2305.14314) defines it."""
    quantized = NF4(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta")
    quantized.weight = bnb.Params4bit(layer.weight.data, quant_type="nf4", module=quantized)
    quantized.support_avx512bf16_for_cpu = False  # this kernel of CPUs passes no gradient to the input
    quantized.bias = layer.bias
    return quantized.requires_grad_(False)


class NF4(bnb.Linear4bit):
    """A 4-bit layer that computes in autocast's dtype, else in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        self.compute_dtype = x.dtype  # bitsandbytes would keep the dtype of the first input
        return super().forward(x)
