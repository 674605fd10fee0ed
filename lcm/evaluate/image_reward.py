"""ImageReward (2304.05977): a BLIP reads the caption and looks at the image, and a head scores both."""

import math
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from lcm.core.errors import UserError
from lcm.evaluate.aesthetic import linear_head
from lcm.evaluate.clip import MEAN, STD, local_folder
from lcm.models.loading import check_finite, check_header, load_tokenizer, weight_files

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # mean and deviation of the published model's raw scores
TOKENS = 35  # the length to which captions are cut
HEAD_WIDTH = 64  # the width of an attention head in every BLIP
CONVERT = "convert ImageReward.pt as docs/evaluation.md says"
# Names of BLIP's vision transformer, and those of transformers. The text encoder has the same names in both.
VISION_NAMES = {
    "pos_embed": "embeddings.position_embedding",
    "cls_token": "embeddings.class_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".self_attn.proj.": ".self_attn.projection.",
}


class ImageRewardScorer(nn.Module):
    """Images and captions -> scores `[B]`, about -2 to 2.

    weights: the tensors by their names in `ImageReward.pt` of THUDM/ImageReward. Their shapes give the sizes of the networks.
    tokenizer: the tokenizer of BERT.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: dict[str, Tensor], tokenizer: Any, *, name: str, antialias: bool = True) -> None:
        super().__init__()
        vision, text = vision_weights(part(weights, "blip.visual_encoder.")), part(weights, "blip.text_encoder.")
        try:
            self.vision = BlipVisionModel(vision_config(vision))
            self.text = BlipTextModel(text_config(text), add_pooling_layer=False)
        except KeyError as error:
            raise UserError(f"{name} is no ImageReward: it lacks {error.args[0]}: {CONVERT}") from error
        self.head = linear_head(self.text.config.hidden_size)
        for network, values in ((self.vision, vision), (self.text, text), (self.head, part(weights, "mlp.layers."))):
            load(network, values, name)
        self.tokenizer, self.size, self.antialias = tokenizer, self.vision.config.image_size, antialias
        self.name = f"ImageReward of {name} ({self.size} px, {'antialiased bicubic' if antialias else 'plain bilinear'} resize)"
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def score(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """Return the scores `[B]` of images in [0, 1], `[B, 3, size, size]`, and B captions."""
        image = self.vision((pixels - self.mean) / self.std).last_hidden_state
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(captions, **options).to(self.mean.device)
        states = self.text(tokens["input_ids"], tokens["attention_mask"], encoder_hidden_states=image).last_hidden_state
        return (self.head(states[:, 0].float()).squeeze(-1) - SCORE_MEAN) / SCORE_STD


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names start with the prefix, in float32 and without the prefix."""
    return {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}


def vision_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of BLIP's vision transformer by their names in transformers."""
    renamed = {}
    for name, value in weights.items():
        for old, new in VISION_NAMES.items():
            name = name.replace(old, new)
        renamed[f"post_layer{name}" if name.startswith("norm.") else name] = value
    return renamed


def vision_config(weights: dict[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=layers(weights, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(weights: dict[str, Tensor]) -> BlipTextConfig:
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=layers(weights, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
    )


def layers(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def load(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Copy weights into a network, and ignore surplus weights. Raises UserError for a missing weight or another shape."""
    check_finite(name, weights)
    for key, parameter in network.state_dict().items():
        if key not in weights or weights[key].shape != parameter.shape:
            raise UserError(f"{name} is no ImageReward: it lacks {key} of shape {tuple(parameter.shape)}: {CONVERT}")
    network.load_state_dict(weights, strict=False)


def pretrained_image_reward(model: str, *, antialias: bool = True) -> ImageRewardScorer:
    """Load the weights and BERT's tokenizer from a folder or by hub id. Raises UserError.

    The folder holds `model.safetensors` with the names of `ImageReward.pt`, and the tokenizer of bert-base-uncased.
    """
    folder = local_folder(model, f"there is no ImageReward folder {model!r}: {CONVERT}")
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder)[1]:
        check_header(file)
        weights |= load_file(file)
    scorer = ImageRewardScorer(weights, None, name=model.rstrip("/"), antialias=antialias)
    scorer.tokenizer = load_tokenizer(BertTokenizer, folder, scorer.text.config)
    return scorer
