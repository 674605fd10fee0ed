"""ImageReward matches plain formulas. The tests use a tiny BLIP with random weights, named as in the authors' file."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertTokenizer

from lcm.core.errors import UserError
from lcm.evaluate.image_reward import pretrained_image_reward
from tests.evaluate.test_clip import images
from tests.evaluate.test_scores import Original, metric_and_reward

CAPTIONS = ["red apple", "rocket", "a dog on a red rocket " * 9]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "on", "red", "apple", "dog", "rocket"]
IMAGE, TEXT = 128, 64  # widths of two attention heads and of one


def random_weights() -> dict[str, Tensor]:
    """Return random weights of two layers per network, by the names in THUDM/ImageReward."""
    torch.manual_seed(0)
    weights: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = (
            torch.randn(outputs, inputs) / inputs**0.5,
            torch.randn(outputs) / 9,
        )

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + torch.randn(width) / 9, torch.randn(width) / 9

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    weights[f"{vision}.cls_token"], weights[f"{vision}.pos_embed"] = torch.randn(1, 1, IMAGE), torch.randn(1, 5, IMAGE)
    weights[f"{vision}.patch_embed.proj.weight"] = torch.randn(IMAGE, 3, 16, 16) / 28
    weights[f"{vision}.patch_embed.proj.bias"] = torch.randn(IMAGE) / 9
    norm(f"{vision}.norm", IMAGE)
    for block in (f"{vision}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1", IMAGE)
        norm(f"{block}.norm2", IMAGE)
        linear(f"{block}.attn.qkv", IMAGE, 3 * IMAGE)
        linear(f"{block}.attn.proj", IMAGE, IMAGE)
        linear(f"{block}.mlp.fc1", IMAGE, 96)
        linear(f"{block}.mlp.fc2", 96, IMAGE)
    weights[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS), TEXT)
    weights[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, TEXT)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for attention, width in (("attention", TEXT), ("crossattention", IMAGE)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", width, TEXT)
            linear(f"{layer}.{attention}.self.value", width, TEXT)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, 80)
        linear(f"{layer}.output.dense", 80, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", IMAGE, 8)  # not used by the score
    return weights | {f"mlp.{name}": value for name, value in Original(TEXT).state_dict().items()}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("image_reward")
    save_file(random_weights(), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def expected_scores(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the scores of the authors' formulas. The vision transformer normalises before each part, BERT after it."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value)]
        return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)

    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    x = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = F.conv2d(x, weights[f"{vision}.patch_embed.proj.weight"], weights[f"{vision}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([weights[f"{vision}.cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + weights[f"{vision}.pos_embed"]
    for block in (f"{vision}.blocks.{i}" for i in range(2)):
        parts = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(f"{block}.attn.proj", attend(*parts))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{vision}.norm", x, 1e-6)
    words, positions = (weights[f"{text}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    y = norm(f"{text}.embeddings.LayerNorm", words[ids] + positions[: ids.shape[1]], 1e-12)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for name, seen, shown in (("attention", None, mask[:, None, None].bool()), ("crossattention", x, None)):
            prefix, states = f"{layer}.{name}", y if seen is None else seen
            query = linear(f"{prefix}.self.query", y)
            attended = attend(query, linear(f"{prefix}.self.key", states), linear(f"{prefix}.self.value", states), shown)
            y = norm(f"{prefix}.output.LayerNorm", y + linear(f"{prefix}.output.dense", attended), 1e-12)
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", y + linear(f"{layer}.output.dense", hidden), 1e-12)
    y = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        y = linear(f"mlp.layers.{place}", y)
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_score_matches_the_authors_formulas(blip: Path) -> None:
    scorer, pixels = pretrained_image_reward(str(blip)), images(3).float() / 255
    assert scorer.size == 32
    tokens = BertTokenizer.from_pretrained(blip)(
        CAPTIONS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens["attention_mask"].sum(1).tolist() == [4, 3, 35]
    expected = expected_scores(load_file(blip / "model.safetensors"), pixels, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(scorer.score(pixels, CAPTIONS), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3


def test_metric_and_reward_take_the_same_folder(blip: Path) -> None:
    """The gradient of the reward raises the metric. The reward also takes images of another size."""
    reward = metric_and_reward("image_reward", {"model": str(blip)}, CAPTIONS)
    assert reward(torch.rand(3, 3, 48, 48), CAPTIONS).shape == (3,)


def test_other_weights_are_refused(blip: Path, tmp_path: Path) -> None:
    weights = load_file(blip / "model.safetensors")
    bare = {name.removeprefix("blip."): value for name, value in weights.items()}
    without = {name: value for name, value in weights.items() if name != "mlp.layers.6.bias"}
    for changed, lacks in ((bare, "embeddings.patch_embedding.weight"), (without, r"6\.bias of shape \(16,\)")):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(
            UserError, match=rf"is no ImageReward: it lacks {lacks}: convert ImageReward\.pt as docs/evaluation\.md"
        ):
            pretrained_image_reward(str(tmp_path))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tokens, but its text encoder has 11"):
        pretrained_image_reward(str(tmp_path))  # transformers makes an empty tokenizer without vocab.txt
    with pytest.raises(UserError, match=r"there is no ImageReward folder 'nowhere'"):
        pretrained_image_reward("nowhere")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward\.pt may hold code"):
        pretrained_image_reward(str(tmp_path))
