"""PixArt-alpha (2310.00426): a transformer with masked T5 embeddings, VP noise and a learned variance."""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from lcm.core.denoiser import Condition
from lcm.models.families import Family, Tower, tokens

LENGTH = 120  # tokens per caption


class PixArt(Family):
    """Students take no w, because diffusers' pipeline does not pass one. The learned variance is not trained."""

    pipelines = ("PixArtAlphaPipeline",)
    network, network_class = "transformer", PixArtTransformer2DModel
    width = "caption_channels"
    towers = (Tower("text_encoder", T5EncoderModel, "tokenizer", T5Tokenizer),)
    text = ("states", "mask")
    resizable = False  # diffusers' pipeline supports 256, 512 and 1024 px, and 1024 px networks have more inputs
    blocks = (BasicTransformerBlock,)

    def call(self, net: Any, forward: Callable[..., Any], z: Tensor, time: Tensor, cond: Condition, w: Tensor | None) -> Tensor:
        dtype, factor = next(net.parameters()).dtype, 8
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if net.config["sample_size"] == 128:  # the 1024 px network also takes the size in pixels
            height, width = z.shape[-2] * factor, z.shape[-1] * factor
            added["resolution"] = z.new_tensor([[height, width]], dtype=dtype).expand(len(z), 2)
            added["aspect_ratio"] = z.new_tensor([[height / width]], dtype=dtype).expand(len(z), 1)
        output = forward(
            z.to(dtype),
            encoder_hidden_states=cond["states"].to(dtype),
            encoder_attention_mask=cond["mask"].to(dtype),
            timestep=time,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output[:, : z.shape[1]]  # without the learned variance

    def encode(self, tokenizers: Sequence[Any], encoders: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        [encoder], texts = encoders, [caption.lower().strip() for caption in captions]  # like diffusers' pipeline
        inputs = tokens(tokenizers[0], texts, encoder.device, max_length=LENGTH)
        mask = inputs["attention_mask"]
        return {"states": encoder(inputs["input_ids"], attention_mask=mask)[0], "mask": mask.float()}
